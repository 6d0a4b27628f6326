"""One request's way past the limits: when it arrives, once its body is known, and what it has used in the end.

    with Visit(traffic, screening, log) as visit:
        await visit.arrive()                # before its body is read; TrafficRefused
        await visit.weigh(body)             # what it asks for; TrafficRefused
        visit.sent()                        # the model computes
        visit.answered(answer)
        visit.meter.events(events)          # what has come of the answer

Tokens are reserved on an estimate; in the end what was used is paid for, and the rest is given back.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Self

from aim_guardrail.detectors.base import Finding
from aim_guardrail.pipeline.failures import DetectorFailed
from aim_guardrail.pipeline.screening import Screening, by_size
from aim_guardrail.policy import Rule, Verdict, settle
from aim_guardrail.traffic import refusals
from aim_guardrail.traffic.business_hours import opens_in_s
from aim_guardrail.traffic.counters import Booking, CountersAway, Taken
from aim_guardrail.traffic.estimate import Asked, answers_with_text, asked, tokens_of
from aim_guardrail.traffic.gate import Traffic
from aim_guardrail.traffic.limits import Limit, caller_of, limits_of, options_of
from aim_guardrail.traffic.meter import Meter, tapped
from aim_guardrail.traffic.refusals import TrafficRefused
from aim_guardrail.traffic.windows import Charge
from aim_guardrail.upstream import Answer
from aim_kserve.access import RequestLog
from aim_kserve.errors import BadRequest
from aim_kserve.http import parse_object


class Visit:
    """One request's.

    Args:
        log: where the further headers of its answer go.

    Attributes:
        counts_tokens: whether the answer is to be metered.
        meter: what has come of the answer.
    """

    __slots__ = (
        "_asked",
        "_bookings",
        "_caller",
        "_limits",
        "_log",
        "_rules",
        "_screening",
        "_stage",
        "_traffic",
        "counts_tokens",
        "meter",
    )

    def __init__(self, traffic: Traffic, screening: Screening, log: RequestLog) -> None:
        self._traffic, self._screening, self._log = traffic, screening, log
        self._rules = screening.guard.policy.traffic
        self._limits = tuple(limits_of(self._rules)) if self._rules else ()
        self.counts_tokens = any(limit.unit == "tokens" for limit in self._limits)
        self._caller = caller_of(screening.context) if self._limits else ""
        self._asked = Asked()
        self._bookings: list[tuple[Limit, Booking]] = []
        self._stage = "held"  # → sent → answered; refused
        self.meter = Meter(0)

    # --- the way there --------------------------------------------------------------------------------------------

    async def arrive(self) -> None:
        """Judge by what is known without a body.

        Raises:
            TrafficRefused: it may not pass.
            Unavailable: what decides cannot be asked, and the policy fails closed.
        """
        if not self._rules:
            return
        for rule in self._rules:
            self._judge_hours(rule)
            self._judge_country(rule)
            self._judge_size(rule, self._screening.context.body_bytes)
        known = self._screening.context.model is not None
        await self._charge(
            [limit for limit in self._limits if limit.unit == "requests" and (known or not limit.needs_model)]
        )

    async def weigh(self, body: bytes, endpoint: str = "") -> None:
        """Judge by what it asks for. ``endpoint``: the route's end. Raises as :meth:`arrive`."""
        if not self._rules:
            return
        needs = self.counts_tokens or any(limit.needs_model for limit in self._limits)
        needs = needs or any(options_of(rule).context_tokens for rule in self._rules)
        await self.weigh_asked(await by_size(len(body), _read, body) if needs else Asked(), len(body), endpoint)

    async def weigh_asked(self, asked: Asked, size: int, endpoint: str = "") -> None:
        """The same for a body of ``size`` bytes that has been read. Raises as :meth:`arrive`."""
        self._asked, self.meter = asked, Meter(asked.prompt)
        for rule in self._rules:
            self._judge_size(rule, size)
            self._judge_context(rule, asked.prompt)
        late = self._screening.context.model is None
        await self._charge(
            [
                limit
                for limit in self._limits
                if (limit.unit == "tokens" and size) or (limit.unit == "requests" and late and limit.needs_model)
            ],
            endpoint,
        )

    def sent(self) -> None:
        """The predictor has been asked: whatever it does now is paid for, unless it fails."""
        self._stage = "sent"

    def answered(self, answer: Answer) -> None:
        """The predictor has begun to answer. What it says of limits of its own goes no further where we set some."""
        self.has_answered(answer.status)
        if self._limits:
            answer.headers = [item for item in answer.headers if not item[0].startswith(b"x-ratelimit-")]

    def chunks(self, answer: Answer) -> AsyncIterator[bytes]:
        """The answer as it comes, metered where tokens are limited."""
        if not self.counts_tokens:
            return answer.chunks()
        return tapped(answer.chunks(), self.meter, answer.header(b"content-type").strip().lower())

    def has_answered(self, status: int) -> None:
        """The same of an answer that is not HTTP."""
        self._stage = "answered" if status < 400 else "refused"
        if status < 400 and self._limits:
            self._traffic.learn_model(self._named())

    def failed(self) -> None:
        """It did not come to an answer of the predictor's."""
        if self._stage == "sent":
            self._stage = "refused"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._log.fields.update(self._screening.log_fields())
        self._settle()

    def _settle(self) -> None:
        """Tokens by what was used, however it ended: a client that left before its answer was complete has used it."""
        if not self._bookings:
            return
        used = self.meter.total if self._stage in ("sent", "answered") else 0
        if self._stage == "answered" and self.meter.is_told:
            self._traffic.answer_length.learn(self.meter.answer)
        self._traffic.counters.settle(
            [(booking, used - booking.charge.cost) for limit, booking in self._bookings if limit.unit == "tokens"]
        )
        self._bookings = []

    # --- rates ----------------------------------------------------------------------------------------------------

    async def _charge(self, limits: Sequence[Limit], endpoint: str = "") -> None:
        """Those that block are taken together or not at all; each other for itself."""
        hard = [limit for limit in limits if limit.rule.action_on(limit.label) == "block"]
        soft = [[limit] for limit in limits if limit.rule.action_on(limit.label) != "block"]
        for group in [hard, *soft] if hard else soft:
            try:
                taken = await self._traffic.counters.take([self._priced(limit, endpoint) for limit in group])
            except CountersAway as error:
                self._unjudged({limit.rule.name: limit.rule for limit in group}.values(), "redis", error)
                continue
            self._tell(group, taken)
            if taken.fits:
                self._bookings += zip(group, taken.bookings, strict=True)
                for limit in group:
                    self._traffic.metrics.limited(limit.name, "allow")
            else:
                self._exceeded(group, taken)

    def _priced(self, limit: Limit, endpoint: str) -> Charge:
        cost = 1
        if limit.unit == "tokens":
            cost = self._asked.prompt + (self._asked.answer or 0)
            if self._asked.answer is None and answers_with_text(endpoint):
                cost += min(self._traffic.answer_length.tokens, max(0, limit.amount - cost))
        model = self._traffic.counted_model(self._named())
        return limit.charge(self._traffic.service, self._caller, model, cost)

    def _named(self) -> str:
        return self._screening.context.model or self._asked.model or self._traffic.service

    def _exceeded(self, group: Sequence[Limit], taken: Taken) -> None:
        """Raises TrafficRefused where the limits block."""
        waits = [stand.wait_ms for _, stand in taken.stands]
        wait_ms = -1 if -1 in waits else max(waits)
        at = waits.index(wait_ms)
        limit, (charge, stand) = group[at], taken.stands[at]
        error = refusals.rate_exceeded(limit.unit, limit.span, limit.per, charge, stand, wait_ms)
        self._found(limit.rule, limit.label, limit.name, error)

    def _tell(self, group: Sequence[Limit], taken: Taken) -> None:
        for unit in ("requests", "tokens"):
            stands = [pair for limit, pair in zip(group, taken.stands, strict=True) if limit.unit == unit]
            if stands:
                self._log.headers.update(refusals.headers(unit, stands))

    # --- the rest -------------------------------------------------------------------------------------------------

    def _judge_hours(self, rule: Rule) -> None:
        hours = options_of(rule).hours
        if hours is None:
            return
        wait_s = opens_in_s(hours, self._traffic.counters.now_s())
        days = ", ".join(hours.days)
        said = f"requests are served from {hours.opens} to {hours.closes} ({hours.time_zone}; {days})"
        self._judged(rule, "HOURS", "hours", not wait_s, TrafficRefused(said, 403, "outside_hours", wait_s or None))

    def _judge_country(self, rule: Rule) -> None:
        countries = options_of(rule).countries
        if countries is None:
            return
        if self._traffic.geo is None:
            self._unjudged([rule], "geo_database")
            return
        country = self._traffic.geo.country(self._screening.context.client)
        said = f"requests from {country or 'an address of no known country'} are not served"
        error = TrafficRefused(said, 403, "country_not_allowed")
        self._judged(rule, "GEO", "countries", countries.permits(country), error)

    def _judge_size(self, rule: Rule, size: int | None) -> None:
        most = options_of(rule).upload_bytes
        if most is None or size is None:
            return
        said = f"the body has {size} bytes and may have {most}: shorten it"
        self._judged(rule, "UPLOAD_SIZE", "upload_bytes", size <= most, TrafficRefused(said, 413, "upload_too_large"))

    def _judge_context(self, rule: Rule, tokens: int) -> None:
        most = options_of(rule).context_tokens
        if most is None:
            return
        said = f"the prompt has about {tokens} tokens and may have {most}: shorten it"
        error = TrafficRefused(said, 400, "context_length_exceeded")
        self._judged(rule, "CONTEXT_LENGTH", "context_tokens", tokens <= most, error)

    def _judged(self, rule: Rule, label: str, name: str, passes: bool, error: TrafficRefused) -> None:
        if passes:
            self._traffic.metrics.limited(name, "allow")
        else:
            self._found(rule, label, name, error)

    def _found(self, rule: Rule, label: str, name: str, error: TrafficRefused) -> None:
        """A limit is passed: note it. Raises ``error`` where the rule blocks."""
        action = rule.action_on(label)
        metrics = self._traffic.metrics
        metrics.limited(name, action)
        finding = Finding("traffic", label, 0, 0, 1.0, name, rule.name, action)
        self._screening.note("prompt", settle([finding]))
        if action == "block":
            self._give_back()
            self._count("block")
            error.told = self._screening.headers()
            raise error

    def _count(self, decision: str) -> None:
        """The request ends here: its prompt is not checked any further."""
        spent_s = time.monotonic() - self._screening.context.arrived_s
        self._traffic.metrics.checked("prompt", self._screening.guard.policy.use_case, decision, spent_s)

    def _give_back(self) -> None:
        """A request that a limit refuses has used nothing of the others."""
        self._traffic.counters.settle([(booking, -booking.charge.cost) for _, booking in self._bookings])
        self._bookings = []

    def _unjudged(self, rules: Iterable[Rule], reason: str, cause: Exception | None = None) -> None:
        """What decides cannot be asked: the policy does. Raises Unavailable."""
        policy, metrics = self._screening.guard.policy, self._traffic.metrics
        for rule in rules:
            closed = rule.required or (rule.on_error or policy.on_error) == "closed"
            if reason == "redis":
                metrics.counted_without_redis("closed" if closed else "open")
            if closed:
                self._give_back()
                self._count("error")
                raise self._screening.failed(DetectorFailed(rule.name, reason)) from cause
            self._screening.note("prompt", Verdict(degraded=(rule.name,)))


def _read(body: bytes) -> Asked:
    """What is asked for. A body that is no JSON object counts by its bytes: it may still be read as one."""
    try:
        return asked(parse_object(body)) if body else Asked()
    except BadRequest:
        return Asked(tokens_of(len(body)))
