"""JSON among other words: what a tool prints for people, before, between and behind what it prints for machines."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# A line that JSON begins with: `[AMDSMI_STATUS_…]` and `[WARNING]` are not JSON.
_JSON_LINE = re.compile(r"[ \t]*[\[{][ \t]*(?:[\"\[\]{}]|\r?$)", re.MULTILINE)
# A byte order mark, and what colours a terminal: no JSON holds either.
_MARKS = re.compile(r"\A\ufeff|\x1b\[[0-9;?]*[ -/]*[@-~]")
_MOST_SAID, _MOST_SAID_CHARS = 8, 200


def documents(text: str) -> tuple[list[Any], list[str]]:
    """The JSON values of an output, in order, and its other lines. Raises ValueError where there is no JSON, or
    where it breaks off."""
    text = _MARKS.sub("", text)
    try:
        return [json.loads(text)], []
    except ValueError as problem:
        whole = problem
    found: list[Any] = []
    other: list[str] = []
    at = 0
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        if _JSON_LINE.match(text, at):
            value, stop = json.JSONDecoder().raw_decode(text, at + len(text[at:end]) - len(text[at:end].lstrip()))
            found.append(value)
            end = stop
        elif line := text[at:end].strip():
            other.append(line)
        at = end
    if not found:
        raise whole
    return found, other


def notes_of(lines: Sequence[str], named: str) -> list[str]:
    """What was said beside the JSON, for people: a few lines, without frames of asterisks."""
    words = [line for line in lines if any(char.isalnum() for char in line)]
    shown = [f"{named} said: {line.strip('* ')[:_MOST_SAID_CHARS]}" for line in words[:_MOST_SAID]]
    return shown + [f"{named} said {len(words) - _MOST_SAID} lines more"] * (len(words) > _MOST_SAID)
