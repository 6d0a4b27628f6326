"""One request's checks: the slots of its bodies collected, judged, and the verdicts applied; and what they came to."""

from __future__ import annotations

import time
from typing import Any

from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.guard import DetectorFailed, Guard, Ruling
from aim_guardrail.pipeline.session import Session
from aim_guardrail.policy import Direction, Verdict
from aim_guardrail.slots.apply import apply
from aim_guardrail.slots.collect import collect, collect_json
from aim_guardrail.slots.places import FREE, Place
from aim_guardrail.slots.slot import Json, Slot, Slots, spelt
from aim_kserve.errors import ContentBlocked, Unavailable

_ORDER = {"allow": 0, "flag": 1, "redact": 2, "block": 3}


class Blocked(ContentBlocked):
    """The guardrail's refusal: 400, ``content_filter``, the families, never the value."""

    def __init__(self, where: str, verdict: Verdict) -> None:
        self.families = verdict.families
        named = ", ".join(verdict.families)
        super().__init__(
            f"{where or 'the text'} was blocked by the guardrail: it contains {named}",
            param=where or None,
            code="content_filter",
        )

    def headers(self) -> dict[str, str]:
        return {**super().headers(), **verdict_headers("block", self.families)}


class Screening:
    """The checks of one request: its session, and the strictest action and all families so far.

    Not thread-safe; may be used from one thread after another.
    """

    __slots__ = ("_keys", "_metrics", "actions", "context", "degraded", "families", "guard", "session")

    def __init__(self, guard: Guard, metrics: Metrics, context: RequestContext) -> None:
        self.guard = guard
        self.context = context
        self.session = Session()
        self.actions: dict[Direction, str] = {"prompt": "allow", "answer": "allow"}
        self.families: dict[str, None] = {}
        self.degraded: dict[str, None] = {}
        self._metrics = metrics
        self._keys = 0

    # --- outcome --------------------------------------------------------------------------------------------------

    @property
    def action(self) -> str:
        """The strictest action of prompt and answer."""
        return max(self.actions.values(), key=_ORDER.__getitem__)

    def headers(self) -> dict[str, str]:
        """What the client is told: ``x-guardrail-verdict``, ``-families`` and ``-degraded``."""
        return verdict_headers(self.action, tuple(sorted(self.families)), tuple(self.degraded))

    def log_fields(self) -> dict[str, Any]:
        """What the access log is told."""
        fields: dict[str, Any] = {"verdict": self.action}
        if self.families:
            fields["families"] = sorted(self.families)
        if self.degraded:
            fields["degraded"] = list(self.degraded)
        return fields

    def note(self, direction: Direction, verdict: Verdict) -> None:
        """Count a final verdict."""
        if _ORDER[verdict.action] > _ORDER[self.actions[direction]]:
            self.actions[direction] = verdict.action
        self.families.update(dict.fromkeys(verdict.families))
        self.degraded.update(dict.fromkeys(verdict.degraded))
        for detector in verdict.degraded:
            self._metrics.detector_failed(detector, "degraded")
        self._metrics.detected(direction, verdict, self.guard.policy)

    def failed(self, error: DetectorFailed) -> Unavailable:
        """A detector failed and the policy fails closed: what the client is told."""
        self._metrics.detector_failed(error.detector, "closed")
        return Unavailable(
            f"the guardrail's detector {error.detector!r} failed and nothing passes unchecked: ask again",
            code="guardrail_failed",
        )

    # --- checks ---------------------------------------------------------------------------------------------------

    def body(self, direction: Direction, body: Json, place: Place = FREE) -> bool:
        """Check every text in ``body``, whose root is ``place``, and put redacted ones in their places; True if
        ``body`` is another now.

        Raises:
            Blocked: a text may not pass.
            Unavailable: a detector failed and the policy fails closed.
            BadRequest: a prompt that cannot be checked (token ids, embeddings), or nested deeper than 200 levels.
            UpstreamFailed: an answer nested deeper than that.
        """
        slots = collect(direction, body, place)
        self._keys = slots.keys
        texts = self.texts(direction, slots)
        return apply(body, slots, texts, shadows=direction == "answer")

    def texts(self, direction: Direction, slots: Slots) -> list[str]:
        """Each slot's text as it may pass. Raises Blocked, Unavailable as :meth:`body`."""
        try:
            rulings = self.guard.judge(direction, slots, self.context)
        except DetectorFailed as error:
            raise self.failed(error) from error
        for ruling in rulings:
            self.note(direction, ruling.verdict)
            if ruling.verdict.blocked:
                raise Blocked(_where(slots, ruling, self._first(direction, ruling.verdict)), ruling.verdict)
        if not rulings:
            return [slot.text for slot in slots.items]
        return self.guard.redacted(direction, slots, rulings, self.session)

    def _first(self, direction: Direction, verdict: Verdict) -> int:
        """Where what blocks begins."""
        return next(f.start for f in verdict.findings if self.guard.blocks(direction, f))

    def text(self, direction: Direction, text: str, where: str = "") -> str:
        """One text alone as it may pass. Raises Blocked, Unavailable as :meth:`body`."""
        return self.texts(direction, Slots([Slot(text, (where,))]))[0]

    def json_text(self, direction: Direction, text: str) -> str:
        """A string that is JSON itself, such as a tool call's arguments, as it may pass. Raises as :meth:`body`."""
        box: Json = {"": text}
        slots = collect_json(direction, text)
        apply(box, slots, self.texts(direction, slots), shadows=False)
        shown: str = box[""]
        return shown

    def has_repeated_keys(self, body: bytes) -> bool:
        """Whether the JSON ``body`` last checked might give a key twice (never a false no).

        Our parser keeps the last of two, the predictor's may keep the first: such a body must not be sent on as it
        came. Each key has its colon, so a text with as many colons as keys were met has none twice.
        """
        return body.count(b":") != self._keys


def _where(slots: Slots, ruling: Ruling, first: int) -> str:
    """What a refusal names: the place of the slot where the code point ``first`` is, or of the key that it is."""
    parts = [slots.items[at] for at in ruling.slots]
    slot = parts[0]
    for slot in parts:
        if first < len(slot.text):
            break
        first -= len(slot.text)
    return spelt(slot.path[:-1] if slot.kind == "name" else slot.path)


class Timed:
    """``with``: what is done in it is one request's check of one direction, counted with its decision."""

    __slots__ = ("_direction", "_metrics", "_screening", "_started")

    def __init__(self, screening: Screening, metrics: Metrics, direction: Direction) -> None:
        self._screening, self._metrics, self._direction = screening, metrics, direction

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        decision = self._screening.actions[self._direction]
        if error is not None and not isinstance(error, Blocked):
            decision = "error"
        self._metrics.checked(self._direction, decision, time.perf_counter() - self._started)


def verdict_headers(action: str, families: tuple[str, ...], degraded: tuple[str, ...] = ()) -> dict[str, str]:
    """``x-guardrail-*`` response headers."""
    headers = {"x-guardrail-verdict": action}
    if families:
        headers["x-guardrail-families"] = ",".join(families)
    if degraded:
        headers["x-guardrail-degraded"] = ",".join(degraded)
    return headers
