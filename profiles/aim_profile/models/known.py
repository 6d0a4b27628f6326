"""The catalogue of known models: exact ids, hand-written dimensions, a source each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aim_profile.errors import CatalogError, UnknownModelError
from aim_profile.files.read import parse_yaml
from aim_profile.gpus.catalog import Confidence
from aim_profile.units import GIB

from .facts import ModelFacts, Shape
from .parameters import active_parameters, count_parameters, expert_parameters


class _Entry(BaseModel):
    """One model as a catalogue file writes it. file_gib: size of the published files, where sourced.

    max_positions comes with max_positions_source; rope_scaling as the published configuration states it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    architecture: str
    native_precision: str | None = None
    source: str
    confidence: Confidence
    shape: Shape | None = None
    total_params: int | None = None
    max_positions: int | None = Field(default=None, ge=1)
    max_positions_source: str | None = Field(default=None, min_length=1)
    rope_scaling: str | None = Field(default=None, min_length=1)
    file_gib: float | None = None
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _a_limit_has_a_source(self) -> Self:
        if (self.max_positions is None) != (self.max_positions_source is None):
            raise ValueError(f"{self.id}: max_positions and max_positions_source come together")
        return self

    def facts(self) -> ModelFacts:
        parameters = count_parameters(self.architecture, self.shape) if self.shape else None
        return ModelFacts(
            **self.model_dump(exclude={"file_gib", "shape", "total_params"}),
            shape=self.shape,
            total_params=parameters.total if parameters else self.total_params,
            linear_params=parameters.linear if parameters else None,
            other_params=parameters.other if parameters else None,
            expert_params=expert_parameters(self.shape) if self.shape else None,
            active_params=active_parameters(parameters, self.shape) if parameters and self.shape else None,
            file_bytes=None if self.file_gib is None else round(self.file_gib * GIB),
        )


class Refused(NamedTuple):
    """An id people use that is not a repository. right: the real id, empty where there is none."""

    id: str
    right: str
    reason: str


class _Catalog(NamedTuple):
    models: Mapping[str, ModelFacts]
    refused: Mapping[str, Refused]


@cache
def _catalog() -> _Catalog:
    models: dict[str, ModelFacts] = {}
    refused: dict[str, Refused] = {}
    folder = files("aim_profile") / "catalog" / "models"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if not entry.name.endswith(".yaml"):
            continue
        for facts in _read(entry.name, entry.read_text(encoding="utf-8"), refused):
            if facts.id in models:
                raise CatalogError(f"catalogue file {entry.name}: {facts.id} twice", field=entry.name)
            models[facts.id] = facts
    return _Catalog(MappingProxyType(models), MappingProxyType(refused))


def _read(name: str, text: str, refused: dict[str, Refused]) -> list[ModelFacts]:
    try:
        raw: dict[str, Any] = parse_yaml(text, f"catalogue file {name}", CatalogError)
        for wrong in raw.get("refused", []):
            refused[wrong["id"]] = Refused(**wrong)
        return [_Entry.model_validate(given).facts() for given in raw["models"]]
    except (KeyError, TypeError, AttributeError, ValidationError) as problem:
        raise CatalogError(f"catalogue file {name}: {problem}", field=name) from problem


def known_ids() -> tuple[str, ...]:
    """Every id of the catalogue, sized or not, in catalogue order."""
    return tuple(_catalog().models)


def by_id(model_id: str) -> ModelFacts:
    """The facts of exactly that id. Raises UnknownModelError, naming the right id where one is known."""
    known, refused = _catalog()
    if model_id in known:
        return known[model_id]
    if wrong := refused.get(model_id):
        raise UnknownModelError(
            f"{model_id}: no such repository ({wrong.reason})",
            field="model",
            value=model_id,
            remedy=f"the real id is {wrong.right}" if wrong.right else "there is no model to put in its place",
        )
    near = [other for other in known if other.lower() == model_id.lower()]
    near = near or difflib.get_close_matches(model_id, known, n=3, cutoff=0.75)
    hint = f"did you mean {' or '.join(near)}? Or " if near else ""
    raise UnknownModelError(
        f"{model_id} is not in the catalogue, and nothing is guessed from a name",
        field="model",
        value=model_id,
        remedy=f"{hint}give an exact id of the catalogue, a directory with its config.json, or a GGUF file",
    )
