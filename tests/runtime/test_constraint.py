"""Every answer held to a schema parses and validates, or the schema is refused by place, before anything runs."""

from __future__ import annotations

import asyncio
import json
import re
import warnings
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json
from aim_runtime.engines.llama_cpp.constraint import Constraint, Constraints
from aim_runtime.engines.llama_cpp.pattern import PatternRefused, translated
from any_tokens import AnyTokens, answer

PARAM = "response_format.json_schema.schema"
TOKENS = AnyTokens()
CONSTRAINTS = Constraints(TOKENS)
COLOURS: Json = {"Colour": {"type": "string", "enum": ["red", 'gr"een', "🙂"]}}


def compiled(schema: Any, *, strict: bool = False) -> Constraint:
    return CONSTRAINTS.of_schema(schema, param=PARAM, strict=strict)


def answers(schema: Any, count: int = 20) -> list[Any]:
    """Whole answers, parsed; each is checked against the schema."""
    constraint = compiled(schema)
    texts = [text for seed in range(count) if (text := answer(constraint, TOKENS, seed)) is not None]
    values = [json.loads(text) for text in texts]
    for value in values:
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)
    return values


def refused(schema: Any, *, strict: bool = False) -> str:
    with pytest.raises(BadRequest) as caught:
        compiled(schema, strict=strict)
    assert caught.value.param == PARAM
    assert len(caught.value.message) < 400
    return caught.value.message


