"""The stages behind the inline one: batch detectors asked side by side or in turn, within the policy's budget.

A block ends it: what has not answered yet is cancelled, what has not been asked is not. A detector gets its own timeout
or what is left of the budget, whichever is less (`bounded`); what becomes of one that is late, fails, or is not worth
asking, the policy says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aim_guardrail.detectors.base import Asked, BatchDetector, Finding, Misconfigured, Passage
from aim_guardrail.detectors.families import Wanted, build_detector
from aim_guardrail.detectors.family import Reads
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.bounded import Bounded, Found, NotAsked, parts
from aim_guardrail.pipeline.cache import VerdictCache, is_small, keys_of
from aim_guardrail.pipeline.course import Answered
from aim_guardrail.pipeline.failures import DetectorFailed, DetectorMisconfigured, DetectorSkipped, DetectorTimedOut
from aim_guardrail.policy import Direction, Policy, Rule

Key = tuple[str, Wanted]
"""What tells detectors apart: their family, and what a rule wants of it."""

_RESULTS = {"block": "blocked", "redact": "redacted", "flag": "flagged", "log": "allowed"}


@dataclass(slots=True)
class Judgement:
    """What the stages came to.

    Attributes:
        findings: of each passage, those that count, with their rules' ids and actions.
        degraded: the rules that were not answered, where the policy lets that pass.
        blocked: whether a finding blocks.
    """

    findings: list[Sequence[Finding]]
    degraded: list[str] = field(default_factory=list)
    blocked: bool = False


class Stages:
    """A policy's batch detectors."""

    def __init__(self, policy: Policy, detectors: Mapping[Key, Bounded]) -> None:
        self.policy = policy
        self.detectors = dict(detectors)
        self._stages = {direction: policy.stages(direction) for direction in ("prompt", "answer")}

    @classmethod
    def load(cls, policy: Policy, reuse: Stages | None = None) -> Stages:
        """Load what the policy's rules want; blocking. What `reuse` has loaded already is shared.

        Raises:
            DetectorFailed: a detector cannot be loaded.
        """
        known = reuse.detectors if reuse is not None else {}
        detectors: dict[Key, Bounded] = {}
        for rule in (*policy.rules("prompt"), *policy.rules("answer")):
            key = rule.type, rule.wanted
            if rule.is_batch and key not in detectors:
                detectors[key] = known[key] if key in known else _load(rule)
        return cls(policy, detectors)

    @classmethod
    def together(cls, stages: Sequence[Stages]) -> Stages:
        """All that these have loaded, for `load` to reuse; at least one."""
        return cls(stages[-1].policy, {key: found for each in stages for key, found in each.detectors.items()})

    def apart(self) -> Stages:
        """The same over the same detectors, but nothing that it learns of them is these stages' concern."""
        return Stages(self.policy, {key: held.apart() for key, held in self.detectors.items()})

    def watches(self, direction: Direction) -> bool:
        """Whether there is any stage for this direction."""
        return bool(self._stages[direction])

    def detector(self, rule: Rule) -> BatchDetector:
        """The one that a rule of the policy asks."""
        return self.detectors[rule.type, rule.wanted].detector

    async def close(self) -> None:
        """Give back what the detectors hold; none is shared with another policy then."""
        for detector in self.detectors.values():
            await detector.close()

    async def judge(
        self,
        direction: Direction,
        passages: Sequence[Passage],
        asked: Asked,
        metrics: Metrics,
        answered: list[Answered] | None = None,
        cache: VerdictCache | None = None,
        reads: Reads = "text",
    ) -> Judgement:
        """Ask the stages in their order; no more once a finding blocks. `answered` gets how each rule was answered,
        also where this raises. `cache`: what is remembered is not asked again. `reads`: what the passages are; only
        rules whose families judge that are asked.

        Raises:
            DetectorFailed: or a kind of it, and the policy fails closed.
        """
        answered = answered if answered is not None else []
        round = _Round(self, direction, passages, asked, metrics, answered, cache)
        groups = [
            group
            for mode, rules in self._stages[direction]
            for group in ([rules] if mode == "parallel" else [(rule,) for rule in rules])
        ]
        groups = [some for group in groups if (some := tuple(rule for rule in group if rule.reads == reads))]
        try:
            while passages and groups and not round.judgement.blocked:
                await round.ask(groups.pop(0))
            return round.judgement
        finally:
            round.end([rule for group in groups for rule in group])


