"""One level of load: requests sent when they are due (open loop), or by clients that wait for their answers (closed).

No coordinated omission: in an open loop a request is due at its time whether or not others were answered, and its
latency counts from then. A clock beside it says how late this process itself is.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from aim_profile.serving.evidence import Point, Slo
from aim_runtime.measure.arrivals import OnOff, on_off, poisson
from aim_runtime.measure.client import Client, Outcome
from aim_runtime.measure.errors import MeasureError
from aim_runtime.measure.figures import point
from aim_runtime.measure.lengths import Lengths
from aim_runtime.measure.prompts import Blocks, Prompts
from aim_runtime.measure.trace import Recorded

#: Of one level: what is more would not fit this process's memory, prompts and all.
MOST_REQUESTS = 200_000
_BEAT_S = 0.02
_SETTLE_S = 0.05


class Ask(NamedTuple):
    """One request to come: seconds after the level began, its body."""

    at_s: float
    body: Mapping[str, Any]


class Shape(NamedTuple):
    """What requests look like. prefixes: so many starts of prefix_tokens each, shared among all prompts."""

    prompt: Lengths
    output: Lengths
    prefix_tokens: int = 0
    prefixes: int = 1


class Load:
    """Makes the requests of each level: always the same ones of the same seed and levels.

    Args:
        model: the name that is asked for.
        path: ``/v1/completions`` or ``/v1/chat/completions``.
        arrivals: poisson, on-off, trace or closed.
    """

    def __init__(
        self,
        prompts: Prompts,
        shape: Shape,
        *,
        model: str,
        path: str,
        arrivals: str,
        bursts: OnOff,
        seed: int,
        trace: Sequence[Recorded] = (),
    ) -> None:
        self.path, self.arrivals = path, arrivals
        self._prompts, self._shape, self._model = prompts, shape, model
        self._bursts, self._trace = bursts, trace
        self._source = random.Random(seed)

    def due(self, offered: float, duration_s: float) -> list[Ask]:
        """An open loop's requests, prompts and all: nothing of it is made while requests are on their way."""
        if self._trace:
            own = (len(self._trace) - 1) / self._trace[-1].at_s
            scaled = ((each.at_s * own / offered, each) for each in self._trace)
            return _bounded(
                Ask(at, self._body(each.prompt_tokens, each.output_tokens, each.blocks))
                for at, each in scaled
                if at < duration_s
            )
        times = (
            on_off(offered, self._bursts, duration_s, self._source)
            if self.arrivals == "on-off"
            else poisson(offered, duration_s, self._source)
        )
        return _bounded(Ask(at, self.body()) for at in times)

    def body(self) -> dict[str, Any]:
        """The next request of the distributions."""
        shape = self._shape
        tokens, output = shape.prompt.draw(self._source), shape.output.draw(self._source)
        shared = ((f"shared {self._source.randrange(shape.prefixes)}", shape.prefix_tokens),)
        return self._body(tokens, output, shared if shape.prefix_tokens else ())

    def _body(self, tokens: int, output: int, blocks: Blocks) -> dict[str, Any]:
        text = self._prompts.make(tokens, blocks)
        chat = self.path.endswith("chat/completions")
        asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        return {
            **asked,
            "model": self._model,
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _bounded(asks: Iterator[Ask]) -> list[Ask]:
    found: list[Ask] = []
    for each in asks:
        if len(found) == MOST_REQUESTS:
            raise MeasureError(f"--rates: a level of more than {MOST_REQUESTS:,} requests: ask for less", exit_code=2)
        found.append(each)
    return found


async def run_level(
    client: Client, load: Load, offered: float, duration_s: float, slo: Slo, *, until_s: float
) -> Point:
    """Send for duration_s, wait until all are answered, but not beyond until_s (of the loop's clock): what is on its
    way then has failed, of the kind `cut off`."""
    level = _Level(client, load, until_s)
    asks = [] if load.arrivals == "closed" else load.due(offered, duration_s)
    beat = asyncio.create_task(_beat(level.lags_s))
    level.began_s = asyncio.get_running_loop().time() + _SETTLE_S
    try:
        if load.arrivals == "closed":
            await asyncio.gather(*(level.client_asks(duration_s) for _ in range(int(offered))))
        else:
            await level.send_on_time(asks)
        outcomes = await level.outcomes()
    finally:
        beat.cancel()
    return point(offered, outcomes, level.lags_s, slo, began_s=level.began_s, least_s=duration_s)


class _Level:
    def __init__(self, client: Client, load: Load, until_s: float) -> None:
        self._client, self._load, self._until_s = client, load, until_s
        self._tasks: list[asyncio.Task[Outcome]] = []
        self._loop = asyncio.get_running_loop()
        self.lags_s: list[float] = []
        self.began_s = 0.0

    def _send(self, body: Mapping[str, Any], due_s: float) -> asyncio.Task[Outcome]:
        task = asyncio.create_task(self._client.ask(self._load.path, body, due_s))
        self._tasks.append(task)
        return task

    async def send_on_time(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            due = self.began_s + ask.at_s
            if due >= self._until_s:
                return
            if (wait := due - self._loop.time()) > 0:
                await asyncio.sleep(wait)
            self._send(ask.body, due)

    async def client_asks(self, duration_s: float) -> None:
        """One client: its next request when the one before has ended."""
        due, end = self.began_s, min(self.began_s + duration_s, self._until_s)
        await asyncio.sleep(max(0.0, due - self._loop.time()))
        while due < end and len(self._tasks) < MOST_REQUESTS:
            task = self._send(self._load.body(), due)
            await asyncio.wait({task}, timeout=max(0.0, self._until_s - self._loop.time()))
            if not task.done():
                return
            if task.result().failed:
                await asyncio.sleep(_SETTLE_S)  # a refusal comes at once: nobody asks thousands of times a second
            due = self._loop.time()

    async def outcomes(self) -> list[Outcome]:
        """Of all that was sent. Whoever is still on its way at the end of the time is ended."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, self._until_s - self._loop.time()))
        for task in self._tasks:
            task.cancel()
        found = await asyncio.gather(*self._tasks, return_exceptions=True)
        return [each for each in found if isinstance(each, Outcome)]


async def _beat(lags_s: list[float]) -> None:
    """How late this process's own clock work is: what reads an answer is as late."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _BEAT_S
        await asyncio.sleep(_BEAT_S)
        lags_s.append(max(0.0, loop.time() - due))
