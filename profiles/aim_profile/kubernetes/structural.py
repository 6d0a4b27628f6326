"""JSON Schema as pydantic writes it, as an API server takes it: every node typed, nothing by reference, no unions.

Defaults are told in descriptions and filled in by whoever reads the object: some depend on other fields.
Source: Kubernetes' documentation of CustomResourceDefinitions, "Specifying a structural schema".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]
#: By the name of a definition: CEL rules (the core language alone) and what is said where one does not hold.
Rules = Mapping[str, Sequence[tuple[str, str]]]

_SAME = ("type", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum")


def structural(node: Mapping[str, Any], defs: Mapping[str, Any], rules: Rules | None = None) -> Schema:
    """One node of a JSON Schema, with all that it refers to in `defs` written out in it."""
    held: Sequence[tuple[str, str]] = ()
    if "$ref" in node:
        named = node["$ref"].rpartition("/")[2]
        held = (rules or {}).get(named, ())
        node = {**defs[named], **{key: value for key, value in node.items() if key != "$ref"}}
    if "anyOf" in node:
        return _union(node, defs, rules)
    made: Schema = {key: node[key] for key in _SAME if key in node}
    if text := _description(node):
        made["description"] = text
    if "const" in node:
        made["enum"] = [node["const"]]
    made |= _open_bounds(node) | _inside(node, defs, rules)
    if held:
        made["x-kubernetes-validations"] = validations(held)
    return made


def validations(rules: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """`x-kubernetes-validations` of rules and their messages."""
    return [{"rule": rule, "message": message} for rule, message in rules]


def _inside(node: Mapping[str, Any], defs: Mapping[str, Any], rules: Rules | None) -> Schema:
    made: Schema = {}
    if "items" in node:
        made["items"] = structural(node["items"], defs, rules)
    if "properties" in node:
        made["properties"] = {key: structural(child, defs, rules) for key, child in node["properties"].items()}
        made |= {"required": node["required"]} if node.get("required") else {}
    elif isinstance(node.get("additionalProperties"), Mapping):
        made["additionalProperties"] = structural(node["additionalProperties"], defs, rules)
    return made


def _union(node: Mapping[str, Any], defs: Mapping[str, Any], rules: Rules | None) -> Schema:
    """`X | None` is nullable; a number or a word is Kubernetes' int-or-string; words or words are all of them; other
    scalars are left open.
    """
    kinds = [kind for kind in node["anyOf"] if kind.get("type") != "null"]
    nullable = {"nullable": True} if len(kinds) < len(node["anyOf"]) else {}
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    if len(kinds) == 1:
        return structural({**kinds[0], **rest}, defs, rules) | nullable
    described = {"description": text} if (text := _description(rest)) else {}
    types = {kind.get("type") for kind in kinds}
    if words := _words(kinds):
        return {"type": "string", "enum": words} | described | nullable
    if types == {"integer", "string"}:
        return {"x-kubernetes-int-or-string": True} | described | nullable
    return {"x-kubernetes-preserve-unknown-fields": True} | described | nullable


def _words(kinds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The words of a union of enumerations, empty where it is none."""
    each = [kind.get("enum", [kind["const"]] if "const" in kind else []) for kind in kinds]
    if not all(each) or {kind.get("type") for kind in kinds} != {"string"}:
        return []
    return [word for words in each for word in words]


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
