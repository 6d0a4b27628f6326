"""The job as a CustomResourceDefinition, made from the models that check it.

Defaults are told in descriptions and filled in by the trainer alone: some depend on other fields.
"""

from __future__ import annotations

from aim_profile.kubernetes import definition
from aim_profile.kubernetes.structural import Schema, structural, validations

from .job import FineTuningJob

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
            "!self.baseModel.modelId.endsWith('.gguf') || !has(self.output) || !has(self.output.format) || "
            "self.output.format != 'adapter'",
            "vLLM takes no GGUF file as the base of an adapter: write merged",
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
}
#: Of which a search space has one. Not a rule of CEL's, whose types have no list of what may be anything.
_SPACES = ("uniform", "logUniform", "categorical")


def structural_schema() -> Schema:
    """`spec.versions[].schema.openAPIV3Schema` of the CRD: apiVersion, kind, metadata, spec and status."""
    raw = FineTuningJob.model_json_schema(by_alias=True)
    spec = structural(raw["properties"]["spec"], raw["$defs"], _RULES)
    parameter = spec["properties"]["search"]["properties"]["parameters"]["items"]
    parameter["properties"]["searchSpace"]["oneOf"] = [{"required": [each]} for each in _SPACES]
    # KubeRay appends to the name.
    named = validations(
        [
            ("size(self.metadata.name) <= 47", "metadata.name: at most 47 characters"),
            (
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "metadata.name: a letter first, then letters, digits and dashes",
            ),
        ]
    )
    says = "A model is tuned on rows, judged, and published with its serving profile."
    return definition.object_schema(says, spec, _STATUS, named)


def custom_resource_definition() -> Schema:
    """The whole object, for `kubectl apply --server-side`."""
    kind = definition.Kind("FineTuningJob", "finetuningjobs", "ftj")
    return definition.custom_resource_definition(kind, structural_schema(), _COLUMNS)


#: Of Kubeflow Trainer's TrainJob: conditions, and trainerStatus as its runtimes report it.
_STATUS: Schema = {
    "type": "object",
    "properties": {
        "conditions": definition.CONDITIONS,
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


def _metric(name: str) -> str:
    return f'.status.trainerStatus.metrics[?(@.name=="{name}")].value'


_COLUMNS: list[Schema] = [
    {"name": "Model", "type": "string", "jsonPath": ".spec.baseModel.modelId"},
    {"name": "Method", "type": "string", "jsonPath": ".spec.method"},
    {"name": "State", "type": "string", "jsonPath": ".status.conditions[-1:].type"},
    {"name": "Progress", "type": "integer", "jsonPath": ".status.trainerStatus.progressPercentage"},
    {"name": "Step", "type": "string", "jsonPath": _metric("currentStep")},
    {"name": "Loss", "type": "string", "jsonPath": _metric("loss")},
    {"name": "Seconds Left", "type": "integer", "jsonPath": ".status.trainerStatus.estimatedRemainingSeconds"},
    {"name": "Published", "type": "string", "jsonPath": ".status.published", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]
