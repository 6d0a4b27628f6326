"""Structural schemas, as CustomResourceDefinitions must have them: is one, defaults, pruning, validation, CEL rules.

https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import cel
import jsonschema

Schema = dict[str, Any]
_INT_OR_STRING = "x-kubernetes-int-or-string"
_OPEN = "x-kubernetes-preserve-unknown-fields"
_RULES = "x-kubernetes-validations"
#: What a server checks by itself, outside the schema.
_META = ("apiVersion", "kind", "metadata")
#: `self.a.b`, or `self.a.size(`.
_SELECTED = re.compile(r"\b(?:self|oldSelf)(?P<fields>(?:\.\w+)+)(?P<called>\()?")
_JUNCTORS = ("allOf", "anyOf", "oneOf")
_NOT_IN_JUNCTORS = ("type", "description", "title", "default", "additionalProperties", "nullable")
_NEVER = (
    "$ref",
    "definitions",
    "dependencies",
    "deprecated",
    "discriminator",
    "id",
    "patternProperties",
    "readOnly",
    "xml",
)


def problems(schema: Schema) -> list[str]:
    """Why a schema is not structural; empty: it is."""
    return list(_not_structural(schema, "openAPIV3Schema"))


def _not_structural(schema: Schema, path: str) -> Iterator[str]:
    if "type" not in schema and not schema.get(_INT_OR_STRING) and not schema.get(_OPEN):
        yield f"{path}.type: Required value: must not be empty for specified object fields"
    yield from (f"{path}.{key}: Forbidden: must not be used" for key in _NEVER if key in schema)
    if schema.get("uniqueItems"):
        yield f"{path}.uniqueItems: Forbidden: uniqueItems cannot be set to true"
    if schema.get("properties") and "additionalProperties" in schema:
        yield f"{path}.additionalProperties: Forbidden: mutually exclusive with properties"
    if schema.get("type") == "array" and "items" not in schema:
        yield f"{path}.items: Required value: must be specified"
    if not schema.get(_INT_OR_STRING):
        yield from _in_junctors(schema, path)
    for at, each in enumerate(schema.get(_RULES, ())):
        for field in _undefined_fields(schema, each["rule"]):
            yield f"{path}.{_RULES}[{at}].rule: Invalid value: compilation failed: undefined field '{field}'"
    for name, inner in _inner(schema):
        yield from _not_structural(inner, f"{path}.{name}")


def _in_junctors(schema: Schema, path: str) -> Iterator[str]:
    told = [*(each for key in _JUNCTORS for each in schema.get(key, ())), *([schema["not"]] if "not" in schema else ())]
    for each in told:
        yield from (
            f"{path}: Forbidden: {key} within allOf, anyOf, oneOf or not" for key in _NOT_IN_JUNCTORS if key in each
        )


def _undefined_fields(schema: Schema, rule: str) -> Iterator[str]:
    """Fields that a rule selects of self and CEL's types do not have: those that may be anything are none of them."""
    for match in _SELECTED.finditer(rule):
        names = match["fields"].split(".")[1:]
        at: Schema | None = {**schema, "properties": {**schema.get("properties", {})}}
        for name in names[:-1] if match["called"] else names:
            if name == "metadata" and at is not None and "metadata" in at["properties"]:
                break  # a server's own
            at = _selected(at or {}, name)
            if at is None:
                yield name
                break


def _selected(schema: Schema, name: str) -> Schema | None:
    """None: no such field."""
    found = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
    return found if isinstance(found, dict) and _is_typed(found) else None


def _is_typed(schema: Schema) -> bool:
    """Whether CEL has a type for it: a list of what may be anything has none either."""
    if schema.get("type") == "array":
        return _is_typed(schema["items"])
    return "type" in schema or bool(schema.get(_INT_OR_STRING))


