"""The embedded engine with the real model: answers, streams, batches, prefixes, cancellation, failures."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from aim_kserve.errors import BadRequest, ServingError, Unavailable
from aim_runtime.engines.base import Json
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine
from aim_runtime.engines.llama_cpp.sequence import Sequence
from llama_engine import ask, chat, context, loaded, new_engine, same_but_for_ties, stream, text_of

pytestmark = pytest.mark.model

PROMPTS = [
    "The river runs through the valley and",
    "In mathematics, a prime number is",
    "def fibonacci(n):",
    "Once upon a time there was a small robot who",
]


@pytest.fixture(scope="module")
def engine(embedded_model: Path) -> Iterator[LlamaCppEngine]:
    engine = new_engine(embedded_model)
    asyncio.run(engine.load())
    yield engine
    asyncio.run(engine.close())


async def idle(engine: LlamaCppEngine, within_s: float = 1.0) -> float:
    """Wait until nothing runs; returns how long that took."""
    began = time.monotonic()
    while engine.stats().running or engine.stats().waiting:
        assert time.monotonic() - began < within_s, engine.stats()
        await asyncio.sleep(0.005)
    return time.monotonic() - began


# -- shapes ----------------------------------------------------------------------------------------------------


async def test_chat_answers_in_openai_shape(engine: LlamaCppEngine):
    asked = context()
    answer = await ask(engine, "chat/completions", chat("Say hello."), asked)
    choice = answer["choices"][0]
    assert answer["id"] == f"chatcmpl-{asked.request_id}"
    assert (answer["object"], answer["model"]) == ("chat.completion", "smollm2")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (asked.usage.prompt_tokens, asked.usage.completion_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )


async def test_a_chat_stream_says_the_same_in_chunks(engine: LlamaCppEngine):
    body = chat("Count to five.")
    whole = await ask(engine, "chat/completions", body)
    chunks = await stream(engine, "chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert [reason for reason in reasons if reason] == [whole["choices"][0]["finish_reason"]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_usage_is_streamed_only_when_asked_for(engine: LlamaCppEngine):
    chunks = await stream(engine, "chat/completions", chat("Hi", max_tokens=3))
    assert all("usage" not in chunk for chunk in chunks)
    continuous = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = await stream(engine, "chat/completions", chat("Hi", max_tokens=3, **continuous))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks[1:-1]] == [1, 2, 3]


async def test_completion_echoes_its_prompt_whole_and_streamed(engine: LlamaCppEngine):
    body = {"prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0, "echo": True}
    whole = await ask(engine, "completions", body)
    assert whole["choices"][0]["text"].startswith(PROMPTS[0])
    assert text_of(await stream(engine, "completions", body)) == whole["choices"][0]["text"]
    assert whole["object"] == "text_completion"
    assert whole["id"].startswith("cmpl-")


async def test_a_prompts_own_log_probabilities(engine: LlamaCppEngine):
    """As evaluations ask: ``echo``, ``logprobs`` and no new token, ids in, over several steps' worth of tokens."""
    said = await ask(
        engine,
        "completions",
        {"prompt": PROMPTS[0], "max_tokens": 60, "temperature": 0, "ignore_eos": True, "logprobs": 1},
    )
    text = PROMPTS[0] + said["choices"][0]["text"]
    ids = (await ask(engine, "tokenize", {"prompt": text}))["tokens"]
    body: Json = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    for _ in range(2):  # the second finds its prompt in the cache, and has to compute it all the same
        answer = await ask(engine, "completions", body)
        (choice,) = answer["choices"]
        scored = choice["logprobs"]
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        assert answer["usage"] == {**answer["usage"], "prompt_tokens": len(ids), "completion_tokens": 0}
        assert {len(scored[name]) for name in scored} == {len(ids)}
        assert (scored["token_logprobs"][0], scored["top_logprobs"][0]) == (None, None)
        assert "".join(scored["tokens"]) == text
        assert [text[a:] == "".join(scored["tokens"][i:]) for i, a in enumerate(scored["text_offset"])] == [True] * len(
            ids
        )
        generated = said["choices"][0]["logprobs"]["token_logprobs"]
        if len(ids) - len(generated) == len((await ask(engine, "tokenize", {"prompt": PROMPTS[0]}))["tokens"]):
            for one, other in zip(scored["token_logprobs"][-len(generated) :], generated, strict=True):
                assert math.isclose(one, other, abs_tol=0.75)
        for value, rivals in zip(scored["token_logprobs"][1:], scored["top_logprobs"][1:], strict=True):
            assert value <= max(rivals.values()) <= 0


