"""A CPU node as YAML people write: a machine without a GPU, its cores and memory shared out to partitions.

version: 1
kind: cpu
cores: 8
memory: 32GiB
partitions: 4              # equal ones: two cores and 8 GiB each

version: 1
kind: cpu
partitions:
- {cpus: [0, 1], memory: 2GiB}
- {cpus: [1, 2], memory: 512MiB}
share_cpus: true           # said, because CPU 1 is in both
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from aim_profile.errors import AimProfileError, NodeError
from aim_profile.files.place import MisplacedError
from aim_profile.files.read import Parsed, check
from aim_profile.units import MIB, parse_memory

from .facts import CPU, MOST_CPUS, Card, Node, Partition, checked_cpus

_MOST_PARTITIONS = 256
_MOST_MIB = 2**30
_Whole = Annotated[int, Field(strict=True)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _mib(text: str) -> int:
    """Whole MiB of a size with a unit, rounded down. Raises ValueError."""
    try:
        found = parse_memory(text) // MIB
    except AimProfileError as problem:
        raise ValueError(str(problem)) from problem
    if not 1 <= found <= _MOST_MIB:
        raise ValueError(f"{text!r} is {'more than 1 PiB' if found else 'less than 1 MiB'}")
    return found


class _Described(_Frozen):
    """What both forms say. share_cpus: a core may be in several partitions."""

    version: Literal[1]
    kind: Literal["cpu"]
    name: str = Field(default="node", min_length=1, max_length=253)
    share_cpus: Annotated[bool, Field(strict=True)] = False

    @field_validator("memory", check_fields=False)
    @classmethod
    def _has_a_unit(cls, value: str | None) -> str | None:
        if value is not None:
            _mib(value)
        return value


class _Equal(_Described):
    """`partitions` equal ones of so many cores and so much memory."""

    cores: _Whole = Field(ge=1, le=MOST_CPUS)
    memory: str
    partitions: _Whole = Field(ge=1, le=_MOST_PARTITIONS)

    @model_validator(mode="after")
    def _enough_for_each(self) -> _Equal:
        if self.partitions > self.cores and not self.share_cpus:
            raise MisplacedError(
                ("partitions",),
                f"{self.partitions} partitions of {self.cores} cores share them: say share_cpus: true, or ask for less",
            )
        if _mib(self.memory) < self.partitions:
            raise MisplacedError(("memory",), f"{self.memory} for {self.partitions} partitions is less than 1 MiB each")
        return self

    def sets(self) -> list[tuple[tuple[int, ...], int]]:
        """CPUs and MiB of each: neighbouring cores, the first sets one more where they do not divide evenly; shared,
        where there are fewer cores than partitions, in turns (0, 1, 0, 1)."""
        each_mib = _mib(self.memory) // self.partitions
        if self.partitions > self.cores:
            return [((place % self.cores,), each_mib) for place in range(self.partitions)]
        each, more = divmod(self.cores, self.partitions)
        ends = accumulate((each + (place < more) for place in range(self.partitions)), initial=0)
        return [(tuple(range(first, last)), each_mib) for first, last in pairwise(ends)]


class _CpuSet(_Frozen):
    cpus: tuple[_Whole, ...] = Field(min_length=1, max_length=MOST_CPUS)
    memory: str

    @field_validator("cpus")
    @classmethod
    def _each_cpu_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return checked_cpus(value)

    @field_validator("memory")
    @classmethod
    def _has_a_unit(cls, value: str) -> str:
        _mib(value)
        return value


class _Sets(_Described):
    """Each partition described. cores, memory: of the machine, where it is to be checked that they are enough."""

    cores: _Whole | None = Field(default=None, ge=1, le=MOST_CPUS)
    memory: str | None = None
    partitions: tuple[_CpuSet, ...] = Field(min_length=1, max_length=_MOST_PARTITIONS)

    @model_validator(mode="after")
    def _on_this_machine(self) -> _Sets:
        holders: dict[int, int] = {}
        for at, part in enumerate(self.partitions):
            for cpu in part.cpus:
                if self.cores is not None and cpu >= self.cores:
                    problem = f"CPU {cpu} is not one of the machine's {self.cores} (0 to {self.cores - 1})"
                    raise MisplacedError(("partitions", at, "cpus"), problem)
                if holders.setdefault(cpu, at) != at and not self.share_cpus:
                    problem = f"CPU {cpu} is in partitions[{holders[cpu]}] too: say share_cpus: true, or take another"
                    raise MisplacedError(("partitions", at, "cpus"), problem)
        self._check_memory()
        return self

    def _check_memory(self) -> None:
        taken_mib = 0
        for at, part in enumerate(self.partitions):
            taken_mib += _mib(part.memory)
            if self.memory is not None and taken_mib > (whole := _mib(self.memory)):
                problem = f"the partitions up to here take {taken_mib} MiB, {taken_mib - whole} more than {self.memory}"
                raise MisplacedError(("partitions", at, "memory"), problem)

    def sets(self) -> list[tuple[tuple[int, ...], int]]:
        """CPUs and MiB of each."""
        return [(part.cpus, _mib(part.memory)) for part in self.partitions]


def cpu_node_of(file: Parsed) -> Node:
    """The node of a file that says `kind: cpu`. Raises NodeError naming file, line, key, value and remedy."""
    named, text, raw = file
    asked: type[_Equal] | type[_Sets] = _Sets if isinstance(raw.get("partitions"), list) else _Equal
    described: Any = check(asked, raw, named, NodeError, text)
    return emulate_cpu(described.sets(), described.name)


def emulate_cpu(sets: Sequence[tuple[Sequence[int], int]], name: str = "node") -> Node:
    """A node without a GPU whose partitions are those CPU sets: ids of cores, and MiB of memory."""
    partitions = tuple(
        Partition(index=at, compute_units=len(cpus), memory_mib=mib, memory_source="derived", cpus=tuple(cpus))
        for at, (cpus, mib) in enumerate(sets)
    )
    card = Card(index=0, product=CPU, partitionable=False, partitions=partitions)
    return Node(name=name, backend="emulated", cards=(card,))
