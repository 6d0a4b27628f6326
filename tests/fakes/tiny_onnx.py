"""Classifiers small enough to be built in a test, in a Hugging Face directory: real graphs, a real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WORDS = ("hello", "you", "are", "nice", "awful", "kill", "the", "a", "and", "some", "more")


def classifier(
    folder: Path,
    weights: Mapping[str, Sequence[float]],
    labels: Sequence[str] = ("fine", "toxic"),
    *,
    problem_type: str | None = "multi_label_classification",
    quantised: bool = False,
    max_tokens: int = 16,
    file: str = "model.onnx",
) -> Path:
    """A directory whose model adds up, over a window's words, the outputs that ``weights`` gives each."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **{word: 4 + at for at, word in enumerate(WORDS)}}
    table = np.zeros((len(vocabulary), len(labels)), np.float32)
    for word, values in weights.items():
        table[vocabulary[word]] = values
    graph = _quantised(table) if quantised else _summed(table)
    (folder / file).parent.mkdir(exist_ok=True)
    onnx.save(graph, folder / file)
    tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"id2label": dict(enumerate(labels)), "model_type": "bert", "problem_type": problem_type}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": max_tokens, "extra": [1]}))
    return folder


def tokenizer(vocabulary: dict[str, int]) -> Any:
    """A real one: words, with [CLS] and [SEP] around them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return made


def model(
    nodes: Sequence[Any], constants: Mapping[str, NDArray[Any]], inputs: Sequence[Any], output: Sequence[Any]
) -> onnx.ModelProto:
    """A graph whose output is called logits."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return made


_INPUTS = [
    ("input_ids", TensorProto.INT64, ["batch", "tokens"]),
    ("attention_mask", TensorProto.INT64, ["batch", "tokens"]),
]


def _summed(table: NDArray[np.float32]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["masks"]),
        helper.make_node("Mul", ["rows", "masks"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["logits"], keepdims=0),
    ]
    constants = {"table": table, "last": np.array([2]), "one": np.array([1])}
    return model(nodes, constants, _INPUTS, ["batch", table.shape[1]])


def _quantised(table: NDArray[np.float32]) -> onnx.ModelProto:
    """The same, its sums cut to bytes by one scale for the whole batch, as dynamic quantisation does."""
    square = np.eye(table.shape[1], dtype=np.int8) * 100
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "one"], ["sums"], keepdims=0),
        helper.make_node("DynamicQuantizeLinear", ["sums"], ["bytes", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["bytes", "square", "zero"], ["products"]),
        helper.make_node("Cast", ["products"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("Div", ["scaled", "hundred"], ["logits"]),
    ]
    constants = {"table": table, "one": np.array([1]), "square": square, "hundred": np.array(100, np.float32)}
    return model(nodes, constants, _INPUTS[:1], ["batch", table.shape[1]])


def image_classifier(folder: Path, labels: Sequence[str] = ("normal", "nsfw"), **preprocessor: Any) -> Path:
    """A directory laid out as Falconsai/nsfw_image_detection, whose model takes red for what must not be seen."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.zeros((3, len(labels)), np.float32)
    weights[:, 0], weights[:, 1] = (-4, 4, 4), (4, -4, -4)
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values"], ["colours"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["colours", "weights"], ["logits"]),
    ]
    inputs = [("pixel_values", TensorProto.FLOAT, ["batch", 3, 32, 32])]
    onnx.save(model(nodes, {"weights": weights}, inputs, ["batch", len(labels)]), folder / "model.onnx")
    config = {"architectures": ["ViTForImageClassification"], "id2label": dict(enumerate(labels)), "model_type": "vit"}
    (folder / "config.json").write_text(json.dumps(config))
    size = {"height": 32, "width": 32}
    normal = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"do_resize": True, "size": size, **normal, **preprocessor})
    )
    return folder
