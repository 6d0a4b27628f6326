"""Why an InferenceService is not taken."""

from __future__ import annotations

from aim_kserve.redacted import redacted


class Denied(Exception):
    """field: its path in the object; value: what stands there; remedy: what to write in its place.

    The message is one line for whoever called kubectl, and tells no credential.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        told = "" if value is None else f": {str(value)[:200]!r}"
        super().__init__(redacted(f"{field}{told}: {problem}; {remedy}"))
