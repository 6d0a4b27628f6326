"""One request's checks: the slots of its bodies collected, judged, and the verdicts applied; and what they came to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self, TypeVar

from aim_guardrail.detectors.base import Asked, Passage
from aim_guardrail.detectors.family import Reads
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.blocked import Blocked, place_named, verdict_headers
from aim_guardrail.pipeline.bounded import parts
from aim_guardrail.pipeline.cache import VerdictCache
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.course import Answered, Course, Witness
from aim_guardrail.pipeline.failures import DetectorFailed
from aim_guardrail.pipeline.guard import INLINE_CHARS, Guard
from aim_guardrail.pipeline.passages import as_read, passages_of, rulings_of
from aim_guardrail.pipeline.pictures import UNREAD, refusal
from aim_guardrail.pipeline.ruling import Ruling, as_sent, redacted
from aim_guardrail.pipeline.session import Session
from aim_guardrail.pipeline.stages import Judgement
from aim_guardrail.pipeline.usage import NOT_TOLD, usages_in
from aim_guardrail.pipeline.watch import Watch, outcome_of
from aim_guardrail.policy import Direction, Verdict, settle
from aim_guardrail.slots.apply import apply
from aim_guardrail.slots.collect import collect, collect_json
from aim_guardrail.slots.places import FREE, Place
from aim_guardrail.slots.slot import Json, Slot, Slots, spelt
from aim_kserve.errors import Unavailable

T = TypeVar("T")

Inline = Callable[[list[str]], Awaitable[None]]
"""Takes each slot's text as the inline stage lets it pass."""

_ORDER = {"allow": 0, "flag": 1, "redact": 2, "block": 3}


