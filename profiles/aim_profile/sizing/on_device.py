"""Does a model fit this very device of a node: the one question a runtime asks before it starts an engine."""

from __future__ import annotations

from typing import Literal

from aim_profile.errors import SizingError
from aim_profile.gpus.catalog import by_name
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.nodes.devices import Device
from aim_profile.units import MIB, gib

from . import llama_cpp
from .alternatives import size_on, size_on_bytes, size_on_cpus
from .fit import DEFAULT_UTILIZATION, STEP_TOKENS, DoesNotFit, Engine, Fit, default_context, make_request
from .kv_cache import KvDtype


def size_on_device(
    model: ModelFacts,
    device: Device,
    *,
    engine: Engine | None = None,
    precision: Precision | None = None,
    context: int | None = None,
    concurrency: int = 1,
    tp: int = 1,
    kv_dtype: KvDtype = "auto",
    metric: Literal["latency", "throughput"] = "latency",
    memory_limit_bytes: int | None = None,
    lora_slots: int = 0,
    lora_rank: int = 16,
) -> Fit | DoesNotFit:
    """Whether `model` fits devices like `device`, with the shortfall and what would fit instead where it does not.

    engine None: llama.cpp for a GGUF file, vLLM for anything else. context None: 8192, or what the model was made for.
    tp: devices together, each like this one. memory_limit_bytes: the most to take of it. In allocation mode ALL it
    counts with its share of what it reports. Raises SizingError for facts that are missing, a request no device
    could meet, or a limit above the device.
    """
    share = _share_bytes(device)
    engine = engine or ("llama_cpp" if model.gguf else "vllm")
    request = make_request(
        engine=engine,
        precision=precision,
        context=context or default_context(model),
        concurrency=concurrency,
        tp=tp,
        kv_dtype=kv_dtype,
        utilization=_utilization(device, share, memory_limit_bytes),
        lora_slots=lora_slots,
        lora_rank=lora_rank,
        max_num_batched_tokens=llama_cpp.STEP_TOKENS if engine == "llama_cpp" else STEP_TOKENS[metric],
    )
    if device.kind == "cpu":
        return size_on_cpus(model, share, request, limited=memory_limit_bytes is not None)
    if device.mode is None:
        return size_on_bytes(model, share, request)
    return size_on(model, device.mode, by_name(device.mode.accelerator), request, share)


def _share_bytes(device: Device) -> int:
    """What of the device's memory is its own. Raises SizingError where it is not known, or nothing."""
    reported = device.memory_bytes
    if not reported:
        raise SizingError(
            f"{device.label}: its memory is {'not readable here' if reported is None else '0'}",
            field="memory",
            value=reported,
            remedy="record the node with `aim-profile node export`, fill it in, and give it as --node",
        )
    mode = device.mode
    if device.alloc_mode != "ALL" or mode is None:
        return reported
    return min(reported, by_name(mode.accelerator).mode(mode.label, mode.deployment).memory_bytes)


def _utilization(device: Device, share: int, limit: int | None) -> float:
    if limit is None:
        return DEFAULT_UTILIZATION
    if limit < 1:
        raise SizingError(
            f"memory limit of {limit} bytes", field="memory_limit", value=limit, remedy="say how much, or leave it out"
        )
    if limit > share:
        raise SizingError(
            f"memory limit of {gib(limit)} GiB: {device.label} has {gib(share)} GiB, {gib(limit - share)} GiB less",
            field="memory_limit",
            value=limit,
            remedy=f"ask for at most {share // MIB} MiB, or for a larger device",
        )
    return min(DEFAULT_UTILIZATION, limit / share)
