"""Tool calls in a model's text: found whatever way the text is cut, and what is no call stays text."""

from __future__ import annotations

import gc
import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_runtime.engines.llama_cpp.tool_calls import Piece, ToolCallText, Way, way_of

WEATHER = '{"city": "S\\u00e3o {Paulo}", "days": [1, 2], "deep": {"a": "}"}}'

# (way, the model's text, content, [(name, arguments)])
TEXTS: list[tuple[Way, str, str, list[tuple[str, str]]]] = [
    ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>', "", [("weather", WEATHER)]),
    (
        "hermes",
        'Let me look.\n\n<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>\n'
        '<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call>\n',
        "Let me look.",
        [("a", '{"x": 1}'), ("b", "{}")],
    ),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "late"}</tool_call>', "", [("late", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "none"}</tool_call>', "", [("none", "{}")]),
    ("hermes", '<tool_call>{"name": "null", "arguments": null}</tool_call>', "", [("null", "{}")]),
    ("hermes", '<tool_call>{"name": "s", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("s", '{"x": 1}')]),
    ("hermes", '<tool_call>{"id": 7, "name": "n", "arguments": {"x": 1}}</tool_call>', "", [("n", '{"x": 1}')]),
    ("hermes", "<tool_call>not JSON</tool_call> and on", "<tool_call>not JSON</tool_call> and on", []),
    ("hermes", '<tool_call>{"names": "x"}</tool_call>', '<tool_call>{"names": "x"}</tool_call>', []),
    ("hermes", "a < b, <tool and <tool_cal", "a < b, <tool and <tool_cal", []),
    ("hermes", '  {"name": "plain JSON", "arguments": {}} \n', '  {"name": "plain JSON", "arguments": {}} \n', []),
    ("hermes", '<tool_call>{"name": "cut", "arguments": {"x": "unfin', "", [("cut", '{"x": "unfin')]),
    ("hermes", '<tool_call>{"name": "cu', '<tool_call>{"name": "cu', []),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "a", "arguments": {WEATHER}}}, {{"name": "b", "arguments": {{}}}}]',
        "",
        [("a", WEATHER), ("b", "{}")],
    ),
    ("mistral", 'Well. [TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}', "Well.", [("a", '{"x": 1}'), ("b", "{}")]),
    ("mistral", '[TOOL_CALLS]a[CALL_ID]0123abcde[ARGS]{"x": 1}', "", [("a", '{"x": 1}')]),
    ("mistral", '[TOOL_CALLS]add{"x": 1}', "", [("add", '{"x": 1}')]),
    ("mistral", "[1, 2] are numbers", "[1, 2] are numbers", []),
    ("mistral", "[TOOL_CALLS]a[ARGS]{}Plain {text}", "Plain {text}", [("a", "{}")]),
    ("mistral", "[TOOL_CALLS]a[ARGS]{x} y", "x} y", [("a", "{")]),
    ("mistral", "[TOOL_CALLS]!", "[TOOL_CALLS]!", []),
    ("llama", f'{{"name": "a", "parameters": {WEATHER}}}', "", [("a", WEATHER)]),
    (
        "llama",
        '<|python_tag|>{"name": "a", "parameters": {"x": 1}}; {"name": "b", "parameters": {}}',
        "",
        [("a", '{"x": 1}'), ("b", "{}")],
    ),
    ("llama", '{"type": "function", "name": "a", "parameters": {}}', "", [("a", "{}")]),
    ("llama", '{"answer": 5}', '{"answer": 5}', []),
    ("llama", "Plain {text}.", "Plain {text}.", []),
    ("llama", " \n", " \n", []),
    ("llama", "", "", []),
]
EVERY_TEXT = pytest.mark.parametrize(("way", "text", "content", "calls"), TEXTS, ids=[text[1][:40] for text in TEXTS])


