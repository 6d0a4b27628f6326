"""Which tool call a piece of a streamed answer belongs to."""

from __future__ import annotations

from typing import Any

from aim_guardrail.slots.slot import Json


class Calls:
    """Numbers tool calls as they come. OpenAI tells them by ``index``; some servers leave it out, or give all the same
    (ollama#7881), and some give every piece an id of its own: a call begins with a name under an id not yet known.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, int] = {}
        self._by_index: dict[Any, int] = {}
        self._taken: set[int] = set()
        self._next = 0  # above all that are taken
        self._last = -1

    def number(self, call: Json) -> int:
        """The call's own number, its index wherever that is its alone."""
        index = call.get("index")
        index = index if type(index) is int else None
        identifier = call.get("id")
        identifier = identifier if type(identifier) is str and identifier else None
        number = self._known(index, identifier, _begins(call))
        if number is None:
            number = index if index is not None and index not in self._taken else self._next
            self._taken.add(number)
            self._next = max(self._next, number + 1)
        if identifier is not None:
            self._by_id.setdefault(identifier, number)
        if index is not None:
            self._by_index[index] = number
        self._last = number
        return number

    def _known(self, index: int | None, identifier: str | None, begins: bool) -> int | None:
        if identifier is not None and identifier in self._by_id:
            return self._by_id[identifier]
        if identifier is not None and begins:
            return None
        if index is not None:
            return self._by_index.get(index)
        return self._last if self._last >= 0 and not begins else None


def _begins(call: Json) -> bool:
    return any(isinstance(part, dict) and part.get("name") for part in (call.get("function"), call.get("custom")))
