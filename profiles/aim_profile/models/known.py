"""The catalogue of known models: exact ids, hand-written dimensions, a source each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aim_profile.errors import CatalogError, UnknownModelError
from aim_profile.files.read import parse_yaml
from aim_profile.gpus.catalog import Confidence
from aim_profile.units import GIB

from .config_fields import Config
from .facts import ModelFacts, Shape
from .huggingface import config_facts
from .parameters import active_parameters, count_parameters, expert_parameters


class _Entry(BaseModel):
    """One model as a catalogue file writes it. file_gib: size of the published files, where sourced.

    Its facts are those of `config`, the fields of its published config.json that decide them, read as a directory's; or
    they stand in the entry: `shape`, max_positions with max_positions_source, rope_scaling as the published
    configuration states it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    architecture: str = ""
    native_precision: str | None = None
    source: str
    confidence: Confidence
    config: dict[str, Any] | None = None
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

    @model_validator(mode="after")
    def _one_way_or_the_other(self) -> Self:
        stated = self.architecture or self.shape or self.native_precision or self.max_positions or self.missing
        if bool(self.config) == bool(stated):
            raise ValueError(f"{self.id}: either config, or its facts one by one")
        return self

    def facts(self) -> ModelFacts:
        """What is known of it. Raises ModelError for a configuration that cannot be read."""
        if self.config is not None:
            return self._from_config(self.config)
        parameters = count_parameters(self.architecture, self.shape) if self.shape else None
        return ModelFacts(
            **self.model_dump(exclude={"file_gib", "shape", "total_params", "config"}),
            shape=self.shape,
            total_params=parameters.total if parameters else self.total_params,
            linear_params=parameters.linear if parameters else None,
            other_params=parameters.other if parameters else None,
            expert_params=expert_parameters(self.shape) if self.shape else None,
            active_params=active_parameters(parameters, self.shape) if parameters and self.shape else None,
            file_bytes=None if self.file_gib is None else round(self.file_gib * GIB),
        )

    def _from_config(self, config: dict[str, Any]) -> ModelFacts:
        read = config_facts(Config.of(Path(self.id), config))
        if read["max_positions"] is not None:
            read["max_positions_source"] = self.source
        read["notes"] = (*self.notes, *read.get("notes", ()))
        if self.file_gib is not None:
            read["file_bytes"] = round(self.file_gib * GIB)
        return ModelFacts(id=self.id, source=self.source, confidence=self.confidence, **read)


class Refused(NamedTuple):
    """An id people use that is not a repository. right: the real id, empty where there is none."""

    id: str
    right: str
    reason: str


class _Catalog(NamedTuple):
    models: Mapping[str, _Entry]
    refused: Mapping[str, Refused]


def _file_of(model_id: str) -> str:
    """The models of an organisation stand in a file of its name, so that one model does not cost reading them all."""
    return f"{model_id.partition('/')[0].lower()}.yaml"


@cache
def _names() -> tuple[str, ...]:
    folder = files("aim_profile") / "catalog" / "models"
    return tuple(sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml")))


@cache
def _organisation(name: str) -> _Catalog:
    """One file of the catalogue; nothing where there is none of that name."""
    if name not in _names():
        return _Catalog({}, {})
    refused: dict[str, Refused] = {}
    models: dict[str, _Entry] = {}
    text = (files("aim_profile") / "catalog" / "models" / name).read_text(encoding="utf-8")
    for model in _read(name, text, refused):
        if model.id in models or _file_of(model.id) != name:
            raise CatalogError(f"catalogue file {name}: {model.id} twice, or in another's file", field=name)
        models[model.id] = model
    return _Catalog(MappingProxyType(models), MappingProxyType(refused))


@cache
def _catalog() -> _Catalog:
    models: dict[str, _Entry] = {}
    refused: dict[str, Refused] = {}
    for name in _names():
        held = _organisation(name)
        models |= held.models
        refused |= held.refused
    return _Catalog(MappingProxyType(models), MappingProxyType(refused))


def _read(name: str, text: str, refused: dict[str, Refused]) -> list[_Entry]:
    try:
        raw: dict[str, Any] = parse_yaml(text, f"catalogue file {name}", CatalogError)
        for wrong in raw.get("refused", []):
            refused[wrong["id"]] = Refused(**wrong)
        return [_Entry.model_validate(given) for given in raw["models"]]
    except (KeyError, TypeError, AttributeError, ValidationError) as problem:
        raise CatalogError(f"catalogue file {name}: {problem}", field=name) from problem


def known_ids() -> tuple[str, ...]:
    """Every id of the catalogue, sized or not, in catalogue order."""
    return tuple(_catalog().models)


@cache
def _facts(model_id: str) -> ModelFacts:
    return _organisation(_file_of(model_id)).models[model_id].facts()


def by_id(model_id: str) -> ModelFacts:
    """The facts of exactly that id. Raises UnknownModelError, naming the right id where one is known."""
    if model_id in _organisation(_file_of(model_id)).models:
        return _facts(model_id)
    known, refused = _catalog()
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
