"""Policies: what is looked for in prompts and answers, and what happens then."""

from aim_guardrail.policy.policy import (
    Action,
    Direction,
    Policy,
    Rule,
    StreamRules,
    load_policy,
    parse_policy,
    shipped_policy,
)
from aim_guardrail.policy.source import PolicyError
from aim_guardrail.policy.verdict import Verdict, decide

__all__ = [
    "Action",
    "Direction",
    "Policy",
    "PolicyError",
    "Rule",
    "StreamRules",
    "Verdict",
    "decide",
    "load_policy",
    "parse_policy",
    "shipped_policy",
]