def objects(**properties: Any) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"enum": ["🙂"]},
        {"type": ["string", "null"], "enum": ["a", None]},
        {"allOf": [{"$ref": "#/definitions/Colour"}], "definitions": COLOURS},
        objects(c={"title": "C", "default": "red", "allOf": [{"$ref": "#/$defs/Colour"}]}) | {"$defs": COLOURS},
        {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3},
        {"type": "string", "pattern": "b", "minLength": 2, "maxLength": 5},
        {"type": "object", "required": ["undeclared"]},
        {"const": "a\"b\\c\n/'"},
        {"const": {"a\"b": ["\\", 1.5, None, True, {}]}},
        {"enum": [1, "1", 1.5, None, True, [1, {"a": 2}], {}, -0.0, 2**53 - 1]},
        {"type": "string", "pattern": "^(a?){900}$"},
        {"type": "string", "pattern": "^((a?){30}){30}$"},
        {"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"},
        {"type": "string", "pattern": "^[^\"]{0,3}$"},
        {"type": "string", "pattern": "^[^\\\\]{0,3}$"},
        {"type": "string", "pattern": "^[\\x00-\\x1f]{1,3}$"},
        {"type": "string", "pattern": "^\\W\\D\\S.$"},
        {"type": "string", "pattern": "^(ab|cd$)|^x[\\s\\S]?$"},
        {"type": "string", "format": "date"},
        {"type": ["string", "null"], "format": "date-time", "pattern": "5"},
        {"type": "string", "format": "ipv6"},
        {"type": "string", "format": "uuid"},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "number", "exclusiveMaximum": 1, "minimum": 0.9999999999},
        {"type": "number", "maximum": 0.12345678901234567, "minimum": 0.1234567890123},
        {"type": "integer", "exclusiveMinimum": 2**53 - 3},
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "integer", "multipleOf": 7, "minimum": 1},
        {"type": "array", "items": {"type": "integer", "multipleOf": 1.5, "maximum": 9}, "minItems": 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        {"type": "array", "prefixItems": [{"type": "integer"}], "additionalItems": {"type": "string"}},
        {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": False, "minItems": 2},
        {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
        {"type": "object", "patternProperties": {"^a": {"const": 1}, "^b": {"const": 2}},
         "additionalProperties": False},
        {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "discriminator": {"propertyName": "kind"},
         "$defs": {"A": objects(kind={"const": "a"}), "B": objects(kind={"const": "b"}, x={"type": "null"})}},
        {"$ref": "#/$defs/Node", "$defs": {"Node": {"type": "object", "required": ["v"], "additionalProperties": False,
         "properties": {"v": {"const": 1}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}}}},
        {"$ref": "#/a~1b/%25", "a/b": {"%": {"const": 5}}},
        {"type": "string", "maxLength": 3, "x-guidance": {"lenient": True, "whitespace_pattern": "x"}},
        {},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)  # fmt: skip
def test_answers_validate(schema: Json):
    assert answers(schema)


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"not": {"type": "string"}}, ".not", "cannot be enforced"),
        (objects(a={"type": "array", "uniqueItems": True}), ".properties.a.uniqueItems", "cannot be enforced"),
        ({"if": {}, "then": {}}, ".if", "cannot be enforced"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, ".propertyNames", "cannot be enforced"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, ".dependentRequired", "cannot be enforced"),
        ({"type": "array", "contains": {"const": 1}}, ".contains", "cannot be enforced"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, ".minLength", "maxLength is 2"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, ".minItems", "maxItems is 2"),
        ({"type": "object", "required": ["z"], "additionalProperties": False}, "", "required property 'z'"),
        (objects(a=objects(n={"type": "integer", "minimum": 3, "maximum": 2})), ".properties.a.properties.n",
         "minimum"),
        (objects(a={"$ref": "#/$defs/E"}) | {"$defs": {"E": {"type": "string", "const": 5}}}, ".properties.a", "types"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "", "oneOf"),
        ({"type": "object", "minProperties": 3}, ".minProperties", "cannot be enforced"),
        ({"const": "\x01"}, ".const", "control characters"),
        ({"enum": ["a", {"b": "\x7f"}]}, ".enum[1].b", "control characters"),
        ({"const": 2**53 + 1}, ".const", "2**53"),
        ({"const": 1e300}, ".const", "2**53"),
        ({"const": 0.12345678901234567}, ".const", "15 digits"),
        ({"type": "number", "minimum": 1e17}, ".minimum", "2**53"),
        ({"type": "number", "multipleOf": 1e-9}, ".multipleOf", "too fine"),
        ({"type": "number", "multipleOf": 0}, ".multipleOf", "above 0"),
        ({"type": "number", "multipleOf": 5, "maximum": -5}, ".multipleOf", "negative"),
        (objects(a={"type": "integer", "multipleOf": 0.7, "minimum": 1, "maximum": 5}), ".properties.a", "of 7"),
        ({"type": "string", "pattern": "(?=a)b"}, ".pattern", "look-around"),
        ({"type": "string", "pattern": "(a)\\1"}, ".pattern", "back-reference"),
        ({"type": "string", "pattern": "a\\bc"}, ".pattern", "boundary"),
        ({"type": "string", "pattern": "(?i)a"}, ".pattern", "flags"),
        ({"type": "string", "pattern": "("}, ".pattern", "no regular expression"),
        ({"type": "string", "pattern": "^\\x01$"}, ".pattern", "U+0001"),
        ({"type": "string", "pattern": "(" * 990 + ")" * 990}, ".pattern", "nested too deeply"),
        ({"type": "string", "pattern": "^a{1,1001}$"}, ".pattern", "1000 is the most"),
        ({"type": "string", "pattern": "a" * 2001}, ".pattern", "2000 is the most"),
        ({"type": "string", "pattern": 5}, ".pattern", "regular expression"),
        ({"type": "string", "maxLength": 10_001}, ".maxLength", "10000"),
        ({"type": "string", "maxLength": True}, ".maxLength", "10000"),
        ({"type": "array", "items": [], "prefixItems": []}, ".items", "not empty"),
        ({"type": "strnig"}, ".type", "one or several"),
        ({"type": []}, ".type", "one or several"),
        ({"enum": []}, ".enum", "not empty"),
        ({"anyOf": {}}, ".anyOf", "list of schemas"),
        ({"properties": []}, ".properties", "object of schemas"),
        ({"properties": {"a": 5}}, ".properties.a", "a schema is"),
        ({"required": True}, ".required", "list of names"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}},
         ".$defs.b.$ref", "back to itself"),
        ({"$ref": "#"}, ".$ref", "back to itself"),
        ({"$ref": "other.json"}, ".$ref", "within the schema"),
        ({"properties": {"a": {"$id": "x", "$ref": "#/y"}}}, ".properties.a.$id", "cannot be enforced"),
        ({"patternProperties": {"^a": {}}, "additionalProperties": {}}, ".patternProperties", "additionalProperties"),
        ({"patternProperties": {"^\\d": {}}, "properties": {"é": {}}}, ".patternProperties", "ASCII"),
        ({"type": "number", "exclusiveMinimum": True}, ".exclusiveMinimum", "a number"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_a_refusal_names_the_place_and_the_reason(schema: Json, place: str, reason: str):
    message = refused(schema)
    assert message.startswith(f"'{PARAM}{place}' "), message
    assert reason in message


def test_a_format_nobody_enforces_is_an_annotation_unless_strict():
    schema = objects(file={"type": "string", "format": "binary", "maxLength": 3})
    assert answers(schema)
    assert refused(schema, strict=True).startswith(f"'{PARAM}.properties.file.format' is 'binary'")


def test_objects_are_closed_where_that_is_sound():
    """Nobody wants properties without a name, but schemas for one value must not exclude each other's."""
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    assert all(value in ({}, {"a": None}) for value in answers(schema))
    assert all(value == [1] for value in answers({"prefixItems": [{"const": 1}], "type": "array", "minItems": 1}))
    other = {"type": "object", "properties": {"b": {"const": 1}}, "required": ["b"]}
    assert any(value.keys() >= {"a", "b"} for value in answers({"allOf": [schema, other]}, count=60))
    assert any(value.keys() >= {"a", "b"} for value in answers(schema | {"anyOf": [other]}, count=60))
    refused({"oneOf": [schema, other]})  # {"b": 1} is both, but would be one if the first were closed


# -- bounds ---------------------------------------------------------------------------------------------------------


def chain(length: int) -> Json:
    links = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "string"}}}


