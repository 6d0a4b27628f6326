"""Workloads: what a fleet is asked to carry, as YAML people write.

version: 1
workloads:
- {name: chat, model: meta-llama/Llama-3.1-8B-Instruct, precision: bf16, context: 32768, concurrency: 4, replicas: 3,
   priority: high, slo: latency, spread: node}
- {name: guard, kind: guardrail, memory: 6GiB, memory_limit: 8GiB, affinity: [chat]}
- {name: tune, kind: finetune, memory: 60GiB, priority: low}
- {name: bot, kind: finetune, training: {model: Qwen/Qwen3-8B, method: qlora, batch: 4, context: 4096, workers: 2}}
- {name: busy, model: Qwen/Qwen3-8B, load: {requests_per_s: 20, prompt_tokens: 512, answer_tokens: 256},
   slo: {ttft_ms: 500, itl_ms: 50}}
- {name: night, kind: finetune, memory: 60GiB, window: "22:00-06:00"}      # of time_zone: Europe/Berlin, beside version
- {name: long, model: Qwen/Qwen3-32B, context: 65536, fallback: [{precision: fp8}, {precision: fp8, context: 16384}]}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from aim_profile.errors import AimProfileError
from aim_profile.files.place import MisplacedError
from aim_profile.files.read import Parsed, check, check_as, located, parsed, read_parsed
from aim_profile.gpus.catalog import by_name
from aim_profile.models.facts import Precision
from aim_profile.sizing.fit import CONTEXT_CEILING_TOKENS
from aim_profile.sizing.kv_cache import KvDtype
from aim_profile.sizing.training import Training
from aim_profile.units import parse_memory

from .fallback import MOST_FALLBACKS, Fallback, has_a_unit, refused_precision
from .load import Latencies, Load, latencies
from .window import WHOLE_DAY, known_zone, window_of, written

Priority = Literal["low", "medium", "high"]
Slo = Literal["latency", "throughput"]
Kind = Literal["serve", "guardrail", "finetune"]

# A name becomes the name of Kubernetes objects.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Whole = Annotated[int, Field(strict=True)]
#: Each part of the day between two of them is planned for.
MOST_EDGES = 48
#: More of one workload are a mistake.
MOST_REPLICAS = 100_000
# What a fallback may change of a workload that names no model.
_WITHOUT_A_MODEL = {"memory", "memory_limit", "tp"}


class WorkloadError(AimProfileError):
    """A workloads file that cannot be used. `field` is the path of the key: `workloads[3].precision`."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Pin(_Frozen):
    """Where a replica must stand: a node, a card of it, a partition of that card."""

    node: str = Field(min_length=1)
    card: Whole | None = Field(default=None, ge=0)
    partition: Whole | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _a_partition_is_of_a_card(self) -> Self:
        if self.partition is not None and self.card is None:
            raise ValueError("a partition is of a card: give card too")
        return self

    def __str__(self) -> str:
        parts = [
            self.node,
            *(f"{word} {n}" for word, n in (("card", self.card), ("partition", self.partition)) if n is not None),
        ]
        return " ".join(parts)


