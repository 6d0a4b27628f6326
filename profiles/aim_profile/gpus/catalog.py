"""Accelerators by PCI id, and the partition modes each one has.

Every figure comes from `catalog/gpus/*.yaml`, where it stands beside its source and how sure it is.
A mode's tier depends on the deployment:

validated      AMD's partitioning support table lists the combination
driver-legal   the amdgpu driver accepts it, nobody validated it
unsupported    neither (or nothing is established for that deployment)

What a live node's driver reports overrides this catalogue: see node.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aim_profile.errors import CatalogError, GpuError, PartitionError
from aim_profile.files.read import parse_yaml

from .modes import (
    COMPUTE_MODES,
    DEPLOYMENTS,
    MEMORY_MODES,
    TIERS,
    Compute,
    Confidence,
    Deployment,
    DeviceMode,
    Memory,
    PartitionMode,
    Tier,
    can_switch,
    memory_partitions,
    parse_partition,
    partition_count,
    structurally_legal,
)

__all__ = [
    "COMPUTE_MODES",
    "DEPLOYMENTS",
    "MEMORY_MODES",
    "TIERS",
    "Accelerator",
    "Compute",
    "Confidence",
    "Deployment",
    "Memory",
    "PartitionMode",
    "Tier",
    "Unknown",
    "by_name",
    "by_pci_id",
    "can_switch",
    "catalog",
    "memory_partitions",
    "parse_partition",
    "partition_count",
    "structurally_legal",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Provenance(_Frozen):
    """Where a figure was read, and how far to trust it."""

    source: str
    confidence: Confidence
    note: str = ""


class PciId(_Frozen):
    """One PCI device id (vendor 0x1002). function: pf = the physical function, vf = an SR-IOV one."""

    id: int = Field(ge=1, le=0xFFFF)
    function: Literal["pf", "vf"]
    variant: str = ""


class ModeFacts(_Frozen):
    """A combination as the catalogue holds it: deployments not named are `unsupported`."""

    compute: Compute
    memory: Memory
    tiers: Mapping[Deployment, Tier]
    provenance: Mapping[Deployment, Provenance]


class Accelerator(_Frozen):
    """One accelerator. xcds, compute_units, hbm_mib are per PCI device (a MI250 package is two).

    hbm_tb_per_s: peak memory bandwidth, 10^12 bytes a second; operations_per_clock_per_cu: of the matrix units without
    sparsity, by format; left out where nobody established them.

    provenance maps each figure's field name to its source; `unverified` lists the doubtful ones.
    """

    name: str
    marketing_names: tuple[str, ...]
    architecture: str
    gfx: str
    pci_ids: tuple[PciId, ...]
    devices_per_package: int = Field(ge=1)
    xcds: int = Field(ge=1)
    cus_per_xcd: int = Field(ge=1)
    hbm_mib: int = Field(ge=1)
    partitionable: bool
    modes_known: tuple[ModeFacts, ...]
    smallest_partition_mib: Mapping[str, int] = Field(default_factory=dict)
    matrix_formats: tuple[str, ...]
    hbm_tb_per_s: float | None = Field(default=None, gt=0)
    max_clock_mhz: int | None = Field(default=None, ge=1)
    operations_per_clock_per_cu: Mapping[str, int] = Field(default_factory=dict)
    provenance: Mapping[str, Provenance]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Self:
        figures = {"pci_ids", "xcds", "cus_per_xcd", "hbm_mib", "partitionable", "matrix_formats"}
        figures |= self.model_fields_set & {"hbm_tb_per_s", "max_clock_mhz", "operations_per_clock_per_cu"}
        if missing := sorted(figures - set(self.provenance)):
            raise ValueError(f"{self.name}: no source for {', '.join(missing)}")
        for known in self.modes_known:
            if not structurally_legal(self.xcds, known.compute, known.memory):
                raise ValueError(f"{self.name}: {known.compute}/{known.memory} breaks the driver's checks")
        return self

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def compute_units(self) -> int:
        """Compute units of one PCI device (XCDs times CUs per XCD)."""
        return self.xcds * self.cus_per_xcd

    @property
    def unverified(self) -> tuple[str, ...]:
        """Names of the figures nobody has established; say so wherever they are shown."""
        return tuple(sorted(key for key, p in self.provenance.items() if p.confidence == "unverified"))

    @property
    def compute_modes(self) -> tuple[Compute, ...]:
        """Compute modes this accelerator has under any deployment, largest partition first."""
        return tuple(c for c in COMPUTE_MODES if any(m.compute == c for m in self.modes_known))

    def bandwidth_of(self, mode: DeviceMode) -> float | None:
        """Peak bytes a second that one device of that mode can read: its share of the card's; None: not known."""
        return None if self.hbm_tb_per_s is None else self.hbm_tb_per_s * 1e12 * mode.cus / self.compute_units

    def operations_of(self, mode: DeviceMode, matrix_format: str) -> float | None:
        """Peak operations a second of one device of that mode in that format; None: not known."""
        per_clock = self.operations_per_clock_per_cu.get(matrix_format)
        if per_clock is None or self.max_clock_mhz is None:
            return None
        return per_clock * mode.cus * self.max_clock_mhz * 1e6

    def function_of(self, pci_id: int) -> Literal["pf", "vf"]:
        """Whether that id is this accelerator's physical or virtual function. GpuError if neither."""
        return self._pci(pci_id).function

    def product_of(self, pci_id: int) -> str:
        """The product's name with its variant: `MI300X HF` for 0x74a9."""
        return f"{self.name} {self._pci(pci_id).variant}".strip()

    def _pci(self, pci_id: int) -> PciId:
        for known in self.pci_ids:
            if known.id == pci_id:
                return known
        raise GpuError(f"{self.name} has no PCI id {pci_id:#06x}", field="pci_id", value=pci_id)

    def partitions_in(self, compute: Compute) -> int:
        """Devices one card shows in that compute mode. PartitionError where the XCDs do not allow it."""
        count = partition_count(self.xcds, compute) if self.partitionable or compute == "SPX" else 0
        if not count:
            modes = ", ".join(self.compute_modes)
            raise PartitionError(
                f"{self.name} has no {compute} mode ({self.xcds} XCDs)",
                field="partition",
                value=compute,
                remedy=f"its compute modes are {modes}",
            )
        return count

    def mode(self, partition: str, deployment: Deployment = "bare-metal") -> PartitionMode:
        """The named combination: `CPX/NPS4`, `cpx_nps4`, or `CPX` alone.

        A compute mode alone takes the memory mode AMD validates for it in that deployment, else the
        lowest NPS the driver accepts, else NPS1. A combination nobody supports comes back with tier
        `unsupported`; one that this accelerator cannot have raises PartitionError.
        """
        compute, memory = parse_partition(partition)
        count = self.partitions_in(compute)
        if memory is None:
            memory = self._default_memory(compute, deployment)
        if not structurally_legal(self.xcds, compute, memory) and memory_partitions(memory) > count:
            raise PartitionError(
                f"{self.name} cannot be {compute}/{memory}: {count} partitions cannot hold "
                f"{memory_partitions(memory)} memory partitions",
                field="partition",
                value=partition,
                remedy="use one of " + ", ".join(m.label for m in self.modes(deployment)),
            )
        return self._build(compute, memory, deployment)

    def modes(
        self, deployment: Deployment = "bare-metal", at_least: Tier = "driver-legal"
    ) -> tuple[PartitionMode, ...]:
        """Every known combination at that tier or better: validated first, then by partition count."""
        built = [self._build(known.compute, known.memory, deployment) for known in self.modes_known]
        kept = [mode for mode in built if TIERS.index(mode.tier) <= TIERS.index(at_least)]
        return tuple(sorted(kept, key=lambda m: (TIERS.index(m.tier), m.partitions, m.memory)))

    def _default_memory(self, compute: Compute, deployment: Deployment) -> Memory:
        candidates = [mode for mode in self.modes(deployment) if mode.compute == compute]
        return candidates[0].memory if candidates else "NPS1"

    def _build(self, compute: Compute, memory: Memory, deployment: Deployment) -> PartitionMode:
        count = self.partitions_in(compute)
        known = next((m for m in self.modes_known if (m.compute, m.memory) == (compute, memory)), None)
        nobody = Provenance(source=f"no source lists it for {deployment}", confidence="inferred")
        provenance = known.provenance.get(deployment, nobody) if known else nobody
        return PartitionMode(
            accelerator=self.name,
            compute=compute,
            memory=memory,
            deployment=deployment,
            partitions=count,
            xcds=self.xcds // count,
            cus=self.compute_units // count,
            memory_mib=self.smallest_partition_mib.get(f"{compute}/{memory}", self.hbm_mib // count),
            tier=known.tiers.get(deployment, "unsupported") if known else "unsupported",
            source=provenance.source,
            confidence=provenance.confidence,
            note=provenance.note,
        )


class Unknown(_Frozen):
    """An accelerator this catalogue does not hold. Nothing about it is guessed."""

    pci_id: int
    seen_as: str = ""
    report: str

    @property
    def name(self) -> str:
        """Always `unknown`."""
        return "unknown"


@cache
def catalog() -> Mapping[str, Accelerator]:
    """Every known accelerator by name, in catalogue order (file name). CatalogError if a file is wrong."""
    folder = files("aim_profile") / "catalog" / "gpus"
    found: dict[str, Accelerator] = {}
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".yaml"):
            accelerator = _load(entry.read_text(encoding="utf-8"), entry.name)
            found[accelerator.name] = accelerator
    return MappingProxyType(found)


