"""The PartitionPlan as a CustomResourceDefinition: `spec.plan` is the file that `aim-profile plan` writes."""

from __future__ import annotations

from typing import Any

from aim_profile.kubernetes import definition
from aim_profile.kubernetes.structural import Rules, Schema, structural, validations
from aim_profile.plans.plan import Plan

from .status import NodeStatus, PlaceStatus

_KIND = definition.Kind("PartitionPlan", "partitionplans", "pplan", scope="Cluster")

_RULES: Rules = {
    "Placement": [
        (
            "self.tp == (size(self.cards) > 1 ? size(self.cards) : size(self.partitions))",
            "tp devices: partitions of one card, or several whole cards",
        )
    ],
}
#: Bounds on lists, which a server needs to know what a rule may cost.
_MOST = {"cards": 4096, "placements": 8192, "unplaced": 8192, "notes": 1024}


def custom_resource_definition() -> Schema:
    """The whole object, for `kubectl apply --server-side`."""
    named = validations([("size(self.metadata.name) <= 63", "metadata.name: at most 63 characters")])
    says = "Which partition mode each card of each node gets, and which replica stands on which device."
    return definition.custom_resource_definition(
        _KIND, definition.object_schema(says, _spec(), _status(), named), _COLUMNS
    )


def _spec() -> Schema:
    raw = Plan.model_json_schema(by_alias=True)
    plan = structural(raw, raw["$defs"], _RULES)
    plan["description"] = "As `aim-profile plan` writes it."
    for name, most in _MOST.items():
        plan["properties"][name]["maxItems"] = most
    plan["properties"]["cards"]["minItems"] = 1
    return {
        "type": "object",
        "required": ["plan"],
        "properties": {
            "plan": plan,
            "strategy": {
                "type": "string",
                "enum": ["mixed", "single"],
                "default": "mixed",
                "description": "The device plugin's resource naming strategy.",
            },
            "stepTimeoutSeconds": {
                "type": "integer",
                "minimum": 1,
                "maximum": 86400,
                "default": 1800,
                "description": "What one phase of a node may take; the Device Config Manager tries for 30 minutes.",
            },
            "backoffLimit": {
                "type": "integer",
                "minimum": 0,
                "maximum": 20,
                "default": 3,
                "description": "How often a node is tried again; the pause doubles, from 30 s to 10 minutes.",
            },
            "suspend": {
                "type": "boolean",
                "default": False,
                "description": "No further node is begun; the one under way goes to its end.",
            },
        },
        "x-kubernetes-validations": validations(
            [("self.strategy == oldSelf.strategy", "strategy is the device plugin's: delete the plan to change it")]
        ),
    }


def _status() -> Schema:
    nodes, places = NodeStatus.model_json_schema(by_alias=True), PlaceStatus.model_json_schema(by_alias=True)
    return {
        "type": "object",
        "properties": {
            "observedGeneration": {"type": "integer", "format": "int64"},
            "phase": {"type": "string"},
            "message": {"type": "string"},
            "progress": {"type": "string", "description": "How many nodes are as planned: 2/3."},
            "current": {"type": "string", "description": "The node that is under way, and its phase."},
            "places": {"type": "string", "description": "Where each service is: service=node/card/partition."},
            "drift": {"type": "string", "description": "What is not as planned any more; none where all is."},
            "conditions": definition.CONDITIONS,
            "nodes": _listed(nodes, ["name"]),
            "services": _listed(places, ["replica"]),
        },
    }


def _listed(model: dict[str, Any], keys: list[str]) -> Schema:
    item = structural(model, model.get("$defs", {}))
    item["required"] = [*keys]
    return {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": keys, "items": item}


_COLUMNS: list[Schema] = [
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {"name": "Nodes", "type": "string", "jsonPath": ".status.progress"},
    {"name": "Current", "type": "string", "jsonPath": ".status.current"},
    {
        "name": "Service=Node/Card/Partition",
        "type": "string",
        "jsonPath": ".status.places",
        "description": "Where each InferenceService is.",
    },
    {"name": "Drift", "type": "string", "jsonPath": ".status.drift"},
    {"name": "Message", "type": "string", "jsonPath": ".status.message", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]