def deep(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def meeting(count: int, key: str = "a") -> Json:
    return {"allOf": [{"properties": {key: {"pattern": f".*{'abcdefghij'[i]}.{{{i + 9}}}"}}} for i in range(count)]}


@pytest.mark.parametrize(
    ("schema", "limit"),
    [
        (chain(1000), "150"),  # the library's recursion would end the process
        (deep(60), "50"),
        ({"enum": [f"v{i}" for i in range(5001)]}, "5000"),
        ({"enum": ["x" * 200_001]}, "200000"),
        ({"type": "object", "properties": {f"p{i}": {} for i in range(501)}}, "500"),
        ({"anyOf": [{"properties": {f"p{i}": {} for i in range(400)}} for _ in range(13)]}, "5000"),
        (meeting(4), "3"),
        (meeting(10), "3"),
        ({"$ref": "#/$defs/a", "format": "email", "$defs": {"a": {"pattern": "a", "allOf": [
            {"pattern": "b"}, {"pattern": "c"}]}}}, "3"),
        ({"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {"const": j}}} for j in range(4)]} for i in range(9)]}, ""),
        ({"patternProperties": {f"^{i}": {} for i in range(11)}}, "10"),
        ({"allOf": [{"properties": {f"q{i}": {"enum": [*range(40)]} for i in range(90)}},
                    {"anyOf": [{"required": [f"z{i}"]} for i in range(400)]}]}, "200000"),
        ({"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {"const": j}}, "required": [f"a{i}_{j}"]}
                               for j in range(2)]} for i in range(11)]}, ""),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_has_no_bound_in_the_library_has_one_here(schema: Json, limit: str):
    assert limit in refused(schema)


@pytest.mark.parametrize(
    "schema",
    [
        chain(70),
        deep(45),
        {"enum": [f"value {i}" for i in range(5000)]},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}},
        meeting(3),
        {"allOf": [{"properties": {f"k{i}": {"format": "email"}}} for i in range(50)]},
        {"anyOf": [{"type": "string", "pattern": f"^{c}.*{c}$"} for c in "abcdefgh"]},
        {"type": "array", "items": {"type": "string", "maxLength": 10_000}, "minItems": 9_000, "maxItems": 10_000},
    ],
    ids=range(8),
)
def test_a_large_schema_within_the_bounds_is_served(schema: Json):
    answer(compiled(schema), TOKENS, seed=1, most=50)


