"""The tables of docs/annotations.md, out of the code that reads and writes annotations."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aim_guardrail.settings import GuardrailSettings
from aim_kserve.settings import ANNOTATION_PREFIX, ServerSettings, annotation_of
from aim_operator import admission
from aim_operator.admission.annotated import POLICY, RULES
from aim_operator.finetuning.objects import DIGEST, GENERATION, JOB_LABEL
from aim_operator.notes import DEFAULTS, GUARDRAIL, PLACES
from aim_operator.partitions.seen import HELD_BY, WAS_CORDONED
from aim_profile.kubernetes.isolation import ENTRY
from aim_runtime.settings import RuntimeSettings

PROCESSES: tuple[tuple[str, type[ServerSettings]], ...] = (
    ("runtime", RuntimeSettings),
    ("guardrail", GuardrailSettings),
)
#: What a setting's schema does not say: it is read out of text.
_READ_FROM_TEXT = {"memory-limit": "memory with a unit, `40GB` or `40GiB`", "policy": "name, file or directory"}


def read_by_processes() -> str:
    """A row for each annotation that a process of ours reads."""
    head = "| `aim.amd.com/…` | value | default | read by | says |\n|---|---|---|---|---|\n"
    return head + "".join(_rows())


def written_by_the_operator() -> str:
    rows = [
        (f"`{DEFAULTS}`", "InferenceService", "what was filled in, as JSON; made anew at each change"),
        (
            f"`{GUARDRAIL}`",
            "InferenceService",
            "`injected`: the guardrail's container is the operator's to take out again",
        ),
        (_code(*PLACES), "InferenceService", "where its replicas are ([PartitionPlan](operator.md#partitionplan))"),
        (_code(HELD_BY, WAS_CORDONED), "Node", "the plan that is switching it, and whether it was cordoned before"),
        (_code(DIGEST, GENERATION), "RayJob", "the FineTuningJob that it is of, and as of which edit"),
        (f"label `{JOB_LABEL}`", "RayJob, its pods", "the FineTuningJob that they are of"),
        ("`operator.aim.amd.com/…`", "all of our kinds", "what kopf remembers of an object between two events"),
        (
            *(f'label `{label}: "{value}"`' for label, value in ENTRY.items()),
            "pods, by whoever renders them",
            "clients may call it: a [tenant's NetworkPolicy](manifests.md#a-tenant) lets the Gateway in",
        ),
    ]
    head = "| annotation or label | on | says |\n|---|---|---|\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _code(*names: str) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _rows() -> Iterator[str]:
    completes = _completing()
    found = [
        (annotation, process, settings, name)
        for process, settings in PROCESSES
        for name, field in settings.model_fields.items()
        if (annotation := annotation_of(field))
    ]
    for annotation, process, settings, name in sorted(found, key=lambda row: row[0]):
        readers = [process]
        if name in completes:
            readers.append("webhook: completes")
        if ANNOTATION_PREFIX + annotation in (POLICY, RULES):
            readers.append("webhook: injects")
        field = settings.model_fields[name]
        value = _READ_FROM_TEXT.get(annotation) or _READ_FROM_TEXT.get(name) or _value(settings, name)
        says, _, default = str(field.description).partition("; default: ")
        default = default or (f"`{field.default}`" if field.default is not None else "none")
        also = "" if name == annotation.replace("-", "_") else f" (setting `{name}`)"
        cells = (f"`{annotation}`", value, default, ", ".join(readers), f"{says}{also}")
        yield f"| {' | '.join(cells)} |\n"


def _value(settings: type[ServerSettings], name: str) -> str:
    """What may be given, by the setting's own schema."""
    schema = settings.model_json_schema()["properties"][name]
    shapes = [shape for shape in schema.get("anyOf", [schema]) if shape.get("type") != "null"]
    return " or ".join(_shape(shape) for shape in shapes)


def _shape(shape: dict[str, Any]) -> str:
    if "enum" in shape:
        return ", ".join(f"`{value}`" for value in shape["enum"])
    words = {"integer": "whole number", "number": "number", "string": "text"}[shape["type"]]
    bounds = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))
    return " ".join([words, *(f"{word} {shape[key]:g}" for key, word in bounds if key in shape)])


def _completing() -> set[str]:
    """Settings that the mutating webhook looks at (``told.NAME``) to complete a service."""
    folder = Path(admission.__file__).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "told"}
