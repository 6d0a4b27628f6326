"""Figures that vendors published of their own devices, as the catalogue holds them: evidence that nobody here measured.

A row's sequences at once follow from it: each makes a token every `itl_ms`, so tokens/s times that many; an answer's
length from the time between its first token and its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aim_profile.errors import CatalogError
from aim_profile.files.read import parse_yaml
from aim_profile.gpus.catalog import by_name
from aim_profile.models.facts import Precision


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PublishedRow(_Frozen):
    """One level of load: of all servers of the card together, but latencies, which are means of requests."""

    offered_per_s: float = Field(gt=0)
    e2e_s: float = Field(gt=0)
    ttft_ms: float = Field(gt=0)
    itl_ms: float = Field(gt=0)
    tokens_per_s: float = Field(gt=0)

    @property
    def answer_tokens(self) -> int:
        """Tokens of an answer, on average."""
        return round((self.e2e_s * 1000 - self.ttft_ms) / self.itl_ms) + 1


class PublishedRun(_Frozen):
    """One mode of the card. servers: engines on it, one a device; one_stream_itl_ms: with a single sequence."""

    partition: str
    servers: int = Field(ge=1)
    one_stream_itl_ms: float | None = Field(default=None, gt=0)
    rows: tuple[PublishedRow, ...] = Field(min_length=1)


class Published(_Frozen):
    """One page of figures. gpu: the device of the catalogue it counts for, note: why, where that is not plain."""

    published_by: str
    source: str
    date: date
    model: str
    precision: Precision
    engine: Literal["vllm"]
    gpu: str
    note: str = ""
    prompt_tokens: int = Field(ge=1)
    most_answer_tokens: int = Field(ge=1)
    runs: tuple[PublishedRun, ...] = Field(min_length=1)

    def label(self, run: PublishedRun) -> str:
        """Whose figures of what, in one line."""
        what = f"{self.model} {self.precision} on {self.gpu} {run.partition}"
        note = f" ({self.note})" if self.note else ""
        return f"published by {self.published_by} on {self.date}, not measured here: {what}, {self.source}{note}"


@cache
def published() -> tuple[Published, ...]:
    """Everything the catalogue holds. Raises CatalogError where a file of it is wrong."""
    return tuple(_read())


def _read() -> Iterator[Published]:
    folder = files("aim_profile") / "catalog" / "evidence"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".yaml"):
            raw = parse_yaml(entry.read_text(encoding="utf-8"), f"catalogue file {entry.name}", CatalogError)
            try:
                found = Published.model_validate(raw)
            except ValidationError as problem:
                raise CatalogError(f"catalogue file {entry.name}: {problem}", field=entry.name) from problem
            for run in found.runs:
                by_name(found.gpu).mode(run.partition)
            yield found
