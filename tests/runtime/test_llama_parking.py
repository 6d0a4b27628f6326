"""A less urgent request makes way, and its answer is the one it would have been; a more urgent one waits for nobody."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aim_runtime.engines.base import EngineSpec, Json, parks
from aim_runtime.engines.llama_cpp import loading
from aim_runtime.engines.llama_cpp.batch_plan import BatchPlan
from aim_runtime.engines.llama_cpp.chat_template import ChatTemplate
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine
from aim_runtime.engines.llama_cpp.exact import CHUNK_TOKENS
from aim_runtime.engines.llama_cpp.parking import Parking, State
from aim_runtime.engines.llama_cpp.scheduler import Scheduler
from aim_runtime.engines.llama_cpp.scoring import ROWS_PER_STEP
from aim_runtime.engines.llama_cpp.sequence import Delta, Generation, Sequence
from aim_runtime.engines.llama_cpp.slots import Slot, Slots
from aim_runtime.engines.llama_cpp.turns import MOST_YIELDED_STEPS, Turn, Turns
from aim_runtime.supervisor.launch import Launch
from aim_runtime.supervisor.remote import RemoteEngine
from llama_engine import MIB, ask, context, loaded, new_engine, same_but_for_ties
from lora_files import weights, write_gguf

pytestmark = pytest.mark.model

HIGH, MEDIUM, LOW = -1, 0, 1
STORY = "Once upon a time there was a small robot who lived in a tower by the sea and counted ships. "
URGENT: Json = {"prompt": "At once:", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
GREEDY: Json = {"prompt": STORY * 4, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 2}
SCHEMA: Json = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TEMPLATE = """{%- for tool in tools or [] %}{{ tool | tojson }}
{%- endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOL: Json = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CHAT: Json = {"messages": [{"role": "user", "content": STORY * 3 + "Who is that?"}], "max_tokens": 24, "seed": 3}

PERSON: Json = {"name": "person", "schema": SCHEMA}

#: What is interrupted: operation and body. A prompt of GREEDY is computed in two steps and more.
ASKED: dict[str, tuple[str, Json]] = {
    "greedy": ("completions", GREEDY),
    "sampled": ("completions", {**GREEDY, "temperature": 1.0, "seed": 7, "frequency_penalty": 0.5}),
    "adapter": ("completions", {**GREEDY, "model": "a"}),
    "echo": ("completions", {**GREEDY, "echo": True, "prompt": STORY * 3}),
    "schema": ("chat/completions", {**CHAT, "response_format": {"type": "json_schema", "json_schema": PERSON}}),
    "tool": ("chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
}


def scheduler_of(engine: LlamaCppEngine) -> Scheduler:
    assert engine._loaded is not None
    return engine._loaded.scheduler


def until(met: Callable[[], bool]) -> None:
    """Wait, in a thread that is not the loop's."""
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


async def soon(met: Callable[[], bool]) -> None:
    for _ in range(3000):
        if met():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 30 s")


class Interruptions:
    """Has something more urgent arrive while the engine computes the ``at``-th batches (1: the next) of what is not
    urgent. ``parked``: cached and generated tokens of every sequence at the moment that it was parked."""

    def __init__(self, engine: LlamaCppEngine, at: set[int], **urgent: Any) -> None:
        self._engine = engine
        self._scheduler = scheduler_of(engine)
        self._at = at
        self._urgent = {**URGENT, **urgent}
        self._loop = asyncio.get_running_loop()
        self._batches = itertools.count(1)
        self._answers: list[asyncio.Task[Json]] = []
        self._decode, self._put = self._scheduler._context.decode, self._scheduler._parking.put
        self.parked: list[tuple[int, int]] = []

    async def __aenter__(self) -> Interruptions:
        self._scheduler._context.decode = self._interrupted  # type: ignore[method-assign]
        self._scheduler._parking.put = self._noted  # type: ignore[method-assign]
        return self

    async def __aexit__(self, *error: object) -> None:
        del self._scheduler._context.decode
        del self._scheduler._parking.put
        for answer in await asyncio.gather(*self._answers):
            assert answer["usage"]["completion_tokens"] == 2 * self._urgent.get("n", 1)

    def _interrupted(self) -> int:
        urgent = any(slot.running.priority == HIGH for slot in self._scheduler._slots.busy)
        if not urgent and next(self._batches) in self._at:
            before = self._scheduler.in_flight
            self._loop.call_soon_threadsafe(self._ask)
            until(lambda: self._scheduler.in_flight > before)
        return self._decode()

    def _ask(self) -> None:
        self._answers.append(asyncio.create_task(ask(self._engine, "completions", self._urgent, context(HIGH))))

    def _noted(self, sequence: Sequence, slot: int, length: int) -> None:
        self.parked.append((length, sequence.generated))
        self._put(sequence, slot, length)


async def said(engine: LlamaCppEngine, asked: str, **fields: Any) -> Json:
    """Everything of an answer but ids and its time."""
    operation, body = ASKED[asked]
    answer = await ask(engine, operation, {**body, **fields}, context(LOW))
    for choice in answer["choices"]:
        for call in choice.get("message", {}).get("tool_calls") or []:
            del call["id"]
    return {name: answer[name] for name in ("choices", "usage")}


async def said_anew(engine: LlamaCppEngine, asked: str, **fields: Any) -> Json:
    """... with nothing of its prompt in the cache, nor for the next one."""
    await ask(engine, "completions", URGENT)
    answer = await said(engine, asked, **fields)
    await ask(engine, "completions", URGENT)
    return answer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("adapters") / "a.gguf", weights(1))


def running(model: Path, **options: Any) -> Iterator[LlamaCppEngine]:
    """Deterministic, one slot; its chat template knows tools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_template_of", lambda model, path: ChatTemplate(TEMPLATE, {}))
        engine = new_engine(model, **{"slots": 1, "max_model_len": 256, "deterministic": True, **options})
        asyncio.run(engine.load())
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def exact(embedded_model: Path, adapter: Path) -> Iterator[LlamaCppEngine]:
    yield from running(embedded_model, adapters={"a": adapter})


@pytest.fixture(scope="module")
def forgetful(embedded_model: Path, adapter: Path) -> Iterator[LlamaCppEngine]:
    """Keeps nothing of what it parks."""
    yield from running(embedded_model, adapters={"a": adapter}, parked_memory_bytes=0)


@pytest.fixture(scope="module")
def two_slots(embedded_model: Path) -> Iterator[LlamaCppEngine]:
    """Of which one sequence's state, but not two, can be kept."""
    yield from running(embedded_model, slots=2, parked_memory_bytes=3 * MIB)


# --- the same answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ASKED)
async def test_parked_anywhere_the_answer_is_the_same_to_the_bit(exact: LlamaCppEngine, asked: str):
    """In its prompt, right after its first token, and twice among the others."""
    alone = await said_anew(exact, asked)
    batches = -(-alone["usage"]["prompt_tokens"] // (ROWS_PER_STEP if asked == "echo" else CHUNK_TOKENS))
    async with Interruptions(exact, {1, batches, batches + 2, batches + 5}) as interruptions:
        assert await said(exact, asked) == alone
    assert [generated for _, generated in interruptions.parked] == [0, 1, 3, 6]
    assert len(scheduler_of(exact)._parking) == scheduler_of(exact)._parking.used_bytes == 0


@pytest.mark.parametrize("asked", ["sampled", "echo"])
async def test_without_memory_for_it_it_is_computed_again_to_the_same_bits(forgetful: LlamaCppEngine, asked: str):
    alone = await said_anew(forgetful, asked)
    async with Interruptions(forgetful, {1, 7}) as interruptions:
        assert await said(forgetful, asked) == alone
    assert [generated > 1 for _, generated in interruptions.parked] == [False, True]


async def test_tokens_found_in_the_cache_are_told_as_without_the_pause(exact: LlamaCppEngine):
    await said(exact, "greedy")
    alone = await said(exact, "greedy")
    cached = alone["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    async with Interruptions(exact, {1, 3}) as interruptions:
        assert await said(exact, "greedy") == alone
    assert interruptions.parked[0][0] >= cached


async def test_choices_of_one_request(two_slots: LlamaCppEngine):
    """The second choice makes way first, then the first; a leader that is parked in its prompt has its choices wait."""
    alone = await said_anew(two_slots, "sampled", n=2)
    for point, parked in ((1, 1), (3, 2), (6, 2)):
        async with Interruptions(two_slots, {point}, n=2) as interruptions:
            assert (await said(two_slots, "sampled", n=2))["choices"] == alone["choices"]
        assert len(interruptions.parked) == parked
        await ask(two_slots, "completions", {**URGENT, "n": 2})  # the prompt is in no cache


async def test_in_a_shared_cache_the_greedy_text_is_the_same(embedded_model: Path, adapter: Path):
    async with loaded(embedded_model, slots=2, max_model_len=256, adapters={"a": adapter}) as engine:
        alone = {asked: await said(engine, asked) for asked in ("greedy", "adapter")}
        async with Interruptions(engine, {2, 6, 9, 12}, n=2) as interruptions:
            both = await asyncio.gather(*(said(engine, asked) for asked in alone))
        assert len(interruptions.parked) >= 4
        for asked, answer in zip(alone, both, strict=True):
            same_but_for_ties(answer["choices"][0], alone[asked]["choices"][0])


# --- who makes way ----------------------------------------------------------------------------------------------------


async def test_equals_never_make_way(embedded_model: Path):
    async with loaded(embedded_model, slots=1) as engine:
        async with Interruptions(engine, set()) as interruptions:
            await asyncio.gather(*(ask(engine, "completions", URGENT, context(LOW)) for _ in range(3)))
        assert interruptions.parked == []


async def test_the_least_urgent_makes_way_the_latest_of_them_first(embedded_model: Path):
    async with loaded(embedded_model, slots=3) as engine:
        scheduler = scheduler_of(engine)
        body = {**URGENT, "max_tokens": 400}
        running = [asyncio.create_task(ask(engine, "completions", body, context(p))) for p in (LOW, LOW, MEDIUM)]
        await soon(lambda: engine.stats().running == 3)
        arrivals = sorted(slot.running.order for slot in scheduler._slots.busy)
        first = asyncio.create_task(ask(engine, "completions", body, context(MEDIUM)))
        await soon(lambda: engine.stats().parked == 1)
        assert sorted(slot.running.order for slot in scheduler._slots.busy)[-1] == arrivals[1]
        second = asyncio.create_task(ask(engine, "completions", body, context(HIGH)))
        await soon(lambda: engine.stats().parked == 2)
        assert {slot.running.priority for slot in scheduler._slots.busy} == {HIGH, MEDIUM}
        assert [sequence.order for sequence in scheduler._waiting] == arrivals[1:]
        assert engine.stats().waiting == 2
        for task in (*running, first, second):
            task.cancel()
        await asyncio.gather(*running, first, second, return_exceptions=True)
        await soon(lambda: scheduler.in_flight == 0)
        assert (engine.stats().parked, len(scheduler._parking), scheduler._parking.used_bytes) == (0, 0, 0)


async def test_cancelled_while_parked_it_is_freed_at_once(embedded_model: Path):
    async with loaded(embedded_model, slots=1) as engine:
        parking = scheduler_of(engine)._parking
        body = {**URGENT, "max_tokens": 400}
        low = asyncio.create_task(ask(engine, "completions", body, context(LOW)))
        await soon(lambda: engine.stats().running == 1)
        high = asyncio.create_task(ask(engine, "completions", body, context(HIGH)))
        await soon(lambda: engine.stats().parked == 1)
        assert parking.used_bytes > 0
        low.cancel()
        await soon(lambda: engine.stats().parked == 0)
        assert (parking.used_bytes, engine.stats().running, high.done()) == (0, 1, False)
        high.cancel()
        await asyncio.gather(low, high, return_exceptions=True)


async def test_one_that_does_not_fit_even_then_parks_nobody(embedded_model: Path):
    """A cache of one sequence's cells: beside an equally urgent one there is no room for it, whoever makes way."""
    async with loaded(embedded_model, slots=3, max_model_len=256, kv_cache_memory_bytes=1) as engine:
        low = asyncio.create_task(ask(engine, "completions", {**URGENT, "max_tokens": 60}, context(LOW)))
        high = asyncio.create_task(ask(engine, "completions", GREEDY | {"max_tokens": 20}, context(HIGH)))
        await soon(lambda: engine.stats().running == 2)
        async with Interruptions(engine, set()) as interruptions:
            await ask(engine, "completions", {**GREEDY, "prompt": "Go on. " * 60, "max_tokens": 1}, context(HIGH))
        assert interruptions.parked == []
        await asyncio.gather(low, high)


# --- a first token waits for nobody less urgent -----------------------------------------------------------------------


async def batches_to_a_first_token(engine: LlamaCppEngine) -> int:
    scheduler = scheduler_of(engine)
    decode, batches = scheduler._context.decode, []

    def counting() -> int:
        batches.extend(1 for slot in scheduler._slots.busy if slot.running.priority == HIGH)
        return decode()

    scheduler._context.decode = counting  # type: ignore[method-assign]
    try:
        await ask(engine, "completions", {**GREEDY, "prompt": STORY * 6, "max_tokens": 1}, context(HIGH))
    finally:
        del scheduler._context.decode
    return len(batches)


async def test_beside_eight_less_urgent_ones_a_first_token_takes_as_many_steps_as_alone(embedded_model: Path):
    async with loaded(embedded_model, slots=8, max_model_len=512) as engine:
        plan = scheduler_of(engine)._plan
        plan.learn(100, 0.5)
        plan.learn = lambda tokens, computed_s: None  # type: ignore[method-assign]  # this machine's speed is no matter
        alone = await batches_to_a_first_token(engine)
        body = {**URGENT, "max_tokens": 200}
        low = [asyncio.create_task(ask(engine, "completions", body, context(LOW))) for _ in range(8)]
        await soon(lambda: engine.stats().running == 8)
        await ask(engine, "completions", URGENT, context(HIGH))  # the prompt is in no cache
        beside = await batches_to_a_first_token(engine)
        assert 2 < alone <= MOST_YIELDED_STEPS
        assert beside == alone
        assert not any(task.done() for task in low)
        for task in low:
            task.cancel()
        await asyncio.gather(*low, return_exceptions=True)


def ignore(delta: Delta) -> None:
    """A sink for sequences whose answers nobody reads."""


def slot(number: int, priority: int, prompt: int, generated: int = 0, weights: str = "") -> Slot:
    sequence = Sequence(Generation(np.zeros(prompt, np.int32), max_tokens=9999), 0, ignore, priority=priority)
    sequence.arrival = number
    sequence.weights = weights
    for _ in range(generated):
        sequence.append(0)
    return Slot(number, cached=prompt + generated - 1 if generated else 0, sequence=sequence)


def compute(turn: Turn, plan: BatchPlan) -> set[int]:
    """The turn's step, as if it had been computed; who had a part in it."""
    took_part = set()
    for entry in itertools.chain(*plan.batches(turn.slots, turn.groups)):
        took_part.add(entry.slot.number)
        completes = entry.completes
        entry.slot.cached += entry.count
        if completes:
            entry.slot.running.append(0)
    return took_part


def steps_to_first_token(high: Slot, others: list[Slot]) -> int:
    plan, turns, steps = BatchPlan(512), Turns(), 0
    plan.learn(100, 0.5)
    while not high.running.generated:
        compute(turns.next([*others, high]), plan)
        steps += 1
    return steps


RUNNING = st.tuples(st.sampled_from([MEDIUM, LOW]), st.integers(2, 300), st.integers(0, 3), st.sampled_from(["", "a"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(RUNNING, max_size=7), st.integers(2, 2500))
async def test_a_first_token_takes_a_seventh_of_its_steps_longer_at_most(running: list[Any], prompt: int):
    alone = steps_to_first_token(slot(9, HIGH, prompt), [])
    beside = steps_to_first_token(slot(9, HIGH, prompt), [slot(n, *each) for n, each in enumerate(running)])
    assert beside <= alone + 1 + alone // MOST_YIELDED_STEPS


@settings(max_examples=30, deadline=None)
@given(st.lists(RUNNING, min_size=1, max_size=7))
async def test_nobody_is_starved_by_first_tokens_that_never_end(running: list[Any]):
    """More urgent prompts come one after the other, with two adapters of their own."""
    low = [slot(n, *each) for n, each in enumerate(running)]
    plan, turns = BatchPlan(512), Turns()
    plan.learn(100, 0.5)
    took_part: set[int] = set()
    for _ in range(MOST_YIELDED_STEPS * 60):
        took_part |= compute(turns.next([*low, slot(8, HIGH, 900, weights="b"), slot(9, HIGH, 900)]), plan)
    assert took_part >= set(range(len(low)))


async def test_while_one_generates_the_prompts_below_it_wait_and_their_answers_do_not():
    high, answering, asking = slot(0, HIGH, 20, generated=1), slot(1, LOW, 20, generated=1), slot(2, LOW, 900)
    plan, turns = BatchPlan(512), Turns()
    plan.learn(100, 0.5)
    steps = [compute(turns.next([high, answering, asking]), plan) for _ in range(2 * (MOST_YIELDED_STEPS + 1))]
    assert all({0, 1} <= step for step in steps)
    assert [number for number, step in enumerate(steps, 1) if 2 in step] == [8, 16]


@settings(max_examples=100, deadline=None)
@given(st.lists(RUNNING, min_size=1, max_size=8), st.integers(1, 20))
async def test_among_equals_nothing_changes(running: list[Any], steps: int):
    """Step by step what a plain round of the adapters would compute."""
    busy = [slot(n, LOW, *each[1:]) for n, each in enumerate(running)]
    twins = [slot(n, LOW, *each[1:]) for n, each in enumerate(running)]
    turns, plan, plain, last = Turns(), BatchPlan(512), BatchPlan(512), ""
    for _ in range(steps):
        keys = sorted({each.running.weights for each in twins})
        if len(keys) > 1:
            last = next((key for key in keys if key > last), keys[0])
        chosen = [each for each in twins if len(keys) < 2 or each.running.weights == last]
        turn = turns.next(busy)
        assert ([each.number for each in turn.slots], turn.groups) == ([each.number for each in chosen], len(keys))
        assert compute(turn, plan) == compute(Turn(chosen, len(keys)), plain)


# --- whatever comes and goes ------------------------------------------------------------------------------------------


class ListCache:
    """The cache's contract over plain lists: what each slot holds, token by token. A state is a slot's tokens."""

    def __init__(self, count: int, cells: int) -> None:
        self.held: list[list[int]] = [[] for _ in range(count)]
        self.cells = cells

    def keep(self, slot: int, length: int) -> bool:
        del self.held[slot][length:]
        return True

    def share(self, source: int, target: int, length: int) -> None:
        self.held[target] = self.held[source][:length]

    def state_bytes(self, slot: int) -> int:
        return len(self.held[slot])

    def save(self, slot: int) -> State:
        return np.array(self.held[slot], np.uint8)

    def load(self, slot: int, state: State) -> bool:
        assert self.held[slot] == []
        if sum(map(len, self.held)) + state.size > self.cells:
            return False
        self.held[slot] = state.tolist()
        return True


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("seat"), st.lists(st.integers(0, 1), min_size=1, max_size=12)),
        st.tuples(st.sampled_from(["leave", "park", "resume", "forget"]), st.integers(0, 2)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(ACTIONS, st.integers(0, 30), st.integers(20, 60))
async def test_what_is_parked_is_kept_within_the_bound_and_put_back_as_it_was(
    actions: list[tuple[str, Any]], most_bytes: int, cells: int
):
    cache = ListCache(3, cells)
    slots, parking = Slots(3, cache, keeps_prefixes=True), Parking(cache, most_bytes)
    parked: list[Sequence] = []
    for action, value in actions:
        seated = None
        if action == "seat":
            seated = slots.seat(Sequence(Generation(np.array(value, np.int32), max_tokens=4), 0, ignore))
        elif action in ("resume", "forget") and parked:
            sequence = parked[value % len(parked)]
            kept = parking.kept(sequence)
            seated = slots.seat(sequence, kept) if action == "resume" else None
            if seated is not None and kept is not None:
                assert seated.cached in (0, kept.length)
                assert seated.cached or sum(map(len, cache.held)) + kept.length > cells
            if seated is not None or action == "forget":
                parking.forget(sequence)
                parked.remove(sequence)
        elif action in ("leave", "park") and slots.busy:
            leaving = slots.busy[value % len(slots.busy)]
            if action == "park":
                parked.append(leaving.running)
                parking.put(leaving.running, leaving.number, leaving.cached)
            slots.leave(leaving)
        if seated is not None:
            assert cache.held[seated.number] == seated.running.tokens[: seated.cached].tolist()
            cache.held[seated.number] += seated.running.tokens[seated.cached :].tolist()
            seated.cached = seated.running.length
        assert len(parking) == len(parked)
        held = [kept.state.nbytes for kept in map(parking.kept, parked) if kept is not None]
        assert parking.used_bytes == sum(held) <= most_bytes


PROMPTS = ["The river runs through", STORY * 4, "In mathematics, a prime number", STORY + "One day"]
COMING = st.lists(
    st.tuples(
        st.integers(0, 4),  # decodes after the one before
        st.sampled_from([HIGH, MEDIUM, LOW]),
        st.sampled_from(PROMPTS),
        st.sampled_from([1, 1, 1, 2]),  # choices
        st.sampled_from([None, None, None, 3]),  # its client leaves after so many more decodes
    ),
    min_size=4,
    max_size=7,
)


class Audited:
    """Looks at every batch: the most urgent run, nothing is kept of who is not parked, nor beyond the bound."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        self.scheduler = scheduler_of(engine)
        self.batches = 0
        self._decode = self.scheduler._context.decode
        self.scheduler._context.decode = self._audited  # type: ignore[method-assign]

    def _audited(self) -> int:
        scheduler, parking = self.scheduler, self.scheduler._parking
        self.batches += 1
        waiting = [sequence.priority for sequence in scheduler._waiting if sequence.may_start]
        least_urgent = max(slot.running.priority for slot in scheduler._slots.busy)
        assert min(waiting, default=LOW) >= least_urgent
        assert set(parking._parked) <= set(scheduler._waiting)
        assert parking.used_bytes <= parking._most_bytes
        return self._decode()

    async def after(self, batches: int) -> None:
        """So many more batches, or until there is nothing to compute."""
        until_batch = self.batches + batches
        await soon(lambda: self.batches >= until_batch or not self.scheduler.in_flight)


_alone: dict[str, list[str]] = {}


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(COMING)
async def test_whoever_comes_and_goes_every_answer_is_the_one_it_has_alone(two_slots: LlamaCppEngine, coming: Any):
    def body(prompt: str, n: int = 1) -> Json:
        return {"prompt": prompt, "max_tokens": 4, "temperature": 1.0, "seed": 5, "ignore_eos": True, "n": n}

    async def texts(prompt: str, n: int, priority: int) -> list[str]:
        answer = await ask(two_slots, "completions", body(prompt, n), context(priority))
        return [choice["text"] for choice in answer["choices"]]

    for prompt in PROMPTS:
        if prompt not in _alone:
            _alone[prompt] = await texts(prompt, 2, MEDIUM)
    audited = Audited(two_slots)
    asked: list[tuple[str, int, asyncio.Task[list[str]]]] = []
    leaving: list[asyncio.Task[None]] = []

    async def leave(after: int, task: asyncio.Task[list[str]]) -> None:
        await audited.after(after)
        task.cancel()

    for wait, priority, prompt, n, leaves_after in coming:
        await audited.after(wait)
        task = asyncio.create_task(texts(prompt, n, priority))
        asked.append((prompt, n, task))
        await asyncio.sleep(0)
        if leaves_after is not None:
            leaving.append(asyncio.create_task(leave(leaves_after, task)))
    for prompt, n, task in asked:
        (found,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(found, asyncio.CancelledError) or found == _alone[prompt][:n]
    await asyncio.gather(*leaving)
    await soon(lambda: not audited.scheduler.in_flight)
    del audited.scheduler._context.decode
    assert (len(audited.scheduler._parking), audited.scheduler._parking.used_bytes) == (0, 0)


# --- from another process ---------------------------------------------------------------------------------------------


async def test_an_engine_in_a_process_of_its_own_tells_of_it(embedded_model: Path):
    options = {"threads": 1, "kv_cache_memory_bytes": 16 * MIB}
    spec = EngineSpec("llama_cpp", embedded_model, "smollm2", max_model_len=256, max_concurrency=1, options=options)
    engine = RemoteEngine(Launch(spec))
    assert not parks(engine)
    await engine.load()
    try:
        assert parks(engine)
        # Long enough, both, to be seen by a beat: one a second at rest, then four.
        low = asyncio.create_task(engine.operations["completions"]({**URGENT, "max_tokens": 240}, context(LOW)))
        await soon(lambda: engine.stats().running == 1)
        assert engine.stats().kv_tokens_total == 256
        high = asyncio.create_task(engine.operations["completions"]({**URGENT, "max_tokens": 100}, context(HIGH)))
        await soon(lambda: engine.stats().parked == 1)
        assert not low.done()
        await high
        assert (await low)["usage"]["completion_tokens"] == 240  # type: ignore[index]
    finally:
        await engine.close()
