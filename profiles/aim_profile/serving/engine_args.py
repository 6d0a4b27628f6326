"""vLLM's arguments and environment for one model on one kind of device, computed from the sizing.

Keys and value forms are AIM's (dashes; numbers as numbers), so they stand in an AIM profile as they are. Only what
differs from vLLM's own default, or what the partition decides, is set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import JsonValue

from aim_profile.gpus.catalog import Accelerator, PartitionMode, memory_partitions
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.nodes.facts import AllocMode
from aim_profile.sizing.fit import DEFAULT_UTILIZATION, Demand, Request, budget_bytes
from aim_profile.units import MIB

from .profile import FineTuning, Weights

# AIM's published profiles never admit more (max-num-seqs of all 144 profiles that set it, aim-build@2be2cf8). Fewer
# than the tokens of any step, which vLLM insists on.
MOST_SEQUENCES = 512
_DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16"}
_SIXTEEN_BIT = ("bf16", "fp16", "fp32")
# gfx targets AMD's AITER kernels are built for; AIM's gfx90a profiles switch it off.
_AITER = ("gfx942", "gfx950")


class DeviceShare(NamedTuple):
    """What one device reports and what of it this engine may use, bytes.

    CAPPING: the two are equal. ALL: the device reports its whole memory partition and shares it with its
    siblings; nothing but the engine's own arguments keeps them apart.
    """

    reported_bytes: int
    share_bytes: int
    alloc_mode: AllocMode
    limit_bytes: int | None = None

    @property
    def utilization(self) -> float:
        """gpu-memory-utilization: 0.90 of the share, less where a memory limit says so, four decimals, floored."""
        wanted = DEFAULT_UTILIZATION * self.share_bytes / self.reported_bytes
        allowed = wanted if self.limit_bytes is None else min(wanted, self.limit_bytes / self.reported_bytes)
        # The epsilon keeps 0.9 from becoming 0.8999 in binary; a millionth of a device is less than a page.
        return math.floor(allowed * 10_000 + 1e-6) / 10_000

    @property
    def budget_bytes(self) -> int:
        """Bytes the engine may take."""
        return budget_bytes(self.reported_bytes, self.utilization)


def share_of(
    accelerator: Accelerator, mode: PartitionMode, alloc_mode: AllocMode, limit_bytes: int | None = None
) -> DeviceShare:
    """The share of one device of `mode`. limit_bytes: the user's own limit."""
    share = mode.memory_bytes
    reported = accelerator.hbm_mib // memory_partitions(mode.memory) * MIB if alloc_mode == "ALL" else share
    return DeviceShare(max(reported, share), share, alloc_mode, limit_bytes)


def weights_state(model: ModelFacts, precision: Precision, checkpoint: str | None) -> Weights:
    """Where weights of that precision come from; vLLM turns 16-bit files into fp8 while it loads, no others."""
    if checkpoint is not None:
        return "checkpoint given"
    if precision == model.native_precision or (precision in _SIXTEEN_BIT and model.native_precision in _SIXTEEN_BIT):
        return "as published"
    if precision == "fp8" and model.native_precision in _SIXTEEN_BIT:
        return "quantised at load"
    return "needs a quantised checkpoint"


def engine_args(
    need: Demand,
    share: DeviceShare,
    request: Request,
    *,
    weights: Weights,
    concurrency: int,
    checkpoint_method: str | None = None,
    finetuning: FineTuning | None = None,
) -> dict[str, JsonValue]:
    """vLLM's arguments, in the order a person would write them: those that `request` was sized with.

    concurrency: sequences of `request.context` tokens that may run at once; checkpoint_method: vLLM's name of how
    the files were quantised, where it must be said. In ALL mode the KV cache gets its bytes by name
    (`kv-cache-memory-bytes`), because a fraction of what the device reports is profiled against memory that
    siblings are using; the fraction still stands, since vLLM checks it against free memory when it starts.
    """
    args: dict[str, JsonValue] = {"tensor-parallel-size": request.tp}
    if request.tp > 1:
        args["distributed-executor-backend"] = "mp"
    args["gpu-memory-utilization"] = share.utilization
    if share.alloc_mode == "ALL":
        args["kv-cache-memory-bytes"] = share.budget_bytes - need.fixed
    args["max-model-len"] = request.context
    args["max-num-seqs"] = min(concurrency, MOST_SEQUENCES)
    args["max-num-batched-tokens"] = request.max_num_batched_tokens
    if dtype := _DTYPES.get(request.precision or ""):
        args["dtype"] = dtype
    if method := "fp8" if weights == "quantised at load" else checkpoint_method:
        args["quantization"] = method
    if request.kv_dtype == "fp8":
        args["kv-cache-dtype"] = "fp8"
    if finetuning is not None and finetuning.lora_slots:
        args |= {"enable-lora": True, "max-loras": finetuning.lora_slots, "max-lora-rank": finetuning.lora_rank}
    return args


def environment(accelerator: Accelerator, mode: PartitionMode, tensor_parallel: int) -> dict[str, str]:
    """Environment for that gfx target, after AIM's published profiles.

    NCCL_MIN_NCHANNELS=112 is for the 304 compute units of a whole GPU: on partitions of 20 to 152 the channels
    would take what the kernels need, so it is left out there. Device filters (`*_VISIBLE_DEVICES`) never appear.
    """
    if accelerator.gfx not in _AITER:
        return {"VLLM_ROCM_USE_AITER": "0"}
    found = {"GPU_ARCHS": accelerator.gfx, "HSA_NO_SCRATCH_RECLAIM": "1"}
    if tensor_parallel > 1 and mode.partitions == 1:
        found["NCCL_MIN_NCHANNELS"] = "112"
    found["VLLM_ROCM_USE_AITER"] = "1"
    return found
