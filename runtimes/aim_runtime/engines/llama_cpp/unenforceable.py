"""The refusal of a schema, by place."""

from __future__ import annotations

from typing import Any

_MAX_PLACE = 200  # characters of a place that are shown


class Unenforceable(ValueError):
    """A schema that no answer can be held to.

    Args:
        at: where in the schema, as a client would write it: ``.properties.age.pattern``; empty for all of it.
        reason: continues a sentence that begins with the place.
    """

    def __init__(self, at: str, reason: str) -> None:
        super().__init__(f"{at}: {reason}")
        self.at = at if len(at) <= _MAX_PLACE else f"{at[: _MAX_PLACE // 2]}...{at[-_MAX_PLACE // 2 :]}"
        self.reason = reason


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