def told(way: Way, pieces: list[str], most: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls as a client puts them together from the deltas."""
    reader = ToolCallText(way, most)
    content, names, arguments = "", {}, {}
    shown: list[Piece] = [reader.push(piece) for piece in pieces] + [reader.push("", last=True)]
    for piece in shown:
        content += piece.content
        for call in piece.calls:
            if call.name is not None:
                assert call.index == len(names)
                names[call.index] = call.name
            assert call.index in names, "arguments before the name"
            arguments[call.index] = arguments.get(call.index, "") + call.arguments
    return content, [(names[index], arguments[index]) for index in names]


@EVERY_TEXT
def test_calls_are_told_from_text(way: Way, text: str, content: str, calls: list[tuple[str, str]]):
    assert told(way, [text]) == (content, calls)


@EVERY_TEXT
def test_in_two_pieces_at_every_place_and_character_by_character(
    way: Way, text: str, content: str, calls: list[tuple[str, str]]
):
    for cut in range(len(text) + 1):
        assert told(way, [text[:cut], text[cut:]]) == (content, calls), (text[:cut], text[cut:])
    assert told(way, list(text)) == (content, calls)


ANYTHING = st.lists(
    st.sampled_from([*(text for _, text, _, _ in TEXTS), "<tool_call>", "[TOOL_CALLS]", "{", "}", '"', " ", "x", ";"])
).map("".join)


@given(st.sampled_from(["hermes", "mistral", "llama"]), ANYTHING, st.lists(st.integers(0, 400)))
def test_any_text_in_any_pieces_is_told_the_same(way: Way, text: str, cuts: list[int]):
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert told(way, pieces) == told(way, [text])


@given(st.sampled_from(["hermes", "mistral", "llama"]), st.text(alphabet="abc {}\n\"'é🙂", max_size=60))
def test_text_without_calls_is_kept_whole(way: Way, text: str):
    assert told(way, [text]) == (text, [])


@pytest.mark.parametrize(("way", "text", "content", "calls"), [text for text in TEXTS if len(text[3]) > 1])
def test_only_so_many_calls_as_were_asked_for(way: Way, text: str, content: str, calls: list[tuple[str, str]]):
    assert told(way, [text], most=1) == (content, calls[:1])


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=4),
    st.sampled_from([None, 2]),
    st.booleans(),
    st.sampled_from(["hermes", "mistral", "llama"]),
)
def test_arguments_come_back_as_they_were_written(arguments: Any, indent: int | None, ascii_only: bool, way: Way):
    key = "parameters" if way == "llama" else "arguments"
    call = json.dumps({"name": "f", key: arguments}, indent=indent, ensure_ascii=ascii_only)
    text = {"hermes": f"<tool_call>{call}</tool_call>", "mistral": f"[TOOL_CALLS][{call}]", "llama": call}[way]
    content, ((name, given_back),) = told(way, list(text))
    assert (content, name) == ("", "f")
    assert json.loads(given_back) == arguments


def test_the_way_is_known_by_the_template():
    assert way_of("… <tool_call>\n{{ tool_call | tojson }}\n</tool_call>") == "hermes"
    assert way_of("{{ '[TOOL_CALLS] [' }}") == "mistral"
    assert way_of("<|start_header_id|> … {{ '<|python_tag|>' }}") == "llama"
    assert way_of("<|start_header_id|> … '\"parameters\": '") == "llama"
    assert way_of("<tool_call>\n<function=…>") is None
    assert way_of("<|im_start|>{{ message.content }}") is None


@pytest.mark.parametrize(
    ("way", "unit", "head", "tail"),
    [
        ("hermes", "a ", '<tool_call>{"name": "f", "arguments": {"x": "', '"}}</tool_call>'),
        ("hermes", " <tool_cal", "", ""),
        ("hermes", " ", "x", "y"),
        ("mistral", "[", "", ""),
        ("mistral", "a", "[TOOL_CALLS]", ""),
        ("llama", "{", "", ""),
        ("llama", ";", '{"name": "f", "parameters": {}}', ""),
    ],
)
def test_the_cost_is_linear_in_the_text(way: Way, unit: str, head: str, tail: str):
    def seconds(size: int) -> float:
        reader, text = ToolCallText(way), head + unit * (size // len(unit)) + tail
        began = time.process_time()
        for character in text:
            reader.push(character)
        reader.push("", last=True)
        return time.process_time() - began

    gc.disable()  # what other tests left behind is not this reader's cost
    try:
        assert seconds(100_000) < 12 * max(seconds(25_000), 0.005), "four times the text, far more than that in work"
    finally:
        gc.enable()
