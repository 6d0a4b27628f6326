"""Tools of the embedded engine: how the prompt tells of them, and calls told as OpenAI's, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json
from aim_runtime.engines.llama_cpp import loading
from aim_runtime.engines.llama_cpp.chat_template import ChatTemplate
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine
from aim_runtime.engines.llama_cpp.sequence import Delta
from aim_runtime.engines.llama_cpp.tools import ToolForm, ToolUse, tool_use
from llama_engine import ask, new_engine, stream

pytestmark = pytest.mark.model

# Hermes' and Qwen's way, in few words.
TEMPLATE = """{%- if tools %}<|im_start|>system
Functions:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Call one as <tool_call>{"name": …, "arguments": {…}}</tool_call><|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

WEATHER: Json = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"$ref": "#/$defs/Unit"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
    "$defs": {"Unit": {"enum": ["celsius", "fahrenheit"]}},
}
TOOLS: list[Json] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}


def asked(**fields: Any) -> Json:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    return {"messages": messages, "tools": TOOLS, "max_tokens": 120, "temperature": 0, **fields}


@pytest.fixture(scope="module")
def engine(embedded_model: Path) -> Iterator[LlamaCppEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_template_of", lambda model, path: ChatTemplate(TEMPLATE, {}))
        made = new_engine(embedded_model)
        asyncio.run(made.load())
    yield made
    asyncio.run(made.close())


def put_together(chunks: list[Json], index: int = 0) -> Json:
    """The message a client puts together from a stream, and its reason to end."""
    made: Json = {"content": "", "tool_calls": [], "finish_reason": None}
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        made["content"] += choice["delta"].get("content") or ""
        made["finish_reason"] = choice["finish_reason"] or made["finish_reason"]
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(made["tool_calls"])
                made["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            made["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return made


class TestWithTheRealModel:
    @pytest.mark.parametrize("seed", range(3))
    async def test_a_named_function_s_arguments_validate(self, engine: LlamaCppEngine, seed: int):
        body = asked(tool_choice=NAMED, temperature=1.5, seed=seed)
        choice = (await ask(engine, "chat/completions", body))["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "weather")
        Draft202012Validator(WEATHER).validate(json.loads(call["function"]["arguments"]))
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "stop")

    @pytest.mark.parametrize("seed", range(3))
    async def test_required_is_a_call_of_one_of_them(self, engine: LlamaCppEngine, seed: int):
        body = asked(tool_choice="required", parallel_tool_calls=False, temperature=1.5, seed=seed)
        choice = (await ask(engine, "chat/completions", body))["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        schema = {"weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}[call["function"]["name"]]
        Draft202012Validator(schema).validate(json.loads(call["function"]["arguments"]))
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")

    @pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
    async def test_streamed_calls_are_the_unary_ones(self, engine: LlamaCppEngine, choice: Any):
        body = asked(tool_choice=choice, parallel_tool_calls=False)
        whole = (await ask(engine, "chat/completions", body))["choices"][0]
        made = put_together(await stream(engine, "chat/completions", body))
        calls = [call["function"] for call in whole["message"]["tool_calls"]]
        assert [{"name": call["name"], "arguments": call["arguments"]} for call in made["tool_calls"]] == calls
        assert made["finish_reason"] == whole["finish_reason"]
        assert made["content"] == ""
        assert all(call["id"].startswith("call_") for call in made["tool_calls"])

    async def test_auto_without_a_call_is_plain_text(self, engine: LlamaCppEngine):
        body = asked(max_tokens=24)
        whole = (await ask(engine, "chat/completions", body))["choices"][0]
        made = put_together(await stream(engine, "chat/completions", body))
        assert made["content"] == whole["message"]["content"] != ""
        assert "tool_calls" not in whole["message"]
        assert made["finish_reason"] == whole["finish_reason"] != "tool_calls"

    async def test_marks_that_are_control_tokens_are_part_of_the_text(
        self, engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
    ):
        """Mistral's and Llama's marks are; here <|im_start|> stands for one, and the model can say nothing else."""
        assert engine._loaded is not None
        mark = int(engine._loaded.model.tokenize("<|im_start|>", add_special=False)[0])
        monkeypatch.setattr(engine._loaded.prompts, "call_marks", frozenset({mark}))
        said = asked(logit_bias={str(mark): 100}, max_tokens=2)
        choice = (await ask(engine, "chat/completions", said))["choices"][0]
        assert choice["message"]["content"] == "<|im_start|>" * 2
        choice = (await ask(engine, "chat/completions", {**said, "tool_choice": "none"}))["choices"][0]
        assert choice["message"]["content"] == ""

    async def test_history_with_calls_reaches_the_template_as_objects(self, engine: LlamaCppEngine):
        call = {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Pa\\"ris"}'},
        }
        messages = [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
        ]
        told = await ask(engine, "tokenize", {"messages": messages, "return_token_strs": True})
        assert '"arguments": {"city": "Pa\\"ris"}}</tool_call>' in "".join(told["token_strs"])

    @pytest.mark.parametrize(
        ("fields", "param", "says"),
        [
            ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "None"),
            ({"tools": [{"type": "retrieval"}]}, "tools[0]", "'function'"),
            ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name", "names two tools"),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
            (
                {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
                "tools[0].function.parameters",
                "schema",
            ),
            ({"tool_choice": "always"}, "tool_choice", "'required'"),
            ({"tool_choice": {"type": "function"}}, "tool_choice", "'required'"),
            (
                {"tool_choice": {"type": "function", "function": {"name": "wether"}}},
                "tool_choice.function.name",
                "the tools are weather, now",
            ),
            ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format", "tool_choice"),
            (
                {
                    "tool_choice": "required",
                    "tools": [
                        *TOOLS,
                        {"type": "function", "function": {"name": "f", "parameters": {"not": {"type": "string"}}}},
                    ],
                },
                "tools[2].function.parameters",
                "not",
            ),
        ],
    )
    async def test_what_cannot_be_is_refused_by_name(self, engine: LlamaCppEngine, fields: Json, param: str, says: str):
        with pytest.raises(BadRequest) as refused:
            await ask(engine, "chat/completions", asked(**fields))
        assert refused.value.param == param
        assert says in refused.value.message

    @pytest.mark.parametrize("arguments", ["{", "[1]", 7], ids=str)
    async def test_arguments_in_the_history_are_objects(self, engine: LlamaCppEngine, arguments: Any):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        with pytest.raises(BadRequest) as refused:
            await ask(engine, "chat/completions", asked(messages=messages))
        assert refused.value.param == "messages[1].tool_calls[0].function.arguments"


# --- the form alone -----------------------------------------------------------------------------------------------


def streamed(use: ToolUse, texts: list[str], reason: str = "stop") -> Json:
    form = ToolForm(use)
    deltas = [Delta(0, text=text) for text in texts] + [Delta(0, finish_reason=reason)]
    chunks = [form.chunk_choice(delta, "", None) for delta in deltas]
    return put_together([{"choices": [choice]} for choice in chunks if choice is not None])


@pytest.mark.parametrize(
    ("way", "text", "length"),
    [
        ("hermes", 'Well.\n<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', 29),
        ("mistral", 'Well. [TOOL_CALLS][{"name": "a", "arguments": {"x": 1}}]', 9),
        ("llama", '{"name": "a", "parameters": {"x": 1}}', 29),
    ],
)
def test_calls_that_the_model_writes_are_told(way: Any, text: str, length: int):
    use = ToolUse(TOOLS, way)
    whole = ToolForm(use).choice(Delta(0, text=text, finish_reason="stop"), "", None)
    assert whole["message"]["tool_calls"][0]["function"] == {"name": "a", "arguments": '{"x": 1}'}
    assert whole["message"]["content"] == ("Well." if "Well" in text else None)
    assert len(whole["message"]["tool_calls"][0]["id"]) == length
    made = streamed(use, list(text))
    assert [(call["name"], call["arguments"]) for call in made["tool_calls"]] == [("a", '{"x": 1}')]
    assert (made["content"], made["finish_reason"], whole["finish_reason"]) == (
        whole["message"]["content"] or "",
        "tool_calls",
        "tool_calls",
    )


def test_a_call_cut_off_ends_for_its_length():
    made = streamed(ToolUse(TOOLS, "hermes"), ['<tool_call>{"name": "a", "arguments": {"x"'], reason="length")
    assert (made["tool_calls"][0]["arguments"], made["finish_reason"]) == ('{"x"', "length")


@pytest.mark.parametrize("tail", [", ", ', {"na', ', {"name": "no'])
def test_what_is_cut_off_of_a_list_of_calls_is_no_content(tail: str):
    use = tool_use(TOOLS, "required", parallel=None, way="hermes", takes_tools=True)
    assert use is not None
    text = '[{"name": "now", "parameters": {}}' + tail
    whole = ToolForm(use).choice(Delta(0, text=text, finish_reason="length"), "", None)
    assert len(whole["message"]["tool_calls"]) == 1
    assert (whole["message"]["content"], whole["finish_reason"]) == (None, "length")
    assert streamed(use, list(text), reason="length")["content"] == ""


def test_every_choice_has_calls_of_its_own():
    form = ToolForm(ToolUse(TOOLS, "hermes"))
    call = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    first = form.chunk_choice(Delta(0, text=call, finish_reason="stop"), "", None)
    second = form.chunk_choice(Delta(1, text="No.", finish_reason="stop"), "", None)
    assert first is not None
    assert second is not None
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")


def test_no_tools_ask_for_nothing():
    for tools, choice in ((None, None), ([], "auto"), (TOOLS, "none")):
        assert tool_use(tools, choice, parallel=None, way="hermes", takes_tools=True) is None
    with pytest.raises(BadRequest, match="no place for tools"):
        tool_use(TOOLS, "auto", parallel=None, way=None, takes_tools=False)
