"""What a workload may say instead of replicas: the requests that come, and what is promised of their latency.

load: {requests_per_s: 20, prompt_tokens: 512, answer_tokens: 256}
slo: {ttft_ms: 500, itl_ms: 50}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, ValidationError, model_validator

from aim_profile.files.place import MisplacedError, did_you_mean
from aim_profile.sizing.asked import Promise, RequestShape


class Load(RequestShape):
    """Requests that come in a second, and their tokens: what they may have, where some are longer than others."""

    requests_per_s: float = Field(gt=0, le=1e6, allow_inf_nan=False)


class Latencies(Promise):
    """Promised latencies; at least one is given."""

    @model_validator(mode="after")
    def _promises_something(self) -> Self:
        if self.ttft_ms is None and self.itl_ms is None:
            raise ValueError("give ttft_ms, itl_ms or both")
        return self


def latencies(value: object) -> object:
    """A mapping as Latencies, anything else as it is. Raises MisplacedError at the key that is wrong.

    pydantic itself would name every type that `slo` may be, and none of its keys.
    """
    if not isinstance(value, Mapping):
        return value
    try:
        return Latencies.model_validate(value)
    except ValidationError as problem:
        errors = problem.errors(include_url=False)
        first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
        why = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            why = f"unknown key; {did_you_mean(str(first['loc'][-1]), Latencies.model_fields)}"
        raise MisplacedError(first["loc"], why) from problem
