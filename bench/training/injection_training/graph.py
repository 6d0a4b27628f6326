"""Writes the encoder for ONNX Runtime: the trained layers as signed bytes, the rest as places in the base's own file.

So what is committed is the difference, and nothing is put together where it serves: ONNX Runtime reads the base's
tensors out of the file that its package installs (`external_data`), at the offsets written here, which hold for that
very file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from injection_training.encoder import FROZEN, HEADS, LAYERS, LINEARS, WIDTH, Base

BASE_FILE = "model.onnx"
_EPSILON = 1e-12
_BYTE = 127
_MICROSOFT = "com.microsoft"
_OPSET, _IR = 17, 8

Array = NDArray[Any]


@dataclass
class Sketch:
    """A graph that grows."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def node(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: object) -> str:
        """Add a node; the name of its output."""
        self.nodes.append(helper.make_node(kind, inputs, [output], output, domain=domain, **attributes))
        return output

    def tensor(self, name: str, value: Array) -> str:
        """Add a constant."""
        self.tensors.append(numpy_helper.from_array(value, name))
        return name


@dataclass
class InBase:
    """Constants that stand in the base's file."""

    base: Base
    raw: bytes
    sketch: Sketch

    def tensor(self, name: str, dims: list[int] | None = None) -> str:
        """Refer to one; `dims` where they are to be read as others (of its first elements)."""
        known = self.base.initializers[name]
        made = onnx.TensorProto(name=name, data_type=known.data_type, dims=dims or list(known.dims))
        size = int(np.prod(made.dims)) * helper.tensor_dtype_to_np_dtype(known.data_type).itemsize
        made.data_location = TensorProto.EXTERNAL
        places = {"location": BASE_FILE, "offset": self.raw.index(known.raw_data), "length": size}
        for key, value in places.items():
            made.external_data.add(key=key, value=str(value))
        self.sketch.tensors.append(made)
        return name


def encoder(raw: bytes, trained: Mapping[str, Array]) -> onnx.ModelProto:
    """`input_ids` (1, tokens), the ends marked, to `logits` (1, 1). `raw`: the base's file; `trained`: by the names of
    `encoder.Classifier`. One row at a time: its activations are cut to bytes by one scale for all of it.
    """
    sketch = Sketch()
    base = InBase(Base(raw), raw, sketch)
    states = _embedded(sketch, base)
    for layer in range(LAYERS):
        weights = _frozen(base, layer) if layer < FROZEN else _trained(sketch, layer, trained)
        states = _layer(sketch, states, f"layer{layer}", weights)
    _head(sketch, states, trained)
    graph = helper.make_graph(
        sketch.nodes,
        "injection-encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1])],
        sketch.tensors,
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR, producer_name="")


def _embedded(sketch: Sketch, base: InBase) -> str:
    sketch.tensor("zero", np.array([0]))
    sketch.tensor("one", np.array([1]))
    sketch.tensor("two", np.array([2]))
    sketch.node("Shape", ["input_ids"], "shape")
    sketch.node("Slice", ["shape", "one", "two"], "count")
    parts = {}
    for which in ("word", "position"):
        name = base.base.embedding(f"{which}_embeddings.weight")
        for part in ("q", "scale"):
            table = base.tensor(f"{name}_{part}")
            if which == "word":
                parts[part] = sketch.node("Gather", [table, "input_ids"], f"{which}_{part}")
            else:
                parts[part] = sketch.node("Slice", [table, "zero", "count"], f"{which}_{part}")
        sketch.node("Cast", [parts["q"]], f"{which}_float", to=TensorProto.FLOAT)
        sketch.node("Mul", [f"{which}_float", parts["scale"]], which)
    kind = base.tensor(base.base.embedding("token_type_embeddings.weight"), [WIDTH])
    sketch.node("Add", ["position", kind], "place")
    sketch.node("Add", ["word", "place"], "sum")
    norm = [base.tensor(base.base.embedding(f"LayerNorm.{each}")) for each in ("weight", "bias")]
    return sketch.node("LayerNormalization", ["sum", *norm], "embedded", epsilon=_EPSILON)


Weights = dict[str, list[str]]
"""The constants of a layer's parts: weight, scale and bias of a linear one, weight and bias of a norm."""


def _frozen(base: InBase, layer: int) -> Weights:
    def linear(which: str) -> Iterator[str]:
        name = base.base.linear(layer, which)
        yield base.tensor(f"{name}_q")
        yield base.tensor(f"{name}_scale", [base.base.array(f"{name}_scale").size])
        yield base.tensor(base.base.named(layer, which) + ".bias")

    def norm(which: str) -> list[str]:
        return [base.tensor(f"{base.base.named(layer, which)}.{each}") for each in ("weight", "bias")]

    return {**{each: list(linear(each)) for each in LINEARS}, **{each: norm(each) for each in _NORMS}}


_NORMS = ("attention_norm", "outer_norm")


def _trained(sketch: Sketch, layer: int, trained: Mapping[str, Array]) -> Weights:
    def linear(which: str) -> list[str]:
        name = f"layers.{layer}.{which}"
        values, scales = quantised(trained[f"{name}.weight"].T)
        bias = sketch.tensor(f"{name}.bias", trained[f"{name}.bias"])
        return [sketch.tensor(f"{name}.q", values), sketch.tensor(f"{name}.scale", scales), bias]

    def norm(which: str) -> list[str]:
        names = [f"layers.{layer}.{which}.{each}" for each in ("weight", "bias")]
        return [sketch.tensor(name, trained[name]) for name in names]

    return {**{each: linear(each) for each in LINEARS}, **{each: norm(each) for each in _NORMS}}


def quantised(weights: Array) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Signed bytes `[in, out]`, and a scale for each column."""
    scales = np.abs(weights).max(axis=0) / _BYTE
    return np.ascontiguousarray(np.rint(weights / scales), np.int8), scales.astype(np.float32)


def _layer(sketch: Sketch, states: str, name: str, weights: Weights) -> str:
    def linear(which: str, inputs: str) -> str:
        weight, scale, bias = weights[which]
        given = [inputs, weight, scale, "", bias]
        return sketch.node("DynamicQuantizeMatMul", given, f"{name}.{which}", _MICROSOFT)

    def added(which: str, more: str, to: str) -> str:
        given = [more, to, *weights[which]]
        return sketch.node("SkipLayerNormalization", given, f"{name}.{which}", _MICROSOFT, epsilon=_EPSILON)

    heads = [linear(each, states) for each in ("query", "key", "value")]
    mixed = sketch.node("MultiHeadAttention", heads, f"{name}.mixed", _MICROSOFT, num_heads=HEADS)
    states = added("attention_norm", linear("attention", mixed), states)
    inner = sketch.node("Gelu", [linear("inner", states)], f"{name}.gelu", _MICROSOFT)
    return added("outer_norm", linear("outer", inner), states)


def _head(sketch: Sketch, states: str, trained: Mapping[str, Array]) -> None:
    weight = sketch.tensor("head.weight", np.ascontiguousarray(trained["head.weight"].T))
    bias = sketch.tensor("head.bias", trained["head.bias"])
    mean = sketch.node("ReduceMean", [states], "mean", axes=[1], keepdims=0)
    most = sketch.node("ReduceMax", [states], "most", axes=[1], keepdims=0)
    sketch.node("Concat", [mean, most], "pooled", axis=1)
    sketch.node("Gemm", ["pooled", weight, bias], "logits")
