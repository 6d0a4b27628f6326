"""The streaming guard: holds text back until it is proven safe, releases it, redacted, in order.

See `StreamGuard`. API documentation: `aim_guardrail.pipeline`.
"""

from __future__ import annotations

from dataclasses import dataclass

from aim_guardrail.pipeline import Guard, Session
from aim_guardrail.policy import Verdict


@dataclass(frozen=True, slots=True)
class Released:
    """What may go out now (`""`: nothing yet) and the verdict on everything pushed so far."""

    text: str
    verdict: Verdict


class StreamGuard:
    """Checks one streamed answer (one choice). Feed it with `push`, end it with `finish`."""

    def __init__(self, guard: Guard, session: Session) -> None:
        self._guard, self._session, self._held = guard, session, ""

    def push(self, delta: str) -> Released:
        """Take a piece of the answer; give what is safe to show.

        Raises:
            DetectorFailed: a detector failed and the policy's `on_error` is `closed`.
        """
        self._held += delta
        return Released("", Verdict())

    def finish(self) -> Released:
        """The answer is complete: give the rest. Raises as `push`."""
        checked = self._guard.check("answer", self._held, self._session)
        return Released(checked.text, checked.verdict)