def _inner(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for name, each in schema.get("properties", {}).items():
        yield f"properties[{name}]", each
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield key, schema[key]


def pruned_and_defaulted(schema: Schema, document: dict[str, Any]) -> dict[str, Any]:
    """The document as it is stored: defaults filled in, fields that the schema does not know dropped."""
    kept = {key: document[key] for key in _META if key in document}
    body = copy.deepcopy({key: value for key, value in document.items() if key not in _META})
    own = {name: each for name, each in schema.get("properties", {}).items() if name not in _META}
    _shape(schema | {"properties": own}, body)
    return kept | body


def _shape(schema: Schema, value: Any) -> None:
    if isinstance(value, dict):
        _shape_mapping(schema, value)
    elif isinstance(value, list):
        for item in value:
            _shape(schema.get("items", {_OPEN: True}), item)


def _shape_mapping(schema: Schema, value: dict[str, Any]) -> None:
    known, rest = schema.get("properties", {}), schema.get("additionalProperties")
    for name, inner in known.items():
        if "default" in inner and (name not in value or (value[name] is None and not inner.get("nullable"))):
            value[name] = copy.deepcopy(inner["default"])
    for name in list(value):
        if name in known:
            _shape(known[name], value[name])
        elif isinstance(rest, dict):
            _shape(rest, value[name])
        elif not (rest or schema.get(_OPEN)):
            del value[name]


def violations(schema: Schema, new: dict[str, Any], old: dict[str, Any] | None) -> list[str]:
    """What of a document the schema or its CEL rules refuse. old: what is stored, for rules with oldSelf."""
    found = [line for error in _validator(schema).iter_errors(new) for line in _told(error)]
    return found or list(_broken_rules(schema, new, old, ""))


def _told(error: jsonschema.ValidationError) -> Iterator[str]:
    """As a server says it: of a junctor also what each of its schemas lacked."""
    if error.validator in _JUNCTORS:
        yield f"{_dotted(error)}: Invalid value: must validate at least one schema ({error.validator})"
        for each in error.context or ():
            yield from _told(each)
    elif error.validator == "required":
        missing = [name for name in error.validator_value if name not in error.instance]
        yield from (f"{_dotted(error)}.{name}: Required value" for name in missing)
    elif error.validator == "enum":
        supported = ", ".join(f'"{value}"' for value in error.validator_value)
        yield f'{_dotted(error)}: Unsupported value: "{error.instance}": supported values: {supported}'
    else:
        yield f"{_dotted(error)}: Invalid value: {error.message}"


#: By the schema's identity; KServe's take a second to build. The schema beside it, so that nobody else gets its id.
_VALIDATORS: dict[int, tuple[Schema, jsonschema.Draft202012Validator]] = {}


def _validator(schema: Schema) -> jsonschema.Draft202012Validator:
    if id(schema) not in _VALIDATORS:
        _VALIDATORS[id(schema)] = schema, jsonschema.Draft202012Validator(_as_json_schema(schema))
    return _VALIDATORS[id(schema)][1]


def _dotted(error: jsonschema.ValidationError) -> str:
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    return path.lstrip(".") or "<root>"


def _as_json_schema(schema: Schema) -> Schema:
    """The schema in JSON Schema's words. Closed it is not: what is unknown has been pruned."""
    if schema.get(_INT_OR_STRING):
        return {"type": ["integer", "string"]}
    found = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes") and key != "nullable"}
    if "properties" in found:
        found["properties"] = {name: _as_json_schema(inner) for name, inner in found["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = _as_json_schema(found[key])
    if schema.get("nullable") and "type" in found:
        found["type"] = [found["type"], "null"]
        if "enum" in found:
            found["enum"] = [*found["enum"], None]
    return found


def _broken_rules(schema: Schema, new: Any, old: Any, path: str) -> Iterator[str]:
    for each in schema.get(_RULES, ()):
        of_change = "oldSelf" in each["rule"]
        if of_change and old is None:
            continue
        if cel.evaluate(each["rule"], {"self": new} | ({"oldSelf": old} if of_change else {})) is not True:
            where = path + each.get("fieldPath", "") or "<root>"
            yield f"{where.lstrip('.')}: Invalid value: {each.get('message') or 'failed rule: ' + each['rule']}"
    if isinstance(new, dict):
        before = old if isinstance(old, dict) else {}
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        for name, value in new.items():
            inner = known.get(name, rest)
            if isinstance(inner, dict):
                yield from _broken_rules(inner, value, before.get(name), f"{path}.{name}")
    elif isinstance(new, list) and "items" in schema:
        # Items of a plain list have no old self (transition rules need a map's keys).
        for at, item in enumerate(new):
            yield from _broken_rules(schema["items"], item, None, f"{path}[{at}]")
