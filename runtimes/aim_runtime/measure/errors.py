"""What ends a measurement before its time."""

from __future__ import annotations


class MeasureError(Exception):
    """One line: field, value and remedy. exit_code: 2 for what was asked, 1 for what was found."""

    def __init__(self, problem: str, *, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(problem)
