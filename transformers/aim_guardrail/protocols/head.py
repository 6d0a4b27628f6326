"""What is said beside a body: a request's query string, an answer's headers."""

from __future__ import annotations

from urllib.parse import quote_plus, unquote_plus

from aim_guardrail.pipeline.screening import Screening, by_size
from aim_guardrail.slots.places import is_plain_key
from aim_guardrail.slots.slot import Slot, Slots

Headers = list[tuple[bytes, bytes]]

#: Headers of HTTP itself and of tracing, which say nothing of an answer's text, and credentials meant for the client.
_NO_TEXT = (
    *(b"content-", b"cache-control", b"server", b"date", b"etag", b"expires", b"last-modified", b"vary", b"age"),
    *(b"accept", b"access-control-", b"allow", b"retry-after", b"set-cookie", b"www-authenticate", b"strict-transport"),
    *(b"x-request-id", b"traceparent", b"inference-header-content-length"),
)


async def check_query(screening: Screening, query: bytes) -> bytes:
    """A query string, each name and value checked as it is read; as it came where nothing was found.

    Raises:
        Blocked, Unavailable: see :class:`Screening`.
    """
    fields, slots, places = await by_size(len(query), _read, query)
    shown, raw = await screening.screen_texts("prompt", slots, len(query)), query.split(b"&")
    for (at, part), slot, text in zip(places, slots.items, shown, strict=True):
        if text != slot.text:
            fields[at][part] = text
            raw[at] = "=".join(map(quote_plus, fields[at])).encode()
    return b"&".join(raw)


def _read(query: bytes) -> tuple[list[list[str]], Slots, list[tuple[int, int]]]:
    """A query's fields, their texts, and where in the fields each of these stands."""
    fields = [[unquote_plus(part) for part in field.split("=", 1)] for field in query.decode("latin-1").split("&")]
    slots, places = Slots(), []
    for at, (name, *values) in enumerate(fields):
        if not is_plain_key(name):
            slots.items.append(Slot(name, ("query",)))
            places.append((at, 0))
        for value in values:
            slots.items.append(Slot(value, ("query", name), name))
            places.append((at, 1))
    return fields, slots, places


def check_headers(screening: Screening, headers: Headers) -> Headers:
    """An answer's headers, those that may say anything checked; each is context for its value.

    Raises:
        Blocked, Unavailable: see :class:`Screening`.
    """
    at = [index for index, (name, _) in enumerate(headers) if not name.startswith(_NO_TEXT)]
    if not at:
        return headers
    slots = Slots([_slot(*headers[index]) for index in at])
    checked = list(headers)
    for index, slot, text in zip(at, slots.items, screening.texts("answer", slots), strict=True):
        if text != slot.text:
            checked[index] = headers[index][0], text.encode("latin-1", "replace")
    return checked


def _slot(name: bytes, value: bytes) -> Slot:
    key = name.decode("latin-1")
    return Slot(value.decode("latin-1"), ("headers", key), key)
