"""The V2 protocol's tensors of text: BYTES elements checked one by one, in JSON and in the binary extension.

https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.md. Strings in a V2 body's JSON
are checked as in any JSON; this file is for what is not JSON.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from aim_guardrail.exact_json import exact
from aim_guardrail.pipeline.screening import Screening, by_size
from aim_guardrail.policy import Direction
from aim_guardrail.protocols.places import V2
from aim_guardrail.slots.pictures import is_picture_file, picture
from aim_guardrail.slots.places import Kind
from aim_guardrail.slots.slot import Json, Slot, Slots
from aim_kserve.errors import BadRequest, ContentBlocked, UpstreamFailed
from aim_kserve.http import json_length, parse_object
from aim_kserve.kserve import InferRequest, InferResponse, to_http_parameters

#: Elements of a tensor that are few enough to be looked at one by one, and what one of more is taken for, in bytes.
_FEW, _LARGE = 64, 64


async def check_binary(screening: Screening, direction: Direction, body: bytes, length: bytes) -> tuple[bytes, int]:
    """A body of JSON and the raw tensors after it, checked; with the length of its JSON.

    Raises:
        BadRequest: a prompt's lengths that do not add up.
        UpstreamFailed: an answer's.
        Blocked, Unavailable: see :class:`Screening`.
    """
    with _blame(direction):
        return await _checked_binary(screening, direction, body, length)


async def _checked_binary(screening: Screening, direction: Direction, body: bytes, length: bytes) -> tuple[bytes, int]:
    split = json_length(length, len(body))
    head, tensors = await by_size(len(body), _read, body, split)
    changed = await screening.screen(direction, head, V2, size=split)
    raws = []
    for tensor, raw in tensors:
        if tensor.get("datatype") == "BYTES":
            checked = await _check_raw(screening, direction, raw, str(tensor.get("name")))
            if checked is not None:
                raw, changed = checked, True
                tensor["parameters"]["binary_data_size"] = len(raw)
        raws.append(raw)
    if not changed and not screening.has_repeated_keys(body[:split]):
        return body, split
    text = await by_size(split, orjson.dumps, head)
    return b"".join([text, *raws]), len(text)


def _read(body: bytes, split: int) -> tuple[Json, list[tuple[Json, bytes]]]:
    """A body's JSON, and its tensors after it."""
    head = exact(parse_object(body[:split]), body[:split])
    return head, _raw_tensors(head, body, split)


@contextmanager
def _blame(direction: Direction) -> Iterator[None]:
    """``with``: what is malformed in an answer is the predictor's fault, not the client's."""
    try:
        yield
    except BadRequest as error:
        if direction == "prompt" or isinstance(error, ContentBlocked):
            raise
        raise UpstreamFailed(f"the predictor's answer: {error.message}", code="predictor_invalid") from error


def _raw_tensors(head: Json, body: bytes, offset: int) -> list[tuple[Json, bytes]]:
    """The tensors whose data follow the JSON, which ends at `offset`, each with its data. Raises BadRequest."""
    found = []
    for tensor in _binary_tensors(head):
        size = tensor["parameters"]["binary_data_size"]
        raw = body[offset : offset + size]
        if len(raw) != size:
            raise BadRequest(f"{tensor.get('name')}: binary_data_size {size}, but {len(raw)} bytes are left")
        offset += size
        found.append((tensor, raw))
    if offset != len(body):
        raise BadRequest(f"binary_data_size: {len(body) - offset} bytes follow the last tensor: state whose they are")
    return found


def _binary_tensors(head: Json) -> list[Json]:
    tensors: list[Any] = []
    for name in ("inputs", "outputs"):
        tensors += head[name] if isinstance(head.get(name), list) else []
    found = []
    for tensor in tensors:
        parameters = tensor.get("parameters") if isinstance(tensor, dict) else None
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is not None:
            if type(size) is not int or size < 0:
                raise BadRequest(f"{tensor.get('name')}: binary_data_size must be a number of bytes (got {size!r})")
            found.append(tensor)
    return found


async def check_tensors(screening: Screening, direction: Direction, message: InferRequest | InferResponse) -> None:
    """A message of KServe's, checked in place: its BYTES tensors and its string parameters.

    Raises:
        BadRequest: a prompt's tensor that is cut short.
        UpstreamFailed: an answer's.
        Blocked, Unavailable: see :class:`Screening`.
    """
    with _blame(direction):
        await _check_tensors(screening, direction, message)


