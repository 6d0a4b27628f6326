"""What tenants try who want more than is theirs, and operators who have bad luck; the queue over an engine in this
process."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from aim_kserve.errors import Overloaded, ServingError, Unavailable
from aim_kserve.identity import Caller, set_caller
from aim_runtime.admission.create import ServiceLevels
from aim_runtime.admission.engine import InTurn
from aim_runtime.admission.estimate import choices, max_tokens, text_bytes
from aim_runtime.engines.base import RequestContext
from aim_runtime.qos.deadlines import retry_after
from aim_runtime.qos.policy import QosPolicy
from aim_runtime.qos.request import Ask
from aim_runtime.qos.ticket import Ticket
from fake_engine import FakeEngine

ENFORCED = """version: 1
classes: {high: {max_waiting: 4, slo: {ttft_ms: 60000}}, low: {max_waiting: 8}}
tenants: {heavy: {weight: 3}}
enforcement: {share: 0}
"""


ROOMY = "version: 1\nclasses: {low: {max_waiting: 20000}}\nlimits: [{requests_per_minute: 60}]\n"
NO_NUMBERS = [0, -5, 0.5, "", "x", "1e3", "9" * 5000, [], {}, None, True, float("inf"), float("nan")]


class Served:
    """One engine of one slot behind a queue. ``order``: tenants in the order that they were answered."""

    def __init__(self, policy: str, **engine: Any) -> None:
        self.registry = CollectorRegistry()
        self.engine = FakeEngine("m", **{"slots": 1, **engine})
        levels = ServiceLevels(QosPolicy.parse(policy, "policy.yaml"))
        self.turns: InTurn = levels.in_turn(self.engine, "m", "high", registry=self.registry)
        self.order: list[str] = []

    async def load(self) -> Served:
        await self.turns.load()
        return self

    def ask(self, tenant: str, qos_class: str = "high", slo_ms: str | None = None, **body: Any) -> asyncio.Task[Any]:
        async def asking() -> Any:
            set_caller(Caller("k", tenant, frozenset({"infer"}), "high"))
            headers = {"x-qos-priority": qos_class} | ({"x-slo-ttft-ms": slo_ms} if slo_ms else {})
            answer = await self.turns.operations["completions"](
                {"prompt": "x", "max_tokens": 1, **body}, RequestContext(tenant, headers)
            )
            self.order.append(tenant)
            return answer

        return asyncio.create_task(asking())

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"model_name": "m", **labels}) or 0.0

    def taken(self) -> list[float]:
        assert self.turns.queue is not None
        scheduler = self.turns.queue.scheduler
        names = ("aim_qos_slots", "aim_qos_kv_tokens")
        fair = sum(len(scheduler.served(each)) for each in ("high", "medium", "low"))
        return [self.turns.queue.waiting, len(scheduler.running()), fair, *map(self.value, names)]


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def ended(tasks: list[asyncio.Task[Any]]) -> Counter[str]:
    found = await asyncio.gather(*tasks, return_exceptions=True)
    for each in found:
        assert isinstance(each, (dict, ServingError)), each
    return Counter(str(each.code) if isinstance(each, ServingError) else "answered" for each in found)


HOLD = {"max_tokens": 10_000, "fake": {"token_s": 0.01}}


# --- one tenant against the others ------------------------------------------------------------------------------------


async def test_a_tenant_that_fills_a_class_keeps_nobody_else_out_of_it() -> None:
    served = await Served(ENFORCED).load()
    holding = served.ask("flooding", "low", **HOLD)
    await settle()
    flood = [served.ask("flooding", "low") for _ in range(50)]
    await settle()
    others = [served.ask(name, "low") for name in ("one", "two", "two", "heavy", "heavy", "heavy")]
    await settle()
    again = [served.ask("flooding", "low") for _ in range(50)]
    await settle()
    assert [task.done() for task in others].count(True) == 0
    holding.cancel()
    assert await ended(others) == {"answered": 6}
    assert await ended([*flood, *again]) == {"queue_full": 98, "answered": 2}
    last = flood[7].exception()  # let in, and the latest of its tenant when another came
    assert isinstance(last, Unavailable)
    assert 1 <= int(last.headers()["retry-after"]) <= 2
    assert isinstance(flood[-1].exception(), Overloaded)
    assert served.taken() == [0] * 5


async def test_impossible_deadlines_of_one_do_not_hold_back_the_class_below() -> None:
    """They are no promise of the class's that was broken."""
    served = await Served(ENFORCED).load()
    assert await ended([served.ask("a") for _ in range(4)]) == {"answered": 4}
    refused = await ended([served.ask("hostile", slo_ms="0.0001") for _ in range(50)])
    assert refused == {"deadline": 50}
    assert served.value("aim_qos_throttled", **{"class": "low"}) == 0
    assert await ended([served.ask("b", "low")]) == {"answered": 1}
    assert served.value("aim_qos_rejections_total", **{"class": "high", "reason": "deadline"}) == 50


