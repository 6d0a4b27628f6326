"""What KServe's V2 messages ask for and answer, by the size of their texts: they have no usage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aim_guardrail.traffic.estimate import Asked, asked, text_bytes, tokens_of
from aim_kserve.kserve import InferRequest


def asked_of(request: InferRequest) -> tuple[Asked, int]:
    """What is asked for, and the bytes of all its tensors."""
    bound = asked({"parameters": dict(request.parameters or {})}).answer
    size = sum(_size(tensor) for tensor in request.inputs)
    return Asked(tokens_of(text_of(request.inputs)), bound), size


def text_of(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors that hold texts."""
    return sum(_size(tensor) for tensor in tensors if tensor.datatype == "BYTES")


def _size(tensor: Any) -> int:
    if tensor._raw_data:
        return len(tensor._raw_data)
    data = tensor.data
    return text_bytes([each.decode("utf-8", "replace") if isinstance(each, bytes) else each for each in data])
