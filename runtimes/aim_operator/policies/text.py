"""A GuardrailPolicy as the file that the guardrail reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aim_guardrail.policy import Policy, parse_policy
from aim_profile.files.write import dump

FILE = "policy.yaml"
_FORMAT = 2


def config_map_of(policy: str) -> str:
    """The ConfigMap that it is kept in."""
    return f"{policy}-guardrail-policy"


def text_of(body: Mapping[str, Any]) -> str:
    """The file, whether it is valid or not."""
    spec = {key: value for key, value in body["spec"].items() if value is not None}
    return dump({"version": _FORMAT, "name": body["metadata"]["name"], **spec})


def policy_of(body: Mapping[str, Any]) -> Policy:
    """Read as the guardrail reads it. Raises PolicyError: line, key, what is wrong, the remedy."""
    return parse_policy(text_of(body), origin="spec, line")
