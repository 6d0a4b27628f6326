"""The guard: a compiled policy. This is the whole API the server needs:

    policy = load_policy("policy.yaml")              # or shipped_policy("chat"); PolicyError: one line to show
    guard = Guard.load(policy)                       # blocking, 0.5-5 s: call it in a thread; DetectorFailed
    guard = Guard.load(new_policy, reuse=guard)      # hot reload: loaded engines are shared, this is cheap

    session = Session()                              # one per request; shared by its prompt and its answers
    slots = collect("prompt", body, place)           # aim_guardrail.slots
    rulings = guard.judge("prompt", slots)           # sync; above INLINE_CHARS run it in a thread
    texts = guard.redacted(slots, rulings, session)
    apply(body, slots, texts)

    checked = guard.check("prompt", text, session)   # the same for one text alone
    if checked.verdict.blocked: ...                  # checked.text is "" then

    stream = StreamGuard(guard, session)             # aim_guardrail.streams.held; one per text, not thread-safe
    released = stream.push(delta)                    # released.text may go out now; may be ""
    released = stream.finish()                       # the rest; call it once, when the text ends
    if released.verdict.blocked: ...                 # stop the upstream, end with finish_reason content_filter

A verdict has `action` (allow, flag, redact, block), `families`, `findings` (labels, spans, scores, rule ids; never
values) and `degraded` (detectors that failed under `on_error: open`). Under `on_error: closed` a failing detector
raises `DetectorFailed`, which names it: that is a 503, never a pass.

This is the first stage, pure and synchronous. What is awaited, batched or given up at a deadline comes behind it
(`guard.stages`, see `pipeline.stages`), over the texts as this stage would let them pass, before anything is applied.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aim_guardrail.detectors.base import Detector, Finding
from aim_guardrail.detectors.families import Options, Wanted, build_detector
from aim_guardrail.pipeline.failures import DetectorFailed
from aim_guardrail.pipeline.ruling import Ruling, redact_parts, redacted
from aim_guardrail.pipeline.session import Session
from aim_guardrail.pipeline.stages import Stages
from aim_guardrail.policy import Direction, Policy, Rule, Verdict, decide
from aim_guardrail.slots.slot import Slot, Slots
from aim_guardrail.text import Text, context_of

INLINE_CHARS = 2048
"""Texts up to this length are checked in well under 10 ms whatever they hold (3 us a character in a text of nothing but
telephone numbers); run longer ones in a thread."""


_ALLOWED = Verdict()


@dataclass(frozen=True, slots=True)
class Checked:
    """A checked text: what may pass (`""` when blocked) and why."""

    text: str
    verdict: Verdict


class Guard:
    """A policy with its detectors. Immutable and thread-safe.

    Attributes:
        stages: the batch detectors, judged behind.
    """

    def __init__(self, policy: Policy, detectors: Sequence[Detector], stages: Stages | None = None) -> None:
        self.policy = policy
        self.stages = stages if stages is not None else Stages(policy, {})
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
        wanted: dict[tuple[str, Options, frozenset[str] | None], frozenset[str]] = {}
        for rule in policy.rules("prompt") + policy.rules("answer"):
            if rule.is_inline:
                key = rule.type, rule.options, rule.phone_regions
                wanted[key] = wanted.get(key, frozenset()) | rule.labels
        loaded = {(d.family, _options(d), _regions(d), d.labels): d for d in (reuse._detectors if reuse else ())}
        detectors = []
        for (family, options, regions), labels in wanted.items():
            known = loaded.get((family, options, regions, labels)) or loaded.get((family, None, regions, labels))
            detectors.append(known if known is not None else _load(family, Wanted(labels, options, regions)))
        return cls(policy, detectors, Stages.load(policy, reuse.stages if reuse else None))

    @classmethod
    def together(cls, guards: Sequence[Guard]) -> Guard:
        """All that these have loaded, for `load` to reuse; the last one's policy, if it is to judge anything."""
        stages = Stages.together([guard.stages for guard in guards])
        return cls(guards[-1].policy, list(dict.fromkeys(d for guard in guards for d in guard._detectors)), stages)

    def apart(self) -> Guard:
        """The same with the same engines; how its detectors fare says nothing of theirs here."""
        return Guard(self.policy, self._detectors, self.stages.apart())

    def check(self, direction: Direction, text: str, session: Session) -> Checked:
        """Check a whole text.

        Raises:
            DetectorFailed: a detector failed and the policy's `on_error` is `closed`.
        """
        folded = Text(text)
        verdict = self.verdict(direction, folded)
        if verdict.blocked:
            return Checked("", verdict)
        return Checked(self.redact(folded, verdict.findings, session), verdict)

    def judge(self, direction: Direction, slots: Slots) -> list[Ruling]:
        """The verdicts that are more than a mere allow, in order; none after one that blocks.

        Raises:
            DetectorFailed: as for `check`.
        """
        rulings: list[Ruling] = []
        runs = {at: run for run in slots.joined for at in run}
        for at, slot in enumerate(slots.items):
            run = runs.get(at)
            if run is None:
                verdict = self._decide(direction, *self._find_in(direction, slot))
            elif run[0] == at:
                verdict = self._verdict_on_parts(direction, [slots.items[part] for part in run])
            else:
                continue
            if verdict is not _ALLOWED and (verdict.findings or verdict.degraded):
                rulings.append(Ruling(run or (at,), verdict))
                if verdict.blocked:
                    break
        return rulings

    def redacted(
        self, slots: Slots, rulings: Iterable[Ruling], session: Session, direction: Direction = "answer"
    ) -> list[str]:
        """Each slot's text as it may pass; of a prompt, values to be restored go into the session's vault."""
        kept = self.policy.restored if direction == "prompt" else frozenset[str]()
        return redacted([slot.text for slot in slots.items], rulings, session, kept)

    def watches(self, direction: Direction) -> bool:
        """Whether the policy checks this direction at all, or changes it."""
        if direction == "answer" and self.policy.restored:
            return True
        if direction == "prompt" and self.policy.images != "pass":
            return True
        return bool(self._by_direction[direction]) or self.stages.watches(direction)

    def may_find(self, direction: Direction, scan: str) -> bool:
        """Whether judging these whole units (folded) could come to anything: a cheap test."""
        try:
            for detector in self._by_direction[direction]:  # as `any` would: it is asked for every token
                if detector.may_find(scan):
                    return True
        except Exception:  # noqa: BLE001 - the edge of third-party engines: judging meets the same failure and asks the policy
            return True
        return False

    def verdict(self, direction: Direction, text: Text, since: int = 0) -> Verdict:
        """The verdict on the values in `text` from `since` (an index of `text.scan`) on.

        Raises:
            DetectorFailed: as for `check`.
        """
        return self._decide(direction, *self._find(direction, text, text.scan[since:] if since else text.scan, since))

    def redact(self, text: Text, findings: Iterable[Finding], session: Session) -> str:
        """`text.original` with the findings to be redacted replaced by placeholders."""
        return redact_parts([text.original], findings, session)[0]

    def _find(self, direction: Direction, text: Text, new: str, since: int = 0) -> tuple[list[Finding], list[str]]:
        """What is found in `text` from `since` on, where `new` stands; and the detectors that failed openly."""
        findings: list[Finding] = []
        degraded: list[str] = []
        for detector in self._by_direction[direction]:
            try:
                if detector.may_find(new):
                    findings += detector.scan(text, since)
            except Exception as error:  # the edge of third-party engines: whatever they raise, the policy decides
                if self.policy.on_error == "closed":
                    raise DetectorFailed(detector.family, type(error).__name__) from error
                degraded.append(detector.family)
        return findings, degraded

    def _find_in(self, direction: Direction, slot: Slot) -> tuple[list[Finding], list[str]]:
        """What is found in a slot, behind what names it."""
        text = Text(slot.text)
        if not slot.key:
            return self._find(direction, text, text.scan)
        before = context_of(slot.key)
        known, end = len(before), len(before) + len(text.scan)
        named = Text.folded(f'{before}{text.scan}"')
        findings, degraded = self._find(direction, named, text.scan, known)
        inside = [f for f in findings if known <= f.start < f.end <= end]
        return [moved(f, text.span(f.start - known, f.end - known)) for f in inside], degraded

    def _decide(self, direction: Direction, findings: list[Finding], degraded: list[str]) -> Verdict:
        if not findings and not degraded:
            return _ALLOWED
        return decide(findings, self.policy.rules(direction), tuple(degraded))

    def _verdict_on_parts(self, direction: Direction, parts: Sequence[Slot]) -> Verdict:
        """What is in each of the parts of one text, and what only all together say."""
        findings, degraded, edges = list[Finding](), dict[str, None](), list[int]()
        start = 0
        for part in parts:
            own, failed = self._find_in(direction, part)
            findings += [moved(f, (f.start + start, f.end + start)) for f in own]
            degraded.update(dict.fromkeys(failed))
            start += len(part.text)
            edges.append(start)
        whole = Text("".join(part.text for part in parts))
        together, failed = self._find(direction, whole, whole.scan)
        findings += [f for f in together if edges[bisect_right(edges, f.start)] < f.end]
        return self._decide(direction, findings, list({**degraded, **dict.fromkeys(failed)}))


def moved(finding: Finding, span: tuple[int, int]) -> Finding:
    """A finding, its span counted from elsewhere."""
    return finding._replace(start=span[0], end=span[1])


def _serves(detector: Detector, rule: Rule) -> bool:
    same = detector.family == rule.type and _regions(detector) == rule.phone_regions
    return same and _options(detector) in (None, rule.options)


def _regions(detector: Detector) -> frozenset[str] | None:
    """Whose telephone numbers a detector knows; most know of none."""
    return getattr(detector, "regions", None)


def _options(detector: Detector) -> Options | None:
    """The options it was made with; most have none."""
    return getattr(detector, "options", None)


def _load(family: str, wanted: Wanted) -> Detector:
    try:
        return build_detector(family, wanted)  # type: ignore[return-value]  # of an inline family
    except Exception as error:  # the edge of third-party engines: name the one that does not load
        raise DetectorFailed(family, f"cannot be loaded ({type(error).__name__}: {error})") from error
