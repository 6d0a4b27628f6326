"""Which replica gets a request.

The one that answered the same beginning of a prompt before, whose cache has it, as long as that one is not much busier
than others; else the less busy of two drawn at random (the power of two choices: Mitzenmacher, 2001).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Generic, Protocol, TypeVar

from aim_runtime.engines.base import Json

#: How much busier than the best of the others, in requests per slot and shares of the KV cache, a replica may be and
#: still get a prompt back.
AFFINITY_SLACK = 0.5
PREFIX_CHARACTERS = 512
PREFIXES_AT_MOST = 8192


class Busy(Protocol):
    def busy(self) -> float: ...


B = TypeVar("B", bound=Busy)


class Choice(Generic[B]):
    """Chooses, and remembers where prompts went.

    Args:
        random: draws the two; tests give a seeded one.
    """

    def __init__(self, random: random.Random) -> None:
        self._random = random
        self._known: OrderedDict[bytes, B] = OrderedDict()

    def of(self, candidates: Sequence[B], prefix: bytes) -> B:
        """One of at least one."""
        drawn = self._random.sample(candidates, 2) if len(candidates) > 2 else candidates
        best = min(drawn, key=lambda one: one.busy())
        known = self._known.get(prefix)
        if known is not None and known in candidates and known.busy() <= best.busy() + AFFINITY_SLACK:
            best = known
        if prefix:
            self._known[prefix] = best
            self._known.move_to_end(prefix)
            if len(self._known) > PREFIXES_AT_MOST:
                self._known.popitem(last=False)
        return best

    def forget(self, gone: B) -> None:
        for prefix in [prefix for prefix, one in self._known.items() if one is gone]:
            del self._known[prefix]


def prefix_of(body: Json) -> bytes:
    """What stands for the beginning of a prompt: its first characters, and the adapter, whose cache is its own. Empty
    where the body has no text; anything may stand in it."""
    text = "".join(_texts(body))
    if not text:
        return b""
    return blake2b(f"{body.get('model')}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _texts(body: Json) -> list[str]:
    texts: list[str] = []
    length = 0
    for piece in _pieces(body):
        texts.append(piece[: PREFIX_CHARACTERS - length])
        length += len(texts[-1])
        if length >= PREFIX_CHARACTERS:
            break
    return texts


def _pieces(body: Json) -> Iterator[str]:
    for field in ("prompt", "input"):
        if isinstance(body.get(field), str):
            yield body[field]
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            return
        content = message.get("content")
        yield f"\0{message.get('role')}\0"
        if isinstance(content, str):
            yield content
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]
