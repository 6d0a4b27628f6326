"""A body's slots as detectors read them, parts that are read as one as one, and their findings as rulings on slots."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from aim_guardrail.detectors.base import Finding, Passage
from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.policy import Direction, settle
from aim_guardrail.slots.slot import Slots

#: What a key is that says nothing but what it names: no sentence.
_is_name = re.compile(r"[A-Za-z0-9_.:/$-]{1,40}").fullmatch


def as_read(slots: Slots) -> Iterator[str]:
    """Every text, and those that are read as one as one."""
    yield from (slot.text for slot in slots.items)
    yield from ("".join(slots.items[part].text for part in run) for run in slots.joined)


def passages_of(direction: Direction, slots: Slots, texts: list[str]) -> tuple[list[tuple[int, ...]], list[Passage]]:
    """What batch detectors look at: every text, parts that are read as one as one, and keys that are more than a name;
    which slots each is of."""
    runs: list[tuple[int, ...]] = []
    passages: list[Passage] = []
    joined = {at: run for run in slots.joined for at in run}
    for at, slot in enumerate(slots.items):
        run = joined.get(at, (at,))
        if slot.kind == "number" or run[0] != at or (slot.kind == "name" and _is_name(slot.text)):
            continue
        text = "".join(texts[part] for part in run)
        if text.strip():
            runs.append(run)
            passages.append(Passage(text, direction, slot.role, slot.key))
    return runs, passages


def rulings_of(runs: list[tuple[int, ...]], findings: Sequence[Sequence[Finding]]) -> list[Ruling]:
    """What was found in each passage, on the slots it is of; nothing for those without findings."""
    return [Ruling(run, settle(found)) for run, found in zip(runs, findings, strict=True) if found]
