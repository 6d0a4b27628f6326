"""docs/guardrails.md says of policies, families and headers what there is, all of it and no more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from aim_guardrail.policy import Policy, shipped_names, shipped_policy
from aim_guardrail.policy.policy import _NEW, Rule, Stage, StreamRules

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "guardrails.md").read_text(encoding="utf-8")
SHIPPED = Path(__file__).parents[2] / "transformers/aim_guardrail/policies"


def table(head: str) -> list[list[str]]:
    """The rows of the table whose first column has this heading, each a list of cells."""
    (found,) = re.findall(rf"^\| {re.escape(head)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [line.split("|")[1:-1] for line in found.splitlines()]


def keys(head: str) -> dict[str, bool]:
    """The keys of a table, and whether each is marked as new in version 2."""
    return {key: bool(mark) for row in table(head) for key, mark in re.findall(r"`(\w+)`( ◆)?", row[0])}


@pytest.mark.parametrize(
    ("head", "model"), [("policy", Policy), ("rule", Rule), ("stage ◆", Stage), ("`stream`", StreamRules)]
)
def test_every_key_is_told(head: str, model: type[BaseModel]) -> None:
    assert keys(head).keys() == model.model_fields.keys()


@pytest.mark.parametrize(("head", "section"), [("policy", "policy"), ("rule", "rule"), ("`stream`", "stream")])
def test_what_is_new_is_marked(head: str, section: str) -> None:
    assert {key for key, is_new in keys(head).items() if is_new} == set(_NEW[section])


def test_every_type_is_told() -> None:
    """Asked of a process of its own: other tests bring families to this one."""
    command = [sys.executable, "-m", "aim_guardrail", "catalog", "-o", "json"]
    catalog = subprocess.run(command, capture_output=True, check=True)
    types = {family["type"] for family in json.loads(catalog.stdout)["families"]}
    assert {name for row in table("family") for name in re.findall(r"`(\w+)`", row[1])} == types


def test_every_shipped_policy_is_told() -> None:
    assert {name for row in table("shipped") for name in re.findall(r"`(\w+)`", row[0])} == set(shipped_names())


def test_the_policy_that_is_shown_is_the_one_that_ships() -> None:
    (shown,) = re.findall(r"^```yaml\n(version: 2\n.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert (SHIPPED / "chat.yaml").read_text(encoding="utf-8").endswith(shown)


@pytest.mark.parametrize("page", ["guardrails.md", "guardrail-verbs.md"])
def test_examples_have_the_version_of_the_policy_that_ships(page: str) -> None:
    said = re.findall(r"\b[0-9a-f]{12}\b", (DOCS / page).read_text(encoding="utf-8"))
    assert said == [shipped_policy("chat").version_hash]
