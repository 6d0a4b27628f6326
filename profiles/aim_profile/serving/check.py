"""What a well-formed profile claims, held against the facts: does it fit, does it agree with itself and the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from aim_profile.errors import AimProfileError, SizingError
from aim_profile.gpus.catalog import PartitionMode, by_name, catalog
from aim_profile.models.facts import ModelFacts
from aim_profile.models.known import by_id
from aim_profile.sizing.fit import DEFAULT_UTILIZATION, Request, fit, make_request
from aim_profile.units import GIB

from .engine_args import share_of
from .profile import Profile, devices_side_by_side, to_model_precision


class Finding(NamedTuple):
    """error: it contradicts the facts and would not start, or not where it says. note: worth knowing."""

    level: Literal["error", "note"]
    field: str
    problem: str


def check(profile: Profile) -> list[Finding]:
    """Every contradiction between a profile and the catalogue, and what could not be checked."""
    if profile.metadata.gpu not in catalog():
        return [Finding("note", "metadata.gpu", f"{profile.metadata.gpu} is not in the catalogue: nothing was sized")]
    accelerator = by_name(profile.metadata.gpu)
    use = profile.partition
    mode = accelerator.mode(use.label if use else "SPX", use.deployment if use else "bare-metal")
    return [*_placed(profile, mode), *_memory(profile, mode)]


def _placed(profile: Profile, mode: PartitionMode) -> Iterator[Finding]:
    if mode.tier == "unsupported":
        problem = f"{mode.accelerator} {mode.label} is unsupported on {mode.deployment}"
        yield Finding("error", "partition", problem)
    elif mode.tier == "driver-legal":
        problem = f"{mode.accelerator} {mode.label}: the driver accepts it, AMD does not validate it"
        yield Finding("note", "partition", problem)
    beside = devices_side_by_side(by_name(mode.accelerator), mode)
    if profile.metadata.gpu_count not in beside:
        allowed = ", ".join(map(str, beside))
        yield Finding(
            "error", "metadata.gpu_count", f"{profile.metadata.gpu_count} side by side: possible are {allowed}"
        )
    if profile.unproven:
        problem = "tensor parallelism over partitions is unproven (vllm#20125): a validated mode does not speak for it"
        yield Finding("note", "metadata.gpu_count", problem)
    claimed = profile.partition.device_memory_mib if profile.partition else None
    if claimed is not None and claimed > mode.memory_mib:
        problem = f"{claimed} MiB claimed, the smallest device of {mode.label} reports {mode.memory_mib}"
        yield Finding("error", "partition.device_memory_mib", problem)
    if profile.metadata.type == "optimized" and profile.partition is not None and not profile.evidence.measured:
        yield Finding("note", "metadata.type", "optimized, but nothing says it was measured on a partition")


def _memory(profile: Profile, mode: PartitionMode) -> Iterator[Finding]:
    if profile.aim_id is None:
        yield Finding("note", "aim_id", "a general profile: whether a model fits is asked with `aim-profile fit`")
        return
    try:
        model = by_id(profile.aim_id)
        reported = _reported_bytes(profile, mode)
        request = sizing_request(profile, reported)
        # Its own finding says what a context beyond the model's limit means; memory is sized all the same.
        sized = fit(model.model_copy(update={"max_positions": None}), reported, request)
    except AimProfileError as unknown:
        # Another checkpoint may have a precision that the catalogue cannot know.
        yield Finding("note", unknown.field if isinstance(unknown, SizingError) else "aim_id", f"not sized: {unknown}")
        return
    yield from _length(profile, model, request.context)
    if not sized.fits:
        problem = (
            f"{sized.weights_gib} GiB of weights, {sized.overhead_gib} of overhead and {sized.kv_gib} of cache for one "
            f"sequence of {sized.context} tokens: short by {sized.shortfall_gib} GiB on {mode.accelerator} {mode.label}"
        )
        yield Finding("error", "engine_args", problem)
        return
    sequences = profile.engine_arg("max-num-seqs")
    if isinstance(sequences, int) and sequences > sized.max_concurrency:
        problem = f"{sequences} admitted, {sized.max_concurrency} of full length fit: the rest wait or are preempted"
        yield Finding("note", "engine_args.max-num-seqs", problem)


def _length(profile: Profile, model: ModelFacts, context: int) -> Iterator[Finding]:
    """vLLM refuses a context beyond the model's own limit; another checkpoint, or one told so, may go further."""
    if model.max_positions is None or context <= model.max_positions:
        return
    lengthened = any(profile.engine_arg(name) for name in ("rope-scaling", "hf-overrides"))
    lengthened |= profile.env_vars.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1"
    refused = profile.model_id == profile.aim_id and not lengthened
    problem = f"{context} is more than the {model.max_positions} positions {model.id} was made for"
    yield Finding("error" if refused else "note", "engine_args.max-model-len", problem)


def _reported_bytes(profile: Profile, mode: PartitionMode) -> int:
    alloc_mode = profile.partition.alloc_mode if profile.partition else "CAPPING"
    return share_of(by_name(mode.accelerator), mode, alloc_mode).reported_bytes


def sizing_request(profile: Profile, reported_bytes: int) -> Request:
    """What a profile's own engine arguments ask of a device that reports so many bytes, for one sequence.

    Raises SizingError naming the argument that nothing can be sized with.
    """
    utilization, context = profile.engine_arg("gpu-memory-utilization"), profile.engine_arg("max-model-len")
    step_tokens = profile.engine_arg("max-num-batched-tokens")
    slots = profile.finetuning
    return make_request(
        precision=to_model_precision(profile.metadata.precision),
        context=context if isinstance(context, int) else 8192,
        tp=max(1, profile.metadata.gpu_count),
        kv_dtype="fp8" if str(profile.engine_arg("kv-cache-dtype")).startswith("fp8") else "auto",
        utilization=float(utilization) if isinstance(utilization, int | float) else DEFAULT_UTILIZATION,
        lora_slots=slots.lora_slots if slots else 0,
        lora_rank=slots.lora_rank if slots else 16,
        max_num_batched_tokens=step_tokens if isinstance(step_tokens, int) else _vllm_step_tokens(reported_bytes),
    )


def _vllm_step_tokens(reported_bytes: int) -> int:
    """Tokens vLLM's server takes into a step by default, by device memory (EngineArgs.get_batch_defaults, 0.32)."""
    return 16384 if reported_bytes >= 160 * GIB else 8192 if reported_bytes >= 70 * GIB else 2048
