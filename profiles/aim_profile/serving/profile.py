"""Profile: how one model is served on one kind of device. Frozen, versioned; an unknown key is refused.

A superset of AMD's AIM profile (amd-enterprise-ai/aim-build@2be2cf8, schemas/model_profile_schema.json): the keys
`aim_id, model_id, metadata, engine_args, env_vars` mean what they mean there; `partition, gpu_sharing,
guardrails, finetuning, evidence` are ours. A profile without `partition` is for whole GPUs, as all of AIM's are.

The id is AIM's, `{engine}-{gpu}-{precision}-tp{n}-{metric}`, with the partition mode after the GPU where there is
one: `vllm-mi300x-cpx-nps4-fp8-tp1-latency`. A reference names the model too: `org/model/id`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from aim_profile.errors import AimProfileError
from aim_profile.files.place import MisplacedError, Place
from aim_profile.gpus.catalog import (
    COMPUTE_MODES,
    MEMORY_MODES,
    Accelerator,
    Compute,
    Deployment,
    Memory,
    PartitionMode,
    Tier,
    by_name,
    catalog,
)
from aim_profile.models.facts import Precision
from aim_profile.nodes.facts import AllocMode

from .evidence import NO_GPU, Measurement, Subject
from .evidence import AimPrecision as AimPrecision  # profiles and their evidence have one list of them

PROFILE_VERSION: Literal[1] = 1
#: What a derived profile says of itself until it carries figures.
NOT_MEASURED = "derived from facts, not measured: throughput and latency are unknown until someone runs it"

Engine = Literal["vllm", "llama_cpp"]
Metric = Literal["latency", "throughput"]
ProfileType = Literal["optimized", "preview", "unoptimized", "general"]
Priority = Literal["low", "medium", "high"]
Weights = Literal["as published", "quantised at load", "needs a quantised checkpoint", "checkpoint given"]

ENGINES: tuple[Engine, ...] = get_args(Engine)
METRICS: tuple[Metric, ...] = get_args(Metric)
TYPES: tuple[ProfileType, ...] = get_args(ProfileType)
PRECISIONS: tuple[AimPrecision, ...] = get_args(AimPrecision)

# Every GPU that AIM's schema names; a profile may also name any other accelerator of our catalogue.
AIM_GPUS = (
    *("MI100", "MI250X", "MI210", "MI300A", "MI300X", "MI308X", "MI325X", "MI350X", "MI355X", "V710"),
    *("W7900", "W7800", "W6900X", "W6800", "W6800X", "V620", "RX9070", "RX7900", "RX6900", "RX6800", "NONE"),
)
# The device plugin hands out devices; hiding them a second time leaves a pod with none, or with its neighbour's.
_DEVICE_FILTERS = {"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"}


class ProfileError(AimProfileError):
    """A profile that cannot be read, derived or exported."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Metadata(_Frozen):
    """What a profile is selected by. gpu_count: devices the engine uses, partitions where partition is set."""

    engine: Engine
    gpu: str
    precision: AimPrecision
    gpu_count: int = Field(ge=0, le=8)
    metric: Metric
    manual_selection_only: bool = False
    type: ProfileType

    @field_validator("gpu")
    @classmethod
    def _known_gpu(cls, value: str) -> str:
        if value not in AIM_GPUS and value not in catalog():
            raise ValueError(f"no GPU of that name: use one of {', '.join(dict.fromkeys((*catalog(), *AIM_GPUS)))}")
        return value


class PartitionUse(_Frozen):
    """The mode the card must be in. device_memory_mib, compute_units: of one device, as derived.

    alloc_mode CAPPING: a device reports its share of the memory; ALL: all of its memory partition, and the
    engine must be told to keep to its share. tier: what AMD says of the mode in that deployment.
    """

    compute: Compute
    memory: Memory
    alloc_mode: AllocMode = "CAPPING"
    deployment: Deployment = "bare-metal"
    tier: Tier | None = None
    device_memory_mib: int | None = Field(default=None, ge=1)
    compute_units: int | None = Field(default=None, ge=1)

    @property
    def label(self) -> str:
        """`CPX/NPS4`."""
        return f"{self.compute}/{self.memory}"

    @property
    def resource_label(self) -> str:
        """`cpx_nps4`, as in the device plugin's resource name."""
        return f"{self.compute}_{self.memory}".lower()


