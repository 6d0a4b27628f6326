"""Apply: the texts that may pass, put where the slots were found. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

from aim_guardrail.slots.places import SHADOWS
from aim_guardrail.slots.slot import Inner, Json, Path, Slots


def apply(body: Json, slots: Slots, texts: Sequence[str], shadows: bool) -> bool:
    """Put ``texts``, one for each slot, in their places in ``body``; True if ``body`` is another now.

    A string that is JSON and gives a key twice is written anew: our parser saw only the last of the two.

    Args:
        shadows: null what repeats a text in another form wherever one within it was changed (in answers).
    """
    changed = [(slot, text) for slot, text in zip(slots.items, texts, strict=True) if text != slot.text]
    stale = _repeating(slots.inner) if slots.inner else set()
    if not changed and not stale:
        return False
    for slot, _ in changed:
        stale.update(slot.path[:end] for end in range(len(slot.path)) if slot.path[:end] in slots.inner)
    names: dict[Path, dict[str, str]] = {}
    for slot, text in changed:
        way = _way(body, slots.inner, slot.path)
        if slot.kind == "name":
            names.setdefault(slot.path[:-1], {})[slot.text] = text
        else:
            way[-1][slot.path[-1]] = text
        for node in way if shadows else ():
            drop_shadows(node)
    # Paths are those of the body as it came: the deepest first, and a string before a key around it.
    left = [(-len(path), path) for path in stale] + [(-len(path) - 1, path) for path in names]
    for _, path in sorted(left, key=lambda item: item[0]):
        if path in stale:
            _way(body, slots.inner, path)[-1][path[-1]] = orjson.dumps(slots.inner[path].box[""]).decode()
        else:
            _rename(_way(body, slots.inner, (*path, ""))[-1], names[path])
    return True


def drop_shadows(node: Any) -> bool:
    """Null what repeats an answer's text piece by piece; True if there was any."""
    dropped = False
    if type(node) is dict:
        for shadow in SHADOWS:
            if node.get(shadow) is not None:
                node[shadow] = None
                dropped = True
    return dropped


def _way(body: Json, inner: dict[Path, Inner], path: Path) -> list[Any]:
    """Every object and list from the root to the one that holds the last step of ``path``."""
    node: Any = body
    way = [node]
    for end in range(1, len(path)):
        within = inner.get(path[:end])
        node = within.box if within is not None else node[path[end - 1]]
        way.append(node)
    return way


def _rename(node: Json, names: dict[str, str]) -> None:
    items = [(names.get(key, key), value) for key, value in node.items()]
    node.clear()
    node.update(items)


def _repeating(inner: dict[Path, Inner]) -> set[Path]:
    """Where a string that is JSON gives a key twice. Each key has its colon: as many colons as keys, and none does."""
    return {path for path, said in inner.items() if said.text.count(":") != said.keys and repeats_a_key(said.text)}


def repeats_a_key(text: str | bytes) -> bool:
    """Whether an object in valid JSON, not too deep, gives a key twice."""
    repeated = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal repeated
        repeated = repeated or len(pairs) != len({key for key, _ in pairs})

    json.loads(text, object_pairs_hook=look)
    return repeated
