"""What a policy says of a text classifier. Cheap to import: nothing is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from aim_guardrail.detectors.endpoint import Endpoint, base_url
from aim_guardrail.detectors.family import Options


def _pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else value


#: A mapping as pairs, so that options can be told apart by hash.
Renamed = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(_pairs),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]


_OF_ENDPOINT = ("model", "api", "classes", "window_chars", "api_key_file", "ca_file")
_OF_PATH = ("activation", "threads")


class ClassifierOptions(Options):
    """A classifier in place of the embedded one.

    Attributes:
        path: a Hugging Face directory with `model.onnx`.
        endpoint: in its place an OpenAI-compatible server that classifies (vLLM), e.g. ``http://guard:8080``.
        model: the name it is served by there.
        api: the server's route: `classify`, or `pooling` where it answers numbers alone.
        classes: what the server's outputs are, in their order: its answers name no more than the highest.
        labels: the model's labels that mean one of the family's under another name, e.g. ``{LABEL_1: INJECTION}``.
        activation: what turns a directory's outputs into scores, where its `config.json` says it wrong or not at all.
        threads: how many batches of a directory's model run at once, by default one for each CPU, four at most.
        window_chars: how much text an endpoint gets at once; its tokens must fit the model.
        api_key_file, ca_file: as of any endpoint (`Endpoint`).
    """

    path: str | None = Field(default=None, min_length=1)
    endpoint: str | None = None
    model: str | None = Field(default=None, min_length=1, max_length=512)
    api: Literal["classify", "pooling"] | None = None
    classes: tuple[str, ...] | None = Field(default=None, min_length=1)
    labels: Renamed = ()
    activation: Literal["softmax", "sigmoid"] | None = None
    threads: int | None = Field(default=None, ge=1, le=64)
    window_chars: int | None = Field(default=None, ge=100, le=100_000)
    api_key_file: str | None = Field(default=None, min_length=1)
    ca_file: str | None = Field(default=None, min_length=1)

    @field_validator("endpoint")
    @classmethod
    def _is_a_base_url(cls, value: str | None) -> str | None:
        return None if value is None else base_url(value)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        self._check()
        return self

    def _check(self) -> None:
        """Raises ValueError: what is given does not go together."""
        if self.path is not None and self.endpoint is not None:
            raise ValueError("path is a directory and endpoint a server: give one of them")
        for own, names in (("endpoint", _OF_ENDPOINT), ("path", _OF_PATH)):
            for name in names:
                if getattr(self, own) is None and getattr(self, name) is not None:
                    raise ValueError(f"{name} goes with {own}, which is not given: remove it")
        if self.endpoint is not None and (self.model is None or self.classes is None):
            raise ValueError("an endpoint needs model, the name it is served by, and classes, what its outputs are")
        if self.labels and not self.is_given:
            raise ValueError("labels are those of another model: give path or endpoint, or remove them")

    @property
    def is_given(self) -> bool:
        """Whether there is another model."""
        return self.path is not None or self.endpoint is not None

    @property
    def served(self) -> Endpoint:
        """Where the model is served. Only with an endpoint."""
        assert self.endpoint is not None
        assert self.model is not None
        return Endpoint(endpoint=self.endpoint, model=self.model, api_key_file=self.api_key_file, ca_file=self.ca_file)


class ModelOptions(ClassifierOptions):
    """Of a family without an embedded model."""

    @model_validator(mode="after")
    def _is_given(self) -> ModelOptions:
        if not self.is_given:
            raise ValueError("there is no embedded model: give path, a directory, or endpoint, model and classes")
        return self


def family_labels(
    labels: tuple[str, ...], known: Mapping[str, Any], renamed: Renamed, aliases: Mapping[str, str]
) -> dict[str, str]:
    """Which of a model's labels mean which of the family's; those that mean none are left out.

    Raises:
        ValueError: ``renamed`` names what the model or the family does not have.
    """
    for label, ours in renamed:
        if label not in labels:
            raise ValueError(f"labels: the model has no {label!r}: it has {', '.join(labels)}")
        if ours not in known:
            raise ValueError(f"labels: {label!r} stands for {ours!r}: use one of {', '.join(known)}")
    said = dict(renamed)
    spelt = {label: label.upper().replace(" ", "_").replace("-", "_") for label in labels}
    meant = {label: said.get(label) or aliases.get(name, name) for label, name in spelt.items()}
    return {label: ours for label, ours in meant.items() if ours in known}
