"""A candidate beside the policy in force: it changes nothing, and what it would have changed is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from aim_guardrail.detectors.base import Asked, Finding, Label, Passage
from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.detectors.family import Family
from aim_guardrail.in_force import Generation, Policies
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.course import Course
from aim_guardrail.policy import PolicySet, Verdict, parse_policy
from aim_guardrail.review.shadow import MOST_CHARS, Shadow
from aim_guardrail.slots.slot import Slot, Slots
from fake_predictor import FakePredictor
from guarded import ask, events, eventually, guardrail, metric, orders, said
from served import Served

CHAT, MAIL, CARD = "/v1/chat/completions", "jane.doe@example.com", "4111 1111 1111 1111"
LIVE = """\
version: 2
name: live
prompt: [{type: pii, action: redact, entities: [EMAIL_ADDRESS]}]
answer: [{type: pii, action: redact, entities: [EMAIL_ADDRESS]}]
"""
#: Blocks cards, lets addresses pass.
NEXT = LIVE.replace("live", "next").replace("redact", "block").replace("EMAIL_ADDRESS", "CREDIT_CARD")


@pytest.fixture(scope="module")
def server(predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("policies")
    (directory / "live.yaml").write_text(LIVE)
    (directory / "next.yaml").write_text(NEXT + "shadow: true\n")
    with guardrail(predictor.host, "--policy", str(directory)) as server:
        yield server


def counted(server: Served) -> dict[str, float]:
    return {
        result: metric(server, "guardrail_shadow_total", result=result)
        for result in ("same", "stricter", "laxer", "error")
    }


def expect(server: Served, before: dict[str, float], **more: int) -> None:
    wanted = {result: count + more.get(result, 0) for result, count in before.items()}
    assert eventually(lambda: counted(server) == wanted), (counted(server), wanted)


def test_both_are_told(server: Served) -> None:
    assert metric(server, "guardrail_policy_info", name="live", mode="live") == 1
    assert metric(server, "guardrail_policy_info", name="next", mode="shadow") == 1


@pytest.mark.parametrize(
    ("text", "shown", "result"),
    [("hi", "hi", "same"), (f"a {CARD}", f"a {CARD}", "stricter"), (f"a {MAIL}", "a <EMAIL_ADDRESS_1>", "laxer")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_its_verdict_is_counted_and_nothing_else(
    server: Served, text: str, shown: str, result: str, stream: bool
) -> None:
    before = counted(server)
    detections = metric(server, "guardrail_detections_total")
    answer = httpx.post(f"{server.url}{CHAT}", json=ask("hi", stream=stream), headers=orders(say=text))
    assert answer.status_code == 200
    told = said(events(answer)) if stream else answer.json()["choices"][0]["message"]["content"]
    assert told == shown
    assert answer.headers["x-guardrail-policy"].startswith("live/")
    expect(server, before, **{"same": 1, result: 1} if result != "same" else {"same": 2})
    assert metric(server, "guardrail_detections_total") == detections + (MAIL in text)


def test_a_prompt_that_it_would_block_goes_on(server: Served, predictor: FakePredictor) -> None:
    before, added = counted(server), metric(server, "guardrail_shadow_families_total", family="pii", result="added")
    answer = httpx.post(f"{server.url}{CHAT}", json=ask(f"card {CARD}"), headers=orders(say="hi"))
    assert answer.status_code == 200
    assert CARD.encode() in predictor.last["body"]
    expect(server, before, stricter=1, same=1)
    assert metric(server, "guardrail_shadow_families_total", family="pii", result="added") == added + 1
    assert answer.headers["x-request-id"] in server.stderr()
    assert CARD not in server.stderr()


def test_what_failed_is_not_compared(server: Served) -> None:
    before = counted(server)
    httpx.post(f"{server.url}{CHAT}", json=ask("hi"), headers=orders(drop_after=0))
    expect(server, before, same=1)  # the prompt


def test_none_is_sampled_of_nothing(predictor: FakePredictor, tmp_path: Path) -> None:
    (tmp_path / "live.yaml").write_text(LIVE)
    (tmp_path / "next.yaml").write_text(NEXT)
    flags = ["--policy", str(tmp_path / "live.yaml"), "--shadow_policy", str(tmp_path / "next.yaml")]
    with guardrail(predictor.host, *flags, "--shadow_sample", "0") as server:
        httpx.post(f"{server.url}{CHAT}", json=ask(CARD))
        assert sum(counted(server).values()) == 0
        assert metric(server, "guardrail_policy_info", name="next", mode="shadow") == 1


# --- what it may hold -----------------------------------------------------------------------------------------------


class Judge:
    """A model that waits until it is told to go on."""

    family, cost, digest, cacheable = "judge", "model", "1", False
    free: asyncio.Event
    fails = False

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        if Judge.fails:
            raise RuntimeError("no")
        if passages[0].text.startswith("wait"):
            await Judge.free.wait()
        return [[] for _ in passages]

    async def close(self) -> None:
        pass


class Beside:
    """A shadow over a policy of a judge."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.policies = Policies(self.metrics)
        self.shadow = Shadow(self.policies, self.metrics, 1.0, most=2)
        rules = "prompt: [{type: judge, action: block, timeout_ms: 60000}]\nbudget_ms: 60000"
        self.read = PolicySet(
            parse_policy(LIVE, "live"),
            shadows={None: parse_policy(f"version: 2\nname: next\nshadow: true\n{rules}", "next")},
        )

    async def start(self) -> None:
        await self.policies.put_in_force(Generation.load(self.read))

    async def request(self, text: str, outcome: str = "allowed") -> None:
        context = RequestContext(CHAT, request_id="r")
        witness = self.shadow(context)
        assert witness is not None
        witness.slots("prompt", Slots([Slot(text)]), [])
        policy = self.read.default
        await witness.ended(
            Course("prompt", context, policy, "allow", outcome, None, [Verdict()], [], [], 0, 0)  # type: ignore[arg-type]
        )

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"guardrail_shadow_{name}", labels) or 0


