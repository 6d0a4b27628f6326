"""A Hugging Face directory: which files there are, and what they say of a classifier."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

Activation = Literal["softmax", "sigmoid"]
M = TypeVar("M", bound=BaseModel)

_GRAPHS = ("model.onnx", "model_quantized.onnx", "onnx/model.onnx", "onnx/model_quantized.onnx")
_OFFSET_TYPES = frozenset(["roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"])  # positions begin behind padding's
_READ_BYTES = 1 << 20


class ModelError(Exception):
    """A model cannot be used as it is: the file, what is wrong with it and the remedy, in one line."""


class Config(BaseModel):
    """What of `config.json` matters here. https://huggingface.co/docs/transformers/main_classes/configuration"""

    model_type: str = ""
    id2label: dict[int, str] = Field(default_factory=dict)
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    max_position_embeddings: int | None = None
    pad_token_id: int | None = None


class _TokenizerConfig(BaseModel):
    model_max_length: float | None = None


@dataclass(frozen=True, slots=True)
class Directory:
    """The files of a classifier.

    Attributes:
        labels: in the order of the model's outputs.
        activation: what turns outputs into scores: `softmax` where one label excludes the others.
    """

    path: Path
    graph: Path
    config: Config
    labels: tuple[str, ...]
    activation: Activation

    @classmethod
    def read(cls, path: Path, activation: Activation | None = None) -> Directory:
        """What is in a directory; ``activation`` in place of what `config.json` implies. Raises ModelError."""
        if not path.is_dir():
            raise ModelError(f"{path}: no such directory: give one with config.json, tokenizer.json and model.onnx")
        graph = next((path / name for name in _GRAPHS if (path / name).is_file()), None)
        if graph is None:
            raise ModelError(f"{path}: no {' or '.join(_GRAPHS[:2])} in it: export the model to ONNX")
        config = parsed(path / "config.json", Config)
        if sorted(config.id2label) != list(range(len(config.id2label))) or not config.id2label:
            raise ModelError(f"{path}/config.json: id2label does not name outputs 0, 1, …: give each its label")
        labels = tuple(config.id2label[at] for at in range(len(config.id2label)))
        return cls(path, graph, config, labels, activation or _activation(config, len(labels)))

    @property
    def max_tokens(self) -> int | None:
        """How many tokens the model reads at once, those around a text included; None where no file says so."""
        said = self.config.max_position_embeddings
        if said is not None and self.config.model_type in _OFFSET_TYPES:
            said -= (self.config.pad_token_id if self.config.pad_token_id is not None else 1) + 1
        file = self.path / "tokenizer_config.json"
        limit = parsed(file, _TokenizerConfig).model_max_length if file.is_file() else None
        known = [int(each) for each in (said, limit) if each is not None and 0 < each < 1e6]
        return min(known, default=None)

    def digest(self) -> str:
        """SHA-256 of the files that what it says depends on."""
        whole = hashlib.sha256(self.activation.encode())
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            if (self.path / name).is_file():
                whole.update((self.path / name).read_bytes())
        for file in sorted(
            [self.graph, *self.graph.parent.glob("*.onnx_data"), *self.graph.parent.glob("*.onnx.data")]
        ):
            with file.open("rb") as opened:
                whole.update(hashlib.file_digest(opened, "sha256").digest())
        return whole.hexdigest()


def _activation(config: Config, labels: int) -> Activation:
    """As transformers' own pipeline decides."""
    if config.problem_type == "multi_label_classification" or labels == 1:
        return "sigmoid"
    return "softmax"


def parsed(file: Path, model: type[M]) -> M:
    """A JSON file of a directory. Raises ModelError."""
    try:
        with file.open("rb") as opened:
            return model.model_validate_json(opened.read(_READ_BYTES))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}): give a readable file") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(f"{file}: {where + ': ' if where else ''}{first['msg']}: mend it, or fetch it anew") from None
