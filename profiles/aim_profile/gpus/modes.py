"""Partition modes: their names, how many devices each makes, and what the driver's structure allows."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from aim_profile.errors import PartitionError
from aim_profile.units import MIB

Compute = Literal["SPX", "DPX", "TPX", "QPX", "CPX"]
Memory = Literal["NPS1", "NPS2", "NPS4", "NPS8"]
Deployment = Literal["bare-metal", "passthrough", "sr-iov"]
Tier = Literal["validated", "driver-legal", "unsupported"]
# documented: read in source or a primary document; reported: one secondary report;
# inferred: follows from documented facts; unverified: not established.
Confidence = Literal["documented", "reported", "inferred", "unverified"]

COMPUTE_MODES: tuple[Compute, ...] = get_args(Compute)
MEMORY_MODES: tuple[Memory, ...] = get_args(Memory)
DEPLOYMENTS: tuple[Deployment, ...] = get_args(Deployment)
TIERS: tuple[Tier, ...] = get_args(Tier)


class DeviceMode(BaseModel, ABC):
    """How one card is cut into equal devices, as the planner sees it.

    partitions: devices per card; cus: compute units per device; memory_mib: what the smallest device reports.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accelerator: str
    partitions: int
    cus: int
    memory_mib: int
    tier: Tier

    @property
    @abstractmethod
    def label(self) -> str:
        """The mode as people write it."""

    def unproven(self, devices: int) -> bool:
        """Whether one model over that many devices of one card rests on nobody's proof.

        AMD validates modes, not tensor parallelism over their partitions, which was reported to answer garbage on
        CPX/NPS4 (vllm#20125, closed as stale, not as fixed).
        """
        return devices > 1 and self.partitions > 1

    def standing(self, devices: int) -> str:
        """The tier, and what it does not speak for: `validated, tensor parallelism unproven`."""
        return f"{self.tier}, tensor parallelism unproven" if self.unproven(devices) else self.tier

    @property
    def memory_bytes(self) -> int:
        """Bytes the smallest device of this mode reports."""
        return self.memory_mib * MIB


class PartitionMode(DeviceMode):
    """One compute and memory combination of one accelerator under one deployment.

    memory_mib is what the smallest device reports under CAPPING, the driver's default (memory partition ÷ the
    partitions sharing it).
    """

    compute: Compute
    memory: Memory
    deployment: Deployment
    xcds: int
    source: str
    confidence: Confidence
    note: str = ""

    @property
    def label(self) -> str:
        """`CPX/NPS4`, as people and AMD's tables write it."""
        return f"{self.compute}/{self.memory}"

    @property
    def resource_label(self) -> str:
        """`cpx_nps4`, as the device plugin (`amd.com/cpx_nps4`) and the node labeller write it."""
        return f"{self.compute}_{self.memory}".lower()


def can_switch(deployment: Deployment | Literal["unknown"]) -> bool:
    """Whether the machine itself can change its cards' modes.

    Not an SR-IOV guest: its host's driver (GIM) makes the virtual functions, and with them the mode. Not where it is
    unknown whether the machine is one.
    """
    return deployment in ("bare-metal", "passthrough")


def memory_partitions(memory: Memory) -> int:
    """How many NUMA memory partitions a mode makes: NPS4 → 4."""
    return int(memory.removeprefix("NPS"))


def partition_count(xcds: int, compute: Compute) -> int:
    """Devices per card from its XCDs, 0 where the driver refuses the mode (kernel aqua_vanjaram.c)."""
    allowed = {
        "SPX": True,
        "DPX": xcds % 4 == 0,
        "TPX": xcds % 3 == 0,
        "QPX": xcds % 4 == 0 and xcds // 4 >= 2,
        "CPX": xcds > 1,
    }[compute]
    return {"SPX": 1, "DPX": 2, "TPX": 3, "QPX": 4, "CPX": xcds}[compute] if allowed else 0


def structurally_legal(xcds: int, compute: Compute, memory: Memory) -> bool:
    """The driver's structural checks: memory partitions per compute mode (kernel aqua_vanjaram.c)."""
    ranges = memory_partitions(memory)
    count = partition_count(xcds, compute)
    if not count or ranges > count:
        return False
    if compute == "DPX":
        return ranges <= 2
    return compute != "CPX" or xcds % ranges == 0


_PARTITION = re.compile(r"([A-Za-z]+)(?:[/_\- ]([A-Za-z]+[0-9]+))?")


def parse_partition(text: str) -> tuple[Compute, Memory | None]:
    """`CPX/NPS4`, `cpx_nps4`, `CPX-NPS4` or `cpx` → compute and memory mode. Raises PartitionError."""
    found = _PARTITION.fullmatch(text.strip())
    compute = next((c for c in COMPUTE_MODES if found and c == found.group(1).upper()), None)
    asked_memory = found.group(2) if found else None
    memory = next((m for m in MEMORY_MODES if asked_memory and m == asked_memory.upper()), None)
    if compute is None or (asked_memory and memory is None):
        raise PartitionError(
            f"{text!r} is not a partition mode",
            field="partition",
            value=text,
            remedy=f"write COMPUTE/MEMORY, as in CPX/NPS4; compute is one of {', '.join(COMPUTE_MODES)}, "
            f"memory one of {', '.join(MEMORY_MODES)}",
        )
    return compute, memory
