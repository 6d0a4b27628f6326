"""The streaming guard: holds text back until it is proven safe, releases it, redacted, in order.

How it can promise that no part of a value leaks, at any split into deltas: values lie within units of text
(`aim_guardrail.text`), and a unit that the end of the text so far touches is held. When a unit is over, the finished
units are scanned once, with the last `CONTEXT_CHARS` already released characters as left context (a keyword may stand
before its value), and go out. What detectors report depends on nothing else, so the released text and the verdict are
those of checking the whole answer at once. Two differences remain, both on the side of holding more: a run longer
than `max_hold_chars` is blocked or withheld as the policy says, where a whole answer would be scanned; and what comes
after a block is never looked at.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from aim_guardrail.detectors.base import Finding
from aim_guardrail.pipeline import Guard, Session
from aim_guardrail.pipeline.guard import moved
from aim_guardrail.policy import Verdict
from aim_guardrail.text import CONTEXT_CHARS, Text, holds_private_key, run_end, safe_cut

# While an overlong run is withheld, this much of it is kept to see where it ends.
_TAIL_CHARS = 64
# So much held text is looked at again for every delta. More (a private key, a long run) only when it has grown by a
# 16th: looking costs as much as there is, and would cost its square in all.
_SHORT_CHARS = 256
_GROWTH = 16


class Released(NamedTuple):
    """What may go out now (`""`: nothing yet) and the verdict on everything judged so far."""

    text: str
    verdict: Verdict


class StreamGuard:
    """Checks one streamed answer (one choice). Feed it with `push`, end it with `finish`. Not thread-safe.

    Findings' spans count code points from the start of the answer. Once the verdict is a block nothing more is
    released: end the stream.
    """

    def __init__(self, guard: Guard, session: Session) -> None:
        self._guard = guard
        self._session = session
        self._is_watched = guard.watches("answer")
        self._most_chars = guard.policy.stream.max_hold_chars
        self._verdict = Verdict()
        self._held = ""  # not yet released
        self._coming: list[str] = []  # what came behind it since it was looked at
        self._held_chars = 0  # of both
        self._due_chars = 0  # when to look
        self._held_from = 0  # where in the answer it begins
        self._context = ""  # what was released before it, folded
        self._withholding = False  # within a run longer than max_hold_chars

    @property
    def held_chars(self) -> int:
        """How much is held back now, in code points."""
        return self._held_chars

    def push(self, delta: str) -> Released:
        """Take a piece of the answer; give what is safe to show.

        Raises:
            DetectorFailed: a detector failed and the policy's `on_error` is `closed`. Nothing was released.
        """
        if self._verdict.blocked:
            return Released("", self._verdict)
        if not self._is_watched:
            return Released(delta, self._verdict)
        self._coming.append(delta)
        self._held_chars += len(delta)
        if self._held_chars < self._due_chars:
            return Released("", self._verdict)
        try:
            return Released(self._look(), self._verdict)
        finally:
            self._held_chars = len(self._held)
            self._due_chars = self._next_look()

    def finish(self) -> Released:
        """The answer is complete: give the rest. Raises as `push`."""
        released = ""
        self._join()
        if not self._verdict.blocked and not (self._withholding and not self._run_is_over()):
            text = Text(self._held)
            released = self._release(text, len(text.scan))
        self._held, self._held_chars = "", 0
        return Released(released, self._verdict)

    def _look(self) -> str:
        """What may go out of all that is held."""
        self._join()
        if self._withholding and not self._run_is_over():
            return ""
        text = Text(self._held)
        released = self._release(text, safe_cut(text.scan))
        if len(self._held) > self._most_chars and not self._verdict.blocked:
            released += self._overflow()
        return released

    def _join(self) -> None:
        self._held += "".join(self._coming)
        self._coming.clear()

    def _next_look(self) -> int:
        held = self._held_chars
        if held <= _SHORT_CHARS:
            return held + 1
        due = held + 1 + held // _GROWTH
        return due if held > self._most_chars else min(due, self._most_chars + 1)

    def _release(self, text: Text, cut: int) -> str:
        """Judge and give what lies before `cut` (an index of `text.scan`); `text` is what is held."""
        end = text.origin(cut)
        if not end:
            return ""
        scan, piece = text.scan[:cut], text.original[:end]
        if self._guard.may_find("answer", scan):
            piece = self._judge(text, scan, piece)
        self._context = (self._context + scan)[-CONTEXT_CHARS:]
        self._held_from += end
        self._held = "" if self._verdict.blocked else text.original[end:]
        return piece

    def _judge(self, text: Text, scan: str, piece: str) -> str:
        known = len(self._context)
        verdict = self._guard.verdict("answer", Text.folded(self._context + scan), known)
        if any(finding.start < known for finding in verdict.findings):
            # A value that began in text already released: a detector broke its contract. Never go on then.
            at = self._held_from
            self._block(Finding("stream", "BOUNDARY", at, at, 1.0, "released-boundary", action="block"))
            return ""
        local = [moved(f, text.span(f.start - known, f.end - known)) for f in verdict.findings]
        if verdict.blocked:
            first = next(f for f in local if f.action == "block")
            piece, shown = piece[: first.start], [f for f in local if f.end <= first.start]
        else:
            shown = local
        offset = self._held_from
        findings = tuple(moved(f, (f.start + offset, f.end + offset)) for f in local)
        self._verdict = self._verdict.joined(replace(verdict, findings=findings))
        return self._guard.redact(Text(piece), shown, self._session)

    def _overflow(self) -> str:
        scan = Text(self._held).scan
        if holds_private_key(scan):
            return ""  # certain to be redacted or blocked: its end is worth waiting for
        start = self._held_from
        action = self._guard.policy.stream.on_overflow
        end = start + len(self._held)
        finding = Finding("stream", "UNBROKEN_RUN", start, end, 1.0, "max_hold_chars", action=action)
        if action == "block":
            self._block(finding)
            return ""
        self._verdict = self._verdict.joined(Verdict("redact", ("stream",), (finding,)))
        placeholder = self._session.placeholder("UNBROKEN_RUN", scan)
        self._withholding = True
        self._drop(len(self._held) - _TAIL_CHARS)
        return placeholder

    def _run_is_over(self) -> bool:
        """Drop what belongs to the withheld run; whether it ended."""
        text = Text(self._held)
        end = run_end(text.scan)
        if end is None:
            self._drop(len(self._held) - _TAIL_CHARS)
            return False
        self._context = text.scan[:end]
        self._withholding = False
        self._drop(text.origin(end))
        return True

    def _drop(self, count: int) -> None:
        self._held_from += max(count, 0)
        self._held = self._held[max(count, 0) :]

    def _block(self, finding: Finding) -> None:
        self._verdict = self._verdict.joined(Verdict("block", ("stream",), (finding,)))
        self._held = ""
