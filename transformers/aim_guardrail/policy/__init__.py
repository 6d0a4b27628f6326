"""Policies: what is looked for in prompts and answers, and what happens then."""

from aim_guardrail.policy.directory import PolicySet, beside, load_policies
from aim_guardrail.policy.policy import (
    Action,
    Direction,
    Policy,
    Rule,
    Stage,
    StreamRules,
    load_policy,
    parse_policy,
    shipped_names,
    shipped_policy,
)
from aim_guardrail.policy.source import PolicyError
from aim_guardrail.policy.verdict import Verdict, decide, settle

__all__ = [
    "Action",
    "Direction",
    "Policy",
    "PolicyError",
    "PolicySet",
    "Rule",
    "Stage",
    "StreamRules",
    "Verdict",
    "beside",
    "decide",
    "load_policies",
    "load_policy",
    "parse_policy",
    "settle",
    "shipped_names",
    "shipped_policy",
]
