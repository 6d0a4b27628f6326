"""Whatever the embedded engine cannot honour is a 400 that names the field, before anything runs."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine
from llama_engine import ask, chat, context, new_engine

pytestmark = pytest.mark.model

NAN, INF = float("nan"), float("inf")
SCHEMA = "response_format.json_schema.schema"


@pytest.fixture(scope="module")
def engine(embedded_model: Path) -> Iterator[LlamaCppEngine]:
    engine = new_engine(embedded_model, slots=2, max_waiting=2, max_model_len=256)
    asyncio.run(engine.load())
    yield engine
    asyncio.run(engine.close())


async def refusal(engine: LlamaCppEngine, operation: str, body: Json) -> BadRequest:
    """The refusal, asked for as a stream: it must come before the stream is handed over."""
    with pytest.raises(BadRequest) as caught:
        await engine.operations[operation](body, context())
    assert caught.value.status == 400
    assert engine.stats().running == engine.stats().waiting == 0
    return caught.value


def messages(*items: Any) -> Json:
    return {"messages": list(items)}


def schema(value: Any, **fields: Any) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value, **fields}}}


def nested(depth: int) -> Json:
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {"type": "string"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": INF}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-50, "top_p": 0.9}, "repetition_penalty"),
        ({"repeat_penalty": 1e-50, "min_p": 0.1}, "repeat_penalty"),
        ({"repetition_penalty": 101}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 3}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 250}, "max_tokens"),
        ({"max_completion_tokens": 250}, "max_completion_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stop": 3}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"5": NAN}}, "logit_bias.5"),
        ({"logit_bias": {"5": True}}, "logit_bias.5"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, SCHEMA),
        (schema("no schema"), "response_format.json_schema.schema"),
        (schema({"type": "nothing"}), SCHEMA),
        (schema({"$ref": "https://example.org/schema.json"}), SCHEMA),
        (schema({"$ref": "#/$defs/missing", "$defs": {}}), SCHEMA),
        (schema({"$ref": f"#/anyOf/{'9' * 5000}", "anyOf": [{}]}), SCHEMA),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), SCHEMA),
        (schema({"type": "string", "maxLength": 20_000}), SCHEMA),
        (schema({"type": "string", "pattern": "^a{1,99999}$"}), SCHEMA),
        (schema({"type": "string", "pattern": "(?=a)b"}), SCHEMA),
        (schema({"type": "array", "items": {"type": "string"}, "minItems": -1}), SCHEMA),
        (schema(nested(400)), SCHEMA),
        (schema({"type": "array", "uniqueItems": True}, strict=True), SCHEMA),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"guided_json": {}}, "guided_json"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"json_schema": {"type": "string"}}, "json_schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format.schema"),
        (schema({"type": "string"}, strikt=True), "response_format.json_schema.strikt"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        (
            {"stream_options": {"include_usage": True, "include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"stream_options": {"includ_usage": True}}, "stream_options.includ_usage"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"cache_salt": "s"}, "cache_salt"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        (messages({"role": "wizard", "content": "x"}), "messages[0].role"),
        (messages({"content": "x"}), "messages[0].role"),
        (messages({"role": "user", "content": "x"}, {"role": ["user"], "content": "x"}), "messages[1].role"),
        (messages({"role": "user"}), "messages[0].content"),
        (messages({"role": "user", "content": None}), "messages[0].content"),
        (messages({"role": "user", "content": 5}), "messages[0].content"),
        (messages({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text"),
        (
            messages({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}),
            "messages[0].content[1].type",
        ),
        (messages({"role": "tool", "content": "x"}), "messages[0].role"),
        (messages({"role": "assistant", "content": "", "tool_calls": [{}]}), "messages[0].tool_calls"),
    ],
    ids=str,
)
async def test_chat_refuses(engine: LlamaCppEngine, fields: Json, param: str):
    error = await refusal(engine, "chat/completions", {**chat("hi"), "stream": True, **fields})
    assert error.param == param
    assert param in error.message or "schema" in error.message
    assert len(error.message) < 400


async def test_a_request_that_bans_every_token_is_refused(engine: LlamaCppEngine):
    tokens = list(range(engine._engine.model.vocabulary_size))
    error = await refusal(
        engine, "completions", {"prompt": "a", "stop_token_ids": tokens, "min_tokens": 2, "top_p": 0.9}
    )
    assert error.param == "stop_token_ids"
    assert "min_tokens" in error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": [[1, -1]]}, "prompt"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_completion_tokens": 0, "max_tokens": 4}, "max_completion_tokens"),
        ({"prompt": "a", "max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt": "a", "max_completion_tokens": 300}, "max_completion_tokens"),
    ],
    ids=str,
)
async def test_completions_refuse(engine: LlamaCppEngine, body: Json, param: str):
    assert (await refusal(engine, "completions", body)).param == param


async def test_a_prompt_that_is_too_long_is_refused_by_how_much(engine: LlamaCppEngine):
    tokens = await ask(engine, "tokenize", {"prompt": "word " * 300})
    for operation, param, body in [
        ("completions", "prompt", {"prompt": "word " * 300}),
        ("chat/completions", "messages", chat("word " * 10_000)),
    ]:
        error = await refusal(engine, operation, body)
        assert (error.param, error.code) == (param, "context_length_exceeded")
        if param == "prompt":
            over = tokens["count"] - 255
            assert f"has {tokens['count']} tokens" in error.message
            assert "context is 256" in error.message
            assert f"by {over} tokens" in error.message


@pytest.mark.parametrize(
    ("operation", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("tokenize", {"prompt": 3}, "prompt"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("detokenize", {"tokens": [10**6]}, "tokens"),
    ],
    ids=str,
)
async def test_tokenize_and_detokenize_refuse(engine: LlamaCppEngine, operation: str, body: Json, param: str):
    assert (await refusal(engine, operation, body)).param == param


async def test_harmless_fields_are_ignored_and_neutral_values_accepted(engine: LlamaCppEngine):
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "x_unknown": 1}
    neutral: Json = {"n": None, "stop": None, "seed": None, "logit_bias": {}, "tools": [], "functions": None}
    choice = {"tool_choice": "none", "best_of": 1, "response_format": {"type": "text"}, "top_k": -1}
    body = {**chat("hi", max_tokens=2), **harmless, **neutral, **choice}
    assert (await ask(engine, "chat/completions", body))["usage"]["completion_tokens"] <= 2


async def test_text_parts_are_joined_and_developers_are_the_system(engine: LlamaCppEngine):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    a = await ask(
        engine, "tokenize", messages({"role": "developer", "content": "S"}, {"role": "user", "content": parts})
    )
    b = await ask(
        engine, "tokenize", messages({"role": "system", "content": "S"}, {"role": "user", "content": "Hello"})
    )
    assert a["tokens"] == b["tokens"]


def test_where_ggml_gives_up_its_reason_is_the_last_word() -> None:
    program = (
        "import ctypes, pathlib, llama_cpp\n"
        "from aim_runtime.engines.llama_cpp import bindings\n"
        "folder = pathlib.Path(llama_cpp.__file__).parent / 'lib'\n"
        "ctypes.CDLL(str(next(folder.glob('libggml-base*')))).ggml_abort(b'here.c', 7, b'no memory left')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.splitlines()[-1] == "here.c:7: no memory left"
