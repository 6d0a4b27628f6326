"""KServe's own CustomResourceDefinitions, where they are at hand: `$KSERVE_CRDS`, else a folder `crds` beside ours.

They are not ours to ship. Files are CRDs as JSON, from KServe's repository: config/crd/full.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

ROOT = Path(__file__).parent.parent.parent
FOLDERS = [Path(os.environ["KSERVE_CRDS"])] if "KSERVE_CRDS" in os.environ else sorted(ROOT.parent.glob("*/crds"))
CRDS = {
    crd["spec"]["names"]["kind"]: crd
    for folder in FOLDERS
    for file in folder.glob("serving.kserve.io_*.json")
    for crd in [json.loads(file.read_text(encoding="utf-8"))]
}


def closed(schema: Any) -> Any:
    """OpenAPI as JSON Schema: objects closed (a server would drop what it does not know), int-or-string allowed."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if (
        "properties" in schema
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        found["additionalProperties"] = False
    return found


@cache
def validator(kind: str, version: str) -> jsonschema.Draft202012Validator:
    versions = CRDS[kind]["spec"]["versions"]
    (schema,) = [found["schema"]["openAPIV3Schema"] for found in versions if found["name"] == version]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return jsonschema.Draft202012Validator(closed(schema))


def violations(document: dict[str, Any]) -> list[str]:
    """What a server with these definitions would refuse or drop."""
    found = validator(document["kind"], document["apiVersion"].rpartition("/")[2])
    return [error.message for error in found.iter_errors(document)]