class _Round:
    """One judgement on its way."""

    def __init__(
        self,
        stages: Stages,
        direction: Direction,
        passages: Sequence[Passage],
        asked: Asked,
        metrics: Metrics,
        answered: list[Answered],
        cache: VerdictCache | None,
    ) -> None:
        self.judgement = Judgement([()] * len(passages))
        self._stages, self._direction, self._metrics = stages, direction, metrics
        self._passages, self._asked, self._answered, self._cache = passages, asked, answered, cache
        self._failed = False
        self._is_late = False

    async def ask(self, rules: Sequence[Rule]) -> None:
        """Ask all at once. The first that blocks, or fails closed, has the others cancelled."""
        tasks = {asyncio.ensure_future(self._ask(rule)): rule for rule in rules}
        try:
            for done in asyncio.as_completed(tasks):
                await done
                if self.judgement.blocked:
                    return
        except DetectorFailed:
            self._failed = True
            raise
        finally:
            self._skip_all(rule for task, rule in tasks.items() if not task.done())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def end(self, not_asked: Sequence[Rule]) -> None:
        """Count what was not asked any more, and a budget that was not enough."""
        self._skip_all(not_asked)
        if self._is_late or time.monotonic() > self._asked.deadline_s:
            self._metrics.budget_exceeded(self._stages.policy.use_case)

    def _skip_all(self, rules: Iterable[Rule]) -> None:
        """Of rules that a block, or a failure, made needless. (A client that left did not: they are cancelled, too.)"""
        if self.judgement.blocked or self._failed:
            for rule in rules:
                self._skipped(rule, "early_stop")

    async def _ask(self, rule: Rule) -> None:
        """Add what counts of what a rule's detector finds.

        Raises:
            DetectorFailed: or a kind of it: it gave no answer and the policy does not let that pass.
        """
        began_s = time.monotonic()
        deadline_s = self._asked.deadline_s
        if rule.timeout_ms is not None:
            deadline_s = min(deadline_s, began_s + rule.timeout_ms / 1000)
        detector = self._stages.detectors[rule.type, rule.wanted]
        try:
            found = await self._asked_or_known(rule, detector, replace(self._asked, deadline_s=deadline_s))
        except NotAsked as error:
            self._not_asked(rule, error)
        except TimeoutError:
            self._timed_out(rule, began_s)
        except Misconfigured as error:
            self._note(rule, "misconfigured", began_s)
            self._metrics.detector_failed(rule.name, "misconfigured")
            raise DetectorMisconfigured(rule.name, str(error)) from error
        except Exception as error:  # noqa: BLE001 - the edge of third-party engines: the policy decides
            self._note(rule, "error", began_s)
            self._erred(rule, DetectorFailed(rule.name, type(error).__name__), error)
        else:
            await self._found(rule, found, began_s)

    async def _asked_or_known(self, rule: Rule, detector: Bounded, asked: Asked) -> Found:
        """The findings on all passages, those remembered among them. Raises as `Bounded.ask`."""
        cache, passages, is_asked = self._cache, self._passages, False
        if cache is None or not detector.is_cacheable or not is_small(passages):
            return await detector.ask(passages, asked)

        async def ask(missing: Sequence[int]) -> Found:
            nonlocal is_asked
            is_asked = True
            return await detector.ask([passages[at] for at in missing], asked)

        keys = keys_of((rule.version_hash, detector.detector.digest, asked.tenant), passages)
        found = await cache.found(keys, ask, asked.deadline_s, self._metrics)
        if not is_asked:
            self._metrics.skipped(rule.name, "cache")
        return found

    async def _found(self, rule: Rule, found: Found, began_s: float) -> None:
        strictest, at = "log", 0
        async for part in parts(found):
            for findings in part:
                if counted := [_ruled(finding, rule) for finding in findings if rule.applies(finding)]:
                    strictest = min(strictest, *(f.action for f in counted), key=list(_RESULTS).index)
                    self.judgement.findings[at] = [*self.judgement.findings[at], *counted]
                at += 1
        self.judgement.blocked = self.judgement.blocked or strictest == "block"
        self._note(rule, _RESULTS[strictest], began_s)

    def _not_asked(self, rule: Rule, error: NotAsked) -> None:
        self._skipped(rule, error.reason)
        if error.reason == "breaker":
            self._erred(rule, DetectorFailed(rule.name, "it has failed too often of late"), error)
        else:
            self._is_late = True
            self._pass_or_raise(rule, self._on_timeout(rule), DetectorSkipped(rule.name, "no time"), error)

    def _timed_out(self, rule: Rule, began_s: float) -> None:
        self._is_late = True
        self._note(rule, "timeout", began_s)
        then = self._on_timeout(rule)
        self._metrics.timed_out(rule.name, then)
        self._pass_or_raise(rule, then, DetectorTimedOut(rule.name, "timeout"), None)

    def _erred(self, rule: Rule, error: DetectorFailed, cause: Exception) -> None:
        then = "closed" if rule.required else rule.on_error or self._stages.policy.on_error
        self._metrics.detector_failed(rule.name, "closed" if then == "closed" else "degraded")
        self._pass_or_raise(rule, then, error, cause)

    def _on_timeout(self, rule: Rule) -> str:
        return "closed" if rule.required else rule.on_timeout or self._stages.policy.on_timeout

    def _pass_or_raise(self, rule: Rule, then: str, error: DetectorFailed, cause: Exception | None) -> None:
        """A rule has no answer: whether that passes."""
        if then == "closed":
            raise error from cause
        self.judgement.degraded.append(rule.name)

    def _note(self, rule: Rule, result: str, began_s: float) -> None:
        seconds = time.monotonic() - began_s
        self._answered.append(Answered(rule.name, rule.type, self._direction, result, began_s, seconds))
        self._metrics.answered(rule.name, rule.type, self._direction, result, seconds)

    def _skipped(self, rule: Rule, reason: str) -> None:
        self._answered.append(
            Answered(rule.name, rule.type, self._direction, f"skipped_{reason}", time.monotonic(), 0.0)
        )
        self._metrics.skipped(rule.name, reason)


def _ruled(finding: Finding, rule: Rule) -> Finding:
    return finding._replace(detector=rule.name, action=rule.action_on(finding.label))


def _load(rule: Rule) -> Bounded:
    try:
        made: Any = build_detector(rule.type, rule.wanted)
    except Exception as error:  # the edge of third-party engines: name the one that does not load
        raise DetectorFailed(rule.name, f"cannot be loaded ({type(error).__name__}: {error})") from error
    return Bounded(made, rule.name)
