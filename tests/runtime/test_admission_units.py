"""What admission reads off a request, and its queue over an engine in this process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.datastructures import Headers

from aim_kserve.access import open_log
from aim_kserve.errors import BadRequest, Unavailable
from aim_kserve.identity import Caller, set_caller
from aim_runtime.admission.create import ServiceLevels
from aim_runtime.admission.engine import InTurn
from aim_runtime.admission.estimate import Estimate, choices, max_tokens, text_bytes
from aim_runtime.admission.levels import Levels
from aim_runtime.admission.queue import Queue
from aim_runtime.engines.base import Engine, Json, Operation, RequestContext, Stream, TakesAdapters
from aim_runtime.qos.policy import QosPolicy
from aim_runtime.replicas.engine import Replica, Replicas
from fake_engine import FakeEngine

# --- estimate ---------------------------------------------------------------------------------------------------------

texts = st.text(max_size=20)
fields = st.sampled_from(["messages", "prompt", "input", "tools", "n", "best_of", "max_tokens"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
)


@given(st.dictionaries(fields, anything, max_size=4))
def test_no_body_is_too_odd_to_be_estimated(body: Json) -> None:
    size, tokens = text_bytes(body)
    assert size >= 0
    assert tokens >= 0
    assert choices(body) >= 1
    assert (max_tokens(body) or 1) >= 1


@given(st.lists(texts.filter(lambda text: not text.startswith("data:")), max_size=20))
def test_the_text_of_messages_is_counted_in_bytes(contents: list[str]) -> None:
    parts = [{"type": "text", "text": text} for text in contents]
    size, _ = text_bytes({"messages": [{"role": "user", "content": parts}]})
    assert size == sum(len(text.encode()) for text in contents) + len("user") + len("text") * len(parts)


def test_tokens_choices_and_images() -> None:
    assert text_bytes({"prompt": [1, 2, 3]}) == (0, 3)
    assert text_bytes({"prompt": [[1, 2], [3]]}) == (0, 3)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9999}}
    assert text_bytes({"messages": [{"content": [image]}]})[0] < 20
    assert choices({"prompt": ["a", "b"], "n": 3}) == 6
    assert choices({"prompt": [1, 2], "best_of": 4, "n": 2}) == 4
    assert max_tokens({"max_tokens": 9, "max_completion_tokens": 5}) == 5


def test_a_huge_body_is_looked_at_in_part() -> None:
    size, _ = text_bytes({"messages": [{"content": "abcdefgh"}] * 100_000})
    assert 800_000 < size < 2_500_000


def test_the_ratio_is_learned_from_text_and_not_from_images() -> None:
    estimate = Estimate()
    for _ in range(200):
        estimate.learn(1000, 500, 10)
    assert estimate.bytes_per_token == pytest.approx(2, rel=0.02)
    assert estimate.answer_tokens == pytest.approx(10, abs=1)
    estimate.learn(100, 5000, 10)  # an image
    assert estimate.bytes_per_token == pytest.approx(2, rel=0.02)


# --- levels -----------------------------------------------------------------------------------------------------------

SLOS = QosPolicy.parse("version: 1\nclasses: {high: {slo: {ttft_ms: 400}}, low: {slo: {ttft_ms: 9000}}}\n", "p")


def test_a_models_own_promise_holds_for_its_class_and_those_above() -> None:
    def promised(own: Any, ms: float | None) -> list[float | None]:
        levels = Levels(SLOS.of_model(own, ms), "high")
        return [levels.of({}, {"x-qos-priority": name}).ttft_slo_s for name in ("high", "medium", "low")]

    assert promised("medium", None) == [0.4, None, 9]
    assert promised("medium", 600) == [0.4, 0.6, 9]
    assert promised("medium", 100) == [0.1, 0.1, 9]
    assert promised("low", 5000) == [0.4, 5, 5]


@pytest.mark.parametrize(("wanted", "seconds"), [("100", 0.1), ("400", 0.4), ("90000", 0.4), ("0.5", 0.0005)])
def test_a_client_may_only_tighten_its_deadline(wanted: str, seconds: float) -> None:
    level = Levels(SLOS, "high").of({}, {"x-slo-ttft-ms": wanted})
    assert level.ttft_slo_s == pytest.approx(seconds)


@pytest.mark.parametrize(("given", "served_as"), [(None, "medium"), ("low", "low"), ("high", "high")])
async def test_the_caller_says_class_and_tenant(given: Any, served_as: str) -> None:
    set_caller(Caller("k", "acme", frozenset({"infer"}), given))  # of this test's context only
    level = Levels(QosPolicy.default(), "medium").of({}, {})
    assert (level.tenant, level.qos_class) == ("acme", served_as)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["x-qos-priority", "x-slo-ttft-ms", "host"]), st.sampled_from(["low", "high", "7", "1e9"])
        ),
        max_size=4,
    )
)
def test_headers_of_asgi_say_what_a_mapping_says(pairs: list[tuple[str, str]]) -> None:
    levels = Levels(QosPolicy.default(), "medium")

    def read(headers: Mapping[str, str]) -> Any:
        try:
            return levels.of({}, headers)
        except BadRequest as error:
            return str(error)

    raw = Headers(raw=[(name.encode(), value.encode()) for name, value in pairs])
    assert read(raw) == read(dict(reversed(pairs)))  # the first of several counts


# --- the queue --------------------------------------------------------------------------------------------------------


class Gated(FakeEngine):
    """Its calls end when they are told to. ``calls``: prompts in the order the engine was asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calls: list[str] = []
        self.aborts: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    @property
    def operations(self) -> Mapping[str, Operation]:
        return {"completions": self._gated, "tokenize": self._gated}

    async def _gated(self, body: Json, context: RequestContext) -> Json | Stream:
        name = body["prompt"]
        self.calls.append(name)
        gate = self.gates.setdefault(name, asyncio.Event())
        try:
            await gate.wait()
        except asyncio.CancelledError:
            self.aborts.append(name)
            raise
        context.usage.prompt_tokens = body.get("size", 1)
        context.usage.completion_tokens = body.get("size", 1)
        return {"text": name, "priority": context.priority}

    def healthy(self) -> bool:
        return not self.dead


