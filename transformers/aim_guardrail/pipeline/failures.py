"""How a check can fail, and what a client is told of it."""

from __future__ import annotations

from typing import ClassVar


class DetectorFailed(RuntimeError):
    """A detector could not be loaded, or failed on a text, and the policy fails closed.

    Attributes:
        code: what tells clients the failures apart.
        told: what a client is told, after the detector's name. Never the reason: it may repeat a text.
    """

    code: ClassVar[str] = "guardrail_failed"
    told: ClassVar[str] = "failed and nothing passes unchecked: ask again"

    def __init__(self, detector: str, reason: str) -> None:
        super().__init__(f"detector {detector!r} failed: {reason}")
        self.detector = detector


class DetectorMisconfigured(DetectorFailed):
    """It cannot work as it is configured: nothing passes, whatever the policy says of errors."""

    code = "guardrail_misconfigured"
    told = "is not configured as it should be and nothing passes unchecked: its operator has to mend that"


class DetectorTimedOut(DetectorFailed):
    """A detector did not answer in its time and the policy's `on_timeout` is closed."""

    code = "guardrail_timeout"
    told = "did not answer in its time and nothing passes unchecked: ask again"


class DetectorSkipped(DetectorTimedOut):
    """Its answer was not expected within what was left of the budget: it was not asked, and `on_timeout` is closed."""

    code = "guardrail_budget"
    told = "would not have answered within what is left of the budget and nothing passes unchecked: ask again"
