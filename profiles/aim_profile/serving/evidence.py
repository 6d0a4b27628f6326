"""Measured evidence: what was run on which hardware under which load, and what came of it. Frozen; unknown keys are
refused.

A measurement speaks for the profiles whose model, engine, precision, GPU, partition mode, allocation mode and number of
devices are its own, and for no other: a partition says nothing of a card, an MI325X nothing of an MI300X. Where nobody
knows what a server ran on, the figures are kept and speak for no profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, field_serializer, model_validator

from aim_profile.errors import AimProfileError
from aim_profile.gpus.catalog import by_name, catalog
from aim_profile.nodes.facts import AllocMode

# AIM's names; its fp4 is what model facts call mxfp4.
AimPrecision = Literal["int4", "int8", "fp4", "fp8", "fp16", "bf16", "fp32"]

#: In the place of a GPU's name, as in AIM's profiles.
NO_GPU = "NONE"

_Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]
_Text = Annotated[str, Field(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Subject(NamedTuple):
    """What a measurement must be of to speak for a profile. model None: a profile for any model."""

    model: str | None
    engine: str
    precision: str
    gpu: str
    partition: str
    alloc_mode: str
    gpu_count: int


class Mismatch(NamedTuple):
    """The first thing in which a measurement is of something else. field: as it stands in the file."""

    field: str
    found: object
    wanted: object

    def __str__(self) -> str:
        return f"{self.field} {self.found}, this is {self.wanted}"


class Hardware(_Frozen):
    """What computed. gpu: its name in the catalogue, NONE for processors; partition: `CPX/NPS4`, a whole card is
    SPX/NPS1; gpu_count: devices of the engine (partitions, where the mode has several), 0 for processors.

    told_by: server (it said so itself), node (read on the server's machine), file (an emulation file of that machine),
    unknown (nobody knows: such a measurement speaks for no profile).
    """

    told_by: Literal["server", "node", "file", "unknown"]
    gpu: str = NO_GPU
    partition: _Text | None = None
    alloc_mode: AllocMode = "CAPPING"
    gpu_count: int = Field(default=0, ge=0, le=8)
    driver: _Text | None = None
    rocm: _Text | None = None
    cpu: _Text | None = None
    cores: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.gpu == NO_GPU:
            if self.partition is not None or self.gpu_count:
                raise ValueError(f"gpu {NO_GPU} has neither partition nor gpu_count: name the GPU, or leave them out")
            return self
        if self.gpu not in catalog():
            raise ValueError(f"gpu {self.gpu} is not in the catalogue: use {NO_GPU} or one of {', '.join(catalog())}")
        if self.partition is None or not self.gpu_count:
            raise ValueError(f"gpu {self.gpu} needs partition (SPX/NPS1: the whole card) and gpu_count")
        try:
            by_name(self.gpu).mode(self.partition)
        except AimProfileError as problem:
            raise ValueError(f"partition: {problem}") from problem
        return self

    @property
    def label(self) -> str:
        """`2 x MI300X CPX/NPS4`, or the processor with its cores; for people."""
        if self.told_by == "unknown":
            return "unknown hardware"
        if self.gpu != NO_GPU:
            return f"{self.gpu_count} x {self.gpu} {self.partition}"
        return f"{self.cpu or 'a processor'}, {self.cores or '?'} cores"


class EngineRun(_Frozen):
    """The engine that answered. args: its arguments, as far as they are known."""

    name: _Text
    version: _Text | None = None
    args: Mapping[str, JsonValue] = Field(default_factory=dict)


class Load(_Frozen):
    """What was asked of it, enough to ask it again. Lengths as `aim-runtime measure` takes them: `constant:128`.

    arrivals: poisson, on-off and trace are open loops (requests come whether or not others were answered), closed is
    so many clients that wait for their answer. prompts: digest of the prompts' texts; warm_up: requests before the
    figures; duration_s: of the whole run, requests: of all its points together.
    """

    generator: _Text
    arrivals: Literal["poisson", "on-off", "trace", "closed"]
    prompt_tokens: _Text
    output_tokens: _Text
    shared_prefix_tokens: _Count = 0
    prompts: _Text
    trace: _Text | None = None
    seed: int
    warm_up: _Count
    requests: _Count
    duration_s: float = Field(ge=0, allow_inf_nan=False)


class Percentiles(_Frozen):
    """Of every request that was answered, by the nearest rank: each is a value that was seen."""

    p50: _Milliseconds
    p95: _Milliseconds
    p99: _Milliseconds

    @model_validator(mode="after")
    def _rise(self) -> Self:
        if not self.p50 <= self.p95 <= self.p99:
            raise ValueError(f"percentiles must rise: p50 {self.p50}, p95 {self.p95}, p99 {self.p99}")
        return self


class Slo(_Frozen):
    """What a request must keep to count as good: milliseconds to its first token, and between tokens on average."""

    ttft_ms: float | None = Field(default=None, gt=0)
    itl_ms: float | None = Field(default=None, gt=0)


class Point(_Frozen):
    """One level of load. offered: requests per second that were sent (open loop), or clients (closed loop).

    ttft, itl, e2e: milliseconds from the moment a request was to be sent, so that a client that fell behind cannot
    hide waiting; itl: every gap between two tokens; None where nothing was answered. client_lag_ms: how late the client
    itself sent, at p95; valid: the client kept up. failed: kind of failure → requests.
    """

    offered: float = Field(gt=0, allow_inf_nan=False)
    duration_s: float = Field(gt=0, allow_inf_nan=False)
    answered: _Count
    failed: Mapping[str, _Count] = Field(default_factory=dict)
    requests_per_s: _Rate
    output_tokens_per_s: _Rate
    prompt_tokens: _Count
    output_tokens: _Count
    ttft_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    e2e_ms: Percentiles | None = None
    goodput_per_s: _Rate | None = None
    client_lag_ms: _Milliseconds = 0.0
    valid: bool = True


class Knee(_Frozen):
    """The highest load that was still served well, and what showed that it was the last."""

    offered: float = Field(gt=0, allow_inf_nan=False)
    because: _Text


class Measurement(_Frozen):
    """One run: hardware, engine, load, a point for each level of load. knee None: it was not reached.

    model: the id that profiles know it by; served_as: its name on the server. date: when it began. command: what
    makes the same run again; tool: what measured, with its version.
    """

    version: Literal[1]
    model: _Text
    served_as: _Text
    precision: AimPrecision | None = None
    hardware: Hardware
    engine: EngineRun
    load: Load
    slo: Slo = Slo()
    points: tuple[Point, ...] = Field(min_length=1)
    knee: Knee | None = None
    command: _Text
    date: AwareDatetime
    tool: _Text

    @field_serializer("date", when_used="json")
    def _to_the_second(self, value: datetime) -> str:
        return value.isoformat(timespec="seconds")

    @model_validator(mode="after")
    def _has_figures(self) -> Self:
        if not any(point.valid and point.answered for point in self.points):
            raise ValueError("points: none of them is valid with a request answered: that is no evidence")
        return self

    @property
    def headline(self) -> Point:
        """The point at the knee; without one the most that was offered."""
        usable = [point for point in self.points if point.valid and point.answered]
        at_knee = [point for point in usable if self.knee is not None and point.offered == self.knee.offered]
        return (at_knee or usable)[-1]

    def mismatch(self, subject: Subject) -> Mismatch | None:
        """In what this is of something else than the subject; None: it speaks for it."""
        here = self.hardware
        if here.told_by == "unknown":
            return Mismatch("hardware.told_by", "unknown", subject.gpu)
        compared = (
            ("model", self.model, subject.model or "a profile for any model"),
            ("engine.name", self.engine.name, subject.engine),
            ("precision", self.precision or "unknown", subject.precision),
            ("hardware.gpu", here.gpu, subject.gpu),
            ("hardware.partition", here.partition or "CPU", subject.partition),
            ("hardware.alloc_mode", here.alloc_mode, subject.alloc_mode),
            ("hardware.gpu_count", here.gpu_count, subject.gpu_count),
        )
        return next((Mismatch(*each) for each in compared if each[1] != each[2]), None)
