"""What a device has to do for one step of a model: bytes to read, operations to compute, on each tensor-parallel rank.

A step makes one token of every running sequence. It reads every weight but the input embedding (a row of it) and the
experts that nobody chose, and the cache of every sequence. A prompt costs two operations for each active parameter and
token; the square of attention is left out, so long prompts cost more than is said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from aim_profile.gpus.catalog import Accelerator
from aim_profile.gpus.modes import DeviceMode
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.models.parameters import SIXTEEN_BIT_BYTES, expert_parameters

from .asked import RequestShape
from .fit import weight_bytes
from .kv_cache import KvDtype, kv_bytes_per_sequence, not_sized, shape_of

# The format a device computes in; where it has no units for that, and for integers of 4 bits, 16-bit units work.
_COMPUTED_IN: Mapping[str, str] = {"fp8": "fp8", "int8": "int8", "mxfp4": "mxfp4"}


class Work(NamedTuple):
    """dense_bytes: weights that every step reads; expert_bytes: all experts; expert_share: the part of them that one
    token needs; cache_bytes: of one sequence, half through its answer; operations: of one token; layers: of the model.
    """

    layers: int
    dense_bytes: float
    expert_bytes: float
    expert_share: float
    cache_bytes: float
    operations: float

    def weights_read(self, sequences: float) -> tuple[float, float]:
        """Least and most bytes of weights a step of so many sequences reads: all choose the same experts, or none."""
        most = min(1.0, self.expert_share * max(1.0, sequences))
        return self.dense_bytes + self.expert_share * self.expert_bytes, self.dense_bytes + most * self.expert_bytes


class Speeds(NamedTuple):
    """Peaks of one device: bytes and operations a second, and its part of the card's compute units.

    operations: of the matrix units in the model's format; None: not established, so that nothing bounds it.
    """

    bytes_per_s: float
    operations_per_s: float | None
    share: float


def work_of(
    model: ModelFacts, precision: Precision | None, shape: RequestShape, tp: int = 1, kv_dtype: KvDtype = "auto"
) -> Work:
    """The work of one rank. Raises SizingError for facts that are missing or a tp that does not divide."""
    dimensions = shape_of(model, tp)
    total = weight_bytes(model, precision)
    if model.linear_params is None or model.other_params is None:
        raise not_sized(model)
    embedding = 0 if dimensions.tied else dimensions.vocab * dimensions.hidden
    kept = model.other_params * SIXTEEN_BIT_BYTES
    linear_bytes = max(0, total - kept)
    experts = expert_parameters(dimensions) if model.expert_params is None else model.expert_params
    per_token = dimensions.experts.per_token / dimensions.experts.count if dimensions.experts else 1.0
    expert_bytes = linear_bytes * experts / model.linear_params
    aside = (embedding + dimensions.vision_params) * SIXTEEN_BIT_BYTES
    active = model.linear_params - experts * (1 - per_token) + dimensions.vocab * dimensions.hidden
    middle = shape.prompt_tokens + shape.answer_tokens // 2
    return Work(
        layers=dimensions.layers,
        dense_bytes=max(0.0, total - expert_bytes - aside) / tp,
        expert_bytes=expert_bytes / tp,
        expert_share=per_token,
        cache_bytes=float(kv_bytes_per_sequence(model, middle, kv_dtype=kv_dtype, tp=tp)),
        operations=2.0 * active / tp,
    )


def speeds_of(accelerator: Accelerator, mode: DeviceMode, precision: str | None) -> Speeds | None:
    """The peaks of a device of that mode; None where its bandwidth is not established."""
    bandwidth = accelerator.bandwidth_of(mode)
    if bandwidth is None:
        return None
    wanted = _COMPUTED_IN.get(precision or "bf16", "bf16")
    known = accelerator.operations_per_clock_per_cu
    operations = accelerator.operations_of(mode, wanted if wanted in known else "bf16")
    return Speeds(bandwidth, operations, mode.cus / accelerator.compute_units)