async def _check_tensors(screening: Screening, direction: Direction, message: InferRequest | InferResponse) -> None:
    await _check_names(screening, direction, message)
    for tensor in message.inputs if isinstance(message, InferRequest) else message.outputs:
        if tensor.datatype != "BYTES":
            continue
        if tensor._raw_data:
            raw = await _check_raw(screening, direction, tensor._raw_data, tensor.name)
            tensor._raw_data = tensor._raw_data if raw is None else raw
        else:
            data = await _check_data(screening, direction, tensor.data, tensor.name)
            tensor.data = tensor.data if data is None else data


async def _check_names(screening: Screening, direction: Direction, message: InferRequest | InferResponse) -> None:
    """What strings there are beside the tensors' elements: the id, names, parameters of all."""
    said: Json = {"id": message.id, "parameters": message.parameters}
    parts: dict[str, list[Any]] = {}
    if isinstance(message, InferRequest):
        parts = {"inputs": message.inputs, "outputs": message.request_outputs or []}
    else:
        parts = {"outputs": message.outputs}
    for key, items in parts.items():
        said[key] = [{"name": item.name, "parameters": to_http_parameters(item.parameters or {})} for item in items]
    if not await screening.screen(direction, said, V2):
        return
    message.id, message.parameters = said["id"], said["parameters"]
    for key, items in parts.items():
        for item, shown in zip(items, said[key], strict=True):
            item._name, item.parameters = shown["name"], shown["parameters"] or None


def said_in(tensors: Iterable[Any]) -> bytes:
    """The elements of all tensors of text, as the binary extension has them: what a digest of a gRPC message is of."""
    texts = [tensor for tensor in tensors if tensor.datatype == "BYTES"]
    return b"".join(tensor._raw_data or pack(_flat(tensor.data)) for tensor in texts)


def _flat(data: Any) -> list[bytes]:
    """A tensor's JSON data, which may be nested, as its elements."""
    if isinstance(data, (str, bytes)):
        return [data.encode() if isinstance(data, str) else data]
    if not isinstance(data, Iterable):
        raise BadRequest(f"a BYTES tensor holds {data!r}, not a string")
    return [element for item in data for element in _flat(item)]


async def _check_raw(screening: Screening, direction: Direction, raw: bytes, name: str) -> bytes | None:
    """A tensor's elements as they are packed, if they are to be others."""
    size = len(raw)
    elements, slots = await by_size(size, _of_raw, raw, name, _looks_at_pictures(screening))
    shown = await screening.screen_texts(direction, slots, size)
    return await by_size(size, _packed, elements, slots, shown)


async def _check_data(screening: Screening, direction: Direction, data: Any, name: str) -> list[str] | None:
    """A tensor's elements as JSON has them, if they are to be others."""
    size = _size(data)
    slots = await by_size(size, _of_data, data, name, _looks_at_pictures(screening))
    shown = await screening.screen_texts(direction, slots, size)
    return shown if await by_size(size, _differ, slots, shown) else None


def _size(data: Any) -> int:
    """At least how many bytes a tensor's data have, without looking at more than a few."""
    if isinstance(data, (str, bytes)):
        return len(data)
    if not isinstance(data, (list, tuple)):
        return 0
    return len(data) * _LARGE if len(data) > _FEW else sum(map(_size, data))


def _looks_at_pictures(screening: Screening) -> bool:
    return screening.guard.policy.images != "pass"


def _of_raw(raw: bytes, name: str, pictures: bool) -> tuple[list[bytes], Slots]:
    elements = unpack(raw)
    return elements, _slots(elements, name, pictures)


def _of_data(data: Any, name: str, pictures: bool) -> Slots:
    return _slots(_flat(data), name, pictures)


def _slots(elements: list[bytes], name: str, pictures: bool) -> Slots:
    """Each element of the tensor ``name`` as text; what is not UTF-8 as what a lenient reader makes of it."""
    texts = [element.decode("utf-8", "replace") for element in elements]
    slots = Slots([Slot(text, (name, index), name) for index, text in enumerate(texts)])
    if pictures:
        slots.pictures = list(_pictures(elements, texts, name))
    return slots


