"""A Keras embedding, bidirectional LSTM, maximum over time and two dense layers as an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

TOKENS = 100

Arrays = Mapping[str, NDArray[np.float32]]


def built(weights: Arrays) -> onnx.ModelProto:
    """The graph: `input_ids`, (batch, TOKENS), to `logits`, (batch, labels).

    The embedding's rows are bytes with a scale each; every row of a batch is computed by itself, whatever is beside it.

    Args:
        weights: as Keras has them: `embedding` (words, width); `forward` and `backward`, each with `.kernel`,
            `.recurrent`, `.bias`; `dense` and `output`, each with `.kernel`, `.bias`.
    """
    table, scales = _bytes(weights["embedding"])
    units = weights["forward.recurrent"].shape[0]
    sides = ("forward", "backward")
    constants: dict[str, NDArray[Any]] = {
        "table": table,
        "scales": scales,
        "kernel": np.stack([_gates(weights[f"{side}.kernel"]) for side in sides]),
        "recurrent": np.stack([_gates(weights[f"{side}.recurrent"]) for side in sides]),
        "bias": np.stack([_bias(weights[f"{side}.bias"]) for side in sides]),
        "features": np.array([-1, 2 * units], np.int64),
        **{
            f"{layer}.{part}": weights[f"{layer}.{part}"]
            for layer in ("dense", "output")
            for part in ("kernel", "bias")
        },
    }
    lstm = {"hidden_size": units, "direction": "bidirectional"}
    nodes = [
        helper.make_node("Transpose", ["input_ids"], ["steps"], perm=[1, 0]),
        helper.make_node("Gather", ["table", "steps"], ["bytes"]),
        helper.make_node("Cast", ["bytes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["scales", "steps"], ["scale"]),
        helper.make_node("Mul", ["floats", "scale"], ["embedded"]),
        helper.make_node("LSTM", ["embedded", "kernel", "recurrent", "bias"], ["states"], **lstm),
        helper.make_node("ReduceMax", ["states"], ["highest"], axes=[0], keepdims=0),
        helper.make_node("Transpose", ["highest"], ["rows"], perm=[1, 0, 2]),
        helper.make_node("Reshape", ["rows", "features"], ["both"]),
        helper.make_node("Gemm", ["both", "dense.kernel", "dense.bias"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "output.kernel", "output.bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "toxicity",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", TOKENS])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(weights["output.bias"])])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="aim-kserve"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _bytes(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Each row as signed bytes, and what one of them is worth."""
    scales = np.abs(table).max(axis=1, keepdims=True) / 127
    whole = np.divide(table, scales, out=np.zeros_like(table), where=scales > 0)
    return np.rint(whole).astype(np.int8), scales.astype(np.float32)


def _gates(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keras' (inputs, 4 units) as ONNX' (4 units, inputs): i, f, c, o there, i, o, f, c here."""
    gate_in, forget, cell, out = np.split(kernel, 4, axis=1)
    return np.concatenate([gate_in, out, forget, cell], axis=1).T


def _bias(bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keras has one bias, ONNX one for the inputs and one for the states."""
    gates = _gates(bias[np.newaxis])[:, 0]
    return np.concatenate([gates, np.zeros_like(gates)])
