"""One name on several devices: who gets a request, what is done when one dies, and moving without losing any."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry

from aim_kserve.errors import BadRequest, NotFound, ServingError, Unavailable
from aim_runtime.engines.base import EngineDied, Json, ModelLoadError, RequestContext
from aim_runtime.models.directory import Models
from aim_runtime.models.entry import Launch, ModelEntry
from aim_runtime.models.eviction import DoesNotFit
from aim_runtime.replicas.choice import prefix_of
from aim_runtime.replicas.engine import Replica, Replicas
from aim_runtime.replicas.suspects import KEPT, QUARANTINE_S, Suspects
from fake_engine import FakeEngine, words


@dataclass
class Mortal(FakeEngine):
    """Fails what it has once it is ``dead``, as a supervised engine does; ``full`` refuses what comes."""

    full: bool = False
    closed: bool = False

    async def _answer(self, request: Any) -> Any:
        if self.dead or self.full:
            raise Unavailable("the engine is dead or full")
        return await super()._answer(request)

    async def _tokens(self, request: Any) -> AsyncIterator[str]:
        async for token in super()._tokens(request):
            if self.dead:
                raise Unavailable("the engine has died")
            yield token

    async def close(self) -> None:
        assert self._running + self._waiting == 0, "closed with requests in flight"
        self.closed = True
        await super().close()


@asynccontextmanager
async def replicas(count: int = 2, **options: Any) -> AsyncIterator[tuple[Replicas, list[Mortal]]]:
    engines = [Mortal("m", **options) for _ in range(count)]
    both = Replicas([Replica(engine, str(index)) for index, engine in enumerate(engines)], random.Random(7))
    await both.load()
    yield both, engines


_numbers = iter(range(10**9))


def context() -> RequestContext:
    return RequestContext(f"r{next(_numbers)}")


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def body(prompt: str = "x", **fields: Any) -> Json:
    return {"prompt": prompt, "max_tokens": 4, **fields}


async def ask(engine: Replicas, **fields: Any) -> str:
    """The text of a whole or streamed answer."""
    answer = await engine.operations["completions"](body(**fields), context())
    if isinstance(answer, dict):
        return str(answer["choices"][0]["text"])
    chunks = [orjson.loads(chunk) async for chunk in answer]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def taken(engines: Sequence[FakeEngine]) -> list[int]:
    return [len(engine.seen) for engine in engines]


async def test_load_is_shared_out() -> None:
    async with replicas(3, token_s=0.002) as (all_three, engines):
        await asyncio.gather(*(ask(all_three, prompt=str(index)) for index in range(90)))
        assert min(taken(engines)) >= 20  # by chance alone: 18 or fewer once in 500
        assert all_three.stats().slots_total == 3 * 64


async def test_the_same_beginning_goes_to_the_same_replica() -> None:
    async with replicas(4) as (all_four, engines):
        system = "you are a helpful assistant. " * 40
        for index in range(20):
            await ask(all_four, prompt=f"{system}{index}")
        assert sorted(taken(engines)) == [0, 0, 0, 20]


async def test_an_overloaded_replica_is_not_held_to_its_prompts() -> None:
    async with replicas(2, token_s=0.002, slots=4) as (both, engines):
        await asyncio.gather(*(ask(both, prompt="the same") for _ in range(40)))
        assert min(taken(engines)) >= 10


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"prompt": "a"}, {"prompt": "a"}, True),
        ({"prompt": "a" * 600}, {"prompt": "a" * 700}, True),
        ({"prompt": "a"}, {"prompt": "b"}, False),
        ({"prompt": "a", "model": "m"}, {"prompt": "a", "model": "adapter"}, False),
        (
            {"messages": [{"role": "system", "content": "s" * 600}, {"role": "user", "content": "1"}]},
            {"messages": [{"role": "system", "content": "s" * 600}, {"role": "user", "content": "2"}]},
            True,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "b"}]}]},
            False,
        ),
    ],
)
def test_what_a_beginning_is(one: Json, other: Json, same: bool) -> None:
    assert (prefix_of(one) == prefix_of(other)) is same


@pytest.mark.parametrize(
    "odd", [{}, {"messages": 5}, {"messages": [5]}, {"messages": [{"content": 7}]}, {"prompt": ["a"]}, {"prompt": ""}]
)
def test_a_body_without_text_has_no_beginning(odd: Json) -> None:
    assert prefix_of(odd) == b"" or "content" in str(odd)
    assert prefix_of({**odd, "prompt": "\ud800"})  # half a character is text, too


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("trouble", ["dead", "full"])
async def test_who_dies_or_is_full_before_its_first_byte_is_replaced(trouble: str, stream: bool) -> None:
    async with replicas(2) as (both, engines):
        await ask(both, prompt="warm")  # the next one goes where this one went
        first = max(engines, key=lambda engine: len(engine.seen))
        healthy = first.healthy
        first.healthy = healthy if trouble == "full" else lambda: True  # type: ignore[method-assign]  # not yet noticed
        setattr(first, trouble, True)
        assert await ask(both, prompt="warm", stream=stream) == "".join(words(4))
        assert sum(taken(engines)) == 2  # one answer each


async def test_a_stream_that_dies_before_its_first_byte_is_begun_elsewhere() -> None:
    async with replicas(2, token_s=0.05) as (both, engines):
        stream = await both.operations["completions"](body(stream=True), context())
        asked = asyncio.ensure_future(anext(stream))
        await until(lambda: any(engine._running for engine in engines))
        next(engine for engine in engines if engine._running).dead = True
        chunks = [await asked, *[chunk async for chunk in stream]]
        texts = [choice["text"] for chunk in chunks for choice in orjson.loads(chunk)["choices"]]
        assert "".join(texts) == "".join(words(4))
        assert taken(engines) == [1, 1]


async def test_after_the_first_byte_a_failure_is_told() -> None:
    async with replicas(2) as (both, engines):
        stream = await both.operations["completions"](body(stream=True), context())
        await anext(stream)
        for engine in engines:
            engine.dead = bool(engine._running)
        with pytest.raises(Unavailable, match="has died"):
            _ = [chunk async for chunk in stream]
        assert sum(taken(engines)) == 1


async def test_what_a_failed_replica_has_counted_is_forgotten() -> None:
    async with replicas(2) as (both, engines):
        await ask(both, prompt="warm")
        first = max(engines, key=lambda engine: len(engine.seen))
        first.healthy = lambda: True  # type: ignore[method-assign]
        first.dead = True
        asked = context()
        asked.usage.completion_tokens = 99
        await both.operations["completions"](body("warm"), asked)
        assert asked.usage.completion_tokens == 4


async def test_a_clients_error_and_an_unforeseen_one_are_not_asked_twice() -> None:
    async with replicas(2) as (both, engines):
        with pytest.raises(BadRequest):
            await ask(both, temperature=-1)
        with pytest.raises(ZeroDivisionError):
            await ask(both, fake={"fail_after": 0})
        assert sum(taken(engines)) == 1


async def test_where_all_refuse_the_second_one_answers() -> None:
    async with replicas(3) as (all_three, engines):
        for engine in engines:
            engine.full = True
        with pytest.raises(Unavailable, match="dead or full"):
            await ask(all_three)
        for engine in engines:
            engine.dead = True
        assert not all_three.healthy()
        with pytest.raises(Unavailable):
            await ask(all_three)


async def test_a_replica_that_cannot_be_loaded_is_left_out() -> None:
    engines = [Mortal("m"), Mortal("m", load_error="no such device")]
    both = Replicas([Replica(engine, str(index)) for index, engine in enumerate(engines)])
    await both.load()
    assert [replica.engine for replica in both.replicas] == engines[:1]
    assert engines[1].closed
    neither = Replicas([Replica(Mortal("m", load_error="no such device"))])
    with pytest.raises(ModelLoadError, match="no such device"):
        await neither.load()


@dataclass
class Adaptable(Mortal):
    refuses: bool = False
    paths: dict[str, Path] = field(default_factory=dict)

    async def load_adapter(self, name: str, path: Path) -> None:
        if self.refuses:
            raise BadRequest(f"{path}: rank 512 is more than 64")
        self.adapters = tuple(dict.fromkeys((*self.adapters, name)))
        self.paths[name] = path

    async def unload_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise NotFound(f"{name} is not loaded")
        self.adapters = tuple(kept for kept in self.adapters if kept != name)


async def test_an_adapter_is_on_every_replica_or_on_none() -> None:
    engines = [Adaptable("m"), Adaptable("m")]
    both = Replicas([Replica(engine, str(index)) for index, engine in enumerate(engines)])
    await both.load()
    await both.load_adapter("polite", Path("/a"))
    assert both.adapters == ("polite",)
    third = Adaptable("m")
    await both.add(Replica(third, "2"))
    assert third.adapters == ("polite",)
    engines[1].refuses = True
    with pytest.raises(BadRequest, match="rank 512"):
        await both.load_adapter("rude", Path("/b"))
    assert both.adapters == ("polite",)
    assert engines[0].adapters == ("polite",)
    await both.unload_adapter("polite")
    assert [engine.adapters for engine in (*engines, third)] == [(), (), ()]
    with pytest.raises(BadRequest, match="takes no adapters"):
        await Replicas([Replica(Mortal("m"))]).load_adapter("x", Path("/x"))


async def test_an_adapter_that_cannot_be_replaced_everywhere_is_replaced_nowhere() -> None:
    engines = [Adaptable("m", adapters=("start",)), Adaptable("m", adapters=("start",))]
    both = Replicas([Replica(engine, str(index)) for index, engine in enumerate(engines)])
    await both.load()
    await both.load_adapter("polite", Path("/a"))
    engines[1].refuses = True
    with pytest.raises(BadRequest, match="rank 512"):
        await both.load_adapter("polite", Path("/b"))
    assert [engine.paths["polite"] for engine in engines] == [Path("/a"), Path("/a")]
    with pytest.raises(BadRequest, match="rank 512"):
        await both.load_adapter("start", Path("/b"))
    assert both.adapters == ("start", "polite")


async def test_adapters_are_not_changed_while_a_replica_is_down() -> None:
    engines = [Adaptable("m", adapters=("start",)), Adaptable("m", adapters=("start",))]
    both = Replicas([Replica(engine, str(index)) for index, engine in enumerate(engines)])
    await both.load()
    engines[1].dead = True
    with pytest.raises(Unavailable, match="a replica of the model is down"):
        await both.load_adapter("polite", Path("/a"))
    with pytest.raises(Unavailable, match="a replica of the model is down"):
        await both.unload_adapter("start")
    assert [engine.adapters for engine in engines] == [("start",), ("start",)]
    engines[1].dead = False
    engines[0].adapters = ()  # a replica died in the middle of an unload once: the rest can be done again
    await both.unload_adapter("start")
    assert [engine.adapters for engine in engines] == [(), ()]
    with pytest.raises(NotFound):
        await both.unload_adapter("start")


async def test_a_new_replica_does_not_bring_back_what_was_unloaded() -> None:
    engines = [Adaptable("m", adapters=("start", "kept"))]
    together = Replicas([Replica(engine, str(index)) for index, engine in enumerate(engines)])
    await together.load()
    await together.unload_adapter("start")
    new = Adaptable("m", adapters=("start", "kept"))  # its launch is the first one's
    await together.add(Replica(new, "1"))
    assert new.adapters == ("kept",)


# --- moving ---------------------------------------------------------------------------------------------------------


class Made:
    """Launches of engines that can be looked at afterwards."""

    def __init__(self, **options: Any) -> None:
        self.engines: dict[str, Mortal] = {}
        self._options = options

    def at(self, place: str, **options: Any) -> Launch:
        def create() -> Mortal:
            self.engines[place] = Mortal("m", **{**self._options, **options})
            return self.engines[place]

        return Launch(create, place)


@asynccontextmanager
async def serving(made: Made, *places: str, **options: Any) -> AsyncIterator[Models]:
    entry = ModelEntry("m", tuple(made.at(place) for place in places))
    models = Models([entry], registry=CollectorRegistry(), **options)
    await models.load_async()
    yield models
    models.start_draining()
    await models.drain(5)
    await models.close()


async def complete(models: Models, stream: bool, tokens: int) -> str:
    asked = {"model": "m", "prompt": f"p{next(_numbers)}", "max_tokens": tokens, "stream": stream}
    answer = await models.route(asked, context()).call("completions", asked, context())
    if isinstance(answer, dict):
        return str(answer["choices"][0]["text"])
    chunks = [orjson.loads(chunk) async for chunk in answer]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def test_migration_under_load_loses_no_request() -> None:
    """Requests in flight on the old place, whole and streamed, more of them all the while, there and back again."""
    made = Made(token_s=0.001, slots=512)
    async with serving(made, "card 0") as models:
        moving = True
        answers: list[str] = []

        async def client(index: int) -> None:
            while moving:
                answers.append(await complete(models, index % 2 == 0, 5 + index % 30))
                assert answers[-1] == "".join(words(5 + index % 30))

        clients = [asyncio.ensure_future(client(index)) for index in range(240)]
        await until(lambda: models.get("m").in_flight.count == 240)
        for place in ("card 1", "card 0", "card 1"):
            old = next(iter(models.get("m").runs_on.replicas)).engine  # type: ignore[attr-defined]
            await models.migrate("m", made.at(place))
            assert old.closed  # which asserts that nothing was in flight there
            assert [replica.place for replica in models.get("m").runs_on.replicas] == [place]  # type: ignore[attr-defined]
            answered = len(answers) + 100
            await until(lambda: len(answers) >= answered)  # noqa: B023  done before the next one
        moving = False
        await asyncio.gather(*clients)
        assert len(answers) >= 240


async def test_a_migration_that_fails_changes_nothing() -> None:
    made = Made()
    short = DoesNotFit("3.2 GiB short on card 1")
    told: list[dict[str, Any]] = []

    def admit(entry: ModelEntry, *, without: Any = ()) -> None:
        if entry.launches[0].place == "small":
            raise short

    def audit(action: str, **fields: Any) -> None:
        told.append({"action": action, **fields})

    async with serving(made, "card 0", admit=admit, audit=audit) as models:
        with pytest.raises(ServingError, match=r"model m: 3\.2 GiB short on card 1") as refused:
            await models.migrate("m", made.at("small"))
        assert (refused.value.status, "small" in made.engines) == (409, False)
        with pytest.raises(BadRequest, match="no such device"):
            await models.migrate("m", made.at("broken", load_error="no such device"))
        assert made.engines["broken"].closed
        with pytest.raises(BadRequest, match="has a replica at 'card 0' already"):
            await models.migrate("m", made.at("card 0"))
        with pytest.raises(NotFound, match="no replica at 'card 7': there are 'card 0'"):
            await models.migrate("m", made.at("card 1"), "card 7")
        with pytest.raises(NotFound, match="knows: m"):
            await models.migrate("other", made.at("card 1"))
        assert await complete(models, False, 3) == "".join(words(3))
        assert [replica.place for replica in models.get("m").runs_on.replicas] == ["card 0"]  # type: ignore[attr-defined]
    moves = [one for one in told if one["action"] == "migrate"]
    assert Counter(one["outcome"] for one in moves) == {"refused": 3}
    assert moves[0]["target"] == "small"


async def test_replicas_come_and_go() -> None:
    made = Made()
    async with serving(made, "0", "1") as models:
        with pytest.raises(BadRequest, match="replicas at '0', '1': say which one leaves"):
            await models.migrate("m", made.at("2"))
        await models.migrate("m", made.at("2"), "0")
        await models.add_replica("m", made.at("3"))
        await models.remove_replica("m", "1")
        await models.remove_replica("m", "2")
        assert {place for place, engine in made.engines.items() if engine.closed} == {"0", "1", "2"}
        with pytest.raises(BadRequest, match="has one replica: unload the model"):
            await models.remove_replica("m", "3")
        assert await complete(models, True, 3) == "".join(words(3))


async def test_the_gauges_follow_the_replicas() -> None:
    registry = CollectorRegistry()
    made = Made()
    models = Models([ModelEntry("m", (made.at("0"), made.at("1")))], registry=registry)
    await models.load_async()

    def places() -> set[str]:
        samples = [sample for metric in registry.collect() for sample in metric.samples]
        return {sample.labels["replica"] for sample in samples if sample.name == "aim_engine_slots"}

    assert places() == {"0", "1"}
    await models.migrate("m", made.at("2"), "0")
    assert places() == {"1", "2"}
    await models.close()


async def test_ending_while_a_replica_is_left_frees_it() -> None:
    made = Made(token_s=0.01)
    async with serving(made, "0") as models:
        request = asyncio.ensure_future(complete(models, False, 10))
        await until(lambda: bool(made.engines["0"]._running))
        move = asyncio.ensure_future(models.migrate("m", made.at("1")))
        await until(lambda: "1" in made.engines)
        models.start_draining()
        await models.drain(5)
        assert await request == "".join(words(10))
        await models.close()
        await asyncio.gather(move, return_exceptions=True)
        assert all(engine.closed for engine in made.engines.values())


# --- requests that end the engine -----------------------------------------------------------------------------------


@dataclass
class Fragile(FakeEngine):
    """Dies of ``poison`` as a supervised engine does, and is back at once."""

    deaths: int = 0
    mercy: int = 10**9

    async def _answer(self, request: Any) -> Any:
        if request.prompt == "poison" and self.deaths < self.mercy:
            self.deaths += 1
            death = EngineDied("its process has died", code="engine_restarting", retry_after_s=5)
            death.alone = self._running + self._waiting == 0
            raise death
        return await super()._answer(request)


def fragile(count: int, **options: Any) -> tuple[Replicas, list[Fragile]]:
    engines = [Fragile("m", **options) for _ in range(count)]
    return Replicas([Replica(engine, str(index)) for index, engine in enumerate(engines)], random.Random(7)), engines


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_a_request_that_ends_every_engine_ends_two(count: int) -> None:
    together, engines = fragile(count)
    await together.load()
    if count == 1:
        with pytest.raises(EngineDied, match="its process has died"):
            await ask(together, prompt="poison")
    for _ in range(5):
        with pytest.raises(ServingError, match="alone in the engine's process 2 times") as caught:
            await ask(together, prompt="poison")
        assert not isinstance(caught.value, Unavailable)
        assert caught.value.headers() == {"x-should-retry": "false"}
        assert caught.value.code == "request_ends_engine"
    assert sum(engine.deaths for engine in engines) == 2
    assert await ask(together, prompt="other") == "".join(words(4))


async def test_a_request_among_others_is_not_suspected_and_ends_no_more_than_two_at_a_time() -> None:
    together, engines = fragile(3, token_s=0.01)
    await together.load()
    others = [asyncio.create_task(ask(together, prompt=str(index), max_tokens=30)) for index in range(12)]
    await until(lambda: min(taken(engines)) >= 1)
    for number in range(1, 4):
        with pytest.raises(EngineDied):
            await ask(together, prompt="poison")
        assert sum(engine.deaths for engine in engines) == 2 * number
    assert set(await asyncio.gather(*others)) == {"".join(words(30))}


async def test_who_is_answered_after_all_was_not_to_blame() -> None:
    together, (engine,) = fragile(1, mercy=1)
    await together.load()
    for stream in (False, True) * 3:  # somebody else killed it each time
        engine.deaths = 0
        with pytest.raises(EngineDied):
            await ask(together, prompt="poison", stream=stream)
        assert await ask(together, prompt="poison", stream=stream) == "".join(words(4))


def test_suspicion_ends_and_is_bounded() -> None:
    now = 0.0
    suspects = Suspects(lambda: now)
    death = EngineDied("")
    death.alone = True
    assert suspects.blame("completions", {"prompt": "\ud800"}, death) is death
    refusal = suspects.blame("completions", {"prompt": "\ud800"}, death)
    with pytest.raises(type(refusal)):
        suspects.check("completions", {"prompt": "\ud800"})
    suspects.check("tokenize", {"prompt": "\ud800"})
    now = 1 + QUARANTINE_S
    suspects.check("completions", {"prompt": "\ud800"})
    assert suspects.blame("completions", {"prompt": "\ud800"}, death) is death
    for number in range(10 * KEPT):
        suspects.blame("completions", {"prompt": str(number)}, death)
    assert len(suspects._ends) == KEPT
