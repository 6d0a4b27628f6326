"""More load than an engine can serve, from tenants of several classes, on real servers; what each class got of it.

Times are *engine seconds*: while requests are on their way, the CPU time of the process that computes; while there is
none, the clock's. So neither what else this machine does nor how fast it is makes a first token late, and arrivals keep
their distance to the engine's work. They are what a client on an idle machine would see, but for the HTTP layer's own
milliseconds. ``Outcome`` has the clock's seconds beside.
"""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import psutil

from aim_kserve.identity import QosClass, keys
from aim_runtime.measure.arrivals import OnOff
from aim_runtime.measure.client import Client, Outcome
from aim_runtime.measure.figures import percentile
from aim_runtime.measure.lengths import Lengths, lengths
from aim_runtime.measure.levels import Ask, Load, Shape
from aim_runtime.measure.prompts import Prompts
from aim_runtime.measure.verb import tokens_per_word
from aim_runtime.qos.fair import W_IN, W_OUT

PATH = "/v1/completions"
TENANTS = ("ada", "bell", "cray", "dirac")
CLASSES: tuple[QosClass, ...] = ("high", "medium", "low")
#: Seconds on and off of the bursts that are half of all arrivals.
BURSTS = OnOff(1.0, 2.0)
_TICK_S = 0.005
_TIMEOUT_S = 3600.0


class Sizes(NamedTuple):
    """How long prompts and answers are, in tokens."""

    prompt: Lengths
    output: Lengths

    @classmethod
    def of(cls, prompt: str, output: str) -> Sizes:
        """Of texts as ``aim-runtime measure`` takes them."""
        return cls(lengths(prompt, "prompt"), lengths(output, "output"))


class EngineClock:
    """See the module. ``at`` says which engine second a moment of the event loop's clock was."""

    def __init__(self, process: psutil.Process) -> None:
        self.busy = 0  # requests on their way
        self._clock_id = (~process.pid << 3) | 2  # what clock_getcpuclockid(3) makes of a process
        self._wall: list[float] = []
        self._engine: list[float] = []

    async def __aenter__(self) -> Self:
        self._last = time.monotonic(), self.cpu_s()
        self._wall, self._engine = [self._last[0]], [0.0]
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    def cpu_s(self) -> float:
        return time.clock_gettime(self._clock_id)

    def now_s(self) -> float:
        """Also puts it down."""
        before_s, cpu_before_s = self._last
        wall_s, cpu_s = self._last = time.monotonic(), self.cpu_s()
        passed_s = cpu_s - cpu_before_s if self.busy else wall_s - before_s
        self._wall.append(wall_s)
        self._engine.append(self._engine[-1] + passed_s)
        return self._engine[-1]

    def at(self, wall_s: float) -> float:
        index = min(max(1, bisect_right(self._wall, wall_s)), len(self._wall) - 1)
        before, after = self._wall[index - 1], self._wall[index]
        share = min(1.0, max(0.0, (wall_s - before) / (after - before))) if after > before else 1.0
        return self._engine[index - 1] + share * (self._engine[index] - self._engine[index - 1])

    async def until(self, engine_s: float) -> None:
        while (left_s := engine_s - self.now_s()) > 0:  # noqa: ASYNC110  the other process's clock rings for nobody
            await asyncio.sleep(min(_TICK_S, left_s))

    async def idle(self) -> None:
        """Return when the process has ended what was left to it."""
        calm = 0
        while calm < 3:
            before = self.cpu_s()
            await asyncio.sleep(0.2)
            calm = calm + 1 if self.cpu_s() - before < 0.01 else 0

    async def _follow(self) -> None:
        while True:
            self.now_s()
            await asyncio.sleep(_TICK_S)


def _cpu_times(server: int) -> dict[psutil.Process, float]:
    """Of a server and its children."""
    own = psutil.Process(server)
    return {each: sum(each.cpu_times()[:2]) for each in (own, *own.children(recursive=True))}


@dataclass(slots=True)
class Sent:
    """One request. due_s: in engine seconds from the start."""

    qos_class: QosClass
    tenant: str
    ask: Ask
    outcome: Outcome = field(default_factory=lambda: Outcome(0.0, 0.0))
    due_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0

    @property
    def first_s(self) -> float | None:
        return self.tokens_s[0] if self.tokens_s else None

    @property
    def ttft_s(self) -> float:
        """Engine seconds; of one without a first token, how long it has waited at least."""
        return (self.ended_s if self.first_s is None else self.first_s) - self.due_s

    @property
    def wall_ttft_s(self) -> float:
        return (self.outcome.tokens_s or [self.outcome.ended_s])[0] - self.outcome.due_s

    @property
    def answered(self) -> bool:
        return self.outcome.failed is None


