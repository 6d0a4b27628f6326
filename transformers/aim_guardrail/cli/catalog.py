"""``aim-guardrail catalog``: the families a policy can name, with labels and options, and the shipped policies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import orjson

from aim_guardrail.cli.given import add_output, parser, run
from aim_guardrail.detectors.families import FAMILIES, Family
from aim_guardrail.policy import shipped_names, shipped_policy
from aim_kserve.tables import plain_table, show


def main(argv: Sequence[str]) -> int:
    arguments = parser("catalog", "The families a policy can name, their labels and options, and the shipped policies.")
    arguments.add_argument("family", nargs="?", choices=tuple(FAMILIES), help="only this one, with its options")
    add_output(arguments)
    return run(_catalog, arguments, argv)


def _catalog(given: argparse.Namespace) -> int:
    families = [FAMILIES[given.family]] if given.family else list(FAMILIES.values())
    if given.output == "json":
        found = {"families": list(map(_told, families)), "policies": list(map(_policy, shipped_names()))}
        sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        return 0
    _show_labels(families)
    if given.family:
        _show_options(families[0])
    else:
        sys.stdout.write(f"\nshipped policies: {', '.join(shipped_names())}\n")
    return 0


def _told(family: Family) -> dict[str, Any]:
    labels = {
        name: {"threshold": label.threshold, "top_score": label.top_score} for name, label in family.labels.items()
    }
    options = family.options.model_json_schema()
    return {"type": family.name, "judged": family.kind, "labels": labels, "options": options}


def _policy(name: str) -> dict[str, Any]:
    policy = shipped_policy(name)
    return {"name": name, "use_case": policy.use_case, "version": policy.version_hash}


def _show_labels(families: Sequence[Family]) -> None:
    table = plain_table(("type", "judged", "label"), ("from", "to"))
    for family in families:
        for at, (name, label) in enumerate(family.labels.items()):
            head = ("", "") if at else (family.name, family.kind)
            table.add_row(*head, name, f"{label.threshold:g}", f"{label.top_score:g}")
        if not family.labels:
            table.add_row(family.name, family.kind, "(its options name them)", "", "")
    show(table)


def _show_options(family: Family) -> None:
    fields = family.options.model_fields
    if not fields:
        sys.stdout.write("\nno options\n")
        return
    table = plain_table(("option", "default", "what it is"))
    for name, field in fields.items():
        default = "(needed)" if field.is_required() else str(field.get_default(call_default_factory=True))
        table.add_row(name, default, field.description or "")
    sys.stdout.write("\n")
    show(table)
