"""No request costs more than its size: what cannot fit is refused unread, what fits is worked on off the event loop."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aim_kserve.errors import BadRequest, Unavailable
from aim_runtime.engines.base import Json
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine
from aim_runtime.engines.llama_cpp.request import ChatBody, parse
from llama_engine import ask, context, loaded, new_engine

pytestmark = pytest.mark.model

CONTEXT = 8192


def _counting_s() -> float:
    """CPU time of counting to two million: the bound follows the machine, which may be slower today."""
    started = time.process_time()
    for _ in range(2_000_000):
        pass
    return time.process_time() - started


# 12 times that, if more: counting lines (make coverage) makes each ten times as slow.
LONG_S = max(0.3, 12 * min(_counting_s() for _ in range(3))) if sys.gettrace() is None else 3.0
IDS = 49152


@pytest.fixture(scope="module")
def engine(embedded_model: Path) -> Iterator[LlamaCppEngine]:
    engine = new_engine(embedded_model, max_model_len=CONTEXT, max_waiting=56)
    asyncio.run(engine.load())
    yield engine
    asyncio.run(engine.close())


class LongestTurn:
    """``async with``: the most CPU seconds that the event loop's thread spends between two of its turns. CPU of this
    thread alone: other processes, and threads that compute without the interpreter's lock, do not count."""

    async def __aenter__(self) -> LongestTurn:
        self.cpu_s = 0.0
        gc.collect()
        gc.freeze()  # the bodies of a test are not garbage to look through
        self._ticks = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        return self

    async def _tick(self) -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            self.cpu_s, last = max(self.cpu_s, now - last), now

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.002)
        self._ticks.cancel()
        gc.unfreeze()


def said(count: int, **fields: Any) -> Json:
    return {"messages": [{"role": "user", "content": "hi", **fields} for _ in range(count)]}


def wide_enum(count: int) -> Json:
    schema = {"enum": [f"value number {i} of many" for i in range(count)]}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


