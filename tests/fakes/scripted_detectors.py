"""Batch detectors that do what the text says, and the transformer with them: ``python scripted_detectors.py FLAGS``.

``NAME=what[:value]`` in a text is an order for the detector whose option `name` is NAME, obeyed in turn:

``bad``        found, label BAD; ``worse``: label WORSE
``sleep:S``    answers after S seconds
``fail``       raises; ``denied``: Misconfigured; ``garbage``: an answer that is none
``stuck:S``    does not end when it is cancelled, for S seconds
``thread:S``   computes for S seconds in a thread

What they do is a JSON line on stderr: ``{"detector": NAME, "did": "asked" | "answered" | "cancelled", "chars": N}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import orjson

from aim_guardrail.detectors.base import Asked, BatchDetector, Finding, Label, Misconfigured, Passage
from aim_guardrail.detectors.families import FAMILIES, Family, Options, Wanted
from aim_guardrail.detectors.threads import Threads

ORDER = re.compile(r"(\w+)=(\w+)(?::([\d.]+))?")


class ScriptedOptions(Options):
    name: str
    cost: Literal["model", "remote"] = "model"
    cacheable: bool = False
    digest: str = "1"


class Scripted:
    """`did`: what it did, last one last."""

    family = "scripted"

    def __init__(self, options: ScriptedOptions) -> None:
        self.options = options
        self.did: list[tuple[str, int]] = []
        self._threads = Threads(1, "scripted", most_waiting=0)

    @property
    def cost(self) -> Literal["model", "remote"]:
        return self.options.cost

    @property
    def digest(self) -> str:
        return self.options.digest

    @property
    def cacheable(self) -> bool:
        return self.options.cacheable

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        chars = sum(len(passage.text) for passage in passages)
        self._note("asked", chars)
        try:
            found = [await self._scan(passage.text) for passage in passages]
        except asyncio.CancelledError:
            self._note("cancelled", chars)
            raise
        self._note("answered", chars)
        return found

    async def close(self) -> None:
        self._threads.close()

    async def _scan(self, text: str) -> list[Finding]:
        found = []
        for order in ORDER.finditer(text):
            if order[1] != self.options.name:
                continue
            if order[2] in ("bad", "worse"):
                found.append(Finding("scripted", order[2].upper(), *order.span(), 0.9, "script"))
            else:
                found += await self._do(order[2], float(order[3] or 0))
        return found

    async def _do(self, what: str, seconds: float) -> list[Finding]:
        if what == "sleep":
            await asyncio.sleep(seconds)
        elif what == "thread":
            await self._threads.run(time.sleep, seconds)
        elif what == "stuck":
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(until - time.monotonic())
        elif what == "garbage":
            return [Finding("scripted", "BAD", 0, 10**6, 0.9, "script")]
        elif what == "denied":
            raise Misconfigured("the judge answers 401: give its key")
        elif what == "fail":
            raise RuntimeError("the text is none of the log's business")
        return []

    def _note(self, what: str, chars: int) -> None:
        self.did.append((what, chars))
        line = orjson.dumps({"detector": self.options.name, "did": what, "chars": chars}).decode()
        print(line, file=sys.stderr, flush=True)


def build(wanted: Wanted) -> BatchDetector:
    assert isinstance(wanted.options, ScriptedOptions)
    return Scripted(wanted.options)


LABELS = {"BAD": Label(0.5, 1.0), "WORSE": Label(0.5, 1.0)}
FAMILY = Family("scripted", "batch", LABELS, build, ScriptedOptions)


def register() -> None:
    """Make the family known to policies that are read from now on."""
    FAMILIES["scripted"] = FAMILY


def did(stderr: str) -> list[dict[str, Any]]:
    """What the detectors of a process did, by what it printed."""
    return [orjson.loads(line) for line in stderr.splitlines() if line.startswith('{"detector"')]


if __name__ == "__main__":
    register()
    from aim_guardrail.__main__ import main

    main()
