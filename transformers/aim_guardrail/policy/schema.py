"""The format as a JSON Schema, for editors: of each family its options and its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from aim_guardrail.detectors.families import FAMILIES, Family, Options
from aim_guardrail.policy.policy import DEFAULT, Policy, Rule

Schema = dict[str, Any]


def policy_schema() -> Schema:
    """What a policy file may hold, in JSON Schema 2020-12. It allows more than the reader, who also asks what goes
    together; it refuses nothing that can be read.
    """
    options = dict.fromkeys(family.options for family in FAMILIES.values())
    models: list[type[BaseModel]] = [Policy, Rule, *options]
    named, schema = models_json_schema([(model, "validation") for model in models])
    definitions = schema["$defs"]
    rule = definitions[_name(named[Rule, "validation"])]
    rule["properties"]["type"]["enum"] = list(FAMILIES)
    rule["properties"]["options"] = {"title": "Options"}
    rule["allOf"] = [_of_family(family, named[family.options, "validation"]) for family in FAMILIES.values()]
    policy: Schema = definitions.pop(_name(named[Policy, "validation"]))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **policy, "$defs": definitions}


def _name(reference: Mapping[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _of_family(family: Family, options: Mapping[str, Any]) -> Schema:
    """What a rule of that type may hold; `options`: a reference to theirs."""
    labels = list(family.labels)
    properties: Schema = {"options": {"anyOf": [options, {"type": "null"}]}}
    if family.named is None:
        properties["entities"] = {"items": {"enum": labels}}
        properties["action"] = {"propertyNames": {"enum": [*labels, DEFAULT]}}
        properties["threshold"] = {"propertyNames": {"enum": labels}}
    elif labels:  # beside those that options add
        properties["entities"] = {"items": {"anyOf": [{"enum": labels}, {"type": "string"}]}}
    then: Schema = {"properties": properties}
    if _needs_options(family.options):
        then["required"] = ["options"]
    return {"if": {"properties": {"type": {"const": family.name}}, "required": ["type"]}, "then": then}


def _needs_options(options: type[Options]) -> bool:
    return any(field.is_required() for field in options.model_fields.values())
