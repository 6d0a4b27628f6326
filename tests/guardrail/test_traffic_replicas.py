"""Two replicas that share Redis let through no more than the limit. ``SOAK_LIMIT_REQUESTS=10000`` (make soak) is the
long form."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from fake_predictor import FakePredictor
from guarded import ask, guardrail, orders
from redis_server import RedisServer

pytestmark = pytest.mark.system
REQUESTS = int(os.environ.get("SOAK_LIMIT_REQUESTS", "600"))
AT_ONCE = 32
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("unit", ["requests", "tokens"])
async def test_two_replicas_never_exceed_a_limit(predictor: FakePredictor, tmp_path: Path, unit: str) -> None:
    """Of all that arrive within a minute exactly the limit passes; of a longer run no minute holds more than it."""
    limit, cost = REQUESTS // 3, 1 if unit == "requests" else 8  # 4 tokens of the prompt, 4 of an answer
    policy = tmp_path / "policy.yaml"
    options = f"{{{unit}: {{minute: {limit * cost}, per: global}}}}"
    policy.write_text(f"version: 2\nname: p\nprompt: [{{type: traffic, action: block, options: {options}}}]\n")
    flags = ["--policy", str(policy), "--redis_timeout_ms", "10000", "--access_log", "false"]
    with (
        RedisServer() as redis,
        guardrail(predictor.host, "--redis_url", redis.url, *flags) as one,
        guardrail(predictor.host, "--redis_url", redis.url, *flags) as other,
    ):
        began = time.monotonic()
        passed, statuses = await asked(one.url, other.url)
        took_s = time.monotonic() - began
    print(
        f"{unit}: {REQUESTS} requests in {took_s:.1f} s, limit {limit}: {dict(statuses)}, most {most(passed)} a minute"
    )
    assert set(statuses) <= {200, 429}
    assert sum(statuses.values()) == REQUESTS
    assert most(passed) <= limit
    if took_s < 60:
        assert len(passed) == limit


async def asked(*urls: str) -> tuple[list[tuple[float, float]], Counter[int]]:
    """When each request that passed was sent and answered, and how many came to which status."""
    passed, statuses, numbers = list[tuple[float, float]](), Counter[int](), iter(range(REQUESTS))
    # What the model answers has as many tokens as were reserved: nothing is given back.
    body = {**ask("hi from me"), "max_tokens": 4}
    usage = '{"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}}'
    told = orders(status=200, body=usage, headers={"content-type": "application/json"})

    async def ask_on(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            sent = time.monotonic()
            async with session.post(urls[number % len(urls)] + CHAT, json=body, headers=told) as answer:
                await answer.read()
                statuses[answer.status] += 1
                if answer.status == 200:
                    passed.append((sent, time.monotonic()))

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(ask_on(session) for _ in range(AT_ONCE)))
    return passed, statuses


def most(passed: list[tuple[float, float]]) -> int:
    """The most that were certainly let through within a minute: sent in it and answered in it."""
    return max((sum(sent >= start and done < start + 60 for sent, done in passed) for start, _ in passed), default=0)