class Mortal(Gated):
    """Its process may be started again."""

    prove = None
    state = "ready"

    def on_ready(self) -> None:
        raise AssertionError("nobody wants to know")

    def die(self, running: str) -> None:
        self.state, self.dead = "restarting", True
        self.gates[running].set()

    def come_back(self) -> None:
        self.state, self.dead = "ready", False
        self.on_ready()


async def in_turn(
    policy: str = "version: 1\n", *, slots: int = 1, kind: type[Gated] = Gated, **of: Any
) -> tuple[InTurn, Any]:
    engine = kind("m", slots=slots)
    levels = ServiceLevels(QosPolicy.parse(policy, "policy.yaml"))
    turns = levels.in_turn(engine, "m", "high", registry=CollectorRegistry(), **of)
    await turns.load()
    return turns, engine


def call(
    turns: InTurn, prompt: str, qos_class: str = "high", tenant: str = "t", slo_ms: str | None = None, **body: Any
) -> asyncio.Task[Any]:
    async def ask() -> Any:
        set_caller(Caller("k", tenant, frozenset({"infer"}), "high"))
        headers = {"x-qos-priority": qos_class} | ({"x-slo-ttft-ms": slo_ms} if slo_ms else {})
        context = RequestContext(prompt, headers)
        return await turns.operations["completions"]({"prompt": prompt, "max_tokens": 1, **body}, context)

    return asyncio.create_task(ask())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def open_all(engine: Gated, tasks: list[asyncio.Task[Any]]) -> None:
    while not all(task.done() for task in tasks):
        for gate in engine.gates.values():
            gate.set()
        await settle()


async def test_in_flight_never_exceeds_the_slots_and_none_stays_idle() -> None:
    turns, engine = await in_turn(slots=3)
    tasks = [call(turns, str(at)) for at in range(9)]
    for done in range(9):
        await settle()
        assert len(engine.calls) == min(9, done + 3)
        assert turns.stats().waiting == 9 - len(engine.calls)
        engine.gates[str(done)].set()
    await asyncio.gather(*tasks)


