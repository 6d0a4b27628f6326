"""What is said beside a body: a request's query string, an answer's headers."""

from __future__ import annotations

from urllib.parse import quote_plus, unquote_plus

from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.slots.places import is_plain_key
from aim_guardrail.slots.slot import Slot, Slots


def check_query(screening: Screening, query: bytes) -> bytes:
    """A query string, each name and value checked as it is read; as it came where nothing was found.

    Raises:
        Blocked, Unavailable: see :class:`Screening`.
    """
    fields = [[unquote_plus(part) for part in field.split("=", 1)] for field in query.decode("latin-1").split("&")]
    slots, places = Slots(), []
    for at, (name, *values) in enumerate(fields):
        if not is_plain_key(name):
            slots.items.append(Slot(name, ("query",)))
            places.append((at, 0))
        for value in values:
            slots.items.append(Slot(value, ("query", name), name))
            places.append((at, 1))
    shown, raw = screening.texts("prompt", slots), query.split(b"&")
    for (at, part), slot, text in zip(places, slots.items, shown, strict=True):
        if text != slot.text:
            fields[at][part] = text
            raw[at] = "=".join(map(quote_plus, fields[at])).encode()
    return b"&".join(raw)
