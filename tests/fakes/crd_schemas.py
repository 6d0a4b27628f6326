"""What an API server would refuse of an object, or drop from it: the real CustomResourceDefinitions, closed, with their
CEL rules; kinds of Kubernetes' own by kubernetes-validate.

The definitions are not ours to ship: they are JSON files in `$KSERVE_CRDS`, else in a folder `crds` beside ours. A rule
that compares with what was there before (`oldSelf`) says nothing of a new object.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cel
import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parent.parent.parent
FOLDERS = [Path(os.environ["KSERVE_CRDS"])] if "KSERVE_CRDS" in os.environ else sorted(ROOT.parent.glob("*/crds"))
OURS = ROOT / "manifests/crds"
KUBERNETES = "1.37"
Object = dict[str, Any]


def _definitions() -> Iterator[Object]:
    for folder in FOLDERS:
        for file in sorted(folder.glob("*.json")):
            yield json.loads(file.read_text(encoding="utf-8"))


def _schemas(definitions: Iterator[Object]) -> dict[tuple[str, str], Object]:
    versions = ((crd["spec"], version) for crd in definitions for version in crd["spec"]["versions"])
    return {
        (f"{spec['group']}/{version['name']}", spec["names"]["kind"]): version["schema"]["openAPIV3Schema"]
        for spec, version in versions
    }


#: Others' definitions, by apiVersion and kind; empty: they are not at hand.
CRDS = _schemas(_definitions())


@cache
def _own() -> dict[tuple[str, str], Object]:
    files = sorted(OURS.glob("*.yaml"))
    found = [each for file in files for each in yaml.safe_load_all(file.read_text(encoding="utf-8"))]
    return _schemas(each for each in found if each and each["kind"] == "CustomResourceDefinition")


def closed(schema: Any) -> Any:
    """OpenAPI as JSON Schema: objects closed, int-or-string and nullable allowed."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if (
        "properties" in schema
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        found["additionalProperties"] = False
    return {"anyOf": [found, {"type": "null"}]} if schema.get("nullable") is True else found


@cache
def _schema(api_version: str, kind: str) -> Object | None:
    found = CRDS.get((api_version, kind)) or _own().get((api_version, kind))
    if found is None:
        return None
    metadata = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {**found, "properties": {**found["properties"], "metadata": metadata}}


@cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(closed(_schema(api_version, kind)))


def violations(document: Object) -> list[str]:
    """A line for each thing that a server would refuse or drop; a kind that nobody here knows is one, too."""
    api_version, kind = document["apiVersion"], document["kind"]
    schema = _schema(api_version, kind)
    if schema is None:
        return _builtin(document)
    errors = _validator(api_version, kind).iter_errors(document)
    found = [f"{error.json_path}: {error.message}" for error in errors]
    return found or list(broken_rules(schema, with_defaults(schema, document), "$"))


def _builtin(document: Object) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"no schema at hand: {document['apiVersion']} {document['kind']}"]
    return []


def with_defaults(schema: Object, value: Any) -> Any:
    """The value as the server keeps it: rules see what defaults put in."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {key: with_defaults(_below(schema, key), each) for key, each in value.items()}
    for key, each in schema.get("properties", {}).items():
        if key not in found and "default" in each:
            found[key] = with_defaults(each, each["default"])
    return found


def _below(schema: Object, key: str) -> Object:
    more = schema.get("additionalProperties")
    found: Object = schema.get("properties", {}).get(key) or (more if isinstance(more, dict) else {})
    return found


@cache
def _program(rule: str) -> Any:
    return cel.compile(rule)


def broken_rules(schema: Object, value: Any, path: str) -> Iterator[str]:
    """Messages of CEL rules that do not hold, each with where."""
    for each in schema.get("x-kubernetes-validations", []) if value is not None else []:
        if "oldSelf" not in each["rule"] and _program(each["rule"]).execute({"self": value}) is not True:
            yield f"{path}: {each.get('message') or each['rule']}"
    if isinstance(value, list):
        for at, item in enumerate(value):
            yield from broken_rules(schema.get("items", {}), item, f"{path}[{at}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from broken_rules(_below(schema, key), item, f"{path}.{key}")
