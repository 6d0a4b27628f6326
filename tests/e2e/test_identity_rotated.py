"""The key file rewritten while clients ask, through both processes: no wrong answer.

Nothing here depends on how fast anybody is. A key that has been taken once counts until it is revoked, and one that has
been refused after that never counts again; in between, whoever reads the file may be late.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
from grpc import aio

from aim_kserve.identity import keys as key_file
from aim_kserve.kserve import pb, pb_grpc
from closed_pair import ClosedPair, bearer
from served import Served

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
BROKEN = ("", "version: 1\nkeys: [", "keys: 7\n", "version: 1\nkeys: []\nmore: 1\n", "\x00", "- a\n")
REWRITES = 40
LATE_S = 60  #: only a server that never reads its file again takes so long


@dataclass
class Key:
    """One key at one server. Times are this process's own."""

    text: str
    entry: key_file.ApiKey
    taken_at: float | None = None
    revoked: bool = False
    refused_at: float | None = None


@dataclass
class Load:
    """What has been asked, and what was answered wrongly."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    held: list[Key] = field(default_factory=list)
    over: bool = False

    def judge(self, key: Key, began: float, status: int, where: str) -> None:
        self.answers += 1
        if status == 200:
            key.taken_at = time.monotonic() if key.taken_at is None else key.taken_at
            if key.refused_at is not None and began > key.refused_at:
                self.wrong.append(f"{where}: {key.entry.id} was refused, and is taken again")
        elif status != 401 or (key.taken_at is not None and began > key.taken_at and not key.revoked):
            self.wrong.append(f"{where}: {key.entry.id} got {status}")
        elif key.revoked and key.refused_at is None:
            key.refused_at = time.monotonic()


async def ask(load: Load, client: httpx.AsyncClient, chosen: random.Random, *, stream: bool) -> None:
    while not load.over:
        key = chosen.choice(load.held)
        began = time.monotonic()
        answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream}, headers=bearer(key.text))
        if stream and answer.status_code == 200 and not answer.text.endswith("data: [DONE]\n\n"):
            load.wrong.append("a stream broke off")
        load.judge(key, began, answer.status_code, f"{client.base_url} stream={stream}")
        await asyncio.sleep(0.02)


async def ask_by_grpc(load: Load, server: Served, key: Key) -> None:
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hi")
    async with aio.insecure_channel(server.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        while not load.over:
            began = time.monotonic()
            try:
                await stub.ModelInfer(message, metadata=list(bearer(key.text).items()), timeout=LATE_S)
                status = 200
            except aio.AioRpcError as error:
                status = {"UNAUTHENTICATED": 401}.get(error.code().name, 500)
            load.judge(key, began, status, "gRPC")
            await asyncio.sleep(0.05)


class Rotation:
    """The file, and who may be in it: ``stays`` always, others come and go."""

    def __init__(self, pair: ClosedPair, loads: dict[str, Load]) -> None:
        self._file, self._loads = pair.credentials.file, loads
        self.others = key_file.read(self._file).keys
        self._now: dict[str, key_file.ApiKey] = {}
        self._number = 0

    def add(self) -> None:
        self._number += 1
        text, entry = key_file.new_key(f"rotated-{self._number}", tenant="t")
        self._now[entry.id] = entry
        self.write()
        for load in self._loads.values():
            load.held.append(Key(text, entry))

    def revoke(self) -> None:
        gone = next(iter(self._now))
        del self._now[gone]
        for load in self._loads.values():  # before it is written: from now on either answer is right
            for key in load.held:
                key.revoked = key.revoked or key.entry.id == gone
        self.write()

    def spoil(self, text: str) -> None:
        """As an editor does that writes in place."""
        self._file.write_text(text)

    def write(self) -> None:
        key_file.write(self._file, key_file.KeyFile(keys=(*self.others, *self._now.values())))

    def revoke_all(self) -> None:
        while self._now:
            self.revoke()


async def rotate(rotation: Rotation, pair: ClosedPair, loads: dict[str, Load], chosen: random.Random) -> None:
    for _ in range(4):
        rotation.add()
    await until(lambda: all(key.taken_at is not None for load in loads.values() for key in load.held))
    rotation.spoil(BROKEN[0])
    await until(lambda: all("the keys read before stay valid" in server.stderr() for server in pair.servers.values()))
    for number in range(REWRITES):
        if number % 5 == 4:
            rotation.spoil(chosen.choice(BROKEN))
            await asyncio.sleep(chosen.choice((0.05, 0.4)))
            rotation.write()
        elif number % 5 in (1, 3):
            rotation.revoke()
        else:
            rotation.add()
        await asyncio.sleep(0.1)
    rotation.revoke_all()


async def test_keys_rotated_under_load_give_no_wrong_answer(pair: ClosedPair) -> None:
    loads = {name: Load() for name in pair.servers}
    chosen = random.Random(7)
    rotation = Rotation(pair, loads)
    entry = next(key for key in rotation.others if key.id == "infer")
    stays = {name: Key(pair.credentials.texts["infer"], entry, taken_at=0) for name in loads}
    clients = {name: httpx.AsyncClient(base_url=server.url, timeout=LATE_S) for name, server in pair.servers.items()}
    asking = []
    for name, load in loads.items():
        load.held.append(stays[name])
        asking += [asyncio.create_task(ask(load, clients[name], chosen, stream=stream)) for stream in (False, True)]
        asking.append(asyncio.create_task(ask_by_grpc(load, pair.servers[name], stays[name])))
    try:
        await rotate(rotation, pair, loads, chosen)
        held = [key for load in loads.values() for key in load.held if key.revoked]
        await until(lambda: all(key.refused_at is not None for key in held))
    finally:
        for load in loads.values():
            load.over = True
        await asyncio.gather(*asking)
        for client in clients.values():
            await client.aclose()
    for name, load in loads.items():
        assert load.wrong == [], name
        assert load.answers > REWRITES
        assert len(load.held) > REWRITES / 3


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LATE_S):
        while not condition():  # noqa: ASYNC110  what others have seen, there is no event of it
            await asyncio.sleep(0.05)
