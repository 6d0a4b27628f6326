"""Label and field selectors, as query parameters and as objects say them."""

from __future__ import annotations

import re
from typing import Any

_SET = re.compile(r"\s*(?P<key>[\w./-]+)\s+(?P<operator>in|notin)\s+\((?P<values>[^)]*)\)\s*")
_EQUAL = re.compile(r"\s*(?P<key>[\w./-]+)\s*(?P<operator>==|=|!=)\s*(?P<value>[^\s,]*)\s*")
_EXISTS = re.compile(r"\s*(?P<not>!?)\s*(?P<key>[\w./-]+)\s*")


def by_query(found: dict[str, Any], labels: str, fields: str) -> bool:
    """Whether an object is meant by `labelSelector` and `fieldSelector`."""
    own = found["metadata"].get("labels") or {}
    terms = re.split(r",(?![^(]*\))", labels) if labels else []
    return all(_label(own, term) for term in terms) and all(
        _field(found, term) for term in filter(None, fields.split(","))
    )


def _label(own: dict[str, str], term: str) -> bool:
    if told := _SET.fullmatch(term):
        listed = own.get(told["key"]) in [value.strip() for value in told["values"].split(",")]
        return listed == (told["operator"] == "in")
    if told := _EQUAL.fullmatch(term):
        return (own.get(told["key"]) == told["value"]) == (told["operator"] != "!=")
    if told := _EXISTS.fullmatch(term):
        return (told["key"] in own) != bool(told["not"])
    raise ValueError(f"unable to parse requirement: {term!r}")


def _field(found: dict[str, Any], term: str) -> bool:
    told = _EQUAL.fullmatch(term)
    if told is None:
        raise ValueError(f"invalid selector: {term!r}")
    at: Any = found
    for key in told["key"].split("."):
        at = at.get(key) if isinstance(at, dict) else None
    return (str(at or "") == told["value"]) == (told["operator"] != "!=")


def by_labels(found: dict[str, Any], selector: dict[str, Any]) -> bool:
    """Whether an object is meant by a LabelSelector (matchLabels, matchExpressions)."""
    own = found["metadata"].get("labels") or {}
    return all(own.get(key) == value for key, value in (selector.get("matchLabels") or {}).items()) and all(
        _expression(own, each) for each in selector.get("matchExpressions") or ()
    )


def _expression(own: dict[str, str], each: dict[str, Any]) -> bool:
    key, values = each["key"], each.get("values") or ()
    return {
        "In": own.get(key) in values,
        "NotIn": own.get(key) not in values,
        "Exists": key in own,
        "DoesNotExist": key not in own,
    }[each["operator"]]
