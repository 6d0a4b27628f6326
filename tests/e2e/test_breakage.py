"""What breaks does not spread: clients that leave, a runtime that dies mid-stream and comes back.

24 streams are broken off as a test; ``make soak`` breaks ``SOAK_STREAMS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from aim_runtime.stack import Stack, running
from ports import free_ports

pytestmark = pytest.mark.model

STREAMS = int(os.environ.get("SOAK_STREAMS", "24"))
AT_ONCE = 8
ANSWERS = 20
# Greedy: the policy is to see the same words each time.
BODY = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "ignore_eos": True,
    "temperature": 0,
}


@pytest.fixture
def stack(embedded_model: Path) -> Stack:
    http, grpc, runtime_http, runtime_grpc = free_ports(4)
    folder = str(embedded_model.parent)
    return Stack("smollm2", folder, "127.0.0.1", http, grpc, runtime_http, runtime_grpc, policy=None)


@pytest.fixture
def processes(stack: Stack) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    with running(stack, show_logs=False) as processes:
        yield processes


def gauge(url: str, name: str) -> float:
    """The sum of a metric's samples at ``url``/metrics."""
    text = httpx.get(f"{url}/metrics").text
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(map(float, values))


def runtime_url(stack: Stack) -> str:
    return f"http://127.0.0.1:{stack.runtime_http_port}"


async def events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def break_off(client: httpx.AsyncClient, stack: Stack, number: int) -> None:
    """Start a stream, read ``number % 3`` events, leave."""
    body = {**BODY, "stream": True, "max_tokens": 400}
    async with client.stream("POST", f"{stack.url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        read = 0
        async with contextlib.aclosing(events(response)) as stream:
            async for _ in stream:
                read += 1
                if read > number % 3:
                    return


async def test_broken_streams_leave_nothing_behind(stack: Stack, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        for start in range(0, STREAMS, AT_ONCE):
            await asyncio.gather(*(break_off(client, stack, start + i) for i in range(AT_ONCE)))
            assert await falls_to_zero(runtime_url(stack), "aim_requests_running")
        answers = [ask(client, stack, tokens=4) for _ in range(ANSWERS)]
        assert [status for status, _ in await asyncio.gather(*answers)] == [200] * ANSWERS
    assert await falls_to_zero(stack.url, "guardrail_upstream_connections")
    assert await falls_to_zero(runtime_url(stack), "aim_requests_running")


async def falls_to_zero(url: str, name: str, within_s: float = 5.0) -> bool:
    """Polls every 20 ms. The slot itself is free within one decode step; the deadline is for a busy test machine."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if await asyncio.to_thread(gauge, url, name) == 0:
            return True
        await asyncio.sleep(0.02)
    return False


async def ask(client: httpx.AsyncClient, stack: Stack, tokens: int) -> tuple[int, dict[str, object]]:
    response = await client.post(f"{stack.url}/v1/chat/completions", json={**BODY, "max_tokens": tokens})
    return response.status_code, response.json()


async def test_runtime_killed_mid_stream(stack: Stack, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        body = {**BODY, "stream": True, "max_tokens": 400}
        seen = []
        async with client.stream("POST", f"{stack.url}/v1/chat/completions", json=body) as response:
            async for event in events(response):
                seen.append(event)
                if len(seen) == 3:
                    processes["runtime"].kill()
        assert seen[-1] == "[DONE]"
        assert "error" in json.loads(seen[-2])

        asked = time.monotonic()
        response = await client.post(f"{stack.url}/v1/chat/completions", json=BODY)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["message"]
        assert time.monotonic() - asked < 2  # the bound on the answer, not a benchmark

        with restarted_runtime(stack):
            for _ in range(400):
                status, _ = await ask(client, stack, tokens=2)
                if status == 200:
                    break
                assert status == 503
                await asyncio.sleep(0.05)
            assert status == 200
        assert processes["guardrail"].poll() is None


@contextlib.contextmanager
def restarted_runtime(stack: Stack) -> Iterator[None]:
    with subprocess.Popen([sys.executable, *stack.commands()["runtime"]], stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
            assert process.wait(30) == 0