class Workload(_Frozen):
    """One model (or job) and how it is to run. Unset fields take the stated default.

    memory: what each device must hold, where it is not derived from `model` or `training` (a detector);
    training: what a fine-tuning job trains, a replica for each of its workers;
    memory_limit: the most it may ever take of a device; with it, it shares its device with others that have one
    (a high priority workload never shares). tp: devices per replica, None: as few as fit, and partitions together
    (unproven) only where nothing else is left. slo latency: one device or whole cards, no tensor parallelism over
    partitions. spread: replicas on different nodes or cards.
    affinity: on a node that also holds a replica of each of these; anti_affinity: on no node that holds one.
    node_selector: only on nodes with these labels. evictable None: low priority is, others are not.
    load: the requests that come, from which the planner derives replicas and concurrency; with it, slo may be the
    latencies promised. devices: only on these, as in `MI300X CPX/NPS4`; empty: on any.
    window: the hours of the day in which it runs, on the clock of the file's time_zone; None: always.
    fallback: other forms, tried in this order where not all its replicas get a device as asked; all take the same one.
    """

    name: Name
    kind: Kind = "serve"
    model: str | None = Field(default=None, min_length=1)
    precision: Precision | None = None
    context: Whole = Field(default=8192, ge=1, le=CONTEXT_CEILING_TOKENS)
    concurrency: Whole = Field(default=1, ge=1, le=1_000_000)
    kv_dtype: KvDtype = "auto"
    lora_slots: Whole = Field(default=0, ge=0, le=1024)
    lora_rank: Whole = Field(default=16, ge=1, le=512)
    training: Training | None = None
    memory: str | None = None
    memory_limit: str | None = None
    tp: Whole | None = Field(default=None, ge=1, le=64)
    replicas: Whole = Field(default=1, ge=1, le=MOST_REPLICAS)
    load: Load | None = None
    priority: Priority = "medium"
    slo: Slo | Latencies = "throughput"
    spread: Literal["node", "card"] | None = None
    affinity: tuple[str, ...] = ()
    anti_affinity: tuple[str, ...] = ()
    node_selector: Mapping[str, str] = Field(default_factory=dict)
    devices: tuple[str, ...] = ()
    pinned: Pin | None = None
    evictable: bool | None = None
    fallback: tuple[Fallback, ...] = Field(default=(), max_length=MOST_FALLBACKS)
    window: str | None = None

    _window = field_validator("window", mode="before")(written)
    _memory = field_validator("memory", "memory_limit")(has_a_unit)
    _latencies = field_validator("slo", mode="before")(latencies)

    @field_validator("devices")
    @classmethod
    def _known_devices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        found = []
        for at, named in enumerate(value):
            gpu, _, mode = named.strip().rpartition(" ")
            try:
                found.append(f"{by_name(gpu).name} {by_name(gpu).mode(mode).label}")
            except AimProfileError as problem:
                raise MisplacedError((at,), f"{problem}; write GPU and mode, as in MI300X CPX/NPS4") from problem
        return tuple(found)

    @model_validator(mode="before")
    @classmethod
    def _a_replica_for_each_worker(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "replicas" not in raw and isinstance(training := raw.get("training"), Mapping):
            return {**raw, "replicas": training.get("workers", 1)}
        return raw

    @model_validator(mode="after")
    def _can_be_planned_for(self) -> Self:
        if self.training is not None:
            self._is_trained()
        if problem := self._unsizable() or self._homeless():
            raise ValueError(problem)
        if problem := self._unbearable():
            raise ValueError(problem)
        return self

    def _unbearable(self) -> str:
        """What stands beside a load that it already says, or cannot be with it; empty where nothing does."""
        if self.load is None:
            alone = isinstance(self.slo, Latencies)
            return "slo with latencies is of a load: give load too, or write latency or throughput" if alone else ""
        if self.kind != "serve" or self.model is None:
            return f"load is of a model that is served: give model, and leave kind {self.kind} out"
        for key in ("replicas", "concurrency", "memory", "memory_limit", "fallback"):
            if key in self.model_fields_set:
                return f"replicas and their size follow from load: leave {key} out"
        if self.pinned is not None and self.pinned.card is not None:
            return "replicas follow from load: pin them to a node, not to a card of it"
        if "context" in self.model_fields_set and self.context < self.load.context:
            return f"context {self.context} does not hold the {self.load.context} tokens of a request of load"
        return ""

    def _unsizable(self) -> str:
        """Why nobody can say what it needs; empty where one can."""
        if self.kind == "finetune" and self.memory is None and self.training is None:
            return "a finetune workload needs training, or memory: what it holds on each device, as in 60GiB"
        if self.model is None and self.memory is None and self.training is None:
            return "give model, or memory: what it holds on each device, as in 6GiB"
        if self.memory_limit and (self.tp or 1) > 1:
            return "memory_limit shares one device: tp must be 1"
        if self.memory and self.memory_limit and parse_memory(self.memory) > parse_memory(self.memory_limit):
            return f"memory {self.memory} is more than memory_limit {self.memory_limit}"
        return ""

    def _is_trained(self) -> None:
        assert self.training is not None
        if self.kind != "finetune":
            raise ValueError(f"training is of kind finetune (kind is {self.kind})")
        for key, given in (("model", self.model), ("memory", self.memory), ("memory_limit", self.memory_limit)):
            if given is not None:
                raise ValueError(f"training says what is held: leave {key} out")
        if (self.tp or 1) > 1 or self.replicas != self.training.workers:
            raise ValueError("each worker of a training is a replica on one device: leave replicas and tp out")

    def _homeless(self) -> str:
        """Why it could stand nowhere; empty where it could."""
        if self.name in self.affinity:
            return "affinity names the workload itself: leave it out"
        if both := sorted(set(self.affinity) & set(self.anti_affinity)):
            return f"{both[0]} is both in affinity and in anti_affinity"
        pinned_partition = self.pinned is not None and self.pinned.partition is not None
        if pinned_partition and ((self.tp or 1) > 1 or (self.replicas > 1 and not self.shares)):
            return "pinned.partition is one device: tp and replicas must be 1"
        return ""

    @model_validator(mode="after")
    def _fallbacks_are_other_forms(self) -> Self:
        seen: list[Workload] = [self.model_copy(update={"fallback": ()})]
        for at, (fallback, form) in enumerate(zip(self.fallback, self.forms, strict=True)):
            if problem := self._refused(fallback, form, seen):
                raise MisplacedError(("fallback", at), problem)
            seen.append(form)
        return self

    def _refused(self, fallback: Fallback, form: Workload, seen: list[Workload]) -> str:
        """What is wrong with that form, beside those before it; empty where nothing is."""
        if self.training is not None:
            return "a training has no other form: leave fallback out"
        if form in seen:
            same = f"is fallback[{seen.index(form) - 1}] again" if form != seen[0] else "changes nothing"
            return f"{fallback} {same}: leave it out"
        if self.model is None and (idle := fallback.model_fields_set - _WITHOUT_A_MODEL):
            return f"{min(idle)} is of a model, and the workload names none: leave it out"
        alone = self.precision if len(fallback.changes) == 1 else fallback.precision
        if self.model and fallback.precision and (why := refused_precision(self.model, alone, fallback.precision)):
            return why
        wrong = form._unsizable() or form._homeless()
        return f"{fallback}: {wrong}" if wrong else ""

    @property
    def forms(self) -> tuple[Workload, ...]:
        """The workload in each of its fallbacks, in their order."""
        return tuple(self.model_copy(update={**each.changes, "fallback": ()}) for each in self.fallback)

    @property
    def tuned_for(self) -> Slo:
        """What its engine is tuned for; promised latencies are a matter of latency."""
        return "latency" if isinstance(self.slo, Latencies) else self.slo

    @property
    def sized_by(self) -> str | None:
        """The model whose facts size it, served or trained."""
        return self.model if self.training is None else self.training.model

    @property
    def shares(self) -> bool:
        """Whether it may stand beside others on one device: it has a limit and its room is not guaranteed."""
        return self.memory_limit is not None and self.priority != "high"

    @property
    def may_be_evicted(self) -> bool:
        """Whether a running replica may be moved or stopped for others, where eviction is allowed at all."""
        return self.priority == "low" if self.evictable is None else self.evictable


class Workloads(_Frozen):
    """A workloads file. Names are unique; affinities name workloads of the same file and make no circle.

    time_zone: of the IANA database, whose clock all windows are read by.
    """

    version: Literal[1] = 1
    time_zone: Annotated[str, AfterValidator(known_zone)] = "UTC"
    workloads: tuple[Workload, ...]

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        places: dict[str, int] = {}
        for at, workload in enumerate(self.workloads):
            first = places.setdefault(workload.name, at)
            if first != at:
                names = f"{workload.name!r} names workloads[{first}] too: names are unique"
                raise MisplacedError(("workloads", at, "name"), names)
        for at, workload in enumerate(self.workloads):
            for key, others in (("affinity", workload.affinity), ("anti_affinity", workload.anti_affinity)):
                if missing := sorted(name for name in others if name not in places):
                    raise MisplacedError(("workloads", at, key), f"no workload is named {missing[0]!r}")
        if circle := _circle({w.name: w.affinity for w in self.workloads if w.affinity}):
            way = f"affinity goes in a circle: {' → '.join(circle)}; leave one of them out"
            raise MisplacedError(("workloads", places[circle[0]], "affinity"), way)
        return self

    @model_validator(mode="after")
    def _windows_agree(self) -> Self:
        windows = {each.name: window_of(each.window) for each in self.workloads if each.window}
        edges: set[int] = set()
        for at, workload in enumerate(self.workloads if windows else ()):
            mine = windows.get(workload.name, WHOLE_DAY)
            edges.update(mine if workload.window else ())
            if len(edges) > MOST_EDGES:
                many = f"windows start and end at more than {MOST_EDGES} times of the day: let more of them agree"
                raise MisplacedError(("workloads", at, "window"), many)
            for name in workload.affinity:
                if name in windows and not windows[name].covers(mine):
                    away = f"{name} runs only {windows[name]}, {workload.name} {workload.window or 'always'}"
                    raise MisplacedError(("workloads", at, "affinity"), f"{away}: give it a window within that")
        return self


def load_workloads(file: Path) -> Workloads:
    """Workloads from a YAML (or JSON) file. Raises WorkloadError naming the file, the key and the value."""
    return workloads_from(read_parsed(file, WorkloadError))


def parse_workloads(text: str, named: str = "workloads") -> Workloads:
    """The same from text; `named` stands in errors for the file."""
    return workloads_from(parsed(text, named, WorkloadError))


def workloads_from(file: Parsed) -> Workloads:
    """The same from a file that was parsed already."""
    return check_as(Workloads, file, WorkloadError, "workloads file")


def with_line(problem: WorkloadError, file: Parsed) -> WorkloadError:
    """What only planning could refuse, of `chat.fallback[0].tp`, with the line of the file at which that stands."""
    name, _, keys = problem.field.partition(".")
    found = next((at for at, each in enumerate(file.raw["workloads"]) if each.get("name") == name), None)
    if found is None:
        return problem
    parts = (int(part) if part.isdecimal() else part for part in re.split(r"[.\[\]]+", keys) if part)
    where = located(file.named, file.text, ("workloads", found, *parts))
    return WorkloadError(f"{where}: {problem.problem}", field=problem.field, value=problem.value, remedy=problem.remedy)


def workloads_of(workloads: Iterable[Workload]) -> Workloads:
    """A checked set of workloads from parts. Raises WorkloadError."""
    return check(Workloads, {"workloads": tuple(workloads)}, "workloads", WorkloadError)


def _circle(edges: Mapping[str, tuple[str, ...]]) -> list[str] | None:
    """The names along one circle of `edges`, None where there is none. Iterative and linear: files may be long."""
    done: set[str] = set()
    for start in sorted(edges):
        path: dict[str, None] = {}  # in the order of the way here
        stack = [(start, False)]
        while stack:
            name, left = stack.pop()
            if left:
                path.popitem()
                done.add(name)
            elif name in path:
                way = list(path)
                return [*way[way.index(name) :], name]
            elif name not in done:
                path[name] = None
                stack.append((name, True))
                stack += [(other, False) for other in edges.get(name, ())]
    return None
