"""The job as a CustomResourceDefinition, made from the models that check it.

An API server takes *structural* schemas only: every node typed, nothing shared by reference, no unions. Defaults are
told in descriptions and filled in by the trainer alone: some depend on other fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .job import API_VERSION, FineTuningJob

Schema = dict[str, Any]

#: What is kept as it is.
_SAME = ("type", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum")

#: Contradictions a cluster can refuse by itself, by the mapping they stand in. CEL's core language alone.
_RULES: dict[str, list[tuple[str, str]]] = {
    "Spec": [
        (
            "!has(self.quantization) || (has(self.method) && self.method == 'qlora')",
            "quantization is of method qlora",
        ),
        (
            "!has(self.method) || self.method != 'qlora' || !has(self.distributed) || "
            "!has(self.distributed.strategy) || self.distributed.strategy != 'fsdp2'",
            "fsdp2 shards no quantized weights: use ddp, or method lora",
        ),
        (
            "!has(self.distributed) || !has(self.distributed.strategy) || self.distributed.strategy != 'fsdp2' || "
            "(has(self.distributed.workers) && self.distributed.workers > 1)",
            "fsdp2 shards over workers: use ddp, or more workers",
        ),
        (
            "!has(self.method) || self.method != 'full' || !has(self.output) || !has(self.output.format) || "
            "self.output.format != 'adapter'",
            "full tuning makes no adapter",
        ),
        (
            "(has(self.template) && self.template == 'classification') == "
            "(has(self.dataset.labels) && size(self.dataset.labels) > 1)",
            "dataset.labels, two or more, are of template classification, which needs them",
        ),
        (
            "!has(self.template) || self.template != 'classification' || !has(self.dataset.packing) || "
            "!self.dataset.packing",
            "a classification judges whole rows: they are not packed",
        ),
        (
            "!has(self.suspend) || !self.suspend || !has(self.resources) || !has(self.resources.queue)",
            "Kueue owns suspend where resources.queue is given",
        ),
    ],
    "Dataset": [
        (
            "(has(self.source) && self.source != '') != (has(self.sources) && size(self.sources) > 0)",
            "give source, or sources with several of them",
        )
    ],
    "Hyperparameters": [
        (
            "!has(self.batchSize) || (type(self.batchSize) == int ? self.batchSize >= 1 && self.batchSize <= 65536 "
            ": self.batchSize == 'auto')",
            "batchSize is 1 to 65536, or auto",
        )
    ],
    "Gate": [
        (
            "has(self.min) || has(self.max) || has(self.minDelta) || has(self.maxDelta)",
            "a gate needs min, max, minDelta or maxDelta",
        )
    ],
    "Span": [("self.min < self.max", "min must be below max")],
    "SearchSpace": [
        (
            "[has(self.uniform), has(self.logUniform), has(self.categorical)].filter(given, given).size() == 1",
            "give one of uniform, logUniform and categorical",
        )
    ],
}


def structural_schema() -> Schema:
    """`spec.versions[].schema.openAPIV3Schema` of the CRD: apiVersion, kind, metadata, spec and status."""
    raw = FineTuningJob.model_json_schema(by_alias=True)
    spec = _structural(raw["properties"]["spec"], raw["$defs"])
    return {
        "type": "object",
        "description": "A model is tuned on rows, judged, and published with its serving profile.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": _STATUS,
        },
        # KubeRay appends to the name.
        "x-kubernetes-validations": [
            {"rule": "size(self.metadata.name) <= 47", "message": "metadata.name: at most 47 characters"},
            {
                "rule": "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "message": "metadata.name: a letter first, then letters, digits and dashes",
            },
        ],
    }


def custom_resource_definition() -> Schema:
    """The whole object, for `kubectl apply --server-side`."""
    group, _, version = API_VERSION.partition("/")
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"finetuningjobs.{group}"},
        "spec": {
            "group": group,
            "names": {
                "kind": "FineTuningJob",
                "listKind": "FineTuningJobList",
                "plural": "finetuningjobs",
                "singular": "finetuningjob",
                "shortNames": ["ftj"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": _COLUMNS,
                    "schema": {"openAPIV3Schema": structural_schema()},
                }
            ],
        },
    }


def _structural(node: Mapping[str, Any], defs: Mapping[str, Any]) -> Schema:
    """One node, with all that it refers to written out in it."""
    rules: list[tuple[str, str]] = []
    if "$ref" in node:
        named = node["$ref"].rpartition("/")[2]
        rules = _RULES.get(named, [])
        node = {**defs[named], **{key: value for key, value in node.items() if key != "$ref"}}
    if "anyOf" in node:
        return _union(node, defs)
    made: Schema = {key: node[key] for key in _SAME if key in node}
    if text := _description(node):
        made["description"] = text
    if "const" in node:
        made["enum"] = [node["const"]]
    made |= _open_bounds(node) | _inside(node, defs)
    if rules:
        made["x-kubernetes-validations"] = [{"rule": rule, "message": message} for rule, message in rules]
    return made


def _inside(node: Mapping[str, Any], defs: Mapping[str, Any]) -> Schema:
    made: Schema = {}
    if "items" in node:
        made["items"] = _structural(node["items"], defs)
    if "properties" in node:
        made["properties"] = {key: _structural(child, defs) for key, child in node["properties"].items()}
        made |= {"required": node["required"]} if node.get("required") else {}
    elif isinstance(node.get("additionalProperties"), Mapping):
        made["additionalProperties"] = _structural(node["additionalProperties"], defs)
    return made


def _union(node: Mapping[str, Any], defs: Mapping[str, Any]) -> Schema:
    """`X | None` is nullable; a number or a word is Kubernetes' int-or-string; other scalars are left open."""
    kinds = [kind for kind in node["anyOf"] if kind.get("type") != "null"]
    nullable = {"nullable": True} if len(kinds) < len(node["anyOf"]) else {}
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    if len(kinds) == 1:
        return _structural({**kinds[0], **rest}, defs) | nullable
    described = {"description": text} if (text := _description(rest)) else {}
    types = {kind.get("type") for kind in kinds}
    if types == {"integer", "string"}:
        return {"x-kubernetes-int-or-string": True} | described | nullable
    return {"x-kubernetes-preserve-unknown-fields": True} | described | nullable


