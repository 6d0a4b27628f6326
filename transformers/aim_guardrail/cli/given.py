"""What verbs are given alike: a policy by name or file, texts, an output form; and how they refuse."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from aim_guardrail.cli.refused import Refused
from aim_guardrail.pipeline import DetectorFailed, Guard
from aim_guardrail.policy import Policy, PolicyError, load_policy, shipped_policy

#: What one text may have: a body's default limit is 8 MiB.
MAX_BYTES = 8 * 1024**2


def policy_named(given: str) -> Policy:
    """A shipped policy by its name, any other by its file. Raises Refused."""
    try:
        return load_policy(given) if Path(given).suffix or os.path.exists(given) else shipped_policy(given)
    except PolicyError as error:
        raise Refused(str(error)) from error


def loaded(policy: Policy) -> Guard:
    """The policy with its detectors. Raises Refused."""
    try:
        return Guard.load(policy)
    except DetectorFailed as error:
        raise Refused(str(error)) from error


def text_given(given: str) -> str:
    """``-`` is standard input. Raises Refused."""
    if given != "-":
        return given
    raw = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise Refused(f"standard input is larger than {MAX_BYTES} bytes: give less")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Refused("standard input is not UTF-8: give text") from None


def parser(verb: str, what: str) -> argparse.ArgumentParser:
    """Of ``aim-guardrail VERB``."""
    return argparse.ArgumentParser(prog=f"aim-guardrail {verb}", description=what, allow_abbrev=False)


def add_output(arguments: argparse.ArgumentParser) -> None:
    """``-o json``."""
    arguments.add_argument("-o", "--output", choices=("table", "json"), default="table")


def run(verb: Callable[[argparse.Namespace], int], arguments: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Do it; 2 and one line on standard error where it is refused."""
    try:
        return verb(arguments.parse_args(argv))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  it talks to a person
        return 2
