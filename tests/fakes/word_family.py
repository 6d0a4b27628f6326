"""``python -m word_family ARGUMENTS``: the transformer with one more family, ``words``, whose model is a list of words.

Its detector is a real `BatchDetector` at the seam where a classifier stands: it is awaited, judges whole passages, and
is slow, fails or hangs where a passage says so:

``badword``     found, label ``BAD``; ``mildword`` label ``MILD``
``slowword``    it takes 0.4 s
``hangword``    it never answers
``failword``    it raises

``options: {log: FILE}``: each passage that it was asked about is written there, a JSON line each.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import orjson

from aim_guardrail.detectors.base import Asked, Finding, Label, Passage
from aim_guardrail.detectors.families import FAMILIES, Family, Options, Wanted

_WORD = re.compile(r"badword|mildword")
_LABELS = {"badword": "BAD", "mildword": "MILD"}


class WordOptions(Options):
    log: str = ""


class Words:
    """Finds its words."""

    family = "words"
    cost: Literal["model", "remote"] = "model"
    digest = "words-1"

    def __init__(self, log: str = "") -> None:
        self.asked: list[Passage] = []
        self.at_once = self.most_at_once = 0
        self._log = Path(log) if log else None

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        self.asked += passages
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self._log is not None:
                with self._log.open("ab") as file:
                    lines = [{"text": p.text, "direction": p.direction, "prompt": len(asked.prompt)} for p in passages]
                    file.write(b"".join(orjson.dumps(line) + b"\n" for line in lines))
            for passage in passages:
                await self._wait(passage.text)
            return [[self._finding(match) for match in _WORD.finditer(passage.text)] for passage in passages]
        finally:
            self.at_once -= 1

    async def _wait(self, text: str) -> None:
        if "failword" in text:
            raise ZeroDivisionError("the text is none of the log's business")
        if "hangword" in text:
            await asyncio.sleep(3600)
        if "slowword" in text:
            await asyncio.sleep(0.4)

    @staticmethod
    def _finding(match: re.Match[str]) -> Finding:
        return Finding("words", _LABELS[match[0]], match.start(), match.end(), 1.0, "words")

    async def close(self) -> None:
        pass


def _build(wanted: Wanted) -> Words:
    assert isinstance(wanted.options, WordOptions)
    return Words(wanted.options.log)


WORDS = Family("words", "batch", {"BAD": Label(0.5, 1.0), "MILD": Label(0.5, 1.0)}, _build, WordOptions)
FAMILIES.setdefault("words", WORDS)

if __name__ == "__main__":
    from aim_guardrail.__main__ import main

    main()
