"""Slots: every text of a body is found, with what is known of it, and what may pass is put back where it was."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_guardrail.pipeline import Guard, Session
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.policy import Policy, Rule
from aim_guardrail.protocols.places import CHAT, RESPONSES, V2
from aim_guardrail.slots.apply import apply
from aim_guardrail.slots.collect import collect
from aim_guardrail.slots.places import FREE
from aim_guardrail.slots.slot import spelt

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="_"), max_size=12).filter(
    lambda word: word != "arguments"
)
BODIES = st.dictionaries(
    WORDS,
    st.recursive(
        st.one_of(WORDS, st.integers(-(2**40), 2**40), st.booleans(), st.none()),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
        max_leaves=20,
    ),
    max_size=5,
)


def said(value: Any) -> list[str]:
    """Every string that says something: values, and keys that are more than a plain word."""
    if isinstance(value, dict):
        names = [key for key in value if not is_plain(key)]
        return names + [text for item in value.values() for text in said(item)]
    if isinstance(value, list):
        return [text for item in value for text in said(item)]
    return [value] if isinstance(value, str) and value else []


def marked(value: Any) -> Any:
    """Every string of a body that is checked, with a mark behind it."""
    if isinstance(value, dict):
        return {key if is_plain(key) else f"{key}_": marked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item) for item in value]
    return f"{value}_" if isinstance(value, str) and value else value


def is_plain(key: str) -> bool:
    return not key or (key.isascii() and key.islower() and key.isalpha())


def where(body: dict[str, Any], place: Any = FREE) -> dict[str, Any]:
    return {spelt(slot.path): slot for slot in collect("prompt", body, place).items}


@given(BODIES)
def test_every_string_of_a_free_body_is_a_slot(body: dict[str, Any]) -> None:
    assert sorted(slot.text for slot in collect("answer", body, FREE).items) == sorted(said(body))


@given(BODIES)
def test_what_is_applied_stands_where_it_was_found(body: dict[str, Any]) -> None:
    changed = copy.deepcopy(body)
    slots = collect("answer", changed, FREE)
    texts = [slot.text for slot in slots.items]
    assert not apply(changed, slots, texts, shadows=True)
    assert changed == body
    assert apply(changed, slots, [f"{text}_" for text in texts], shadows=False) == bool(texts)
    assert changed == marked(body)


def test_a_tensors_name_and_type_are_no_texts_while_they_look_like_such() -> None:
    def tensor(name: str, datatype: str = "BYTES") -> dict[str, Any]:
        return {"name": name, "datatype": datatype, "parameters": {"name": "note"}, "data": ["x"]}

    body = {"id": "7", "model_name": "m", "inputs": [tensor("INPUT0"), tensor("a@b.c", "so it is"), tensor("k" * 41)]}
    assert {path: (slot.text, slot.key) for path, slot in where(body, V2).items()} == {
        "id": ("7", "id"),
        "inputs[0].parameters.name": ("note", "name"),
        "inputs[0].data[0]": ("x", "INPUT0"),
        "inputs[1].name": ("a@b.c", ""),
        "inputs[1].datatype": ("so it is", ""),
        "inputs[1].parameters.name": ("note", "name"),
        "inputs[1].data[0]": ("x", "a@b.c"),
        "inputs[2].name": ("k" * 41, ""),
        "inputs[2].parameters.name": ("note", "name"),
        "inputs[2].data[0]": ("x", "k" * 41),
    }


def test_a_path_leads_through_json_in_a_string() -> None:
    arguments = orjson.dumps({"to": ["a@b.c"], "arguments": '{"n": 4111111111111111}'}).decode()
    body = {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}
    found = where(body, CHAT)
    start = "messages[0].tool_calls[0].function.arguments"
    assert {path: (slot.text, slot.key, slot.kind) for path, slot in found.items() if path.startswith(start)} == {
        f"{start}.to[0]": ("a@b.c", "to", "text"),
        f"{start}.arguments.n": ("4111111111111111", "n", "number"),
    }
    slots = collect("prompt", body, CHAT)
    assert apply(body, slots, [{"a@b.c": "<A>"}.get(slot.text, slot.text) for slot in slots.items], shadows=False)
    shown = orjson.loads(body["messages"][0]["tool_calls"][0]["function"]["arguments"])
    assert shown == {"to": ["<A>"], "arguments": '{"n": 4111111111111111}'}


def test_keys_are_renamed_around_and_within_json_in_a_string() -> None:
    body: dict[str, Any] = {"a@b.c": {"d@e.f": [{"arguments": '{"g@h.i": {"arguments": "{\\"j@k.l\\": 1}"}}'}]}}
    slots = collect("prompt", body, FREE)
    assert apply(body, slots, [f"<{slot.text[0]}>" for slot in slots.items], shadows=False)
    assert body == {"<a>": {"<d>": [{"arguments": '{"<g>":{"arguments":"{\\"<j>\\":1}"}}'}]}}


def test_many_keys_are_renamed_at_once() -> None:
    body: dict[str, Any] = {f"a{n}@b.c": n for n in range(3000)}
    slots = collect("prompt", body, FREE)
    assert apply(body, slots, [f"<{n}>" for n in range(3000)], shadows=False)
    assert body == {f"<{n}>": n for n in range(3000)}


def test_slots_know_who_speaks_and_what_names_them() -> None:
    body = {
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi", "note": "x"}],
        "metadata": {"env": [{"name": "PASSWORD", "value": "v"}]},
    }
    found = where(body, CHAT)
    assert {path: (slot.role, slot.key) for path, slot in found.items()} == {
        "messages[0].content": ("system", ""),
        "messages[1].content": ("user", ""),
        "messages[1].note": ("user", "note"),
        "metadata.env[0].name": ("", "name"),
        "metadata.env[0].value": ("", "PASSWORD"),
    }


def test_neighbours_are_the_text_parts_with_nothing_between() -> None:
    def text(text: str, **more: str) -> dict[str, str]:
        return {"type": "input_text", "text": text, **more}

    picture = {"type": "input_image", "image_url": "https://x.org/a.png"}
    content = [text("a"), text(""), text("b", note="n"), picture, text("c"), text("d")]
    slots = collect("prompt", {"input": [{"role": "user", "content": content}]}, RESPONSES)
    assert [[slots.items[at].text for at in run] for run in slots.joined] == [["a", "b"], ["c", "d"]]


def test_many_parts_and_values_cost_what_they_hold() -> None:
    """A placeholder for each of many values over many parts, in the order they came in."""
    rules = (Rule(type="pii", action="redact", entities=("EMAIL_ADDRESS",)),)
    guard = Guard.load(Policy(version=1, name="t", prompt=rules))
    parts = [{"type": "text", "text": f"a{n}@example.com, b{n}@exam"} for n in range(200)]
    parts = [part for n, part in enumerate(parts) for part in (part, {"type": "text", "text": f"ple.com {n}, "})]
    slots = collect("prompt", {"messages": [{"role": "user", "content": parts}]}, CHAT)
    rulings = guard.judge("prompt", slots)
    assert [len(ruling.slots) for ruling in rulings] == [400]
    shown = guard.redacted(slots, rulings, Session())
    assert shown[:2] == ["<EMAIL_ADDRESS_1>, <EMAIL_ADDRESS_2>", " 0, "]
    assert shown[-2:] == ["<EMAIL_ADDRESS_399>, <EMAIL_ADDRESS_400>", " 199, "]


@pytest.mark.parametrize(
    ("route", "model"),
    [("/v1/chat/completions", None), ("/v1/models/a:predict", "a"), ("/v2/models/b/versions/1/infer", "b")],
)
def test_the_context_knows_the_request_before_its_body(route: str, model: str | None) -> None:
    context = RequestContext.of(route, [(b"content-length", b"12")], "10.0.0.7")
    assert (context.route, context.model, context.client, context.body_bytes) == (route, model, "10.0.0.7", 12)
    assert RequestContext.of(route, [], None).body_bytes is None
    assert RequestContext.of(route, [(b"content-length", b"x")], None).body_bytes is None