async def test_thousands_of_tenants_leave_nothing_behind() -> None:
    served = await Served(
        "version: 1\nclasses: {low: {max_waiting: 20000}}\nlimits: [{requests_per_minute: 60}]\n", slots=8
    ).load()
    names = [f'tenant {at} \N{SNOWMAN} "quoted" {{}}' for at in range(3000)]
    assert await ended([served.ask(name, "low") for name in names]) == {"answered": 3000}
    assert served.taken() == [0] * 5
    assert sorted(served.order) == sorted(names)


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [128, 128.0, "128", " 128"])
def test_engines_that_take_other_spellings_of_a_number_are_asked_for_as_much(given: Any) -> None:
    """pydantic, by its defaults, which vLLM's request models have."""
    assert choices({"prompt": "x", "n": given}) == 128
    assert choices({"prompt": "x", "best_of": given}) == 128
    assert max_tokens({"max_tokens": given}) == 128


@pytest.mark.parametrize("given", NO_NUMBERS)
def test_what_is_no_number_costs_one(given: Any) -> None:
    assert choices({"prompt": "x", "n": given}) == 1
    assert max_tokens({"max_tokens": given}) in (None, 1)


def test_a_batch_of_conversations_takes_a_slot_for_each() -> None:
    conversation = [{"role": "user", "content": "x"}]
    assert choices({"messages": [conversation] * 7}) == 7
    assert choices({"messages": conversation * 7}) == 1


def test_a_text_is_no_image_because_it_begins_like_one() -> None:
    text = "data:" + "x" * 1000
    assert text_bytes({"prompt": text})[0] == 1005
    assert text_bytes({"messages": [{"role": "user", "content": text}]})[0] == 1005 + len("user")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9999}}
    assert text_bytes({"messages": [{"content": [image]}]})[0] < 20


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e9, 1e300, float("inf")])
def test_nobody_is_told_to_come_back_at_once_or_never(seconds: float) -> None:
    asked = (Ticket(number, Ask("a", "low", 1), 0.0, "low") for number in range(50))
    assert all(1 <= retry_after(seconds, each) <= 600 for each in asked)


async def test_a_rate_of_almost_nothing_tells_a_time_that_can_be_read() -> None:
    served = await Served("version: 1\nlimits: [{requests_per_minute: 1.0e-300}]\n").load()
    first, second = served.ask("a"), served.ask("a")
    assert await ended([first, second]) == {"answered": 1, "rate": 1}
    refusal = second.exception()
    assert isinstance(refusal, Overloaded)
    assert refusal.headers() == {"retry-after": "86400"}
    assert refusal.message.endswith("ask again in 86400 s")


async def test_retries_without_a_pause_get_a_tenant_no_more_than_its_rate() -> None:
    served = await Served("version: 1\nlimits: [{requests_per_minute: 60, burst_s: 5}]\n").load()
    storm = await ended([served.ask("storming") for _ in range(500)])
    assert storm == {"answered": 5, "rate": 495}
    assert await ended([served.ask("patient")]) == {"answered": 1}
    assert served.taken() == [0] * 5


# --- whenever a client leaves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("turns_of_the_loop", range(12))
async def test_whenever_it_leaves_its_place_is_free(stream: bool, turns_of_the_loop: int) -> None:
    served = await Served("version: 1\n").load()
    running, waiting = served.ask("a", stream=stream, **HOLD), served.ask("b", stream=stream)
    for _ in range(turns_of_the_loop):
        await asyncio.sleep(0)
    running.cancel()
    waiting.cancel()
    for task in await asyncio.gather(running, waiting, return_exceptions=True):
        if not isinstance(task, asyncio.CancelledError):
            await task.aclose()  # a stream that nobody reads
    await settle()
    assert served.taken() == [0] * 5