@pytest.mark.parametrize(
    "pattern", ["^(.*a.{20}|.*b.{30}|.*c.{40})*$", "^(.*a){50}.{50}$", "(a|b)*a(a|b){500}", "a?" * 900, "^(a*)*b$"]
)
def test_a_pattern_that_explodes_ends_only_its_own_answer(pattern: str):
    """An automaton for these has more states than memory: the step that would make them is an error of the answer's."""
    constraint = compiled({"type": "string", "pattern": pattern})
    for seed in range(5):
        try:
            answer(constraint, TOKENS, seed)
        except BadRequest as error:
            assert error.code == "schema_too_complex"  # noqa: PT017
    assert answers({"type": "integer"})


async def test_compiling_leaves_the_loop_free():
    """The loop turns while the largest allowed schema is compiled."""
    turns = 0
    schema = {"enum": [f"a value with number {i}" for i in range(4999)]}
    task = asyncio.create_task(asyncio.to_thread(CONSTRAINTS.of_schema, schema, param=PARAM))
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert isinstance(task.result(), Constraint)
    assert turns > 10


def test_a_schema_is_compiled_once():
    schema = objects(once={"type": "integer"})
    assert compiled(schema) is compiled(json.loads(json.dumps(schema)))


def test_an_end_is_allowed_only_where_the_answer_is_complete():
    position = compiled({"const": "ab"}).begin()
    for byte in b'"ab"':
        assert not position.complete
        position.accept(byte)
    logits = np.zeros(TOKENS.vocabulary_size, dtype=np.float32)
    position.mask(logits)
    assert position.complete
    assert set(np.flatnonzero(np.isfinite(logits))) == TOKENS.end_tokens


def test_a_vocabulary_without_an_end_token_leaves_none_at_the_end():
    tokens = AnyTokens()
    tokens.end_tokens = frozenset()
    position = Constraints(tokens).of_schema({"const": 5}, param=PARAM).begin()
    position.accept(ord("5"))
    logits = np.zeros(tokens.vocabulary_size, dtype=np.float32)
    position.mask(logits)
    assert position.complete
    assert not np.isfinite(logits).any()


# -- properties -----------------------------------------------------------------------------------------------------

TEXT = st.text(
    st.one_of(st.sampled_from('ab"\\/{}[]:,\n\t 🙂é\u2028\ufeff'), st.characters(exclude_categories=["Cs", "Cc"])),
    max_size=6,
)
NAMES = st.one_of(st.sampled_from(["a", "b", "ab", "a b", 'q"', "\\", "🙂", "", "a/b", "~", "$ref"]), TEXT)
LITERALS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-300, 300), st.sampled_from([0.5, -1.25, 1e-3, 1.0, 2**53 - 1]), TEXT
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=4,
)
PATTERNS = st.sampled_from(
    ["^[a-z]+$", "a", "^a|b$", '^[^"]*$', "^[^\\\\a]{2,4}$", "\\d{2,3}", "^\\w+( \\w+)*$", "^.{1,3}$", "^(a?){40}$",
     "[🙂-🙄]", "^$", "", "^\\S+$", "(ab|a)(c|bcd)", "^[\\]\\-^]$", "^\\W+$", "^(?:x|[\"/]){1,2}"]
)  # fmt: skip
FORMATS = st.sampled_from(["date", "time", "date-time", "email", "uuid", "ipv4", "hostname", "nobody-knows"])
BOUNDS = st.one_of(st.integers(-50, 50), st.sampled_from([0, 0.5, -0.25, 1e-3, 1e6, 3.14159265358979, -(2**60), 99.99]))


