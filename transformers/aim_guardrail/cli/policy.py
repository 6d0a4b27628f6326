"""``aim-guardrail policy validate|explain|schema``: policies, read as the server reads them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

import orjson

from aim_guardrail.cli.given import parser, policy_named, run
from aim_guardrail.detectors.traffic import TrafficOptions
from aim_guardrail.policy import Direction, Policy, Rule, load_policies, load_policy
from aim_guardrail.policy.schema import policy_schema
from aim_guardrail.policy.source import PolicyError

_ACTS = {"block": "blocks", "redact": "redacts", "flag": "flags", "log": "logs"}


def main(argv: Sequence[str]) -> int:
    arguments = parser("policy", "Read policies as the server does: validate them, explain one, print their schema.")
    verbs = arguments.add_subparsers(dest="verb", required=True, metavar="validate|explain|schema")
    validate = verbs.add_parser("validate", help="exit 0 if all can be used, else 1 and a line for each that cannot")
    validate.add_argument("files", nargs="+", metavar="FILE", help="or a directory, as --policy takes it")
    explain = verbs.add_parser("explain", help="what a policy does, in the order in which it does it")
    explain.add_argument("policy", metavar="POLICY", help="a shipped policy's name or a file")
    verbs.add_parser("schema", help="the JSON Schema of the format, for editors")
    return run(_policy, arguments, argv)


def _policy(given: argparse.Namespace) -> int:
    if given.verb == "validate":
        return _validate(given.files)
    if given.verb == "explain":
        sys.stdout.write("".join(f"{line}\n" for line in explained(policy_named(given.policy))))
        return 0
    sys.stdout.buffer.write(orjson.dumps(policy_schema(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return 0


def _validate(files: Sequence[str]) -> int:
    refused = 0
    for file in files:
        try:
            policies = _read(file)
        except PolicyError as error:
            refused = 1
            sys.stderr.write(f"error: {error}\n")
        else:
            for policy in policies:
                told = f"{policy.name} ({policy.version_hash}), version {policy.version}{_whose(policy)}"
                sys.stdout.write(f"{file}: {told}\n")
    return refused


def _read(file: str) -> list[Policy]:
    """Of a file, or of a directory: that they go together, too. Raises PolicyError."""
    if not os.path.isdir(file):  # which a name too long for one is not
        return [load_policy(file)]
    policies = load_policies(file)
    return [*policies, *policies.shadows.values()]


def _whose(policy: Policy) -> str:
    return f"{f', for tenant {policy.tenant}' if policy.tenant else ''}{', a shadow' if policy.shadow else ''}"


def explained(policy: Policy) -> Iterator[str]:
    """What it does, line by line."""
    whose = _whose(policy)
    budget = f"{policy.budget_s * 1000:g} ms a direction"
    yield f"{policy.name} ({policy.version_hash}){whose}: use case {policy.use_case}, {budget}"
    for direction in ("prompt", "answer"):
        yield from _direction(policy, direction)
    stream = policy.stream
    modes = {
        "holdback": "text goes out once it is judged",
        "buffer": "nothing goes out before the whole answer is judged",
        "observe": "text goes out at once and is judged behind: what a block cuts off has been shown",
        "off": "not judged at all",
    }
    yield f"streamed answers: {modes[stream.mode]}"
    yield f"a run of more than {stream.max_hold_chars} characters in a stream: {_ACTS[stream.on_overflow]}"
    yield f"no answer in time: {_fails(policy.on_timeout)}; a failure: {_fails(policy.on_error)}"


def _direction(policy: Policy, direction: Direction) -> Iterator[str]:
    inline = [rule for rule in policy.rules(direction) if rule.is_inline]
    limits = [rule for rule in policy.rules(direction) if rule.is_traffic and direction == "prompt"]
    stages = policy.stages(direction)
    if not inline and not stages and not limits:
        yield f"{direction}: not checked"
        return
    yield f"{direction}:"
    for rule in limits:
        yield from (f"  as it comes: {line}" for line in _limits(rule))
    for rule in inline:
        yield f"  at once: {_rule(rule)}"
    for at, (mode, rules) in enumerate(stages, 1):
        how = "" if len(rules) == 1 else ", side by side" if mode == "parallel" else ", one after another"
        yield f"  then, stage {at}{how}:"
        yield from (f"    {_rule(rule)}" for rule in rules)


def _rule(rule: Rule) -> str:
    by_action: dict[str, list[str]] = {}
    for label in sorted(rule.labels):
        by_action.setdefault(rule.action_on(label), []).append(label)
    acts = "; ".join(f"{_ACTS[action]} {', '.join(by_action[action])}" for action in _ACTS if action in by_action)
    more = [f"within {rule.timeout_ms} ms"] if rule.timeout_ms else []
    more += ["nothing passes without it"] if rule.required else []
    more += [f"no answer in time: {_fails(rule.on_timeout)}"] if rule.on_timeout else []
    more += [f"a failure: {_fails(rule.on_error)}"] if rule.on_error else []
    name = rule.type if rule.name == rule.type else f"{rule.name} ({rule.type})"
    return f"{name} {acts}{''.join(f'; {each}' for each in more)}"


def _limits(rule: Rule) -> Iterator[str]:
    assert isinstance(rule.options, TrafficOptions)
    for label, limit in rule.options.limits.items():
        yield f"{rule.name} {_ACTS[rule.action_on(label)]} {label}: {limit}"


def _fails(then: str) -> str:
    return "nothing passes (503)" if then == "closed" else "it passes, marked degraded"
