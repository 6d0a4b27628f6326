"""Mixed requests while clients leave at any moment and engines are killed: clean answers, and nothing stays taken.

A few hundred as a test; ``make soak`` sends ``SOAK_STORM`` of them and prints what it saw.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import httpx
import psutil
import pytest

from aim_kserve.kserve import pb, pb_grpc
from served import Served

Json = dict[str, Any]
REQUESTS = int(os.environ.get("SOAK_STORM", "240"))
AT_ONCE = 32
GROWTH_MIB = 48
TAKEN = ("aim_qos_waiting", "aim_qos_running", "aim_qos_slots", "aim_qos_kv_tokens", "aim_requests_running")
POLICY = """version: 1
classes:
  high: {max_waiting: 16, slo: {ttft_ms: 2000}}
  medium: {max_waiting: 32}
  low: {max_waiting: 32}
limits:
- {class: low, requests_per_minute: 1200, burst_s: 3}
ageing_s: 0.5
"""


class Storm:
    """Sends requests drawn at random. ``seen``: what came back; ``wrong``: what must not have."""

    def __init__(self, server: Served, session: aiohttp.ClientSession, channel: grpc.aio.Channel) -> None:
        self._server, self._session = server, session
        self._stub = pb_grpc.GRPCInferenceServiceStub(channel)
        self._random = random.Random(7)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def one(self) -> None:
        draw = self._random
        headers = {"x-qos-priority": draw.choice(["high", "medium", "low"])}
        if draw.random() < 0.2:
            headers["x-slo-ttft-ms"] = draw.choice(["0.01", "50", "1e300"])
        task = asyncio.create_task(
            draw.choice([self._openai, self._openai, self._openai, self._v2, self._grpc])(headers)
        )
        if draw.random() < 0.4:  # its client leaves: while it waits, in its prompt, between two tokens
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(task), draw.expovariate(1 / 0.1))
            if task.cancel():
                self.seen["left"] += 1
        with suppress(asyncio.CancelledError):
            await task

    async def _openai(self, headers: Json) -> None:
        draw = self._random
        body: Json = {"model": "m", "max_tokens": draw.choice([1, 3, 20]), "fake": {"token_s": draw.choice([0, 0.01])}}
        body["stream"], body["n"] = draw.random() < 0.5, draw.choice([1, 1, 1, 2, 128, -3])
        chat = draw.random() < 0.5
        body |= {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": draw.choice(["x", "y " * 200])}
        path = "chat/completions" if chat else "completions"
        async with self._session.post(f"{self._server.url}/v1/{path}", json=body, headers=headers) as answer:
            text = await answer.text()
            await self._judge(path, answer.status, answer.headers, text)
            if answer.status == 200 and body["stream"]:
                whole = text.endswith("data: [DONE]\n\n")
                if not whole or ('"error"' in text and '"code":"engine_restarting"' not in text):
                    self.wrong.append(text[-300:])

    async def _v2(self, headers: Json) -> None:
        tensor = {"name": "prompt", "datatype": "BYTES", "shape": [2], "data": ["x", "y"]}
        body = {"inputs": [tensor], "parameters": {"max_tokens": 2}}
        async with self._session.post(f"{self._server.url}/v2/models/m/infer", json=body, headers=headers) as answer:
            await self._judge("v2", answer.status, answer.headers, await answer.text())

    async def _grpc(self, headers: Json) -> None:
        request = pb.ModelInferRequest(model_name="m")
        request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
        try:
            await self._stub.ModelInfer(request, metadata=tuple(headers.items()))
        except grpc.aio.AioRpcError as error:
            status = {"RESOURCE_EXHAUSTED": 429, "UNAVAILABLE": 503, "NOT_FOUND": 404}.get(error.code().name, 500)
            await self._judge("grpc", status, dict(error.trailing_metadata() or ()), error.details() or "")
        else:
            self.seen["200"] += 1

    async def _judge(self, path: str, status: int, headers: Any, text: str) -> None:
        self.seen[str(status)] += 1
        clean = status in (200, 429, 503) or (status == 404 and "/load loads it" in text)
        if status in (429, 503):
            clean = 1 <= int(headers.get("retry-after", 0)) <= 600
            if path != "grpc":
                told = json.loads(text)["error"]
                clean = clean and headers["content-type"] == "application/json" and bool(told)
        if status == 503:
            await asyncio.sleep(0.2)  # as whoever is told to come back later
        if not clean:
            self.wrong.append(f"{path} {status} {dict(headers)} {text[:300]}")


def taken(server: Served) -> dict[str, float]:
    """What of the engines is taken, or was forgotten to be given back."""
    sums: Counter[str] = Counter()
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        name = line.partition("{")[0]
        if name in TAKEN:
            sums[name] += float(line.rpartition(" ")[2])
    return {name: sums[name] for name in TAKEN}


async def blow(server: Served, requests: int, disturb: Sequence[Callable[[], Awaitable[None]]]) -> Storm:
    """disturb: each happens once, spread over the storm."""
    turn = asyncio.Semaphore(AT_ONCE)
    left = {requests * (at + 1) // (len(disturb) + 1): each for at, each in enumerate(disturb)}
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        grpc.aio.insecure_channel(server.grpc_url) as channel,
    ):
        storm = Storm(server, session, channel)

        async def one(at: int) -> None:
            async with turn:
                if at in left:
                    await left[at]()
                await storm.one()

        await asyncio.wait_for(asyncio.gather(*map(one, range(requests))), 60 + requests)
    return storm


async def nothing_stays_taken(server: Served) -> None:
    for _ in range(200):
        if not any((now := await asyncio.to_thread(taken, server)).values()):
            return
        await asyncio.sleep(0.05)
    assert now == dict.fromkeys(TAKEN, 0)


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    return ("--qos_policy", str(policy))


async def test_while_engines_are_killed(flags: tuple[str, ...]) -> None:
    with Served.fake(*flags, "--qos_priority", "high", process=True, slots=4) as server:

        async def kill() -> None:
            for child in psutil.Process(server.process.pid).children():
                child.send_signal(signal.SIGKILL)

        before = 0
        for disturb in ([kill, kill], []):
            await asyncio.to_thread(server.wait_ready)
            storm = await blow(server, REQUESTS // 2, disturb)
            assert storm.wrong == [], server.stderr()[-4000:]
            await nothing_stays_taken(server)
            resident = psutil.Process(server.process.pid).memory_info().rss // 2**20
            before = before or resident
            print(f"\n{REQUESTS // 2} requests, {len(disturb)} kills: {dict(storm.seen)}; {before} → {resident} MiB")
        assert {"200", "429", "left"} <= storm.seen.keys()
        assert resident - before < GROWTH_MIB
        assert "Traceback" not in server.stderr()


async def test_while_models_leave_come_back_and_move(flags: tuple[str, ...]) -> None:
    """Two replicas; each has its queue."""
    engine = {"slots": 2, "token_s": 0.002}
    models = {"m": {"engine": engine, "replicas": 2, "priority": "high"}, "other": {"engine": engine}}
    with Served.fake_models(*flags, models=models) as server:
        async with httpx.AsyncClient(base_url=f"{server.url}/v2/repository/models", timeout=60) as admin:

            async def reload() -> None:
                assert (await admin.post("/m/unload")).status_code == 200
                assert (await admin.post("/m/load")).status_code == 200

            async def move() -> None:
                answer = await admin.post("/m/migrate", json={"card": 0, "partition": 1, "leaving": "partition 0"})
                assert answer.status_code in (200, 400, 404, 409, 503), answer.text  # 404: it has moved already

            storm = await blow(server, REQUESTS, [move, reload, move, reload])
        assert storm.wrong == [], server.stderr()[-4000:]
        await nothing_stays_taken(server)
        print(f"\n{REQUESTS} requests, two replicas that leave and move: {dict(storm.seen)}")
        assert {"200", "503", "left"} <= storm.seen.keys()
        assert "Traceback" not in server.stderr()
