"""Our side of ``bench/peers.py``."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from subject import Judge, serve

from aim_guardrail.detectors.base import Asked, Passage
from aim_guardrail.pipeline import Guard
from aim_guardrail.policy import parse_policy, shipped_policy
from aim_guardrail.slots.slot import Slot, Slots

ALL = """\
version: 2
name: bench
prompt:
  - {type: secrets, action: block}
  - {type: pii, action: redact}
  - {type: code, action: flag}
  - {type: toxicity, action: block}
  - {type: injection, action: block}
"""
ONE = "version: 1\nname: bench\nprompt: [{{type: {}, action: redact}}]\n"


def load(name: str) -> tuple[str, Judge]:
    if name == "chat, inline":
        return "secrets and PII, whole check", _inline(Guard.load(shipped_policy("values")))
    if name == "all families":
        return "secrets, PII, code, then toxicity, then injection", _all(Guard.load(parse_policy(ALL, "bench")))
    return f"{name} alone, whole check", _inline(Guard.load(parse_policy(ONE.format(name), "bench")))


def _inline(guard: Guard) -> Judge:
    return lambda text: guard.judge("prompt", Slots([Slot(text)]))


def _all(guard: Guard) -> Judge:
    loop = asyncio.new_event_loop()
    behind: list[Any] = [guard.stages.detector(rule) for rule in guard.policy.rules("prompt") if not rule.is_inline]

    async def judge(text: str) -> None:
        guard.judge("prompt", Slots([Slot(text)]))
        for detector in behind:
            await detector.scan_batch([Passage(text, "prompt", "user")], Asked(time.monotonic() + 60))

    return lambda text: loop.run_until_complete(judge(text))


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1]))
