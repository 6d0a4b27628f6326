"""A finding: one thing that was looked at, what was seen, where, and what to do about it."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

from aim_profile.errors import NodeError

Severity = Literal["error", "warning", "unknown", "ok"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "unknown", "ok")
# repr() of what stood in a file: it may be anything, so it is not passed on.
_QUOTED = re.compile(r"(['\"]).*\1")


class Finding(BaseModel):
    """check: what was looked at; severity: `unknown` is what could not be read, which is never `ok`.

    where: a path, a command or an option; remedy: empty only where all is well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    severity: Severity
    seen: str
    where: str
    remedy: str = ""


def ok(check: str, seen: str, where: str) -> Finding:
    """What is as it should be."""
    return Finding(check=check, severity="ok", seen=seen, where=where)


def error(check: str, seen: str, where: str, remedy: str) -> Finding:
    """What keeps models from running, or from running where they were planned."""
    return Finding(check=check, severity="error", seen=seen, where=where, remedy=remedy)


def warning(check: str, seen: str, where: str, remedy: str) -> Finding:
    """What works, and surprises somebody later."""
    return Finding(check=check, severity="warning", seen=seen, where=where, remedy=remedy)


def unknown(check: str, seen: str, where: str, remedy: str) -> Finding:
    """What could not be read here; remedy: how it could be."""
    return Finding(check=check, severity="unknown", seen=seen, where=where, remedy=remedy)


def unreadable(check: str, problem: NodeError) -> Finding:
    """A file that is not as the kernel or the tool writes it; what stood in it is not repeated."""
    seen = _QUOTED.sub("…", problem.problem.removeprefix(f"{problem.field}: "))
    return error(check, seen, problem.field, problem.remedy or "record the file again")
