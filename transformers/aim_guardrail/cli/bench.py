"""``aim-guardrail bench``: what a policy's rules cost on this machine, a text of each length at a time."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson

from aim_guardrail.cli.given import add_output, loaded, parser, policy_named, run
from aim_guardrail.cli.refused import Refused
from aim_guardrail.detectors.base import Asked, Passage
from aim_guardrail.pipeline import Guard
from aim_guardrail.policy import Direction
from aim_guardrail.slots.slot import Slot, Slots
from aim_kserve.tables import plain_table, show

LENGTHS = (50, 500, 4000)
_PROSE = (
    "Could you help me plan the release? We have two weeks, the tests are slow, and the database migration from "
    "one version to the next still needs a rehearsal on a copy of production. Last time we forgot the search index, "
    "and it took Maria and me until midnight to bring it back. I would rather write the steps down first, and ask the "
    "team on Tuesday whether three people are enough. "
)
#: What six values in a text cost.
_VALUES = (
    "Mail jane.doe@example.com or call +1 415-555-2671; card 4111 1111 1111 1111, IBAN DE89 3704 0044 0532 0130 00, "
    "host 203.0.113.45, SSN 536-22-1478. "
)


def main(argv: Sequence[str]) -> int:
    arguments = parser("bench", "CPU and wall milliseconds of a policy's rules on this machine.")
    arguments.add_argument("--policy", default="chat", help="a shipped policy's name or a file (default: chat)")
    arguments.add_argument("--direction", choices=("prompt", "answer"), default="prompt")
    arguments.add_argument("--texts", type=int, default=200, metavar="N", help="texts of each kind (default: 200)")
    add_output(arguments)
    return run(_bench, arguments, argv)


def _bench(given: argparse.Namespace) -> int:
    if not 1 <= given.texts <= 100_000:
        raise Refused(f"--texts {given.texts}: give 1 to 100000")
    policy = policy_named(given.policy)
    guard = loaded(policy)
    if not guard.watches(given.direction):
        raise Refused(f"the policy {policy.name!r} has no rules for the {given.direction}: choose the other")
    rows = asyncio.run(_measured(guard, given.direction, given.texts))
    if given.output == "json":
        sys.stdout.buffer.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        return 0
    table = plain_table(("what", "text"), ("CPU ms p50", "p95", "wall ms p50", "p95"))
    for row in rows:
        table.add_row(
            row["what"], row["text"], *(f"{row[c]:.3f}" for c in ("cpu_p50", "cpu_p95", "wall_p50", "wall_p95"))
        )
    show(table)
    return 0


def texts(chars: int, count: int, *, values: bool = False) -> list[str]:
    """So many different texts of so many characters; with values, those stand at their end."""
    end = _VALUES if values else ""
    long = _PROSE * (chars // len(_PROSE) + 2)
    return [
        f"{at}. {long[at % len(_PROSE) :][: max(chars - len(end) - len(str(at)) - 2, 0)]}{end}" for at in range(count)
    ]


async def _measured(guard: Guard, direction: Direction, count: int) -> list[dict[str, Any]]:
    rows = []
    kinds = [(f"{chars} characters", texts(chars, count)) for chars in LENGTHS]
    kinds.append(("500, six values", texts(500, count, values=True)))
    for kind, some in kinds:
        rows.append(await _row("inline rules", kind, some, _inline(guard, direction)))
        behind = [rule for rule in guard.policy.rules(direction) if not rule.is_inline]
        rows += [await _row(rule.name, kind, some, _batch(guard.stages.detector(rule), direction)) for rule in behind]
    await guard.stages.close()
    return rows


def _inline(guard: Guard, direction: Direction) -> Callable[[str], Any]:
    async def judge(text: str) -> None:
        guard.judge(direction, Slots([Slot(text)]))

    return judge


def _batch(detector: Any, direction: Direction) -> Callable[[str], Any]:
    async def judge(text: str) -> None:
        await detector.scan_batch([Passage(text, direction, "user")], Asked(time.monotonic() + 60))

    return judge


async def _row(what: str, kind: str, some: Sequence[str], judge: Callable[[str], Any]) -> dict[str, Any]:
    await judge(some[0])  # what is made the first time
    cpu, wall = [], []
    for text in some:
        began, spent = time.perf_counter(), time.process_time()
        await judge(text)
        cpu.append((time.process_time() - spent) * 1000)
        wall.append((time.perf_counter() - began) * 1000)
    figures = {
        f"{name}_p{q}": float(np.percentile(v, q)) for name, v in (("cpu", cpu), ("wall", wall)) for q in (50, 95)
    }
    return {"what": what, "text": kind, "n": len(some), **figures}
