"""The guard: a compiled policy. This is the whole API the server needs:

    policy = load_policy("policy.yaml")              # or shipped_policy("chat"); PolicyError: one line to show
    guard = Guard.load(policy)                       # blocking, 0.5-5 s: call it in a thread; DetectorFailed
    guard = Guard.load(new_policy, reuse=guard)      # hot reload: loaded engines are shared, this is cheap

    session = Session()                              # one per request; shared by its prompt and its answers
    checked = guard.check("prompt", text, session)   # sync; above INLINE_CHARS run it in a thread
    if checked.verdict.blocked: ...                  # checked.text is "" then

    stream = StreamGuard(guard, session)             # aim_guardrail.stream; one per choice, not thread-safe
    released = stream.push(delta)                    # released.text may go out now; may be ""
    released = stream.finish()                       # the rest; call it once, when the choice ends
    if released.verdict.blocked: ...                 # stop the upstream, end with finish_reason content_filter

A verdict has `action` (allow, flag, redact, block), `families`, `findings` (labels, spans, scores, rule ids; never
values) and `degraded` (detectors that failed under `on_error: open`). Under `on_error: closed` a failing detector
raises `DetectorFailed`, which names it: that is a 503, never a pass.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aim_guardrail.detectors import build_detector
from aim_guardrail.detectors.base import Detector, Finding
from aim_guardrail.policy import Direction, Policy, Rule, Verdict, decide
from aim_guardrail.text import Text

INLINE_CHARS = 2048
"""Texts up to this length are checked in well under 10 ms whatever they hold (3 us a character in a text of nothing but
telephone numbers); run longer ones in a thread."""


class DetectorFailed(RuntimeError):
    """A detector could not be loaded, or failed on a text, and the policy fails closed."""

    def __init__(self, detector: str, reason: str) -> None:
        super().__init__(f"detector {detector!r} failed: {reason}")
        self.detector = detector


class Session:
    """What one request remembers: the number of each redacted value. Values are kept as keyed digests only."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._numbers: dict[str, dict[bytes, int]] = {}

    def placeholder(self, label: str, value: str) -> str:
        """`<EMAIL_ADDRESS_1>`: the same value, however it is spaced, gets the same number."""
        canonical = value if label == "SECRET" else re.sub(r"[-\s.()]", "", value).casefold()
        digest = hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), key=self._key, digest_size=16).digest()
        numbers = self._numbers.setdefault(label, {})
        return f"<{label}_{numbers.setdefault(digest, len(numbers) + 1)}>"


@dataclass(frozen=True, slots=True)
class Checked:
    """A checked text: what may pass (`""` when blocked) and why."""

    text: str
    verdict: Verdict


class Guard:
    """A policy with its detectors. Immutable and thread-safe."""

    def __init__(self, policy: Policy, detectors: Sequence[Detector]) -> None:
        self.policy = policy
        self._detectors = tuple(detectors)
        self._by_direction: dict[Direction, tuple[Detector, ...]] = {
            direction: tuple(d for d in self._detectors if any(_serves(d, r) for r in policy.rules(direction)))
            for direction in ("prompt", "answer")
        }

    @classmethod
    def load(cls, policy: Policy, reuse: Guard | None = None) -> Guard:
        """Compile a policy. Blocking: engines load once per process, in 0.5 s (5 s with a cold rule cache).

        Raises:
            DetectorFailed: a detector cannot be loaded.
        """
        wanted: dict[tuple[str, frozenset[str] | None], frozenset[str]] = {}
        for rule in policy.prompt + policy.answer:
            key = rule.type, rule.phone_regions
            wanted[key] = wanted.get(key, frozenset()) | rule.labels
        loaded = {(d.family, _regions(d), d.labels): d for d in (reuse._detectors if reuse else ())}
        detectors = []
        for (family, regions), labels in wanted.items():
            known = loaded.get((family, regions, labels))
            detectors.append(known if known is not None else _load(family, labels, regions))
        return cls(policy, detectors)

    def check(self, direction: Direction, text: str, session: Session) -> Checked:
        """Check a whole text.

        Raises:
            DetectorFailed: a detector failed and the policy's `on_error` is `closed`.
        """
        folded = Text(text)
        verdict = self.judge(direction, folded)
        if verdict.blocked:
            return Checked("", verdict)
        return Checked(self.redact(direction, folded, verdict.findings, session), verdict)

    def watches(self, direction: Direction) -> bool:
        """Whether the policy checks this direction at all."""
        return bool(self._by_direction[direction])

    def may_find(self, direction: Direction, scan: str) -> bool:
        """Whether judging these whole units (folded) could come to anything: a cheap test."""
        try:
            return any(detector.may_find(scan) for detector in self._by_direction[direction])
        except Exception:  # noqa: BLE001 - the edge of third-party engines: judging meets the same failure and asks the policy
            return True

    def blocks(self, direction: Direction, finding: Finding) -> bool:
        """Whether this finding's rule blocks."""
        return any(r.type == finding.family and r.action == "block" for r in self.policy.rules(direction))

    def judge(self, direction: Direction, text: Text, since: int = 0) -> Verdict:
        """The verdict on the values in `text` from `since` (an index of `text.scan`) on.

        Raises:
            DetectorFailed: as for `check`.
        """
        findings: list[Finding] = []
        degraded: list[str] = []
        for detector in self._by_direction[direction]:
            try:
                if detector.may_find(text.scan[since:]):
                    findings += detector.scan(text, since)
            except Exception as error:  # the edge of third-party engines: whatever they raise, the policy decides
                if self.policy.on_error == "closed":
                    raise DetectorFailed(detector.family, type(error).__name__) from error
                degraded.append(detector.family)
        return decide(findings, self.policy.rules(direction), tuple(degraded))

    def redact(self, direction: Direction, text: Text, findings: Iterable[Finding], session: Session) -> str:
        """`text.original` with the findings of redacting rules replaced by placeholders."""
        actions = {rule.type: rule.action for rule in self.policy.rules(direction)}
        pieces, done = [], 0
        for finding in findings:
            if actions[finding.family] == "redact":
                value = Text(text.original[finding.start : finding.end]).scan
                pieces += [text.original[done : finding.start], session.placeholder(finding.label, value)]
                done = finding.end
        return "".join([*pieces, text.original[done:]])


def _serves(detector: Detector, rule: Rule) -> bool:
    return detector.family == rule.type and _regions(detector) == rule.phone_regions


def _regions(detector: Detector) -> frozenset[str] | None:
    """Whose telephone numbers a detector knows; most know of none."""
    return getattr(detector, "regions", None)


def _load(family: str, labels: frozenset[str], regions: frozenset[str] | None) -> Detector:
    try:
        return build_detector(family, labels, regions)
    except Exception as error:  # the edge of third-party engines: name the one that does not load
        raise DetectorFailed(family, f"cannot be loaded ({type(error).__name__}: {error})") from error