def key_folder(folder: Path) -> Path:
    """A key file, and beside it each tenant's keys for each class: ``TENANT-CLASS.key``, and ``metrics.key``."""
    file = folder / "keys.yaml"
    for tenant in TENANTS:
        for qos_class in CLASSES:
            _add(file, f"{tenant}-{qos_class}", tenant, ("infer",), qos_class)
    _add(file, "metrics", "operator", ("infer", "metrics"), None)
    return file


def _add(file: Path, name: str, tenant: str, scopes: Sequence[keys.Scope], qos_class: QosClass | None) -> None:
    text, entry = keys.new_key(name, tenant=tenant, scopes=scopes, qos_class=qos_class)
    keys.add(file, entry)
    (file.parent / f"{name}.key").write_text(text)


class Side:
    """A server under load: who may ask it, and its engine's clock.

    Args:
        url: of the server.
        process: its id.
        key_file: of :func:`key_folder`; None: the server asks for none.
        extra: what is added to a body of that class.
    """

    def __init__(
        self,
        url: str,
        process: int,
        *,
        key_file: Path | None,
        extra: Callable[[QosClass], Mapping[str, Any]] = lambda _: {},
        model: str = "smollm2",
    ) -> None:
        self.url, self.model, self._process, self._keys, self._extra = url, model, process, key_file, extra
        self.per_word = 1.0
        self._clients: dict[tuple[str, QosClass], Client] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for tenant in TENANTS:
            for qos_class in CLASSES:
                self._clients[tenant, qos_class] = await self._client(f"{tenant}-{qos_class}")
        self._operator = await self._client("metrics")
        self.per_word = await tokens_per_word(self._clients["ada", "high"], self.model)
        warm_up = self.asks("warm-up", 9, [("low", "ada", 9.0)], Sizes.of("constant:64", "constant:64"))[:2]
        before = _cpu_times(self._process)
        await asyncio.gather(*(self._send(each, time.monotonic()) for each in warm_up))
        computed = {each: cpu_s - before.get(each, 0.0) for each, cpu_s in _cpu_times(self._process).items()}
        engine = max(computed, key=lambda each: computed[each])
        self.clock = await self._stack.enter_async_context(EngineClock(engine))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def metrics(self) -> str:
        return str(await self._operator.say("/metrics"))

    async def _client(self, name: str) -> Client:
        key = None if self._keys is None else self._keys.parent / f"{name}.key"
        return await self._stack.enter_async_context(Client(self.url, timeout_s=_TIMEOUT_S, key_file=key))

    # --- requests -----------------------------------------------------------------------------------------------

    def asks(
        self, leg: str, seconds: float, rates: Iterable[tuple[QosClass, str, float]], sizes: Sizes, seed: int = 1
    ) -> list[Sent]:
        """Half Poisson, half bursts, so many a second of each class and tenant. The seed says when they come and how
        long they are, the leg's name what they say: no prompt is asked twice, and found in a cache."""
        found = []
        for qos_class, tenant, rate in rates:
            for number, arrivals in enumerate(("poisson", "on-off")):
                named = f"{seed} {qos_class} {tenant} {number}"
                words = Prompts(random.Random(f"{leg} {named}").getrandbits(32), self.per_word)
                load = Load(
                    words,
                    Shape(sizes.prompt, sizes.output),
                    model=self.model,
                    path=PATH,
                    arrivals=arrivals,
                    bursts=BURSTS,
                    seed=random.Random(named).getrandbits(32),
                )
                found += [Sent(qos_class, tenant, ask) for ask in load.due(rate / 2, seconds)]
        return sorted(found, key=lambda each: each.ask.at_s)

    async def _send(self, sent: Sent, due_wall_s: float) -> Sent:
        body = {**sent.ask.body, **self._extra(sent.qos_class)}
        sent.outcome = await self._clients[sent.tenant, sent.qos_class].ask(PATH, body, due_wall_s)
        return sent

    async def leg(self, all_of: Sequence[Sent], seconds: float) -> list[Sent]:
        """All of them when they are due; those of high have a quarter of the time more, then what is left is cut off.
        Between legs the engine has nothing to do."""
        clock, tasks = self.clock, dict[asyncio.Task[Sent], Sent]()
        await clock.idle()
        began_s = clock.now_s()
        for sent in all_of:
            await clock.until(began_s + sent.ask.at_s)
            tasks[self._start(sent)] = sent
        await clock.until(began_s + seconds)
        await self._settle([task for task, sent in tasks.items() if sent.qos_class == "high"], began_s + 1.25 * seconds)
        await self._cut(list(tasks))
        for sent in all_of:
            self._in_engine_s(sent)
        return list(all_of)

    async def closed(self, clients: Iterable[tuple[QosClass, str, Sequence[Ask]]], seconds: float) -> list[Sent]:
        """Clients that ask again as soon as they are answered, for so many engine seconds."""
        found: list[Sent] = []
        await self.clock.idle()
        end_s = self.clock.now_s() + seconds

        async def one(qos_class: QosClass, tenant: str, asks: Sequence[Ask]) -> None:
            for ask in asks:
                if self.clock.now_s() >= end_s:
                    return
                found.append(Sent(qos_class, tenant, ask))
                await self._start(found[-1])

        tasks = [asyncio.create_task(one(*each)) for each in clients]
        await self.clock.until(end_s)
        await self._cut(tasks)
        for sent in found:
            self._in_engine_s(sent)
        return found

    def _start(self, sent: Sent) -> asyncio.Task[Sent]:
        self.clock.now_s()
        self.clock.busy += 1
        task = asyncio.create_task(self._send(sent, time.monotonic()))
        task.add_done_callback(self._ended)
        return task

    def _ended(self, _: object) -> None:
        self.clock.now_s()
        self.clock.busy -= 1

    async def _settle(self, tasks: Sequence[asyncio.Task[Sent]], until_s: float) -> None:
        left = [task for task in tasks if not task.done()]
        while left and self.clock.now_s() < until_s:
            _, still = await asyncio.wait(left, timeout=_TICK_S)
            left = list(still)

    @staticmethod
    async def _cut(tasks: Sequence[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _in_engine_s(self, sent: Sent) -> None:
        outcome, at = sent.outcome, self.clock.at
        sent.due_s, sent.ended_s = at(outcome.due_s), at(outcome.ended_s)
        sent.tokens_s = [at(each) for each in outcome.tokens_s]


# --- what came of it ----------------------------------------------------------------------------------------------


def of(sent: Iterable[Sent], qos_class: QosClass) -> list[Sent]:
    return [each for each in sent if each.qos_class == qos_class]


def ttft(sent: Iterable[Sent], share: float) -> float:
    """Engine seconds within which that share has its first token; one that was refused has no part in it."""
    values = sorted(each.ttft_s for each in sent if each.outcome.refusal is None)
    return percentile(values, share)


def unclean(sent: Iterable[Sent]) -> list[str]:
    """Failures that are no refusal as it should be: a 429 or 503 with ``Retry-After`` and a code, before the answer."""
    return [
        f"{each.qos_class}: {each.outcome.failed} {each.outcome.refusal}"
        for each in sent
        if each.outcome.failed not in (None, "cut off")
        and (
            each.outcome.refusal is None
            or each.outcome.refusal.status not in (429, 503)
            or each.outcome.refusal.retry_after_s is None
            or each.outcome.refusal.code is None
        )
    ]


def refused_after_s(sent: Iterable[Sent]) -> float:
    """How long, by the clock, one that was refused has waited at most."""
    return max((each.outcome.ended_s - each.outcome.sent_s for each in sent if each.outcome.refusal), default=0.0)


def overtaken(sent: Sequence[Sent]) -> list[int]:
    """Of each high one, how many below it that came before it had their first token while it waited for its own."""
    below = [each.first_s for each in sent if each.qos_class != "high" and each.first_s is not None]
    return [
        sum(each.due_s < first_s < each.first_s for first_s in below)
        for each in of(sent, "high")
        if each.first_s is not None
    ]


def service(sent: Iterable[Sent], tenant: str) -> list[tuple[float, float]]:
    """When (engine seconds) so much more was done for it: a prompt's tokens at its first, two for each of an answer."""
    found = []
    for each in sent:
        if each.tenant == tenant and each.first_s is not None:
            tokens = each.outcome.output_tokens or len(each.outcome.tokens_s)
            prompt = each.outcome.prompt_tokens or len(str(each.ask.body["prompt"]).split())
            found.append((each.first_s, W_IN * prompt))
            found += [(when, W_OUT * tokens / len(each.outcome.tokens_s)) for when in each.tokens_s]
    return sorted(found)
