"""From slots to verdicts: a compiled policy, and one request's checks."""

from aim_guardrail.pipeline.failures import DetectorFailed, DetectorTimedOut
from aim_guardrail.pipeline.guard import INLINE_CHARS, Checked, Guard
from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.pipeline.session import Session

__all__ = ["INLINE_CHARS", "Checked", "DetectorFailed", "DetectorTimedOut", "Guard", "Ruling", "Session"]
