"""A V2 body before KServe sees it: how much there is of it, and its binary form.

KServe's model of a request describes every wrong part (half a million empty inputs: 13 s), and its reader makes a
Python object of every element of a binary tensor (30 MB of booleans: 8 s), both in the event loop. Here parts are
counted first, and a tensor's bytes stay bytes, as over gRPC. The binary form:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import orjson
from pydantic import ValidationError

from aim_kserve.errors import BadRequest
from aim_kserve.http import MAX_COMMAS, check_values
from aim_kserve.kserve import InferenceRequest, InferRequest, RequestInput

#: KServe's parser takes four times as long for a value as ours: half a second for these.
MAX_V2_COMMAS = MAX_COMMAS // 4
#: Tensors, dimensions, parameters and other fields of one request. Elements are bounded by the commas.
MAX_PARTS = 4096
MAX_DIMENSIONS = 32
#: Bytes of one element: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
_ELEMENT_BYTES = {
    **{"BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8},
    **{"INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8},
    **{"FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8},
}
_SIZE = "binary_data_size"


class _Input(RequestInput):  # type: ignore[misc]  # KServe ships no types
    data: list[Any] = []  # noqa: RUF012  a pydantic field: copied for each


class _BinaryRequest(InferenceRequest):  # type: ignore[misc]
    inputs: list[_Input]


def check_v2(text: bytes) -> None:
    """Refuse the JSON of a request that would hold every other one up.

    Raises:
        BadRequest: no JSON, or more commas or parts than a request has.
    """
    check_values(text, MAX_V2_COMMAS)
    check_parts(sum(_parts(_loaded(text))))


def check_parts(parts: int) -> None:
    """Raises BadRequest when a request has more than MAX_PARTS."""
    if parts > MAX_PARTS:
        raise BadRequest(
            f"the body has {parts} parts and may have {MAX_PARTS}: its tensors, their dimensions and parameters"
        )


def _loaded(text: bytes) -> Any:
    """FastAPI's reader, which comes next, also takes NaN, half characters and UTF-16: no answer could repeat them."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"Unrecognized request format: {error}") from None  # KServe's words


def _parts(request: Any) -> Iterator[int]:
    if not isinstance(request, dict):
        return
    yield len(request)
    yield _length(request.get("parameters"))
    for field in ("inputs", "outputs"):
        tensors = request.get(field)
        yield _length(tensors)
        for tensor in tensors if isinstance(tensors, list) else ():
            if isinstance(tensor, dict):
                yield len(tensor) + _length(tensor.get("shape")) + _length(tensor.get("parameters"))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (list, dict)) else 0


def read_binary(body: bytes, json_bytes: int, model_name: str) -> InferRequest:
    """A request whose first ``json_bytes`` are JSON, and whose tensors' bytes follow in their order.

    A tensor's bytes are its ``_raw_data``; its ``data`` is empty then. Fields nobody knows are in ``unknown_fields``.

    Raises:
        BadRequest: the JSON is none or no request; sizes, shapes and bytes do not agree.
    """
    parsed = _validated(body[:json_bytes])
    request = InferRequest.from_inference_request(parsed, model_name)
    request.unknown_fields = list(parsed.model_extra or ())
    at = json_bytes
    for index, tensor in enumerate(parsed.inputs):
        where = f"inputs[{index}]"
        size = _binary_size(tensor, where, len(body) - at)
        if size is not None:
            _check_shape(tensor, where, size)
            request.inputs[index]._raw_data = body[at : at + size]
            at += size
    if at < len(body):
        raise BadRequest(f"{len(body) - at} bytes follow the last tensor: check every {_SIZE}", param="inputs")
    return request


def _validated(text: bytes) -> _BinaryRequest:
    try:
        request: _BinaryRequest = _BinaryRequest.model_validate(_loaded(text))
        return request
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        *path, name = fault["loc"] or ("body",)
        if fault["type"] == "missing":
            holder = ".".join(map(str, path)) or "the body"
            raise BadRequest(f"{holder} lacks {name!r}", param=str(name)) from None
        where = ".".join(map(str, fault["loc"])) or "the body"
        raise BadRequest(
            f"the body is not a V2 inference request: {where}: {fault['msg']} (got {str(fault['input'])[:80]!r})",
            param=where,
        ) from None


def _binary_size(tensor: _Input, where: str, left: int) -> int | None:
    """Bytes of a tensor in the binary part; None where it has its elements in the JSON."""
    parameters = tensor.parameters or {}
    if ("data" in tensor.model_fields_set) == (_SIZE in parameters):
        lacks = f"{where} lacks 'data'" if _SIZE not in parameters else where
        raise BadRequest(f"{lacks}: give either 'data' or '{_SIZE}'", param="data")
    if _SIZE not in parameters:
        return None
    size = parameters[_SIZE]
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= left:
        at = f"{where}.parameters.{_SIZE}"
        raise BadRequest(f"{at}: must be 0 to the {left} bytes that are left (got {size!r})", param=at)
    return size


def _check_shape(tensor: _Input, where: str, size: int) -> None:
    """That so many bytes are a tensor of that shape, as far as its datatype tells."""
    shape, datatype = tensor.shape, tensor.datatype.upper()
    if len(shape) > MAX_DIMENSIONS:
        raise BadRequest(f"{where}.shape: {len(shape)} dimensions; {MAX_DIMENSIONS} are the most", param="shape")
    negative = next((length for length in shape if length < 0), None)
    if negative is not None:
        raise BadRequest(f"{where}.shape: {negative} is no length: give the lengths of the data sent", param="shape")
    if datatype == "BYTES":
        return
    if datatype not in _ELEMENT_BYTES:
        known = ", ".join((*_ELEMENT_BYTES, "BYTES"))
        raise BadRequest(f"{where}.datatype: {tensor.datatype!r} is none of {known}", param="datatype")
    count = math.prod(shape)
    if count * _ELEMENT_BYTES[datatype] != size:
        needed = count * _ELEMENT_BYTES[datatype]
        raise BadRequest(
            f"{where}: {count} elements of {datatype} are {needed} bytes, not {size}", param=f"{where}.shape"
        )
