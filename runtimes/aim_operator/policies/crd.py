"""The GuardrailPolicy as a CustomResourceDefinition: `spec` is a policy file, its format 2 and its name left out."""

from __future__ import annotations

from typing import Any

from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.policy import Policy, Rule, Stage
from aim_profile.kubernetes import definition
from aim_profile.kubernetes.structural import Schema, structural, validations

KIND, PLURAL = "GuardrailPolicy", "guardrailpolicies"
#: Bounds on lists, which a server needs to know what a rule may cost.
_MOST_ITEMS = 128
#: What a mapping or a single word may stand for: structural schemas know no such union.
_EITHER: Schema = {"x-kubernetes-preserve-unknown-fields": True}
_ITEM_RULES = [
    (
        "has(self.type) != (has(self.parallel) || has(self.sequential))",
        "give a rule (type, action), or a stage (parallel or sequential)",
    )
]
#: Not a rule of CEL's, whose types have no field that may be anything.
_ONE_OF_THEM = ("action", *Stage.model_fields)


def custom_resource_definition() -> Schema:
    """The whole object, for `kubectl apply --server-side`."""
    # The policy is called as the object is, in answers and metrics.
    named = validations(
        [
            (
                "size(self.metadata.name) <= 63 && self.metadata.name.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$')",
                "metadata.name: letters, digits and dashes, at most 63",
            )
        ]
    )
    says = "What is looked for in prompts and answers, and what happens then (docs/guardrails.md)."
    columns = [
        _column("Version", ".status.version", "of the policy's meaning, as answers name it"),
        _column("Valid", '.status.conditions[?(@.type=="Valid")].status', "whether it can be used"),
        _column("Pods", ".status.current", "how many of its pods run this version"),
        _column("Message", '.status.conditions[?(@.type=="Valid")].message', "what is wrong with it", 1),
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    ]
    kind = definition.Kind(KIND, PLURAL, "gpol")
    return definition.custom_resource_definition(
        kind, definition.object_schema(says, _spec(), _status(), named), columns
    )


def _column(name: str, path: str, says: str, priority: int = 0) -> Schema:
    return {"name": name, "type": "string", "jsonPath": path, "description": says, "priority": priority}


def _spec() -> Schema:
    raw = Policy.model_json_schema()
    own = {key: value for key, value in raw["properties"].items() if key not in ("version", "name")}
    items = {key: own.pop(key) for key in ("prompt", "answer")}
    found: Schema = structural({"type": "object", "properties": own}, raw["$defs"])
    for key in items:
        found["properties"][key] = {"type": "array", "maxItems": _MOST_ITEMS, "items": _item()}
    return found


def _item() -> Schema:
    """A rule, or a stage of rules."""
    item = _rule()
    del item["required"]
    for order in Stage.model_fields:
        item["properties"][order] = {"type": "array", "maxItems": _MOST_ITEMS, "items": _rule()}
    item["anyOf"] = [{"required": [each]} for each in _ONE_OF_THEM]
    item["x-kubernetes-validations"] = validations(_ITEM_RULES)
    return item


def _rule() -> Schema:
    raw = Rule.model_json_schema()
    found = structural(raw, raw.get("$defs", {}))
    del found["description"]  # the class's own: it stands in docs/guardrails.md
    properties: dict[str, Any] = found["properties"]
    properties["type"]["enum"] = list(FAMILIES)
    properties |= {"action": dict(_EITHER), "threshold": dict(_EITHER)}
    # Each family's own; the webhook and the controller hold them against it.
    properties["options"] = {"type": "object", **_EITHER}
    found["required"] = ["type", "action"]
    return found


def _status() -> Schema:
    text: Schema = {"type": "string"}
    return {
        "type": "object",
        "properties": {
            "observedGeneration": {"type": "integer"},
            "version": text
            | {"description": "Of the newest valid spec; what `x-guardrail-policy` says behind the name."},
            "configMap": text | {"description": "Where it is kept, as the guardrails mount it."},
            "current": text | {"description": "2/3: so many of its pods run this version."},
            "pods": {
                "type": "array",
                "description": "The first of them, those that do not run this version before the others.",
                "items": {
                    "type": "object",
                    "required": ["name", "state"],
                    "properties": {
                        "name": text,
                        "service": text | {"description": "Its InferenceService."},
                        "version": text,
                        "state": text | {"enum": ["current", "stale", "unknown"]},
                        "message": text,
                    },
                },
            },
            "conditions": definition.CONDITIONS,
        },
    }