def fields(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({}, optional=optional)


STRINGS = st.builds(
    lambda extra: {"type": "string", **extra},
    fields(minLength=st.integers(0, 4), maxLength=st.integers(1, 12), pattern=PATTERNS, format=FORMATS),
)
NUMBERS = st.builds(
    lambda kind, extra: {"type": kind, **extra},
    st.sampled_from(["integer", "number"]),
    fields(
        minimum=BOUNDS,
        maximum=BOUNDS,
        exclusiveMinimum=BOUNDS,
        exclusiveMaximum=BOUNDS,
        multipleOf=st.sampled_from([1, 2, 7, 0.5, 0.25, 1.75, 100]),
    ),
)
LEAVES = st.one_of(
    STRINGS,
    NUMBERS,
    st.builds(lambda values: {"enum": values}, st.lists(LITERALS, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, LITERALS),
    st.builds(
        lambda types: {"type": types}, st.lists(st.sampled_from(["null", "boolean", "string"]), min_size=1, unique=True)
    ),
    st.just({"type": ["string", "null"], "enum": ["a", None]}),
    st.sampled_from([{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}, {"$ref": "#"}, {}]),
)  # fmt: skip


def grown(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    parts = st.lists(inner, min_size=1, max_size=3)
    several = st.builds(lambda key, value: {key: value}, st.sampled_from(["anyOf", "oneOf", "allOf"]), parts)
    arrays = st.builds(
        lambda extra: {"type": "array", **extra},
        fields(
            items=inner,
            prefixItems=parts,
            minItems=st.integers(0, 3),
            maxItems=st.integers(0, 4),
            uniqueItems=st.sampled_from([False, False, True]),
        ),
    )
    maps = st.builds(
        lambda extra: {"type": "object", **extra},
        fields(
            properties=st.dictionaries(NAMES, inner, max_size=3),
            required=st.lists(NAMES, max_size=3, unique=True),
            additionalProperties=st.one_of(st.just(False), st.just(True), inner),
            patternProperties=st.dictionaries(
                st.sampled_from(["^a", "b$", "^[^a]", "^\\d"]), inner, min_size=1, max_size=2
            ),
            minProperties=st.integers(0, 3),
            maxProperties=st.integers(0, 4),
        ),
    )
    beside = st.builds(lambda one, other: {**one, **other}, st.one_of(several, LEAVES), st.one_of(maps, arrays, LEAVES))
    return st.one_of(several, arrays, maps, maps, beside)


SCHEMAS = st.builds(
    lambda body, a, b: {**body, "$defs": {"A": a, "B": b}},
    st.recursive(LEAVES, grown, max_leaves=8),
    st.recursive(LEAVES, grown, max_leaves=4),
    st.recursive(LEAVES, grown, max_leaves=4),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_any_schema_is_kept_or_refused(schema: Json, seed: int):
    try:
        constraint = compiled(schema)
    except BadRequest as error:
        event("refused")
        assert error.message.startswith(f"'{PARAM}")  # noqa: PT017
        return
    validator = jsonschema.Draft202012Validator(schema)
    for number in range(4):
        text = answer(constraint, TOKENS, seed + number, most=250)
        event("cut" if text is None else "whole")
        if text is not None:
            validator.validate(json.loads(text))


@settings(max_examples=300, deadline=None)
@given(
    pattern=st.one_of(
        PATTERNS, st.from_regex(r"\A(\^?([ab.]|\[\^?[ab\"]+\]|\(a\|b\)|\\[dws])([*+?]|\{1,2\})?){1,5}\$?\Z")
    ),
    seed=st.integers(0, 2**32),
)
def test_a_pattern_is_kept_or_refused(pattern: str, seed: int):
    try:
        translated(pattern)
    except PatternRefused:
        return
    for number in range(3):
        text = answer(compiled({"type": "string", "pattern": pattern}), TOKENS, seed + number, most=120)
        if text is not None:
            with warnings.catch_warnings(action="ignore"):
                assert re.search(pattern, json.loads(text))


@pytest.mark.parametrize("step", [0.1, 0.01, 0.05, 3, 0.000001])
def test_multiples_are_exact(step: float):
    for seed in range(20):
        text = answer(compiled({"type": "number", "multipleOf": step, "minimum": 0, "maximum": 50}), TOKENS, seed)
        if text is not None:
            assert Decimal(text.decode()) % Decimal(repr(step)) == 0
