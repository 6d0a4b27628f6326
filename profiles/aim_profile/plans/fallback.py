"""Fallbacks: other forms in which a workload is accepted where it would have no device as it was asked for.

fallback: [{precision: fp8}, {context: 8192}]

Each entry changes the workload as it was first written, and nothing adds up: what should change together stands in one
entry. They are tried in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from aim_profile.errors import AimProfileError, ModelError, SizingError
from aim_profile.models.facts import Precision
from aim_profile.models.load import load_model
from aim_profile.sizing.fit import CONTEXT_CEILING_TOKENS, weight_bytes
from aim_profile.sizing.kv_cache import KvDtype
from aim_profile.units import parse_memory

_Whole = Annotated[int, Field(strict=True)]
MOST_FALLBACKS = 8


def has_a_unit(value: str | None) -> str | None:
    """Memory as people write it, `6GiB`. Raises ValueError for anything else."""
    if value is not None:
        try:
            parse_memory(value)
        except AimProfileError as problem:
            raise ValueError(str(problem)) from problem
    return value


class Fallback(BaseModel):
    """What is different in that form; the keys are the workload's own. A key that is not given stays as it was."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    precision: Precision | None = None
    context: _Whole = Field(default=8192, ge=1, le=CONTEXT_CEILING_TOKENS)
    concurrency: _Whole = Field(default=1, ge=1, le=1_000_000)
    kv_dtype: KvDtype = "auto"
    lora_slots: _Whole = Field(default=0, ge=0, le=1024)
    memory: str | None = None
    memory_limit: str | None = None
    tp: _Whole | None = Field(default=None, ge=1, le=64)

    _memory = field_validator("memory", "memory_limit")(has_a_unit)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"changes nothing: give one of {', '.join(type(self).model_fields)}, or leave it out")
        return self

    @property
    def changes(self) -> Mapping[str, Any]:
        """The keys given, with their values."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}

    def __str__(self) -> str:
        """`precision fp8, context 8192`."""
        return ", ".join(f"{key} {'default' if value is None else value}" for key, value in self.changes.items())


@cache
def refused_precision(model: str, was: Precision | None, precision: Precision) -> str:
    """Why that model, asked for in `was`, cannot be had in `precision` instead; empty where it can, or where planning
    will refuse the model itself. None: its own.
    """
    try:
        facts = load_model(model)
    except ModelError:
        return ""
    try:
        weight_bytes(facts, precision)
    except SizingError as problem:
        return str(problem)
    return f"precision {precision} is its own, and changes nothing" * (
        was is None and precision == facts.native_precision
    )