class Screening:
    """The checks of one request: its session, and the strictest action and all families so far.

    ``screen*`` are all checks; what has no such prefix is the inline stage alone, which a stream's pieces get.

    Not thread-safe; may be used from one thread after another.

    Attributes:
        prompt: the prompt's passages as they went on, for detectors that judge an answer by what was asked.
        answered: how each batch detector was, in both directions.
        verdicts: those noted so far.
        cache: what batch detectors found before; None: nothing is remembered.
        watch: who looks on.
        error: what ended it, where that was told the client in its answer.
        spent_s: seconds of checking.
        usage: tokens, as the predictor has told so far.
    """

    __slots__ = (
        *("_complete_s", "_keys", "_metrics", "actions", "answered", "cache", "context", "degraded", "error"),
        *("families", "guard", "prompt", "session", "spent_s", "usage", "verdicts", "watch"),
    )

    def __init__(
        self,
        guard: Guard,
        metrics: Metrics,
        context: RequestContext,
        cache: VerdictCache | None = None,
        witnesses: Sequence[Witness] = (),
    ) -> None:
        self.guard = guard
        self.cache = cache
        self.context = context
        self.session = Session()
        self.actions: dict[Direction, str] = {"prompt": "allow", "answer": "allow"}
        self.families: dict[str, None] = {}
        self.degraded: dict[str, None] = {}
        self.prompt: Sequence[Passage] = ()
        self.answered: list[Answered] = []
        self.verdicts: dict[Direction, list[Verdict]] = {"prompt": [], "answer": []}
        self.watch = Watch(witnesses)
        self.error: BaseException | None = None
        self.spent_s: dict[Direction, float] = {"prompt": 0.0, "answer": 0.0}
        self.usage = NOT_TOLD
        self._complete_s = time.monotonic()
        self._metrics = metrics
        self._keys = 0

    def complete(self) -> None:
        """The request's last byte has come: budgets begin. A slow sender's time is its own."""
        self._complete_s = time.monotonic()

    # --- who looks on ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            await self._tell(error or self.error)
        finally:
            self.watch.leave()

    async def turn(self) -> None:
        """The prompt has passed: what comes now is the answer's."""
        await self._tell(None)
        self.watch.direction = "answer"

    async def _tell(self, error: BaseException | None) -> None:
        if not self.watch:
            return
        direction = self.watch.direction
        outcome, code = outcome_of(self.actions[direction], error)
        course = Course(
            direction=direction,
            context=self.context,
            policy=self.guard.policy,
            action=self.actions[direction],
            outcome=outcome,
            error=code,
            verdicts=self.verdicts[direction],
            answered=[answered for answered in self.answered if answered.direction == direction],
            degraded=tuple(self.degraded),
            check_s=self.spent_s[direction],
            since_s=time.monotonic() - self.context.arrived_s,
            usage=self.usage,
        )
        await self.watch.tell(course)

    # --- outcome --------------------------------------------------------------------------------------------------

    @property
    def action(self) -> str:
        """The strictest action of prompt and answer."""
        prompt, answer = self.actions["prompt"], self.actions["answer"]
        return prompt if _ORDER[prompt] > _ORDER[answer] else answer

    def headers(self) -> dict[str, str]:
        """What the client is told: ``x-guardrail-verdict`` and its kind."""
        headers = verdict_headers(self.action, tuple(sorted(self.families)), tuple(self.degraded))
        spent_ms = sum(self.spent_s.values()) * 1000
        return {**headers, "x-guardrail-duration-ms": f"{spent_ms:.2f}", **self.policy_header()}

    def policy_header(self) -> dict[str, str]:
        """By which policy, ``NAME/VERSION``: all there is to say of what was not judged."""
        return {"x-guardrail-policy": self.guard.policy.label}

    def log_fields(self) -> dict[str, Any]:
        """What the access log is told."""
        fields: dict[str, Any] = {"verdict": self.action, "policy": self.guard.policy.label}
        if self.families:
            fields["families"] = sorted(self.families)
        if self.degraded:
            fields["degraded"] = list(self.degraded)
        return fields

    def note(self, direction: Direction, verdict: Verdict) -> None:
        """Count a final verdict."""
        self.verdicts[direction].append(verdict)
        if _ORDER[verdict.action] > _ORDER[self.actions[direction]]:
            self.actions[direction] = verdict.action
        self.families.update(dict.fromkeys(verdict.families))
        self.degraded.update(dict.fromkeys(verdict.degraded))
        for detector in verdict.degraded:
            self._metrics.detector_failed(detector, "degraded")
        self._metrics.detected(verdict)

    def heard(self, payload: Any) -> None:
        """An answer, or an event of one, as the predictor sent it: what it says of tokens."""
        for usage in usages_in(payload):
            self.usage = self.usage.then(usage)

    def failed(self, error: DetectorFailed) -> Unavailable:
        """A detector failed and the policy fails closed: what the client is told."""
        self._metrics.detector_failed(error.detector, "closed")
        return _unavailable(error)

    # --- checks ---------------------------------------------------------------------------------------------------

    async def screen(
        self, direction: Direction, body: Json, place: Place = FREE, size: int = 0, inline: Inline | None = None
    ) -> bool:
        """Check every text in ``body``, whose root is ``place``, and put redacted ones in their places; True if
        ``body`` is another now. ``size``: roughly how many bytes it has; large ones are checked in a thread. ``inline``
        is called with what the inline stage lets pass, if others follow.

        Raises:
            Blocked: a text may not pass.
            Unavailable: a detector failed and the policy fails closed.
            BadRequest: a prompt that cannot be checked (token ids, embeddings), or nested deeper than 200 levels.
            UpstreamFailed: an answer nested deeper than that.
        """
        if not self.guard.stages.watches(direction):
            changed = await by_size(size, self.body, direction, body, place)
        else:
            slots, texts, inline_rulings = await by_size(size, self._collected, direction, body, place)
            if inline is not None:
                await inline(texts)
            texts = await self._judged(direction, slots, texts, inline_rulings)
            changed = await by_size(size, apply, body, slots, texts, direction == "answer")
        if direction == "answer" and self.session.vault:
            changed = await by_size(size, self.session.vault.restore_in, body) or changed
        return changed

    async def screen_behind(self, direction: Direction, body: Json, place: Place = FREE, size: int = 0) -> bool:
        """The stages behind the inline one of :meth:`screen`, for what that has let pass."""
        slots = await by_size(size, collect, direction, body, place)
        texts = await self._judged(direction, slots, [slot.text for slot in slots.items])
        return await by_size(size, apply, body, slots, texts, direction == "answer")

    async def screen_texts(self, direction: Direction, slots: Slots, size: int | None = None) -> list[str]:
        """Each slot's text as it may pass; ``size`` as in :meth:`screen`. Raises Blocked, Unavailable as that."""
        self._refuse_pictures(direction, slots)
        if size is None:
            size = sum(len(slot.text) for slot in slots.items)
        texts = await self._judged(direction, slots, *await by_size(size, self._inline, direction, slots))
        return texts if direction == "prompt" else [self.session.vault.restored(text) for text in texts]

    def body(self, direction: Direction, body: Json, place: Place = FREE) -> bool:
        """The inline stage of :meth:`screen`."""
        slots, texts, _ = self._collected(direction, body, place)
        return apply(body, slots, texts, direction == "answer")

    def texts(self, direction: Direction, slots: Slots) -> list[str]:
        """The inline stage of :meth:`screen_texts`."""
        return self._inline(direction, slots)[0]

    def _inline(self, direction: Direction, slots: Slots) -> tuple[list[str], list[Ruling]]:
        """Each slot's text as the inline stage lets it pass, and why. Raises Blocked, Unavailable."""
        if direction == "prompt" and self.guard.policy.restored:
            self.session.vault.reserve(as_read(slots))
        try:
            rulings = self.guard.judge(direction, slots)
        except DetectorFailed as error:
            raise self.failed(error) from error
        self.watch.keep(direction, slots, rulings)
        if not rulings:
            return [slot.text for slot in slots.items], rulings
        self._rule(direction, slots, rulings)
        return self.guard.redacted(slots, rulings, self.session, direction), rulings

    def _collected(self, direction: Direction, body: Json, place: Place) -> tuple[Slots, list[str], list[Ruling]]:
        slots = collect(direction, body, place)
        self._refuse_pictures(direction, slots)
        self._keys = slots.keys
        return slots, *self._inline(direction, slots)

    async def _judged(
        self, direction: Direction, slots: Slots, texts: list[str], inline: Sequence[Ruling] = ()
    ) -> list[str]:
        """The texts that the inline stage let pass by those rulings, as the stages behind it let them pass."""
        if not self.guard.stages.watches(direction):
            return texts
        size = len(texts) * 16
        runs, passages = await by_size(size, passages_of, direction, slots, texts)
        if direction == "prompt":
            self.prompt = [*self.prompt, *passages]
        judgement = await self.ask_stages(direction, passages, self._deadline_s(direction))
        rulings = await by_size(size, rulings_of, runs, judgement.findings)
        async for part in parts(await by_size(size, as_sent, rulings, inline, texts)):
            self._rule(direction, slots, part)
        await self._judge_pictures(direction, slots)
        kept = self.guard.policy.restored if direction == "prompt" else frozenset[str]()
        return await by_size(size, redacted, texts, rulings, self.session, kept)

    async def ask_stages(
        self, direction: Direction, passages: Sequence[Passage], deadline_s: float, reads: Reads = "text"
    ) -> Judgement:
        """What the stages behind the inline one come to, by ``deadline_s`` (``time.monotonic``). Raises Unavailable."""
        asked = Asked(deadline_s, self.prompt if direction == "answer" else (), self.context.tenant or "")
        try:
            judgement = await self.guard.stages.judge(
                direction, passages, asked, self._metrics, self.answered, self.cache, reads
            )
        except DetectorFailed as error:
            raise _unavailable(error) from error
        self.degraded.update(dict.fromkeys(judgement.degraded))
        return judgement

    def _deadline_s(self, direction: Direction) -> float:
        """Of a prompt all checks have the budget together, from when it had come; an answer's begins when it has."""
        began_s = self._complete_s if direction == "prompt" else time.monotonic()
        return began_s + self.guard.policy.budget_s

    def _refuse_pictures(self, direction: Direction, slots: Slots) -> None:
        """Raises Blocked: the policy does not even have pictures looked at."""
        refused = refusal(self.guard.policy, direction, slots.pictures)
        if refused is not None:
            self.note(direction, refused.verdict)
            raise Blocked(spelt(refused.path), refused.verdict, refused.reason)

    async def _judge_pictures(self, direction: Direction, slots: Slots) -> None:
        """Raises Blocked, Unavailable."""
        if self.guard.policy.images != "classify" or not slots.pictures:
            return
        passages = [Passage(slot.text, direction, slot.role) for slot in slots.pictures]
        judgement = await self.ask_stages(direction, passages, self._deadline_s(direction), "picture")
        for slot, found in zip(slots.pictures, judgement.findings, strict=True):
            verdict = settle(found)
            if found:
                self.note(direction, verdict)
            if verdict.blocked:
                raise Blocked(spelt(slot.path), verdict, UNREAD.get(verdict.findings[0].rule_id))

    def _rule(self, direction: Direction, slots: Slots, rulings: Sequence[Ruling]) -> None:
        """Note the rulings. Raises Blocked."""
        for ruling in rulings:
            self.note(direction, ruling.verdict)
            if ruling.verdict.blocked:
                first = next(f.start for f in ruling.verdict.findings if f.action == "block")
                raise Blocked(place_named(slots, ruling, first), ruling.verdict)

    def text(self, direction: Direction, text: str, where: str = "") -> str:
        """One text alone as it may pass, by the inline stage. Raises Blocked, Unavailable as :meth:`screen`."""
        return self.texts(direction, Slots([Slot(text, (where,))]))[0]

    def json_text(self, direction: Direction, text: str) -> str:
        """A string that is JSON itself, such as a tool call's arguments, as it may pass, by the inline stage.

        Raises as :meth:`screen`.
        """
        box: Json = {"": text}
        slots = collect_json(direction, text)
        apply(box, slots, self.texts(direction, slots), False)
        shown: str = box[""]
        return shown

    def has_repeated_keys(self, body: bytes, *, around: int = 0) -> bool:
        """Whether the JSON ``body`` last checked might give a key twice (never a false no).

        Our parser keeps the last of two, the next one's may keep the first: such a body must not be sent on as it
        came. Each key has its colon, so a text with as many colons as keys were met has none twice.

        Args:
            around: keys that were put around it to have it checked.
        """
        return body.count(b":") != self._keys - around


def _unavailable(error: DetectorFailed) -> Unavailable:
    return Unavailable(f"the guardrail's detector {error.detector!r} {error.told}", code=error.code)


async def by_size(size: int, check: Callable[..., T], *args: Any) -> T:
    """What is small is checked at once, what is large in a thread."""
    return check(*args) if size <= INLINE_CHARS else await asyncio.to_thread(check, *args)
