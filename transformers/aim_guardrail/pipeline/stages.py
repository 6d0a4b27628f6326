"""The stages behind the inline one: batch detectors asked side by side or in turn, within the policy's budget.

A block ends it: what has not answered yet is cancelled, what has not been asked is not. A detector gets its own timeout
or what is left of the budget, whichever is less; what becomes of one that is late or fails is the policy's to say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aim_guardrail.detectors.base import Asked, BatchDetector, Finding, Misconfigured, Passage
from aim_guardrail.detectors.families import Wanted, build_detector
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.failures import DetectorFailed, DetectorTimedOut
from aim_guardrail.policy import Direction, Policy, Rule

Key = tuple[str, Wanted]
"""What tells detectors apart: their family, and what a rule wants of it."""


@dataclass(slots=True)
class Judgement:
    """What the stages came to.

    Attributes:
        findings: of each passage, those that count, with their rules' ids and actions.
        degraded: the rules that were not answered, where the policy lets that pass.
    """

    findings: list[list[Finding]]
    degraded: list[str] = field(default_factory=list)

    @property
    def blocked(self) -> bool:
        """Whether a finding blocks."""
        return any(finding.action == "block" for found in self.findings for finding in found)


class Stages:
    """A policy's batch detectors."""

    def __init__(self, policy: Policy, detectors: Mapping[Key, BatchDetector]) -> None:
        self._policy = policy
        self._detectors = dict(detectors)
        self._stages = {direction: policy.stages(direction) for direction in ("prompt", "answer")}

    @classmethod
    def load(cls, policy: Policy, reuse: Stages | None = None) -> Stages:
        """Load what the policy's rules want; blocking. What `reuse` has loaded already is shared.

        Raises:
            DetectorFailed: a detector cannot be loaded.
        """
        known = reuse._detectors if reuse is not None else {}
        detectors: dict[Key, BatchDetector] = {}
        for rule in (*policy.rules("prompt"), *policy.rules("answer")):
            key = rule.type, rule.wanted
            if not rule.is_inline and key not in detectors:
                detectors[key] = known[key] if key in known else _load(rule)
        return cls(policy, detectors)

    def watches(self, direction: Direction) -> bool:
        """Whether there is any stage for this direction."""
        return bool(self._stages[direction])

    def detector(self, rule: Rule) -> BatchDetector:
        """The one that a rule of the policy asks."""
        return self._detectors[rule.type, rule.wanted]

    async def close(self) -> None:
        """Give back what the detectors hold; none is shared with another policy then."""
        for detector in self._detectors.values():
            await detector.close()

    async def judge(
        self, direction: Direction, passages: Sequence[Passage], asked: Asked, metrics: Metrics
    ) -> Judgement:
        """Ask the stages in their order; no more once a finding blocks.

        Raises:
            DetectorFailed, DetectorTimedOut: and the policy fails closed.
        """
        judgement = Judgement([[] for _ in passages])
        for mode, rules in self._stages[direction]:
            groups = [rules] if mode == "parallel" else [(rule,) for rule in rules]
            for group in groups:
                await self._ask_all(group, passages, asked, metrics, judgement)
                if judgement.blocked:
                    return judgement
        return judgement

    async def _ask_all(
        self, rules: Sequence[Rule], passages: Sequence[Passage], asked: Asked, metrics: Metrics, judgement: Judgement
    ) -> None:
        """Ask all at once. The first that blocks, or fails closed, has the others cancelled."""
        tasks = [asyncio.ensure_future(self._ask(rule, passages, asked, metrics)) for rule in rules]
        try:
            for done in asyncio.as_completed(tasks):
                rule, found = await done
                if found is None:
                    judgement.degraded.append(rule.name)
                    continue
                for mine, theirs in zip(judgement.findings, found, strict=True):
                    mine += theirs
                if judgement.blocked:
                    return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(
        self, rule: Rule, passages: Sequence[Passage], asked: Asked, metrics: Metrics
    ) -> tuple[Rule, list[list[Finding]] | None]:
        """What counts of what a rule's detector finds; None where it gave no answer and the policy lets that pass."""
        left = asked.deadline_s - time.monotonic()
        if rule.timeout_ms is not None:
            left = min(left, rule.timeout_ms / 1000)
        detector = self.detector(rule)
        try:
            async with asyncio.timeout(left):
                found = await detector.scan_batch(passages, replace(asked, deadline_s=time.monotonic() + left))
        except TimeoutError:
            self._pass_or_raise(rule, rule.on_timeout or self._policy.on_timeout, "timeout")
            return rule, None
        except Misconfigured as error:
            metrics.detector_failed(rule.name, "misconfigured")
            raise DetectorFailed(rule.name, str(error)) from error
        except Exception as error:  # noqa: BLE001 - the edge of third-party engines: the policy decides
            self._pass_or_raise(rule, rule.on_error or self._policy.on_error, type(error).__name__)
            return rule, None
        return rule, [[self._settled(rule, f) for f in each if rule.applies(f)] for each in found]

    def _pass_or_raise(self, rule: Rule, then: str, reason: str) -> None:
        """A rule has no answer: whether that passes. Raises DetectorFailed, DetectorTimedOut."""
        if then == "closed" or rule.required:
            raise (DetectorTimedOut if reason == "timeout" else DetectorFailed)(rule.name, reason)

    def _settled(self, rule: Rule, finding: Finding) -> Finding:
        return replace(finding, detector=rule.name, action=rule.action_on(finding.label))


def _load(rule: Rule) -> BatchDetector:
    try:
        made: Any = build_detector(rule.type, rule.wanted)
    except Exception as error:  # the edge of third-party engines: name the one that does not load
        raise DetectorFailed(rule.name, f"cannot be loaded ({type(error).__name__}: {error})") from error
    return made  # type: ignore[no-any-return]
