"""``aim-guardrail check TEXT``: one text through a policy, as the server would check it."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import orjson
from prometheus_client import CollectorRegistry

from aim_guardrail.cli.given import add_output, loaded, parser, policy_named, run, text_given
from aim_guardrail.cli.refused import Refused
from aim_guardrail.filter_api import Item, judge
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import Direction
from aim_kserve.errors import ServingError
from aim_kserve.tables import plain_table, show

ALLOWED, FOUND, REFUSED = 0, 1, 2
"""Exit codes: it passes as it is (flagged or not); it is redacted or blocked; it could not be checked."""


def main(argv: Sequence[str]) -> int:
    arguments = parser(
        "check", "Check one text as the server would. Exit: 0 passes, 1 redacted or blocked, 2 not checked."
    )
    arguments.add_argument("text", metavar="TEXT", help="the text; - reads standard input")
    arguments.add_argument("--policy", default="chat", help="a shipped policy's name or a file (default: chat)")
    arguments.add_argument("--direction", choices=("prompt", "answer"), default="prompt")
    arguments.add_argument("--role", default="user", help="who says it: user, tool, … (default: user)")
    add_output(arguments)
    return run(_check, arguments, argv)


def _check(given: argparse.Namespace) -> int:
    text, guard = text_given(given.text), loaded(policy_named(given.policy))
    if not guard.watches(cast("Direction", given.direction)):
        raise Refused(f"the policy {guard.policy.name!r} has no rules for the {given.direction}: choose the other")
    found = asyncio.run(_judged(guard, Item(text=text, direction=given.direction, role=given.role)))
    if given.output == "json":
        sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    else:
        _show(found)
    return FOUND if found["action"] in ("redact", "block") else ALLOWED


async def _judged(guard: Guard, item: Item) -> dict[str, Any]:
    """What is said of a text, and the milliseconds it took."""
    screening = Screening(guard, Metrics(CollectorRegistry()), RequestContext("/check"))
    began, cpu = time.perf_counter(), time.process_time()
    try:
        judged = await judge(screening, item)
    except ServingError as error:
        raise Refused(error.message) from error
    finally:
        await guard.stages.close()
    spent = {"wall_ms": (time.perf_counter() - began) * 1000, "cpu_ms": (time.process_time() - cpu) * 1000}
    return {**judged.model_dump(), **{name: round(value, 3) for name, value in spent.items()}}


def _show(found: dict[str, Any]) -> None:
    head = f"{found['action']} by policy {found['policy']} ({found['version']}), {found['wall_ms']:.2f} ms"
    degraded = f", not judged by {', '.join(found['degraded'])}" if found["degraded"] else ""
    sys.stdout.write(head + degraded + "\n")
    if found["findings"]:
        table = plain_table(("family", "label", "action", "found by"), ("score", "from", "to"))
        for f in found["findings"]:
            figures = f"{f['score']:.2f}", str(f["start"]), str(f["end"])
            table.add_row(f["family"], f["label"], f["action"], f["found_by"], *figures)
        show(table)
    if found["action"] == "redact":
        sys.stdout.write(f"{found['text']}\n")
