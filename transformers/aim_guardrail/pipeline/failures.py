"""How a check can fail."""

from __future__ import annotations


class DetectorFailed(RuntimeError):
    """A detector could not be loaded, or failed on a text, and the policy fails closed."""

    def __init__(self, detector: str, reason: str) -> None:
        super().__init__(f"detector {detector!r} failed: {reason}")
        self.detector = detector


class DetectorTimedOut(DetectorFailed):
    """A detector did not answer in its time, or there was none left for it, and the policy's `on_timeout` is closed."""
