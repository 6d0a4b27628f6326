"""`kubectl get` as the server prints it: a CustomResourceDefinition's printer columns, else name and age."""

from __future__ import annotations

import re
from typing import Any

from aiohttp import web

from .kinds import Kind

_STEP = re.compile(
    r"\.(?P<key>[\w-]+(?:\\\.[\w-]+)*)|\[\?\(@\.(?P<of>\w+)\s*==\s*[\"'](?P<is>[^\"']*)[\"']\)\]|\[(?P<at>-?\d+:?|\*)\]|\['(?P<quoted>[^']+)'\]"
)


def as_table(kind: Kind, items: list[dict[str, Any]], request: web.Request) -> dict[str, Any] | None:
    """A Table, where the request would rather have one; None: it would not."""
    if "as=Table" not in request.headers.get("Accept", ""):
        return None
    columns = list(kind.columns) or [{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]
    definitions = [{"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}] + [
        {
            "name": each["name"],
            "type": each["type"],
            "format": "",
            "description": "",
            "priority": each.get("priority", 0),
        }
        for each in columns
    ]
    rows = [
        {
            "cells": [item["metadata"]["name"], *(cell(item, each) for each in columns)],
            "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]},
        }
        for item in items
    ]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {},
        "columnDefinitions": definitions,
        "rows": rows,
    }


def cell(item: dict[str, Any], column: dict[str, Any]) -> Any:
    """What stands in a column: the first value at its jsonPath, as text; of the last step `[*]` or a filter, all."""
    found = values(item, column["jsonPath"])
    if not found:
        return None
    return (
        found[0]
        if len(found) == 1 and column["type"] in ("integer", "number", "boolean")
        else ",".join(map(_text, found))
    )


def values(item: dict[str, Any], path: str) -> list[Any]:
    """Values at a path of JSONPath as columns use it: keys, indexes, `[*]`, `[-1:]`, `[?(@.key=="value")]`."""
    found: list[Any] = [item]
    for step in _STEP.finditer(path):
        found = [value for each in found for value in _next(each, step) if value is not None]
    return found


def _next(value: Any, step: re.Match[str]) -> list[Any]:
    if key := step["key"] or step["quoted"]:
        return [value.get(key.replace("\\.", "."))] if isinstance(value, dict) else []
    listed = value if isinstance(value, list) else []
    if step["of"]:
        return [each for each in listed if each.get(step["of"]) == step["is"]]
    if step["at"].endswith(":"):
        return listed[int(step["at"][:-1]) :]
    return listed if step["at"] == "*" else listed[int(step["at"]) : int(step["at"]) + 1]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
