"""The JSON Schema of policies says what the reader says: every option of every family, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError as SchemaError

from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.policy import PolicyError, parse_policy, shipped_names
from aim_guardrail.policy.schema import policy_schema

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def reads() -> Draft202012Validator:
    schema = policy_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", shipped_names())
def test_the_schema_lets_every_shipped_policy_pass(name: str, reads: Draft202012Validator):
    file = resources.files("aim_guardrail") / "policies" / f"{name}.yaml"
    reads.validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def test_the_schema_lets_every_policy_of_the_documentation_pass(reads: Draft202012Validator):
    passed = 0
    for page in sorted(DOCS.glob("*.md")):
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for text in (block, f"version: 2\nname: x\nprompt:\n{block}"):
                with suppress(PolicyError):
                    parse_policy(text, "t")
                    reads.validate(yaml.safe_load(text))
                    passed += 1
    assert passed >= 8


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_schema_knows_the_options_of_every_family(family: str, reads: Draft202012Validator):
    known = dict.fromkeys(FAMILIES[family].options.model_fields)
    rule = {"type": family, "action": "flag", "options": {"no_such_option": 1, **known}}
    errors = reads.iter_errors({"version": 2, "name": "a", "prompt": [rule]})
    told = [inner.message for error in errors for inner in every(error)]
    unknown = [message for message in told if "no_such_option' was unexpected" in message]
    assert unknown
    assert not [message for message in unknown if any(f"'{name}'" in message for name in known)]


def every(error: SchemaError) -> Iterator[SchemaError]:
    """An error, and those it comes of."""
    yield error
    for inner in error.context or ():
        yield from every(inner)


@pytest.mark.parametrize(
    "rule",
    [
        "{type: secretz, action: block}",
        "{type: secrets, action: blok}",
        "{type: secrets, action: block, entities: [SECRT]}",
        "{type: code, action: {DANGEROUS: block}}",
        "{type: toxicity, action: flag, threshold: {TOXICK: 0.5}}",
        "{type: nsfw_image, action: flag}",
        "{type: traffic, action: block, options: {requests: {minuet: 5}}}",
        "{parallel: [{type: ner, action: flag, options: {modell: en}}]}",
    ],
)
def test_the_schema_refuses_what_is_misspelt(rule: str, reads: Draft202012Validator):
    text = f"version: 2\nname: a\nprompt: [{rule}]"
    assert not reads.is_valid(yaml.safe_load(text))
    with pytest.raises(PolicyError):
        parse_policy(text, "t")