def _load(text: str, file_name: str) -> Accelerator:
    try:
        raw = parse_yaml(text, f"catalogue file {file_name}", CatalogError)
        sources: dict[str, str] = raw.pop("sources")
        raw["provenance"] = {key: _resolve(given, sources) for key, given in raw["provenance"].items()}
        raw["modes_known"] = [_mode_facts(given.pop("mode"), given, sources) for given in raw.pop("modes")]
        return Accelerator.model_validate(raw)
    except (KeyError, TypeError, AttributeError, ValidationError) as problem:
        raise CatalogError(f"catalogue file {file_name}: {problem}", field=file_name) from problem


def _resolve(given: Mapping[str, str], sources: Mapping[str, str]) -> dict[str, str]:
    return {**given, "source": sources[given["source"]]}


def _mode_facts(label: str, by_deployment: Mapping[str, Mapping[str, str]], sources: Mapping[str, str]) -> Any:
    compute, memory = parse_partition(label)
    provenance = {key: _resolve(given, sources) for key, given in by_deployment.items()}
    tiers = {key: given.pop("tier") for key, given in provenance.items()}
    return {"compute": compute, "memory": memory, "tiers": tiers, "provenance": provenance}


# Ids the drivers name without anything else being established: never guess, but say what was seen.
_SEEN = {0x75A2: "named 'mi358' in driver sources; XCDs, CUs and HBM are not established"}


def by_pci_id(pci_id: int) -> Accelerator | Unknown:
    """The accelerator with that PCI device id (PF or VF), or Unknown with what to report."""
    for accelerator in catalog().values():
        if any(known.id == pci_id for known in accelerator.pci_ids):
            return accelerator
    return Unknown(
        pci_id=pci_id,
        seen_as=_SEEN.get(pci_id, ""),
        report=f"PCI id {pci_id:#06x} is not in the catalogue: report `lspci -nn -d 1002:{pci_id:04x}`, "
        "the files of /sys/bus/pci/drivers/amdgpu/<bdf>/ and of "
        "/sys/class/kfd/kfd/topology/nodes/<n>/properties, and `amd-smi static --json`",
    )


def by_name(name: str) -> Accelerator:
    """The accelerator of that exact name, or of a marketing name seen in the field; case is ignored.

    Raises GpuError listing the known names.
    """
    wanted = _normal(name)
    for accelerator in catalog().values():
        if wanted in {_normal(known) for known in (accelerator.name, *accelerator.marketing_names)}:
            return accelerator
    raise GpuError(
        f"no accelerator named {name!r} in the catalogue",
        field="gpu",
        value=name,
        remedy="the known ones are " + ", ".join(catalog()),
    )


def _normal(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()
