"""Profiles are derived, never stored: model × precision × GPU × partition mode → Profile, or why there is none."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from aim_profile.errors import SizingError
from aim_profile.gpus.catalog import Accelerator, Deployment, PartitionMode, by_name
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.models.known import by_id
from aim_profile.nodes.facts import AllocMode
from aim_profile.sizing.fit import (
    STEP_TOKENS,
    DoesNotFit,
    Request,
    default_context,
    demand,
    fit,
    limit_notes,
    make_request,
)
from aim_profile.sizing.kv_cache import KvDtype
from aim_profile.units import gib

from .engine_args import DeviceShare, engine_args, environment, share_of, weights_state
from .profile import (
    NOT_MEASURED,
    Evidence,
    FineTuning,
    GpuSharing,
    Guardrail,
    Metadata,
    Metric,
    PartitionUse,
    Priority,
    Profile,
    ProfileError,
    ProfileId,
    Weights,
    devices_side_by_side,
    to_aim_precision,
    to_model_precision,
)


class Wanted(BaseModel):
    """What a profile is derived for, beyond model, GPU and mode. None: computed.

    context: max-model-len, 8192 or what the model was made for, whichever is less; concurrency: sequences of
    that length at once, as many as fit; tensor_parallel: the fewest devices that hold one of them; precision:
    the model's own; memory_limit_bytes: the most to take of a device; checkpoint: the repository that holds the
    weights in that precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Precision | None = None
    metric: Metric = "latency"
    context: int | None = Field(default=None, ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    tensor_parallel: int | None = Field(default=None, ge=1)
    kv_dtype: KvDtype = "auto"
    alloc_mode: AllocMode = "CAPPING"
    memory_limit_bytes: int | None = Field(default=None, ge=1)
    checkpoint: str | None = None
    qos_priority: Priority = "medium"
    partition_id: int | None = Field(default=None, ge=0)
    guardrails: tuple[Guardrail, ...] = ()
    finetuning: FineTuning | None = None


class NoSuchProfileError(ProfileError):
    """A well-formed request that no profile meets: an answer (exit code 1), not bad input."""


class Refusal(NamedTuple):
    """Why there is no such profile. shortfall_gib: by how much the nearest try misses, None: not a matter of memory."""

    reason: str
    shortfall_gib: float | None = None


def derive(model: ModelFacts, mode: PartitionMode, wanted: Wanted | None = None) -> Profile | Refusal:
    """The profile for `model` on devices of `mode`, or why there is none.

    Raises SizingError for facts that are missing or a request no device could meet (see sizing.fit).
    """
    wanted = wanted or Wanted()
    accelerator = by_name(mode.accelerator)
    precision = served_precision(model, wanted.precision)
    if refused := _not_computable(accelerator, precision, wanted):
        return refused
    share = share_of(accelerator, mode, wanted.alloc_mode, wanted.memory_limit_bytes)
    if not share.utilization:
        limit = f"a memory limit of {wanted.memory_limit_bytes} bytes"
        return Refusal(f"{limit} is less than an engine can be told to take")
    asked = make_request(
        precision=precision,
        context=wanted.context or default_context(model),
        concurrency=wanted.concurrency or 1,
        kv_dtype=wanted.kv_dtype,
        utilization=share.utilization,
        lora_slots=wanted.finetuning.lora_slots if wanted.finetuning else 0,
        lora_rank=wanted.finetuning.lora_rank if wanted.finetuning else 16,
        max_num_batched_tokens=STEP_TOKENS[wanted.metric],
    )
    found = _smallest(model, mode, share, asked, wanted.tensor_parallel)
    return found if isinstance(found, Refusal) else _build(model, accelerator, mode, share, found, wanted)


def derive_from_id(
    model_id: str, parts: ProfileId, wanted: Wanted | None = None, deployment: Deployment = "bare-metal"
) -> Profile:
    """The profile that a reference names. Raises ProfileError where there is none, with the reason."""
    precision = to_model_precision(parts.precision)
    if precision is None or parts.engine != "vllm":
        raise ProfileError(
            f"profile: {parts.engine} at {parts.precision} is not derived",
            field="profile",
            value=parts.engine,
            remedy="profiles are derived for vllm at int4, int8, fp4, fp8, fp16 and bf16",
        )
    mode = by_name(parts.gpu).mode(parts.partition or "SPX/NPS1", deployment)
    named = {"precision": precision, "metric": parts.metric, "tensor_parallel": parts.gpu_count}
    found = derive(by_id(model_id), mode, (wanted or Wanted()).model_copy(update=named))
    if isinstance(found, Refusal):
        raise NoSuchProfileError(
            f"{model_id}: {found.reason}", field="profile", remedy="`aim-profile fit` names what would fit"
        )
    return found


def served_precision(model: ModelFacts, asked: Precision | None) -> Precision:
    """The one asked for, else the model's own. Raises SizingError where that is none a profile serves."""
    found = asked or model.native_precision
    if found not in ("bf16", "fp16", "fp8", "int8", "int4", "mxfp4"):
        raise SizingError(
            f"{model.id}: its own precision is {found or 'not known'}, which no profile serves",
            field="precision",
            value=found,
            remedy="name one of bf16, fp16, fp8, int8, int4, mxfp4",
        )
    return found  # type: ignore[return-value]


def _not_computable(accelerator: Accelerator, precision: Precision, wanted: Wanted) -> Refusal | None:
    formats = accelerator.matrix_formats
    if precision == "fp8" and not any(name.startswith("fp8") for name in formats):
        return Refusal(f"{accelerator.name} ({accelerator.gfx}) has no fp8 matrix units: use bf16, int8 or int4")
    if wanted.kv_dtype == "fp8" and accelerator.gfx == "gfx90a":
        return Refusal(f"{accelerator.name} ({accelerator.gfx}) has no fp8: leave kv-cache-dtype alone")
    return None


class _Sized(NamedTuple):
    request: Request
    concurrency: int


def _smallest(
    model: ModelFacts, mode: PartitionMode, share: DeviceShare, asked: Request, tensor_parallel: int | None
) -> _Sized | Refusal:
    """The fewest devices side by side that hold the request, else the nearest miss."""
    beside = devices_side_by_side(by_name(mode.accelerator), mode)
    counts = beside if tensor_parallel is None else (tensor_parallel,)
    if tensor_parallel is not None and tensor_parallel not in beside:
        allowed = ", ".join(map(str, beside))
        return Refusal(f"tensor parallel {tensor_parallel}: {mode.accelerator} {mode.label} has {allowed} side by side")
    missed: list[Refusal] = []
    for count in counts:
        request = asked.model_copy(update={"tp": count})
        try:
            sized = fit(model, share.reported_bytes, request)
        except SizingError as problem:
            if problem.field != "tp":
                raise
            missed.append(Refusal(str(problem)))
            continue
        if not isinstance(sized, DoesNotFit):
            return _Sized(request, sized.max_concurrency)
        where = f"{count} of {mode.accelerator} {mode.label}"
        need = f"{sized.precision} at {request.context} tokens on {where}: short by {sized.shortfall_gib} GiB a device"
        missed.append(Refusal(need, sized.shortfall_gib))
    return min(missed, key=lambda miss: float("inf") if miss.shortfall_gib is None else miss.shortfall_gib)


def _build(
    model: ModelFacts, accelerator: Accelerator, mode: PartitionMode, share: DeviceShare, sized: _Sized, wanted: Wanted
) -> Profile:
    request = sized.request
    precision = served_precision(model, wanted.precision)
    weights = weights_state(model, precision, wanted.checkpoint)
    need = demand(model, request)
    whole = mode.partitions == 1 and not accelerator.partitionable
    limit = wanted.memory_limit_bytes
    return Profile(
        aim_id=model.id,
        model_id=wanted.checkpoint or model.id,
        metadata=Metadata(
            engine="vllm",
            gpu=accelerator.name,
            precision=to_aim_precision(precision),
            gpu_count=request.tp,
            metric=wanted.metric,
            # Nobody should be given weights that do not exist by an automatic choice.
            manual_selection_only=weights == "needs a quantised checkpoint",
            type="unoptimized",
        ),
        engine_args=engine_args(
            need,
            share,
            request,
            weights=weights,
            concurrency=wanted.concurrency or sized.concurrency,
            checkpoint_method=_checkpoint_method(model, weights),
            finetuning=wanted.finetuning,
        ),
        env_vars=environment(accelerator, mode, request.tp),
        partition=None if whole else _partition_use(mode, share),
        gpu_sharing=GpuSharing(
            memory_limit_gb=None if limit is None else limit / 10**9,
            partition_id=wanted.partition_id,
            qos_priority=wanted.qos_priority,
        ),
        guardrails=wanted.guardrails,
        finetuning=wanted.finetuning,
        evidence=Evidence(
            weights=weights,
            weights_gib=gib(need.weights),
            kv_gib=gib(share.budget_bytes - need.fixed),
            overhead_gib=gib(need.overhead),
            budget_gib=gib(share.budget_bytes),
            headroom_gib=gib(share.budget_bytes - need.total),
            notes=_notes(model, accelerator, mode, precision, weights, request.tp),
        ),
    )


def _checkpoint_method(model: ModelFacts, weights: Weights) -> str | None:
    """vLLM's --quantization for files of AMD's own quantiser; the other methods it finds in config.json by itself."""
    return "quark" if model.quantization == "quark" and weights == "as published" else None


def _partition_use(mode: PartitionMode, share: DeviceShare) -> PartitionUse:
    return PartitionUse(
        compute=mode.compute,
        memory=mode.memory,
        alloc_mode=share.alloc_mode,
        deployment=mode.deployment,
        tier=mode.tier,
        device_memory_mib=mode.memory_mib,
        compute_units=mode.cus,
    )


def _notes(
    model: ModelFacts,
    accelerator: Accelerator,
    mode: PartitionMode,
    precision: Precision,
    weights: Weights,
    devices: int,
) -> tuple[str, ...]:
    notes = [NOT_MEASURED]
    if mode.tier != "validated":
        notes.append(f"{accelerator.name} {mode.label} is {mode.tier} on {mode.deployment}, not validated by AMD")
    if mode.unproven(devices):
        notes.append(
            f"tensor parallelism over partitions is unproven, whatever the tier of {mode.label}: it was reported to "
            "answer garbage on CPX/NPS4 (vllm#20125); read its answers before anybody relies on them"
        )
    if weights == "needs a quantised checkpoint":
        notes.append(f"{model.id} is published in {model.native_precision}: name a checkpoint that holds {precision}")
    if weights == "quantised at load":
        notes.append("vLLM quantises the published weights while loading: expect a slower start and some loss")
    if precision == "mxfp4" and not any(name == "mxfp4" for name in accelerator.matrix_formats):
        notes.append(f"{accelerator.gfx} has no mxfp4 matrix units: the weights are unpacked for every step")
    if unsure := accelerator.unverified:
        notes.append(f"not established for {accelerator.name}: {', '.join(unsure)}")
    return (*notes, *limit_notes(model), *model.notes)
