"""What a row says, whatever format it came in."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import orjson

#: A message as OpenAI has it: role, content, tool_calls (their arguments as objects), …
Message = dict[str, Any]


class Conversation(NamedTuple):
    """messages: text contents, tool calls with their arguments as objects. tools: JSON schemas, as OpenAI has them.
    untrained: positions of assistant messages that the row itself gives weight 0.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    untrained: tuple[int, ...] = ()


class Completion(NamedTuple):
    """A text and how it goes on: code, and other text that no chat template is put around."""

    prompt: str
    completion: str


class Labelled(NamedTuple):
    """label: position among the job's labels."""

    text: str
    label: int


Example = Conversation | Completion | Labelled


def content_hash(example: Example) -> int:
    """64 bits of what the row says: equal for rows that teach the same, however they were written down."""
    try:
        said = orjson.dumps(list(example))
    except TypeError:  # a number of more than 64 bits, in the arguments of a call
        said = json.dumps(list(example)).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")
