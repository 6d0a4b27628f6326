"""Many requests while the engine's process is killed again and again: every answer right or refused, none lost.

200 requests as a test; ``make soak`` asks ``SOAK_REQUESTS`` of them and prints what it saw.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from served import Served

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "200"))
AT_ONCE = 64
KILLS = 3
QUESTIONS = [
    f"{one} and {two} are" for one in ("Cats", "Rivers", "Old ships", "Bees") for two in ("dogs", "snow", "ink")
]
TOKENS = 4
DEADLINE_S = 60 + REQUESTS  # a request takes a tenth of a second here
GROWTH_MIB = 32


@dataclass
class Seen:
    """What came back."""

    answers: list[tuple[str, str]] = field(default_factory=list)  # question, text
    ids: list[str] = field(default_factory=list)
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


def test_killed_engines_lose_and_alter_no_answer(embedded_model: Path):
    model = ["--model_name", "smollm2", "--model_dir", str(embedded_model.parent), "--threads", "1"]
    flags = ["--max_model_len", "512", "--max_concurrency", "8", "--deterministic", "--access_log=false"]
    with Served(["-m", "aim_runtime", *model, *flags]) as server:
        undisturbed = asyncio.run(ask(server, QUESTIONS))
        assert len(undisturbed.answers) == len(QUESTIONS), undisturbed
        expected = dict(undisturbed.answers)
        questions = [QUESTIONS[index % len(QUESTIONS)] for index in range(REQUESTS)]
        half, before = REQUESTS // 2, 0
        seen = Seen()
        for part in (questions[:half], questions[half:]):
            asyncio.run(ask(server, part, seen, kills=KILLS if before == 0 else 0))
            resident = psutil.Process(server.process.pid).memory_info().rss // 2**20
            before = before or resident
    print(
        f"\n{REQUESTS} requests, {AT_ONCE} at once, engine killed {KILLS} times: {len(seen.answers)} answered, "
        f"{seen.refused} times 503, {len(seen.wrong)} wrong; server {before} → {resident} MiB"
    )
    assert seen.wrong == []
    assert Counter(question for question, _ in seen.answers) == Counter(questions)
    assert len(set(seen.ids)) == REQUESTS
    assert all(expected[question] == text for question, text in seen.answers)
    assert seen.refused  # the kills were noticed
    assert resident - before < GROWTH_MIB


async def ask(server: Served, questions: list[str], seen: Seen | None = None, kills: int = 0) -> Seen:
    """Ask all, so many at once; kill the engine's process each time another share of them is answered."""
    seen = seen or Seen()
    turn, share = asyncio.Semaphore(AT_ONCE), len(questions) // (kills + 1)
    pending = [share * (number + 1) for number in range(kills)]
    done = 0

    async def one(question: str) -> None:
        nonlocal done
        async with turn:
            await _one(session, server, question, seen)
        done += 1
        if pending and done >= pending[0]:
            pending.pop(0)
            _kill_engine(server)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:
        await asyncio.wait_for(asyncio.gather(*map(one, questions)), DEADLINE_S)
    return seen


async def _one(session: aiohttp.ClientSession, server: Served, question: str, seen: Seen) -> None:
    """Ask until it is answered, as OpenAI's client does: a 503 says that it has not been."""
    body = {"model": "smollm2", "prompt": question, "max_tokens": TOKENS, "temperature": 0}
    while True:
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            answer = await response.json()
        if response.status == 200:
            seen.answers.append((question, answer["choices"][0]["text"]))
            seen.ids.append(answer["id"])
            return
        if response.status != 503 or not answer["error"]["message"] or "retry-after" not in response.headers:
            seen.wrong.append(f"{response.status}: {answer}")
            return
        seen.refused += 1
        await asyncio.sleep(0.5)


def _kill_engine(server: Served) -> None:
    for child in psutil.Process(server.process.pid).children():
        child.send_signal(signal.SIGKILL)