def _pictures(elements: list[bytes], texts: list[str], name: str) -> Iterator[Slot]:
    """The elements that are pictures: files as they are, data URIs and Base64."""
    for index, (element, text) in enumerate(zip(elements, texts, strict=True)):
        if is_picture_file(element[:18]):
            yield Slot(base64.b64encode(element).decode(), (name, index), kind="picture")
        elif (seen := picture(Kind.FREE, (name, index), text)) is not None:
            yield Slot(text, (name, index), kind=seen)


def _packed(elements: list[bytes], slots: Slots, shown: list[str]) -> bytes | None:
    if not _differ(slots, shown):
        return None
    told = zip(elements, slots.items, shown, strict=True)
    return pack([element if text == slot.text else text.encode() for element, slot, text in told])


def _differ(slots: Slots, shown: list[str]) -> bool:
    return any(slot.text != text for slot, text in zip(slots.items, shown, strict=True))


def unpack(raw: bytes) -> list[bytes]:
    """A BYTES tensor's elements: each a 4-byte little-endian length and that many bytes.

    Raises:
        BadRequest: it is cut short.
    """
    elements, offset = [], 0
    while offset < len(raw):
        end = offset + 4
        length = struct.unpack_from("<I", raw, offset)[0] if end <= len(raw) else 0
        offset, end = end, end + length
        if end > len(raw):
            raise BadRequest("a BYTES tensor's binary data is cut short: a 4-byte length and that many bytes each")
        elements.append(raw[offset:end])
        offset = end
    return elements


def pack(elements: list[bytes]) -> bytes:
    """The inverse of :func:`unpack`."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def to_rest(request: InferRequest) -> tuple[bytes, int | None]:
    """A gRPC request as a V2 REST body, and the length of its JSON where raw tensors follow it.

    KServe's own ``InferRequest.to_rest`` forgets each tensor's ``binary_data_size``.
    """
    inputs: list[Json] = []
    raws: list[bytes] = []
    for tensor in request.inputs:
        item: Json = {"name": tensor.name, "shape": list(tensor.shape), "datatype": tensor.datatype}
        parameters = to_http_parameters(tensor.parameters or {})
        elements = unpack(tensor._raw_data) if tensor._raw_data and tensor.datatype == "BYTES" else None
        if elements is not None or tensor._raw_data is None:
            item["data"] = _as_json(elements if elements is not None else tensor.data)
        if item.get("data") is None:
            raw = tensor._raw_data if tensor._raw_data is not None else pack(tensor.data)
            parameters["binary_data_size"] = len(raw)
            item.pop("data", None)
            raws.append(raw)
        inputs.append({**item, "parameters": parameters} if parameters else item)
    head: Json = {"inputs": inputs}
    if request.id:
        head["id"] = request.id
    if request.request_outputs:
        head["outputs"] = [
            {"name": output.name, "parameters": to_http_parameters(output.parameters or {})}
            for output in request.request_outputs
        ]
    if request.parameters:
        head["parameters"] = to_http_parameters(request.parameters)
    text = orjson.dumps(head)
    return b"".join([text, *raws]), len(text) if raws else None


def _as_json(elements: Any) -> list[Any] | None:
    """Elements as JSON has them; None where one is not UTF-8."""
    try:
        return [element.decode() if isinstance(element, bytes) else element for element in elements]
    except UnicodeDecodeError:
        return None


def from_rest(body: bytes, length: bytes, request: InferRequest) -> InferResponse:
    """A V2 REST answer for the gRPC client that sent ``request``.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, struct.error, InferenceError: it is not one.
        UpstreamFailed: its lengths do not add up.
    """
    if length:
        with _blame("answer"):  # KServe takes what is cut short or too long
            split = json_length(length, len(body))
            _raw_tensors(parse_object(body[:split]), body, split)
        answer = InferResponse.from_bytes(body, split)
    else:
        answer = InferResponse.from_rest(orjson.loads(body))
    return InferResponse(
        response_id=answer.id or request.id or "",
        model_name=answer.model_name or request.model_name,
        model_version=answer.model_version,
        infer_outputs=answer.outputs,
        parameters=answer.parameters,
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=request.request_outputs,
    )