async def test_echoed_log_probabilities_go_on_with_the_answers(engine: LlamaCppEngine):
    body: Json = {"prompt": ["One two three", "x"], "max_tokens": 3, "temperature": 0, "ignore_eos": True, "n": 2}
    body |= {"echo": True, "logprobs": 0}
    whole = await ask(engine, "completions", body)
    chunks = await stream(engine, "completions", body)
    for choice in whole["choices"]:
        logprobs = choice["logprobs"]
        assert choice["text"] == "".join(logprobs["tokens"])
        assert logprobs["token_logprobs"][0] is None
        assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
        assert logprobs["top_logprobs"] is None
        assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
        pieces = [part["logprobs"] for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert [token for piece in pieces for token in piece["tokens"]] == logprobs["tokens"]
        assert [at for piece in pieces for at in piece["text_offset"]] == logprobs["text_offset"]


async def test_an_echo_without_anything_new_streams(engine: LlamaCppEngine):
    chunks = await stream(engine, "completions", {"prompt": "One two", "max_tokens": 0, "echo": True})
    assert (text_of(chunks), chunks[-1]["choices"][0]["finish_reason"]) == ("One two", "length")


async def test_max_completion_tokens_limits_completions_too(engine: LlamaCppEngine):
    for limits in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 9}):
        answer = await ask(engine, "completions", {"prompt": "One", "temperature": 0, "ignore_eos": True, **limits})
        assert answer["usage"]["completion_tokens"] == 3


async def test_a_final_message_is_continued(engine: LlamaCppEngine):
    history = [{"role": "user", "content": "Count to five."}, {"role": "assistant", "content": "1, 2, 3,"}]
    body: Json = {"messages": history, "continue_final_message": True, "add_generation_prompt": False}
    prompt = (await ask(engine, "tokenize", body))["tokens"]
    assert (await ask(engine, "detokenize", {"tokens": prompt}))["prompt"].endswith("assistant\n1, 2, 3,")
    answer = await ask(engine, "chat/completions", {**body, "max_tokens": 4, "temperature": 0})
    assert "4" in answer["choices"][0]["message"]["content"]


async def test_an_assistant_that_said_nothing_is_history(engine: LlamaCppEngine):
    for silent in ({"content": None}, {}, {"content": None, "refusal": "no"}):
        said = [{"role": "user", "content": "a"}, {"role": "assistant", **silent}, {"role": "user", "content": "b"}]
        empty = [*said[:1], {"role": "assistant", "content": ""}, *said[2:]]
        tokens = [await ask(engine, "tokenize", {"messages": messages}) for messages in (said, empty)]
        assert tokens[0]["tokens"] == tokens[1]["tokens"]


