"""How an API server says no: a Status object and its HTTP code."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """An answer that is not the object asked for.

    code: HTTP's; reason: Kubernetes' word for it (`NotFound`, `Conflict`, `Invalid`, …).
    """

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason

    def status(self) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Status",
            "metadata": {},
            "status": "Failure",
            "reason": self.reason,
            "message": str(self),
            "code": self.code,
        }


def not_found(plural: str, name: str) -> Refusal:
    return Refusal(404, "NotFound", f'{plural} "{name}" not found')


def conflict(plural: str, name: str) -> Refusal:
    return Refusal(
        409,
        "Conflict",
        f'Operation cannot be fulfilled on {plural} "{name}": the object has been modified; please apply your changes '
        "to the latest version and try again",
    )


class NoSuchPath(Exception):
    """Of a kind that nobody defined: a server answers in plain words, not with a Status."""
