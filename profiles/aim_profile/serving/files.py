"""Profiles as files: our own YAML, AIM's YAML, and the unified JSON of the AIM_Next prototype. Written and read back.

ours       every key (YAML or JSON)
aim        only AIM's keys, valid against AIM's own schema (amd-enterprise-ai/aim-build@2be2cf8, schemas/)
unified    Yu-amd/AIM_Next, aim-gpu-sharing/runtime/aim_profiles/*.json; what it has no field for stands under
           its free-form `metadata`, so a profile of ours comes back whole. Its GB are decimal (10^9 bytes).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from aim_profile.files.read import Parsed, check, check_kind, parsed, read_parsed
from aim_profile.files.write import dump, without_empty
from aim_profile.gpus.catalog import Compute, Memory, by_name, catalog
from aim_profile.models.facts import ModelFacts
from aim_profile.units import GIB, MIB

from .profile import AIM_GPUS, AimPrecision, Metadata, PartitionUse, Priority, Profile, ProfileError

Form = Literal["ours", "aim", "unified"]
FORMS: tuple[Form, ...] = get_args(Form)

_AIM_KEYS = ("aim_id", "model_id", "metadata", "engine_args", "env_vars")
# What the prototype asks beside the GPU is ours to choose: AIM's controller requests 4 CPUs and 32 GiB per GPU
# (aim-engine@9223504); a device of ours is at most a GPU.
_CPU_CORES = 4
_SYSTEM_MEMORY_GB = 32


class UnifiedSharing(BaseModel):
    """`gpu_sharing` of the unified JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool
    memory_limit_gb: float | None = Field(default=None, gt=0)
    partition_id: int | None = Field(default=None, ge=0)
    qos_priority: Priority = "medium"
    compute_mode: Compute = "SPX"
    memory_mode: Memory = "NPS1"
    partition_count: int = Field(default=1, ge=1)
    partition_size_gb: float | None = Field(default=None, gt=0)


class UnifiedResources(BaseModel):
    """`resource_requirements` of the unified JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu_memory_gb: float = Field(gt=0)
    gpu_count: int = Field(ge=0)
    cpu_cores: int = Field(ge=1)
    system_memory_gb: float = Field(gt=0)


class Unified(BaseModel):
    """The prototype's unified JSON. memory_requirement_gb: weights, cache and overhead; all GB are decimal."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_id: str = Field(min_length=1)
    variant_id: str
    version: str
    parameters: str
    precision: AimPrecision
    memory_requirement_gb: float = Field(gt=0)
    recommended_partition_gb: float = Field(gt=0)
    gpu_sharing: UnifiedSharing
    resource_requirements: UnifiedResources
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


def body_of(profile: Profile) -> dict[str, Any]:
    """The whole profile as plain values, without nulls and empty sections."""
    body = without_empty(profile.model_dump(mode="json", exclude_none=True))
    # null is a flag without a value there, so engine_args stay as they are.
    body["engine_args"], body["env_vars"] = dict(profile.engine_args), dict(profile.env_vars)
    return {key: body[key] for key in Profile.model_fields if key in body}


def as_ours(profile: Profile) -> str:
    """The whole profile as YAML."""
    return dump(body_of(profile))


def as_aim(profile: Profile) -> str:
    """AIM's YAML. Raises ProfileError for what AIM's schema cannot say.

    AIM knows no partitions: its detector counts each as a whole GPU, and would give this profile to one. So a
    profile for a part of a card is written `manual_selection_only`: it is for AIM_PROFILE_ID, not for guessing.
    """
    metadata = profile.metadata
    if metadata.gpu not in AIM_GPUS:
        raise _unsaid("metadata.gpu", metadata.gpu, f"AIM's schema knows {', '.join(AIM_GPUS)}")
    if metadata.engine != "vllm":
        raise _unsaid("metadata.engine", metadata.engine, "AIM serves with vllm only")
    body = {key: getattr(profile, key) for key in ("aim_id", "model_id") if getattr(profile, key)}
    manual = metadata.manual_selection_only or profile.is_partitioned
    body["metadata"] = metadata.model_copy(update={"manual_selection_only": manual}).model_dump(mode="json")
    body |= {"engine_args": dict(profile.engine_args), "env_vars": dict(profile.env_vars)}
    return dump(body, _aim_comment(profile))


def _aim_comment(profile: Profile) -> str:
    if profile.partition is None or not profile.is_partitioned:
        return ""
    return (
        f"For {profile.metadata.gpu_count} x {profile.metadata.gpu} in {profile.partition.label}: AIM has no field for "
        "partitions and would take\nthis profile for whole GPUs, so it is selected by AIM_PROFILE_ID only."
    )