class GpuSharing(_Frozen):
    """memory_limit_gb: the most an engine may take of a device, decimal GB (10^9 bytes), None: its share.

    partition_id: the partition of the card this profile is pinned to; qos_priority: who yields to whom.
    """

    memory_limit_gb: float | None = Field(default=None, gt=0)
    partition_id: int | None = Field(default=None, ge=0)
    qos_priority: Priority = "medium"


class Guardrail(_Frozen):
    """One rule for the guardrail transformer, as in the `aim.amd.com/guardrails` annotation."""

    type: str = Field(min_length=1)
    action: Literal["block", "redact", "flag"]
    threshold: float | None = Field(default=None, ge=0, le=1)


class Provenance(_Frozen):
    """What tuned weights were made from. Digests are SHA-256: of the base model's files, of what the job asked for, of
    the tokenised rows (absent: not known any more). metrics: measured on the tuned model; tools: version by name.
    """

    base: str = Field(min_length=1)
    revision: str | None = None
    method: str = Field(min_length=1)
    base_digest: str
    job_digest: str
    data_digest: str | None = None
    metrics: Mapping[str, float] = Field(default_factory=dict)
    tools: Mapping[str, str] = Field(default_factory=dict)


class FineTuning(_Frozen):
    """LoRA adapters served beside the base model: lora_slots resident at once (0: the weights were merged), of at most
    lora_rank; provenance: where the weights come from that the profile was written for.
    """

    lora_slots: int = Field(ge=0, le=1024)
    lora_rank: int = Field(default=16, ge=1, le=512)
    provenance: Provenance | None = None


class Evidence(_Frozen):
    """How sure this profile is. Legal is not validated, validated is not measured; a validated mode says nothing of
    tensor parallelism over its partitions.

    measured: someone ran this very profile and kept the figures, which are in measurements. The GiB are per device and
    estimated: the engine's own start-up profiling is the last word.
    """

    measured: bool = False
    measurements: tuple[Measurement, ...] = ()
    weights: Weights = "as published"
    weights_gib: float | None = None
    kv_gib: float | None = None
    overhead_gib: float | None = None
    budget_gib: float | None = None
    headroom_gib: float | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _measured_by_its_figures(cls, raw: object) -> object:
        """Left out, it follows from the figures."""
        if isinstance(raw, Mapping) and "measured" not in raw and raw.get("measurements"):
            return {**raw, "measured": True}
        return raw

    @model_validator(mode="after")
    def _says_what_was_measured(self) -> Self:
        if self.measured and not self.measurements:
            raise MisplacedError(
                ("measured",), "true, but measurements has none: leave it out and give figures (--evidence)"
            )
        if self.measurements and not self.measured:
            raise MisplacedError(("measured",), "false, but there are measurements: leave it out")
        return self