async def test_completion_takes_sixteen_tokens_unless_told(engine: LlamaCppEngine):
    answer = await ask(engine, "completions", {"prompt": PROMPTS[0], "temperature": 0, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 16


async def test_several_prompts_and_token_ids_are_choices_in_order(engine: LlamaCppEngine):
    body = {"max_tokens": 4, "temperature": 0}
    alone = [await ask(engine, "completions", {**body, "prompt": prompt}) for prompt in PROMPTS[:2]]
    ids = [(await ask(engine, "tokenize", {"prompt": prompt}))["tokens"] for prompt in PROMPTS[:2]]
    texts = [answer["choices"][0]["text"] for answer in alone]
    for prompt in (PROMPTS[:2], ids):
        answer = await ask(engine, "completions", {**body, "prompt": prompt})
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert answer["usage"]["prompt_tokens"] == sum(len(tokens) for tokens in ids)
    one = await ask(engine, "completions", {**body, "prompt": ids[0]})
    assert one["choices"][0]["text"] == texts[0]


async def test_tokenize_and_detokenize_are_inverse(engine: LlamaCppEngine):
    text = "Grüße, 世界 🙂!"
    tokens = await ask(engine, "tokenize", {"prompt": text})
    assert tokens["count"] == len(tokens["tokens"])
    assert (tokens["max_model_len"], tokens["token_strs"]) == (512, None)
    assert await ask(engine, "detokenize", {"tokens": tokens["tokens"]}) == {"prompt": text}
    chat_tokens = await ask(engine, "tokenize", {"messages": chat("hi")["messages"], "return_token_strs": True})
    assert "".join(chat_tokens["token_strs"]).endswith("<|im_start|>assistant\n")


# -- batches ---------------------------------------------------------------------------------------------------


async def test_a_batch_answers_what_each_would_alone(engine: LlamaCppEngine):
    bodies = [{"prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 2} for prompt in PROMPTS]
    alone = [(await ask(engine, "completions", body))["choices"][0] for body in bodies]
    together = await asyncio.gather(*(ask(engine, "completions", body) for body in bodies * 2))
    for answer, expected in zip(together, alone * 2, strict=True):
        same_but_for_ties(answer["choices"][0], expected)


async def test_eight_streams_advance_together(engine: LlamaCppEngine):
    order: list[int] = []

    async def one(number: int) -> int:
        body = {"prompt": f"{number} {PROMPTS[number % 4]}", "max_tokens": 12, "ignore_eos": True, "stream": True}
        answer: Any = await engine.operations["completions"](body, context())
        async for _ in answer:
            order.append(number)  # noqa: PERF401 (the order of all streams is the point)
        return order.count(number)

    counts = await asyncio.gather(*(one(number) for number in range(8)))
    assert min(counts) >= 1
    finished_first = order.index(order[-1])
    assert finished_first < len(order) - 12  # the last to finish had begun long before: interleaved, not in turn
    assert engine.stats().slots_total == 8


async def test_choices_share_their_prompt_and_differ(engine: LlamaCppEngine):
    body = chat("Name an animal.", n=3, temperature=1.5, seed=5, max_tokens=8)
    answer = await ask(engine, "chat/completions", body)
    again = await ask(engine, "chat/completions", body)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert answer["usage"]["completion_tokens"] > 8
    assert again["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    chunks = await stream(engine, "chat/completions", body)
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1, 2}
    assert all(text_of(chunks, index) for index in range(3))


async def test_a_seed_repeats(embedded_model: Path):
    async with loaded(embedded_model) as fresh:
        body = {"prompt": PROMPTS[3], "max_tokens": 16, "temperature": 1.0, "seed": 11}
        seeded = [await ask(fresh, "completions", body) for _ in range(3)]
        assert len({answer["choices"][0]["text"] for answer in seeded}) == 1
        unseeded = [await ask(fresh, "completions", {**body, "seed": None}) for _ in range(2)]
        assert len({answer["choices"][0]["text"] for answer in [seeded[0], *unseeded]}) > 1


# -- prefixes --------------------------------------------------------------------------------------------------


async def test_a_known_prefix_is_not_computed_again(engine: LlamaCppEngine):
    text = "The following is a list of rivers. " * 12
    body = {"prompt": text, "max_tokens": 12, "temperature": 0, "logprobs": 2}
    first = await ask(engine, "completions", body)
    again = await ask(engine, "completions", body)
    prompt_tokens = first["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < prompt_tokens // 2
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt_tokens - 1
    same_but_for_ties(again["choices"][0], first["choices"][0])


async def test_a_running_sequence_lends_its_prefix(engine: LlamaCppEngine):
    text = "A catalogue of birds, with colours. " * 12
    body = {"prompt": text, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 2}
    running: Any = await engine.operations["completions"]({**body, "stream": True}, context())
    await anext(running)
    asked = context()
    second = await ask(engine, "completions", {**body, "max_tokens": 8}, asked)
    async for _ in running:
        pass
    assert asked.usage.cached_tokens == asked.usage.prompt_tokens - 1
    alone = await ask(engine, "completions", {**body, "max_tokens": 8})
    same_but_for_ties(second["choices"][0], alone["choices"][0])


# -- what is generated -----------------------------------------------------------------------------------------


async def test_a_stop_string_ends_the_answer_and_never_shows(engine: LlamaCppEngine):
    body = {"prompt": "1, 2, 3, 4,", "max_tokens": 40, "temperature": 0}
    free = (await ask(engine, "completions", body))["choices"][0]["text"]
    stop = free[9:14]  # across token borders
    answer = await ask(engine, "completions", {**body, "stop": ["never there", stop]})
    assert answer["choices"][0]["text"] == free[: free.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    chunks = await stream(engine, "completions", {**body, "stop": stop})
    assert text_of(chunks) == free[: free.index(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_emoji_are_never_broken(engine: LlamaCppEngine):
    face = (await ask(engine, "tokenize", {"prompt": "🙂", "add_special_tokens": False}))["tokens"]
    assert len(face) > 1  # several tokens make this character
    rest = {str(token): -100 for token in range(3)}
    for token in face:
        rest[str(token)] = 100
    body = {"prompt": "🙂" * 8, "max_tokens": 23, "temperature": 0, "logit_bias": rest, "stream": True}
    answer: Any = await engine.operations["completions"](body, context())
    raw = [chunk async for chunk in answer]
    text = text_of([json.loads(chunk) for chunk in raw])
    assert "🙂" in text
    assert "\ufffd" not in text


@pytest.mark.parametrize("seed", range(3))
async def test_a_schema_is_kept(engine: LlamaCppEngine, seed: int):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    body = chat("Describe a person.", temperature=1.0, seed=seed, max_tokens=120, response_format=format_)
    choice = (await ask(engine, "chat/completions", body))["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a?){900}$"},
        {"type": "string", "pattern": "^((a?){30}){30}$"},
        {"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$", "maxLength": 20},
        {"type": "string", "maxLength": 40},
        {"enum": ["🙂", 'a "quoted" \\ one']},
        {"type": ["string", "null"], "enum": ["a", None]},
        {"allOf": [{"$ref": "#/definitions/C"}], "definitions": {"C": {"enum": ["red", "green"], "type": "string"}}},
        {"type": "object", "required": ["undeclared"], "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
    ],
    ids=str,
)
async def test_answers_of_a_real_model_validate(engine: LlamaCppEngine, schema: Json):
    """Several at a high temperature, beside another request that must not wait for them."""
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    bodies = [chat("Answer.", temperature=1.5, seed=seed, max_tokens=150, response_format=format_) for seed in range(3)]
    asked = [ask(engine, "chat/completions", body) for body in [*bodies, chat("Say hi.")]]
    answers = await asyncio.wait_for(asyncio.gather(*asked), 120)
    for answer in answers[:3]:
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    assert any(answer["choices"][0]["finish_reason"] == "stop" for answer in answers[:3])


async def test_tokens_that_a_request_forbids_and_a_schema_needs_are_named(engine: LlamaCppEngine):
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 5}}}
    five = (await ask(engine, "tokenize", {"prompt": "5"}))["tokens"]
    body = chat("Answer.", min_tokens=3, max_tokens=5, stop_token_ids=five, response_format=format_)
    with pytest.raises(BadRequest) as caught:
        await ask(engine, "chat/completions", body)
    assert caught.value.param == "min_tokens"
    assert (await ask(engine, "chat/completions", chat("Say hi.")))["choices"]


async def test_json_object_begins_and_stays_json(engine: LlamaCppEngine):
    body = chat("A JSON object.", max_tokens=80, seed=1, temperature=0.7, response_format={"type": "json_object"})
    choice = (await ask(engine, "chat/completions", body))["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


async def test_chat_logprobs_are_probabilities(engine: LlamaCppEngine):
    body = chat("Say yes.", logprobs=True, top_logprobs=5, max_tokens=4)
    answer = await ask(engine, "chat/completions", body)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) in (answer["usage"]["completion_tokens"], answer["usage"]["completion_tokens"] - 1)
    assert "".join(entry["token"] for entry in content) == answer["choices"][0]["message"]["content"]
    for entry in content:
        top = [rival["logprob"] for rival in entry["top_logprobs"]]
        assert top == sorted(top, reverse=True)
        assert len(top) == 5
        assert 0 < sum(map(math.exp, top)) <= 1.0001
        assert entry["logprob"] == pytest.approx(top[0])  # greedy took the likeliest
        assert bytes(entry["bytes"]).decode() == entry["token"]
    chunks = await stream(engine, "chat/completions", body)
    streamed = [
        entry for chunk in chunks for c in chunk["choices"] if c["logprobs"] for entry in c["logprobs"]["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]


async def test_completion_logprobs_in_the_legacy_shape(engine: LlamaCppEngine):
    body = {"prompt": PROMPTS[1], "max_tokens": 5, "temperature": 0, "logprobs": 2}
    choice = (await ask(engine, "completions", body))["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value == max(top.values())


async def test_bias_ignore_eos_and_min_tokens(engine: LlamaCppEngine):
    token = (await ask(engine, "tokenize", {"prompt": " yes", "add_special_tokens": False}))["tokens"][0]
    body = {"prompt": PROMPTS[0], "max_tokens": 3, "temperature": 0, "logit_bias": {str(token): 100}}
    assert (await ask(engine, "completions", body))["choices"][0]["text"] == " yes" * 3
    stopped = {**body, "stop_token_ids": [token], "min_tokens": 2, "max_tokens": 6}
    answer = await ask(engine, "completions", stopped)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "stop"


# -- full, cancelled, failed -----------------------------------------------------------------------------------

LONG = {"prompt": PROMPTS[0], "max_tokens": 400, "ignore_eos": True, "temperature": 0}


async def test_closing_a_stream_frees_its_slot(engine: LlamaCppEngine):
    answer: Any = await engine.operations["completions"]({**LONG, "stream": True}, context())
    await anext(answer)
    assert engine.stats().running == 1
    await answer.aclose()
    assert await idle(engine) < 0.1
    with pytest.raises(StopAsyncIteration):
        await anext(answer)


async def test_a_stream_nobody_reads_is_freed_too(engine: LlamaCppEngine):
    answer: Any = await engine.operations["completions"]({**LONG, "stream": True}, context())
    await answer.aclose()
    await idle(engine)
    answer = await engine.operations["completions"]({**LONG, "stream": True}, context())
    del answer
    gc.collect()
    await idle(engine)


async def test_a_cancelled_task_frees_its_slots(engine: LlamaCppEngine):
    task = asyncio.create_task(ask(engine, "completions", {**LONG, "n": 3}))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await idle(engine) < 0.2


async def test_a_slow_reader_loses_nothing(engine: LlamaCppEngine):
    body = {"prompt": PROMPTS[2], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    body["stream_options"] = {"include_usage": True}
    answer: Any = await engine.operations["completions"]({**body, "stream": True}, context())
    chunks = [json.loads(await anext(answer))]
    await idle(engine, within_s=10)
    chunks += [json.loads(chunk) async for chunk in answer]
    assert chunks[-1]["usage"]["completion_tokens"] == 40
    assert len((await ask(engine, "tokenize", {"prompt": text_of(chunks)}))["tokens"]) in range(36, 45)
    assert len(chunks) < 10  # what waited came as one


async def test_a_full_queue_refuses_before_the_answer_begins(embedded_model: Path):
    async with loaded(embedded_model, slots=1, max_waiting=1) as engine:
        running: Any = await engine.operations["completions"]({**LONG, "stream": True}, context())
        await anext(running)
        waiting = asyncio.create_task(ask(engine, "completions", {**LONG, "max_tokens": 2}))
        await asyncio.sleep(0.05)
        assert (engine.stats().running, engine.stats().waiting) == (1, 1)
        with pytest.raises(Unavailable) as caught:
            await engine.operations["completions"]({**LONG, "stream": True}, context())
        assert (caught.value.status, caught.value.code) == (503, "queue_full")
        assert caught.value.retry_after_s
        await running.aclose()
        assert (await waiting)["usage"]["completion_tokens"] == 2


async def test_urgent_requests_go_first(embedded_model: Path):
    async with loaded(embedded_model, slots=1) as engine:
        running: Any = await engine.operations["completions"]({**LONG, "stream": True}, context())
        await anext(running)
        done: list[str] = []

        async def one(name: str, priority: int) -> None:
            await ask(engine, "completions", {**LONG, "max_tokens": 2}, context(priority))
            done.append(name)

        tasks = [
            asyncio.create_task(one(name, p)) for name, p in [("low", 5), ("first", 0), ("second", 0), ("high", -5)]
        ]
        await asyncio.sleep(0.05)
        await running.aclose()
        await asyncio.gather(*tasks)
        assert done == ["high", "first", "second", "low"]


async def test_more_sequences_than_cells_all_finish_with_the_right_answer(
    embedded_model: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    async with loaded(embedded_model, slots=4, max_model_len=256, kv_cache_memory_bytes=1) as engine:
        same = {"max_tokens": 80, "temperature": 0, "ignore_eos": True, "logprobs": 2}
        bodies = [{"prompt": prompt, **same} for prompt in PROMPTS]
        together = await asyncio.gather(*(ask(engine, "completions", body) for body in bodies))
        assert [answer["usage"]["completion_tokens"] for answer in together] == [80] * 4
        assert "is put back" in caplog.text
        for body, answer in zip(bodies, together, strict=True):
            alone = await ask(engine, "completions", body)
            same_but_for_ties(answer["choices"][0], alone["choices"][0])


async def test_a_failed_computation_fails_only_its_sequence(embedded_model: Path, monkeypatch: pytest.MonkeyPatch):
    async with loaded(embedded_model) as engine:
        cursed = (await ask(engine, "tokenize", {"prompt": " curse"}))["tokens"][0]
        context_ = engine._loaded.scheduler._context  # type: ignore[union-attr]
        decode = context_.decode

        def failing() -> int:
            batch = context_.batch
            return -3 if cursed in batch._tokens[: batch.size] else decode()

        monkeypatch.setattr(context_, "decode", failing)
        good = [ask(engine, "completions", {"prompt": prompt, "max_tokens": 6}) for prompt in PROMPTS[:3]]
        bad = ask(engine, "completions", {"prompt": "Under a curse", "max_tokens": 6})
        *answers, error = await asyncio.gather(*good, bad, return_exceptions=True)
        assert isinstance(error, ServingError)
        assert (error.status, error.code) == (500, "decode_failed")
        assert all(isinstance(answer, dict) for answer in answers)
        assert engine.healthy()


@pytest.mark.parametrize("fault", [IndexError("no such place"), float("nan")], ids=str)
async def test_what_fails_while_sampling_ends_its_own_sequence_only(
    embedded_model: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
):
    async with loaded(embedded_model) as engine:
        choose = engine._engine.scheduler._chooser.choose

        def failing(sequence: Sequence, logits: Any) -> Any:
            if sequence.generation.sampling.seed == 13 and sequence.generated == 2:
                if isinstance(fault, Exception):
                    raise fault
                logits[:] = fault
            return choose(sequence, logits)

        monkeypatch.setattr(engine._engine.scheduler._chooser, "choose", failing)
        good = [ask(engine, "completions", {"prompt": prompt, "max_tokens": 6}) for prompt in PROMPTS[:3]]
        bad = ask(engine, "completions", {"prompt": PROMPTS[3], "max_tokens": 6, "seed": 13, "top_p": 0.9})
        *answers, error = await asyncio.gather(*good, bad, return_exceptions=True)
        assert isinstance(error, ServingError)
        assert (error.status, error.code) == (500, "sampling_failed")
        assert "no such place" not in error.message
        assert all(isinstance(answer, dict) for answer in answers)
        assert engine.healthy()
        await idle(engine)


async def test_a_dead_thread_is_told_to_everyone(embedded_model: Path, monkeypatch: pytest.MonkeyPatch):
    async with loaded(embedded_model, slots=1) as engine:
        running: Any = await engine.operations["completions"]({**LONG, "stream": True}, context())
        await anext(running)
        waiting = asyncio.create_task(ask(engine, "completions", LONG))
        await asyncio.sleep(0.05)
        assert engine.healthy()

        def dying() -> int:
            raise MemoryError("no more")

        monkeypatch.setattr(engine._loaded.scheduler._context, "decode", dying)  # type: ignore[union-attr]
        with pytest.raises(Unavailable, match="no more"):
            async for _ in running:
                pass
        with pytest.raises(Unavailable, match="no more"):
            await waiting
        assert not engine.healthy()
        with pytest.raises(Unavailable, match="has stopped"):
            await ask(engine, "completions", LONG)


async def test_drain_waits_then_aborts(embedded_model: Path):
    async with loaded(embedded_model) as engine:
        short = asyncio.create_task(ask(engine, "completions", {**LONG, "max_tokens": 3}))
        await asyncio.sleep(0.05)
        await engine.drain(10)
        assert short.done()
        long = asyncio.create_task(ask(engine, "completions", LONG))
        await asyncio.sleep(0.05)
        await engine.drain(0.1)
        with pytest.raises(Unavailable, match="shutting down"):
            await long


async def test_operations_come_with_the_model_and_go_with_it(embedded_model: Path):
    engine = new_engine(embedded_model)
    assert (dict(engine.operations), engine.healthy()) == ({}, False)
    await engine.load()
    operations = engine.operations
    assert set(operations) == {"chat/completions", "completions", "tokenize", "detokenize"}
    assert engine.max_model_len == 512
    await engine.close()
    assert (dict(engine.operations), engine.healthy()) == ({}, False)
    with pytest.raises(Unavailable):
        await operations["completions"](LONG, context())