#: What is refused: operation, body, the field at fault.
TOO_MUCH: dict[str, tuple[str, Callable[[], Json], str]] = {
    "text of 18 MB": ("tokenize", lambda: {"prompt": "a" * 18_000_000, "return_token_strs": True}, "prompt"),
    "special tokens of 7 MB": ("completions", lambda: {"prompt": "<|im_end|>" * 700_000}, "prompt"),
    "special tokens of 2 MB": ("completions", lambda: {"prompt": "<|im_end|>" * 200_000}, "prompt"),
    "a long prompt among others": ("completions", lambda: {"prompt": ["a", "b" * 2_000_000]}, "prompt"),
    "5 million ids to spell": ("detokenize", lambda: {"tokens": [1] * 5_000_000}, "tokens"),
    "8 million ids": ("completions", lambda: {"prompt": [1] * 8_000_000}, "prompt"),
    "8 million ids in a list": ("completions", lambda: {"prompt": [[1] * 8_000_000]}, "prompt"),
    "2 million prompts": ("completions", lambda: {"prompt": [[1]] * 2_000_000}, "prompt"),
    "10000 messages": ("chat/completions", lambda: said(10_000), "messages"),
    "8192 messages": ("chat/completions", lambda: said(8192), "messages"),
    "8192 wrong messages": ("chat/completions", lambda: {"messages": [1] * 8192}, "messages[0]"),
    "a long message": ("chat/completions", lambda: said(1, content="<|im_end|>" * 200_000), "messages"),
    "2 million parts": (
        "chat/completions",
        lambda: said(1, content=[{"type": "text", "text": ""}] * 2**21),
        "messages",
    ),
    "a long name": ("chat/completions", lambda: said(1, name="a" * 2_000_000), "messages"),
    "2 million stop ids": ("completions", lambda: {"prompt": "a", "stop_token_ids": [1] * 2**21}, "stop_token_ids"),
    "wrong stop ids": ("completions", lambda: {"prompt": "a", "stop_token_ids": ["x"] * IDS}, "stop_token_ids[0]"),
    "a bias for more than all": (
        "completions",
        lambda: {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(IDS + 1)), 1)},
        "logit_bias",
    ),
    "wrong biases": (
        "completions",
        lambda: {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(IDS)), "x")},
        "logit_bias.0",
    ),
    "a long stop string": ("completions", lambda: {"prompt": "a", "stop": "a" * 2**20}, "stop"),
    "many stop strings": ("completions", lambda: {"prompt": "a", "stop": ["ab"] * 10_000}, "stop"),
}
MOST = CONTEXT * 81 // 10 * 10  # bytes of the longest text: SmolLM2's longest token has 81
#: What is served, or refused by its number of tokens only.
MUCH: dict[str, tuple[str, Callable[[], Json]]] = {
    "the longest text": ("tokenize", lambda: {"prompt": "qzx " * (MOST // 4), "return_token_strs": True}),
    "the most special tokens": ("tokenize", lambda: {"prompt": "<|im_end|>" * (MOST // 10), "return_token_strs": True}),
    "the most messages": ("tokenize", lambda: said(CONTEXT)),
    "the most parts": ("chat/completions", lambda: said(1, content=[{"type": "text", "text": ""}] * 600_000)),
    "the most ids to spell": ("detokenize", lambda: {"tokens": [1] * CONTEXT}),
    "every id a stop": ("completions", lambda: {"prompt": "a", "stop_token_ids": list(range(IDS)), "n": 8}),
    "a bias for all": (
        "completions",
        lambda: {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(IDS)), 1), "n": 8},
    ),
    "what all prompts share": (
        "completions",
        lambda: {
            "prompt": ["a"] * 64,
            "stop_token_ids": list(range(IDS)),
            "logit_bias": dict.fromkeys(map(str, range(IDS)), 1),
        },
    ),
    "the longest stop string": ("completions", lambda: {"prompt": "a", "stop": "a" * 16_384, "n": 8}),
    "an enum of 5000": ("completions", lambda: {"prompt": "a", "response_format": wide_enum(5000), "n": 8}),
}


@pytest.mark.parametrize("case", TOO_MUCH)
async def test_what_cannot_fit_is_refused_unread(engine: LlamaCppEngine, case: str):
    operation, body_of, param = TOO_MUCH[case]
    body = body_of()
    async with LongestTurn() as turn:
        with pytest.raises(BadRequest) as caught:
            await engine.operations[operation](body, context())
    assert caught.value.param == param
    assert len(caught.value.message) < 400
    assert turn.cpu_s < LONG_S


@pytest.mark.parametrize("case", MUCH)
async def test_what_fits_leaves_the_event_loop_free(engine: LlamaCppEngine, case: str):
    operation, body_of = MUCH[case]
    body = {"max_tokens": 3, **body_of()} if "completions" in operation else body_of()
    async with LongestTurn() as turn:
        await ask(engine, operation, body)
    assert turn.cpu_s < LONG_S


async def test_all_the_ids_the_engine_can_take_at_once(engine: LlamaCppEngine):
    body = {"prompt": [[IDS] * (CONTEXT - 1)] * 64, "max_tokens": 1}  # the last check of all finds the wrong id
    async with LongestTurn() as turn:
        with pytest.raises(BadRequest, match="token ids go from 0"):
            await engine.operations["completions"](body, context())
    assert turn.cpu_s < LONG_S


async def test_a_prompt_whose_client_left_is_finished_before_the_model_is_freed(embedded_model: Path):
    async with loaded(embedded_model, max_model_len=CONTEXT) as engine:
        model = engine._engine.model
        began, freed, late = asyncio.Event(), False, 0
        loop, tokenize, close = asyncio.get_running_loop(), model._tokenize, model.close

        def tokenizing(text: str, *, add_special: bool) -> Any:
            loop.call_soon_threadsafe(began.set)
            nonlocal late
            late += freed
            return tokenize(text, add_special=add_special)

        def closing() -> None:
            nonlocal freed
            freed = True
            close()

        model._tokenize, model.close = tokenizing, closing  # type: ignore[method-assign]
        asked = asyncio.create_task(ask(engine, "tokenize", {"prompt": "<|im_end|> x" * (MOST // 12)}))
        await began.wait()
        asked.cancel()
        await asyncio.sleep(0)
        background = engine._engine.background
        assert background.busy
        await engine.close()
        assert not background.busy
        assert freed
        assert not late


def prepare_s(engine: LlamaCppEngine, count: int) -> dict[str, float]:
    """CPU seconds of this thread for each way into and out of the tokenizer; the least of three."""
    prompts, model = engine._engine.prompts, engine._engine.model
    chat, ids = parse(ChatBody, said(count)), [IDS - 1] * count
    ways: dict[str, Callable[[], object]] = {
        "chat": lambda: prompts._chat_tokens(chat, prompts._template, None),  # type: ignore[arg-type]
        "completion": lambda: prompts._prompt("<|im_end|> x" * count, add_special=True, echo=True),
        "ids": lambda: prompts._prompt(ids, add_special=True, echo=True),
        "detokenize": lambda: model.detokenize(ids),
    }
    return {name: min(_cpu_s(way) for _ in range(3)) for name, way in ways.items()}


def _cpu_s(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def test_every_way_through_the_tokenizer_is_linear(engine: LlamaCppEngine):
    short, long = prepare_s(engine, 2000), prepare_s(engine, 8000)
    for name, taken in long.items():
        assert taken < 9 * short[name], name  # linear: 4 and a little; quadratic: 16


async def test_drain_waits_for_prompts_whose_clients_left(embedded_model: Path):
    async with loaded(embedded_model, max_model_len=CONTEXT) as engine:
        asked = asyncio.create_task(ask(engine, "tokenize", {"prompt": "<|im_end|> x" * (MOST // 12)}))
        while not engine._engine.background.busy:  # noqa: ASYNC110
            await asyncio.sleep(0)
        asked.cancel()
        await engine.drain(30)
        assert not engine._engine.background.busy


async def test_what_was_begun_before_closing_touches_no_freed_model(embedded_model: Path):
    async with loaded(embedded_model, max_model_len=CONTEXT) as engine:
        text = "<|im_end|> x" * (MOST // 12)
        asked = asyncio.create_task(ask(engine, "tokenize", {"prompt": text, "return_token_strs": True}))
        waiting = [asyncio.create_task(ask(engine, "completions", {"prompt": text})) for _ in range(4)]
        while not engine._engine.background.busy:  # noqa: ASYNC110
            await asyncio.sleep(0)
        model = engine._engine.model
        await engine.close()
        results = await asyncio.gather(asked, *waiting, return_exceptions=True)
        assert all(isinstance(r, (Unavailable, BadRequest, asyncio.CancelledError)) for r in results), results
        with pytest.raises(Exception, match="has been closed"):
            model.tokenize("a", add_special=False)


async def test_a_request_that_is_never_done_preparing_is_no_health(embedded_model: Path):
    async with loaded(embedded_model, stall_timeout_s=0.2) as engine:
        release = threading.Event()
        stuck = asyncio.create_task(engine._engine.background.run(release.wait, cost=10**6))
        while engine.healthy():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stalled_s = engine.stats().stalled_s
        assert stalled_s is not None
        assert stalled_s >= 0.2
        release.set()
        assert await stuck
        assert engine.healthy()