async def test_one_that_need_not_wait_costs_few_calls() -> None:
    """A bound on work that no machine's speed changes: all requests pay it while the engine has room."""
    engine = Gated("m", slots=2)
    engine.gates["x"] = asyncio.Event()
    engine.gates["x"].set()
    levels = ServiceLevels(QosPolicy.default(), lambda: 1.0)  # the first is predicted, to learn; no other at that time
    turns = levels.in_turn(engine, "m", "high", registry=CollectorRegistry())
    await turns.load()
    log = open_log([])

    async def calls(served: Engine) -> int:
        context = RequestContext("x", Headers(raw=[(b"host", b"x"), (b"accept", b"*/*")]))
        seen: list[str] = []
        sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_name) if event == "call" else None)
        try:
            await served.operations["completions"]({"prompt": "x", "max_tokens": 4}, context)
        finally:
            sys.setprofile(None)
        return len(seen)

    await calls(turns)
    assert await calls(turns) - await calls(engine) <= 75
    assert log.fields == {"class": "high", "tenant": "default", "queue_ms": 0.0}
    assert turns.queue is not None
    assert turns.queue.scheduler.ledger.slots_used == 0


async def test_engines_are_told_the_class() -> None:
    turns, engine = await in_turn(slots=3)
    tasks = [call(turns, name, name) for name in ("high", "medium", "low")]
    await open_all(engine, tasks)
    assert [task.result()["priority"] for task in tasks] == [-1, 0, 1]


async def test_a_flood_of_low_leaves_high_the_next_turn() -> None:
    turns, engine = await in_turn()
    flood = [call(turns, f"low {at}", "low") for at in range(200)]
    await settle()
    high = call(turns, "high")
    await settle()
    engine.gates["low 0"].set()
    await settle()
    assert engine.calls == ["low 0", "high"]
    await open_all(engine, [*flood, high])


async def test_two_tenants_share_by_tokens() -> None:
    """One asks for ten times as much each time: it has a tenth of the turns while both wait."""
    turns, engine = await in_turn()
    tasks = [call(turns, f"large {at}", tenant="large", size=100) for at in range(40)]
    tasks += [call(turns, f"small {at}", tenant="small", size=10) for at in range(40)]
    await settle()
    for _ in range(22):
        engine.gates[engine.calls[-1]].set()
        await settle()
    large = sum(name.startswith("large") for name in engine.calls)
    assert large * 100 == pytest.approx((len(engine.calls) - large) * 10, abs=2 * 2 * 100)
    await open_all(engine, tasks)


async def test_a_waiting_call_that_is_cancelled_leaves_nothing_behind() -> None:
    turns, engine = await in_turn()
    running, waiting = call(turns, "a"), call(turns, "b")
    await settle()
    waiting.cancel()
    await settle()
    assert turns.stats().waiting == 0
    running.cancel()
    await settle()
    assert engine.aborts == ["a"]
    last = call(turns, "c")
    await open_all(engine, [last])
    assert engine.calls == ["a", "c"]


async def test_a_call_cancelled_just_when_its_turn_came_gives_it_back() -> None:
    turns, engine = await in_turn()
    running, next_one, last = call(turns, "a"), call(turns, "b"), call(turns, "c")
    await settle()
    engine.gates["a"].set()
    await running
    next_one.cancel()
    await open_all(engine, [next_one, last])
    assert last.result()["text"] == "c"


async def test_one_that_makes_way_is_made_again_and_its_client_notices_nothing() -> None:
    turns, engine = await in_turn("version: 1\nreplay: true\n")
    low = call(turns, "low", "low")
    await settle()
    high = call(turns, "high")
    await settle()
    assert (engine.calls, engine.aborts) == (["low", "high"], ["low"])
    await open_all(engine, [low, high])
    assert engine.calls == ["low", "high", "low"]
    assert [low.result()["text"], high.result()["text"]] == ["low", "high"]
    assert turns.queue is not None
    assert turns.queue.replayed == 1


async def test_one_that_makes_way_and_whose_client_leaves_is_gone() -> None:
    turns, engine = await in_turn("version: 1\nreplay: true\n")
    low = call(turns, "low", "low")
    await settle()
    high = call(turns, "high")
    await asyncio.sleep(0)
    low.cancel()
    await open_all(engine, [low, high])
    assert low.cancelled()
    assert engine.calls.count("low") == 1


async def test_whoever_waits_when_the_time_to_drain_is_over_is_told() -> None:
    turns, engine = await in_turn()
    running, waiting = call(turns, "a"), call(turns, "b")
    await settle()
    await turns.drain(0)
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting
    await open_all(engine, [running])