class Profile(_Frozen):
    """One way to serve one model. aim_id: the model people ask for; model_id: the repository loaded for it."""

    profile_version: Literal[1] = PROFILE_VERSION
    aim_id: str | None = Field(default=None, min_length=1)
    model_id: str | None = Field(default=None, min_length=1)
    metadata: Metadata
    engine_args: Mapping[str, JsonValue] = Field(default_factory=dict)
    env_vars: Mapping[str, str] = Field(default_factory=dict)
    partition: PartitionUse | None = None
    gpu_sharing: GpuSharing = GpuSharing()
    guardrails: tuple[Guardrail, ...] = ()
    finetuning: FineTuning | None = None
    evidence: Evidence = Evidence()

    @field_validator("env_vars")
    @classmethod
    def _usable_environment(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
            if name in _DEVICE_FILTERS:
                raise ValueError(f"{name}: leave it out, the device plugin hands out the devices")
        return value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        tensor_parallel = self.engine_arg("tensor-parallel-size")
        if isinstance(tensor_parallel, int) and tensor_parallel > max(1, self.metadata.gpu_count):
            raise ValueError(
                f"tensor-parallel-size {tensor_parallel} needs more than gpu_count {self.metadata.gpu_count}"
            )
        if self.metadata.type == "general" and self.aim_id is None:
            return self
        if (self.aim_id is None) != (self.model_id is None):
            raise ValueError("aim_id and model_id come together (or neither, in a general profile)")
        return self

    @model_validator(mode="after")
    def _possible_partition(self) -> Self:
        if self.partition is None or self.metadata.gpu not in catalog():
            return self
        try:
            mode = by_name(self.metadata.gpu).mode(self.partition.label, self.partition.deployment)
        except AimProfileError as problem:
            raise ValueError(f"partition: {problem}") from problem
        pinned = self.gpu_sharing.partition_id
        if pinned is not None and pinned >= mode.partitions:
            raise ValueError(
                f"gpu_sharing.partition_id {pinned}: {mode.label} has partitions 0 to {mode.partitions - 1}"
            )
        # Whole GPUs stand side by side; partitions have only the siblings of their own card.
        if mode.partitions > 1 and self.metadata.gpu_count > mode.partitions:
            raise ValueError(
                f"gpu_count {self.metadata.gpu_count}: {mode.label} has {mode.partitions} siblings on a card"
            )
        return self

    @model_validator(mode="after")
    def _carries_its_own_figures(self) -> Self:
        for index, measurement in enumerate(self.evidence.measurements):
            if found := measurement.mismatch(self.subject):
                place: Place = ("evidence", "measurements", index, *found.field.split("."))
                raise MisplacedError(place, f"{found.found}, the profile is for {found.wanted}: take the figures out")
        return self

    @property
    def subject(self) -> Subject:
        """What a measurement must be of to speak for it."""
        kept, use = self.metadata, self.partition
        on_gpu = kept.gpu != NO_GPU
        return Subject(
            model=self.aim_id,
            engine=kept.engine,
            precision=kept.precision,
            gpu=kept.gpu,
            partition=use.label if use else "SPX/NPS1" if on_gpu else "CPU",
            alloc_mode=use.alloc_mode if use else "CAPPING",
            gpu_count=kept.gpu_count if on_gpu else 0,
        )

    def carrying(self, measurements: Iterable[Measurement]) -> Profile:
        """The same with those of the measurements that speak for it, once each, beside what it carries already."""
        found = list(self.evidence.measurements)
        found += [each for each in _once(measurements) if each not in found and each.mismatch(self.subject) is None]
        if len(found) == len(self.evidence.measurements):
            return self
        notes = tuple(note for note in self.evidence.notes if note != NOT_MEASURED)
        update = {"measured": True, "measurements": tuple(found), "notes": notes}
        return self.model_copy(update={"evidence": self.evidence.model_copy(update=update)})

    @property
    def is_partitioned(self) -> bool:
        """Whether it is for a part of a card; SPX is the whole card."""
        return self.partition is not None and self.partition.compute != "SPX"

    @property
    def unproven(self) -> bool:
        """Whether it spans partitions by tensor parallelism and nobody measured it: its tier is the mode's alone."""
        return self.is_partitioned and self.metadata.gpu_count > 1 and not self.evidence.measured

    @property
    def standing(self) -> str | None:
        """Its mode's tier, what that does not speak for, and whether it was measured; None where nothing is known."""
        tier = self.partition.tier if self.partition else None
        unproven = "tensor parallelism unproven" if tier and self.unproven else None
        measured = "measured" if self.evidence.measured else None
        return ", ".join(word for word in (tier, unproven, measured) if word) or None

    @property
    def id(self) -> str:
        """AIM's id, extended by the partition mode where there is one."""
        gpu = self.metadata.gpu.lower()
        if self.partition is not None and self.is_partitioned:
            gpu += f"-{self.partition.compute}-{self.partition.memory}".lower()
        kept = self.metadata
        # AIM's own files say fp4 inside and mxfp4 in their names.
        precision = "mxfp4" if kept.precision == "fp4" else kept.precision
        return f"{kept.engine}-{gpu}-{precision}-tp{kept.gpu_count}-{kept.metric}"

    @property
    def reference(self) -> str:
        """`org/model/id`; a general profile has no model: `general/id`."""
        return f"{self.aim_id or 'general'}/{self.id}"

    def engine_arg(self, name: str) -> JsonValue:
        """An engine argument by its dashed name, in whichever spelling the profile has it; None if absent."""
        return self.engine_args.get(name, self.engine_args.get(name.replace("-", "_")))


def _once(measurements: Iterable[Measurement]) -> list[Measurement]:
    found: list[Measurement] = []
    for each in measurements:
        if each not in found:  # the same run as YAML and as JSON
            found.append(each)
    return found


class ProfileId(NamedTuple):
    """The parts of a profile id. partition: `CPX/NPS4`, None for whole GPUs."""

    engine: Engine
    gpu: str
    partition: str | None
    precision: AimPrecision
    gpu_count: int
    metric: Metric


_ID = re.compile(
    rf"(?P<engine>{'|'.join(ENGINES)})-(?P<gpu>[a-z0-9]+)(?:-(?P<compute>[sdtqc]px)-(?P<memory>nps[1248]))?"
    rf"-(?:mx)?(?P<precision>{'|'.join(PRECISIONS)})-tp(?P<count>[1-8])-(?P<metric>{'|'.join(METRICS)})"
)


def parse_id(text: str) -> ProfileId:
    """`vllm-mi300x-cpx-nps4-fp8-tp1-latency` as its parts. Raises ProfileError."""
    found = _ID.fullmatch(text)
    if found is None:
        raise ProfileError(
            f"profile: {text!r} is not a profile id{_wrong_part(text)}",
            field="profile",
            value=text,
            remedy="write ENGINE-GPU[-COMPUTE-MEMORY]-PRECISION-tpN-METRIC, "
            "as in vllm-mi300x-cpx-nps4-fp8-tp1-latency (see `aim-profile list`)",
        )
    partition = f"{found['compute']}/{found['memory']}".upper() if found["compute"] else None
    return ProfileId(
        engine=found["engine"],  # type: ignore[arg-type]
        gpu=by_name(found["gpu"]).name,
        partition=partition,
        precision=found["precision"],  # type: ignore[arg-type]
        gpu_count=int(found["count"]),
        metric=found["metric"],  # type: ignore[arg-type]
    )


def _wrong_part(text: str) -> str:
    """`: tp9 is none of tp1 … tp8`, where the rest has an id's form."""
    loose = re.fullmatch(r"(\w+)-([a-z0-9]+)(?:-([a-z]+)-([a-z]+\d+))?-(?:mx)?([a-z0-9]+)-(tp\d+)-(\w+)", text)
    if loose is None:
        return ""
    engine, _, compute, memory, precision, count, metric = loose.groups()
    known = (
        *((engine, ENGINES), (compute, [mode.lower() for mode in COMPUTE_MODES])),
        *((memory, [mode.lower() for mode in MEMORY_MODES]), (precision, PRECISIONS)),
        *((count, [f"tp{number}" for number in range(1, 9)]), (metric, METRICS)),
    )
    wrong = next(((part, words) for part, words in known if part is not None and part not in words), None)
    return f": {wrong[0]} is none of {', '.join(wrong[1])}" if wrong else ""


def parse_reference(text: str) -> tuple[str, ProfileId]:
    """`org/model/profile-id` as the model's id and the profile's parts. Raises ProfileError."""
    model_id, slash, profile_id = text.rpartition("/")
    if not slash:
        raise ProfileError(
            f"profile: {text!r} names no model",
            field="profile",
            value=text,
            remedy="write MODEL/PROFILE-ID, as in meta-llama/Llama-3.1-8B-Instruct/vllm-mi300x-bf16-tp1-latency",
        )
    return model_id, parse_id(profile_id)


def reference_in(text: str) -> tuple[str, ProfileId] | None:
    """The same where the text is a reference, else None: it may be a model's id, or a directory."""
    try:
        return parse_reference(text)
    except ProfileError:
        return None


def to_aim_precision(precision: Precision) -> AimPrecision:
    """Model facts' name of a precision as AIM spells it."""
    return "fp4" if precision == "mxfp4" else precision


def to_model_precision(precision: AimPrecision) -> Precision | None:
    """AIM's name of a precision as model facts spell it; None for fp32, which nothing here sizes."""
    if precision == "fp32":
        return None
    return "mxfp4" if precision == "fp4" else precision


def devices_side_by_side(accelerator: Accelerator, mode: PartitionMode) -> tuple[int, ...]:
    """Device counts tensor parallelism may use: one card's siblings, or whole cards (at most 8, a node)."""
    whole_cards = mode.partitions == 1
    most = 8 if whole_cards else mode.partitions
    return tuple(n for n in range(1, most + 1) if most % n == 0)
