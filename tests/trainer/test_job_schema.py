"""The CRD: structural as an API server wants it, and true to what the models take and refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from aim_trainer.job.read import read_job
from aim_trainer.job.schema import custom_resource_definition, structural_schema

ROOT = Path(__file__).parent.parent.parent
JOBS = [
    *(file for file in (ROOT / "docs/samples").rglob("*.yaml") if "kind: FineTuningJob" in file.read_text()),
    *(ROOT / "trainers/aim_trainer/job/templates").glob("*.yaml"),
]

#: What may stand in a structural schema, and what it uses of it.
ALLOWED = {
    "oneOf",
    *("type", "description", "properties", "required", "items", "additionalProperties", "nullable", "enum", "pattern"),
    *("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("format", "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
}


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for key, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}.{key}")


def open_api(schema: dict[str, Any]) -> dict[str, Any]:
    """The same for jsonschema: nullable and exclusive bounds in its words, unknown keys refused."""
    made = {key: value for key, value in schema.items() if key not in ("exclusiveMinimum", "exclusiveMaximum")}
    for bound in ("Minimum", "Maximum"):
        if schema.get(f"exclusive{bound}"):
            made[f"exclusive{bound}"] = made.pop(bound.lower())
    if "properties" in schema:
        made["properties"] = {key: open_api(child) for key, child in schema["properties"].items()}
        made["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if key in schema:
            made[key] = open_api(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if schema.get("nullable"):
        return {"anyOf": [{"type": "null"}, made]}
    return made


def test_the_schema_is_structural() -> None:
    found = list(nodes(structural_schema()))
    assert len(found) > 100
    for path, node in found:
        assert set(node) <= ALLOWED, path
        untyped = node.get("x-kubernetes-int-or-string") or node.get("x-kubernetes-preserve-unknown-fields")
        assert ("type" in node) != bool(untyped), path
        assert node.get("type", "string") in ("object", "array", "string", "integer", "number", "boolean"), path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert (node.get("type") == "array") == ("items" in node), path
        assert all(isinstance(node.get(f"exclusive{bound}", True), bool) for bound in ("Minimum", "Maximum")), path
        assert set(node.get("required", ())) <= set(node.get("properties", {})), path


def test_only_metadata_names_are_looked_at_by_the_root() -> None:
    """A structural schema says nothing of metadata but that it is an object."""
    assert structural_schema()["properties"]["metadata"] == {"type": "object"}


def test_fields_are_described() -> None:
    spec = structural_schema()["properties"]["spec"]["properties"]
    assert spec["hyperparameters"]["properties"]["warmup"]["description"] == (
        "below 1 a share of all steps, else steps. Default: 0.03."
    )


def test_rules_speak_of_fields_there_are() -> None:
    ruled = 0
    for path, node in nodes(structural_schema()):
        for rule in node.get("x-kubernetes-validations", ()):
            ruled += 1
            for name in re.findall(r"self\.((?:\w+\.)*\w+)\b(?!\()", rule["rule"]):
                here: dict[str, Any] = node
                if name.startswith("metadata."):
                    continue
                for part in name.split("."):
                    assert part in here["properties"], (path, name)
                    here = here["properties"][part]
    assert ruled > 10


def test_lists_that_rules_look_through_are_bounded() -> None:
    """A server refuses rules whose cost it cannot bound."""
    for path, node in nodes(structural_schema()):
        if node.get("type") == "array" and any(
            "x-kubernetes-validations" in child for _, child in nodes(node["items"])
        ):
            assert "maxItems" in node, path


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_shipped_jobs_are_valid(file: Path) -> None:
    read_job(file)
    jsonschema.Draft202012Validator(open_api(structural_schema())).validate(yaml.safe_load(file.read_text()))


def test_there_are_shipped_jobs() -> None:
    assert len(JOBS) > 4


BASE: dict[str, Any] = {"spec": {"baseModel": {"modelId": "a/b"}, "dataset": {"source": "x.jsonl"}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hyperparameters", {"learningRate": 0}),
        ("hyperparameters", {"loraRank": 513}),
        ("hyperparameters", {"batchSize": 1.5}),
        ("hyperparameters", {"doRA": True}),
        ("hyperparameters", {"modulesToSave": ["lm_head"]}),
        ("hyperparameters", {"bias": "all"}),
        ("hyperparameters", {"learningRat": 1}),
        ("method", "dora"),
        ("method", None),
        ("resources", {"memory": "16 gigs"}),
        ("search", {"parameters": []}),
        ("dataset", {"source": "x", "packing": "yes"}),
    ],
)
def test_what_the_models_refuse_the_server_refuses(field: str, value: Any) -> None:
    check = jsonschema.Draft202012Validator(open_api(structural_schema()))
    check.validate(BASE)
    with pytest.raises(jsonschema.ValidationError):
        check.validate({"spec": {**BASE["spec"], field: value}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hyperparameters", {"batchSize": "auto", "maxSteps": None}),
        ("hyperparameters", {"batchSize": 4, "learningRate": 1}),
        ("search", {"parameters": [{"name": "x", "searchSpace": {"categorical": [1, 0.5, "a", True]}}]}),
        ("dataset", {"source": "x", "columns": {"prompt": "question"}}),
    ],
)
def test_what_the_models_take_the_server_takes(field: str, value: Any) -> None:
    check = jsonschema.Draft202012Validator(open_api(structural_schema()))
    check.validate({"spec": {**BASE["spec"], field: value}})


def test_the_definition_names_itself() -> None:
    made = custom_resource_definition()
    (version,) = made["spec"]["versions"]
    assert made["metadata"]["name"] == f"{made['spec']['names']['plural']}.{made['spec']['group']}"
    assert (version["name"], version["subresources"]) == ("v1alpha1", {"status": {}})
    assert {column["name"] for column in version["additionalPrinterColumns"]} >= {"Model", "State", "Progress", "Age"}