async def test_what_computes_nothing_needs_no_turn() -> None:
    turns, engine = await in_turn()
    running = call(turns, "a")
    await settle()
    free = asyncio.ensure_future(turns.operations["tokenize"]({"prompt": "t"}, RequestContext("t")))
    await settle()
    assert engine.calls == ["a", "t"]
    await open_all(engine, [running, free])


class Adaptable(Gated):
    async def load_adapter(self, name: str, path: Path) -> None:
        self.adapters = (name,)

    async def unload_adapter(self, name: str) -> None:
        self.adapters = ()


async def test_what_an_engine_has_besides_it_still_has() -> None:
    turns, engine = await in_turn(kind=Adaptable)
    assert isinstance(turns, TakesAdapters)
    await turns.load_adapter("tuned", Path("/tuned"))
    assert turns.adapters == engine.adapters == ("tuned",)
    plain, _ = await in_turn()
    assert not isinstance(plain, TakesAdapters)


async def test_a_replica_that_leaves_serves_its_queue_first() -> None:
    turns, engine = await in_turn()
    other, _ = await in_turn()
    leaving, staying = Replica(turns, "a"), Replica(other, "b")
    replicas = Replicas([leaving, staying])
    tasks = [asyncio.ensure_future(ask_one(replicas, leaving, str(at))) for at in range(3)]
    await settle()
    removing = asyncio.create_task(replicas.remove(leaving, 60))
    await settle()
    assert (turns.stats().waiting, removing.done()) == (2, False)
    await open_all(engine, tasks)
    await removing
    assert [task.result()["text"] for task in tasks] == ["0", "1", "2"]


async def ask_one(replicas: Replicas, replica: Replica, prompt: str) -> Any:
    return await replicas._on(replica, "completions", {"prompt": prompt, "max_tokens": 1}, RequestContext(prompt))


async def test_a_prompt_list_wider_than_the_engine_is_served() -> None:
    turns, engine = await in_turn(slots=2)
    wide = call(turns, "wide", n=10)
    await settle()
    narrow = call(turns, "narrow")
    await settle()
    assert engine.calls == ["wide"]
    await open_all(engine, [wide, narrow])


# --- an engine that is started again ----------------------------------------------------------------------------------


async def test_those_that_wait_keep_their_places_while_the_engine_is_away() -> None:
    turns, engine = await in_turn(kind=Mortal)
    tasks = [call(turns, "a"), call(turns, "low", "low"), call(turns, "high")]
    await settle()
    engine.die("a")
    await settle()
    assert engine.calls == ["a"]  # nobody is put to an engine that is not there
    engine.come_back()
    await settle()
    assert engine.calls == ["a", "high"]
    await open_all(engine, tasks)


async def test_one_that_waits_is_not_kept_beyond_its_deadline() -> None:
    turns, engine = await in_turn(kind=Mortal)
    running, waiting, patient = call(turns, "a"), call(turns, "b", slo_ms="60000"), call(turns, "c")
    await settle()
    engine.die("a")
    await running
    assert turns.queue is not None
    place = next(each for each in turns.queue._waiting if each.ticket.ask.ttft_slo_s)
    place.ticket.arrived_s -= 60  # and time passes
    turns.queue._ring()
    with pytest.raises(Unavailable) as refusal:
        await waiting
    assert (refusal.value.code, refusal.value.retry_after_s) == ("engine_restarting", 5)
    engine.come_back()
    await open_all(engine, [patient])


async def test_they_go_to_another_engine_where_there_is_one() -> None:
    turns, engine = await in_turn(kind=Mortal)
    turns.elsewhere = lambda: True
    running, waiting = call(turns, "a"), call(turns, "b")
    await settle()
    engine.die("a")
    await running
    with pytest.raises(Unavailable):  # which is what sends it there
        await waiting
    assert engine.calls == ["a"]


async def test_a_timer_need_not_say_when_it_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop's that are due at once cannot."""
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_at", lambda _, callback: loop.call_soon(callback))
    waits = iter([5.0, 9.0, 1.0])
    queue = Queue(SimpleNamespace(next_wake_s=lambda: next(waits)), loop.time)  # type: ignore[arg-type]
    queue._waiting.add(object())  # type: ignore[arg-type]
    queue._arm()
    first = queue._timer
    queue._arm()
    assert queue._timer is first
    queue._arm()
    assert queue._timer is not first
    queue._waiting.clear()