def as_unified(profile: Profile, model: ModelFacts | None = None) -> str:
    """The prototype's JSON. model: for the number of parameters, where it is known. Raises ProfileError."""
    need_gb, count = _need_gb(profile), max(1, profile.metadata.gpu_count)
    compute, memory, partitions, size_mib = _device(profile)
    parameters = "unknown" if model is None or model.total_params is None else f"{model.total_params / 1e9:.3g}B"
    unified = Unified(
        model_id=profile.model_id or "",
        variant_id=f"{profile.model_id}-{profile.metadata.precision}",
        version=f"1.0.0-{profile.metadata.precision}",
        parameters=parameters,
        precision=profile.metadata.precision,
        memory_requirement_gb=round(need_gb * count, 2),
        recommended_partition_gb=round(need_gb, 2),
        gpu_sharing=UnifiedSharing(
            enabled=profile.is_partitioned,
            memory_limit_gb=profile.gpu_sharing.memory_limit_gb,
            partition_id=profile.gpu_sharing.partition_id,
            qos_priority=profile.gpu_sharing.qos_priority,
            compute_mode=compute,
            memory_mode=memory,
            partition_count=partitions,
            partition_size_gb=None if size_mib is None else round(size_mib * MIB / 10**9, 2),
        ),
        resource_requirements=UnifiedResources(
            gpu_memory_gb=round(need_gb, 2),
            gpu_count=count,
            cpu_cores=_CPU_CORES * count,
            system_memory_gb=_SYSTEM_MEMORY_GB * count,
        ),
        metadata={"profile": json.loads(profile.model_dump_json())},
    )
    return json.dumps(unified.model_dump(mode="json"), indent=2) + "\n"


def _need_gb(profile: Profile) -> float:
    """Weights, overhead and one full sequence's cache on each device, decimal GB."""
    budget, headroom = profile.evidence.budget_gib, profile.evidence.headroom_gib
    if budget is None or headroom is None:
        raise _unsaid("evidence", "no sizes", "only a derived profile says how much memory it needs")
    return (budget - headroom) * GIB / 10**9


def _device(profile: Profile) -> tuple[Compute, Memory, int, int | None]:
    """Mode, partitions per card and MiB per device."""
    known = catalog().get(profile.metadata.gpu)
    if profile.partition is None:
        return "SPX", "NPS1", 1, known.hbm_mib if known else None
    use = profile.partition
    partitions = by_name(known.name).partitions_in(use.compute) if known else 1
    return use.compute, use.memory, partitions, use.device_memory_mib


def write(profile: Profile, form: Form, model: ModelFacts | None = None) -> str:
    """The profile in that form. Raises ProfileError for what the form cannot say."""
    if form == "unified":
        return as_unified(profile, model)
    return as_aim(profile) if form == "aim" else as_ours(profile)


def read(text: str, named: str = "profile") -> Profile:
    """A profile in any of the forms; JSON is YAML. `named` stands in errors for the file. Raises ProfileError."""
    return profile_of(parsed(text, named, ProfileError))


def profile_of(file: Parsed) -> Profile:
    """The same from a file that was parsed to see what it is."""
    named, text, raw = file.named, file.text, _mapping(file)
    if "gpu_sharing" in raw and "variant_id" in raw:
        return _from_unified(check(Unified, raw, named, ProfileError, text), text, named)
    # `env_vars:` with nothing behind it is an empty mapping to whoever wrote it.
    empty: dict[str, Any] = {key: {} for key in ("engine_args", "env_vars") if key in raw and raw[key] is None}
    return check(Profile, raw | empty, named, ProfileError, text)


def read_file(file: Path) -> Profile:
    """The same from a file. Raises ProfileError naming it."""
    return profile_of(read_parsed(file, ProfileError))


def form_of(text: str) -> Form:
    """Which form a text that `read` accepts is in."""
    raw = _mapping(parsed(text, "profile", ProfileError))
    if "variant_id" in raw:
        return "unified"
    return "aim" if set(raw) <= set(_AIM_KEYS) else "ours"


def _mapping(file: Parsed) -> dict[str, Any]:
    check_kind(file.raw, "profile", file.named, ProfileError)
    if not all(isinstance(key, str) for key in file.raw):
        raise ProfileError(
            f"{file.named}: a key is no word", field=file.named, remedy="`aim-profile export` writes one"
        )
    return file.raw  # type: ignore[no-any-return]  # YAML's own values


def _from_unified(unified: Unified, text: str, named: str) -> Profile:
    """Ours stands whole under metadata.profile; the prototype's own files name no GPU, so none is invented."""
    held = unified.metadata.get("profile")
    if isinstance(held, dict):
        return check(Profile, held, named, ProfileError, text, inside=("metadata", "profile"))
    sharing, resources = unified.gpu_sharing, unified.resource_requirements
    gpu = unified.metadata.get("gpu")
    raw = {
        "aim_id": unified.model_id,
        "model_id": unified.model_id,
        "metadata": Metadata(
            engine="vllm",
            gpu=gpu if isinstance(gpu, str) and gpu in catalog() else "NONE",
            precision=unified.precision,
            gpu_count=min(resources.gpu_count, 8),
            metric="latency",
            manual_selection_only=True,
            type="unoptimized",
        ).model_dump(),
        "partition": PartitionUse(compute=sharing.compute_mode, memory=sharing.memory_mode).model_dump(),
        "gpu_sharing": sharing.model_dump(include={"memory_limit_gb", "partition_id", "qos_priority"}),
        "evidence": {
            "notes": [
                f"read from a unified file that names no GPU and claims {unified.memory_requirement_gb} GB in all: "
                "nothing of it was checked"
            ]
        },
    }
    return check(Profile, raw, named, ProfileError)


def _unsaid(field: str, value: object, why: str) -> ProfileError:
    return ProfileError(
        f"{field}: {value} cannot be said in that form: {why}",
        field=field,
        value=value,
        remedy="export it in another form (ours says everything)",
    )