def _open_bounds(node: Mapping[str, Any]) -> Schema:
    """OpenAPI 3.0 says of a bound that it is exclusive; JSON Schema has bounds of their own for that."""
    made: Schema = {}
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in node:
            made |= {bound: node[exclusive], exclusive: True}
    return made


def _description(node: Mapping[str, Any]) -> str:
    told = " ".join(str(node.get("description", "")).split())
    default = node.get("default")
    if default is None or isinstance(default, dict) or default == []:
        return told
    word = f"Default: {str(default).lower() if isinstance(default, bool) else default}."
    return f"{told}{'.' if told and not told.endswith('.') else ''} {word}".strip()


#: Of Kubeflow Trainer's TrainJob: conditions, and trainerStatus as its runtimes report it.
_STATUS: Schema = {
    "type": "object",
    "properties": {
        "conditions": {
            "type": "array",
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
            "items": {
                "type": "object",
                "required": ["type", "status", "lastTransitionTime", "reason", "message"],
                "properties": {
                    "type": {"type": "string", "maxLength": 316},
                    "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                    "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
                    "lastTransitionTime": {"type": "string", "format": "date-time"},
                    "reason": {"type": "string", "minLength": 1, "maxLength": 1024},
                    "message": {"type": "string", "maxLength": 32768},
                },
            },
        },
        "trainerStatus": {
            "type": "object",
            "description": "How far it is, as the trainer last told.",
            "properties": {
                "progressPercentage": {"type": "integer", "format": "int32", "minimum": 0, "maximum": 100},
                "estimatedRemainingSeconds": {"type": "integer", "format": "int32", "minimum": 0},
                "metrics": {
                    "type": "array",
                    "maxItems": 256,
                    "items": {
                        "type": "object",
                        "required": ["name", "value"],
                        "properties": {
                            "name": {"type": "string", "minLength": 1, "maxLength": 64},
                            "value": {"type": "string", "minLength": 1, "maxLength": 64},
                        },
                    },
                },
                "lastUpdatedTime": {"type": "string", "format": "date-time"},
            },
        },
        "rayJob": {"type": "string", "description": "The RayJob that carries it out."},
        "published": {"type": "string", "description": "Where the result is, once it passed its gates."},
    },
}

_COLUMNS = [
    {"name": "Model", "type": "string", "jsonPath": ".spec.baseModel.modelId"},
    {"name": "Method", "type": "string", "jsonPath": ".spec.method"},
    {"name": "State", "type": "string", "jsonPath": ".status.conditions[-1:].type"},
    {"name": "Progress", "type": "integer", "jsonPath": ".status.trainerStatus.progressPercentage"},
    {
        "name": "Seconds Left",
        "type": "integer",
        "jsonPath": ".status.trainerStatus.estimatedRemainingSeconds",
        "priority": 1,
    },
    {"name": "Published", "type": "string", "jsonPath": ".status.published", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]