@pytest.fixture
async def beside(monkeypatch: pytest.MonkeyPatch) -> Beside:
    monkeypatch.setitem(FAMILIES, "judge", Family("judge", "batch", {"BAD": Label(0.5, 1.0)}, lambda _: Judge()))
    monkeypatch.setattr(Judge, "free", asyncio.Event(), raising=False)
    monkeypatch.setattr(Judge, "fails", False)
    made = Beside()
    await made.start()
    return made


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110  a counter has no event
            await asyncio.sleep(0.01)


async def test_what_has_no_room_is_dropped_and_counted(beside: Beside) -> None:
    for number in range(6):
        await asyncio.wait_for(beside.request(f"wait {number}"), 1)  # nobody waits for it
        await asyncio.sleep(0)
    assert beside.count("dropped_total", reason="queue") == 3  # one is judged, two wait
    Judge.free.set()
    await until(lambda: beside.count("total", result="same") == 3)
    await beside.request("x" * (MOST_CHARS + 1))
    assert beside.count("dropped_total", reason="size") == 1


async def test_one_that_fails_is_an_error_and_the_next_is_judged(beside: Beside) -> None:
    Judge.fails = True
    await beside.request("hi")
    await until(lambda: beside.count("total", result="error") == 1)
    Judge.fails = False
    await beside.request("hi")
    await until(lambda: beside.count("total", result="same") == 1)


async def test_requests_that_came_to_nothing_are_not_compared(beside: Beside) -> None:
    for outcome in ("error", "client_gone"):
        await beside.request("hi", outcome)
    await beside.request("hi")
    await until(lambda: beside.count("total", result="same") == 1)
    assert beside.count("total", result="error") == 0


async def test_engines_are_shared_and_what_is_learnt_of_them_is_not(beside: Beside) -> None:
    shadow = beside.read.shadows[None].model_copy(update={"shadow": False, "name": "live"})
    both = Generation.load(PolicySet(shadow, shadows=beside.read.shadows), beside.policies.current)
    (live,), (beside_it,) = (guard.stages.detectors.values() for guard in (both.guards[None], both.shadows[None]))
    assert live.detector is beside_it.detector
    assert live is not beside_it
    assert len(both.detectors) == 1
