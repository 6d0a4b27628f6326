"""A request's span, and one for each batch detector that judged it; made when it has ended.

Names: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/; ours begin with ``guardrail.``. No text is ever
in a span.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.course import Answered, Course
from aim_guardrail.pipeline.ruling import Ruling
from aim_guardrail.policy import Direction
from aim_guardrail.settings import GuardrailSettings
from aim_guardrail.slots.slot import Slots
from aim_kserve.access import RequestLog, current_log
from aim_kserve.errors import StartupError
from aim_kserve.otlp_endpoint import endpoint, not_installed

if TYPE_CHECKING:
    from aim_kserve.otlp import Phase, Spans

_OPERATIONS = {
    "chat/completions": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    "messages": "chat",
    "responses": "chat",
}
_FAILED = frozenset(["timeout", "error", "misconfigured"])
#: Of one request: a long stream is judged window by window.
MOST_DETECTORS = 128


@contextmanager
def tracing(settings: GuardrailSettings) -> Iterator[list[Tracing]]:
    """``with``: the tracing that these settings want, none or one.

    Raises:
        StartupError: spans are to be sent and OpenTelemetry is not installed.
    """
    url = endpoint(settings.otlp_endpoint)
    if url is None:
        yield []
        return
    try:
        from aim_kserve.otlp import Spans
    except ImportError as error:
        raise StartupError(not_installed(url, error.name)) from error
    spans = Spans(url, "aim-guardrail", version("aim-kserve"))
    try:
        yield [Tracing(spans, settings.model_name)]
    finally:
        spans.close()


class Tracing:
    """Makes a witness of each request. ``model``: what is asked where the route does not say."""

    def __init__(self, spans: Spans, model: str) -> None:
        self._spans, self._model = spans, model

    def __call__(self, context: RequestContext) -> Traced:
        log = current_log()
        self._spans.begin(log)
        return Traced(self._spans, log, context, self._model)


class Traced:
    """The witness of one request, or of one of several parts of it: its spans go out when it is over."""

    hears = keeps = False

    def __init__(self, spans: Spans, log: RequestLog, context: RequestContext, model: str) -> None:
        self._spans, self._log, self._context, self._model = spans, log, context, model
        self._courses: list[Course] = []

    def content(self, direction: Direction, data: bytes) -> None:
        """It hears nothing."""

    def slots(self, direction: Direction, slots: Slots, rulings: Sequence[Ruling]) -> None:
        """It keeps nothing."""

    async def ended(self, course: Course) -> None:
        """Remember what a direction came to."""
        self._courses.append(course)

    def left(self) -> None:
        """Send the spans: this never waits."""
        from aim_kserve.otlp import Phase

        now_ns = time.time_ns() - int(time.monotonic() * 1e9)  # what turns a monotonic time into one since 1970
        began_ns = now_ns + int(self._context.arrived_s * 1e9)
        model = self._context.model or self._model
        operation = operation_of(self._context.route)
        errors = [course.error for course in self._courses if course.error is not None]
        span = Phase(
            f"guardrail {operation} {model}", began_ns, time.time_ns(), self._attributes(operation, model), bool(errors)
        )
        answered = [answered for course in self._courses for answered in course.answered][:MOST_DETECTORS]
        self._spans.request(self._log, span, [_detector(each, now_ns) for each in answered])

    def _attributes(self, operation: str, model: str) -> dict[str, str | int | float | bool]:
        found: dict[str, str | int | float | bool] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
            "aim.request_id": self._log.request_id,
        }
        for course in self._courses:
            found["guardrail.policy"] = course.policy.label
            found[f"guardrail.{course.direction}.outcome"] = course.outcome
            found[f"guardrail.{course.direction}.check_seconds"] = course.check_s
            if families := sorted({family for verdict in course.verdicts for family in verdict.families}):
                found[f"guardrail.{course.direction}.families"] = ",".join(families)
            if course.error is not None:
                found["error.type"] = course.error
            told = {"input_tokens": course.usage.prompt, "output_tokens": course.usage.answer}
            found |= {f"gen_ai.usage.{name}": count for name, count in told.items() if count is not None}
        return found


def operation_of(route: str) -> str:
    """``gen_ai.operation.name`` of a route; ``infer``, which the conventions do not know, of any other."""
    return _OPERATIONS.get(route.removeprefix("/openai").removeprefix("/v1/"), "infer")


def _detector(answered: Answered, now_ns: int) -> Phase:
    from aim_kserve.otlp import Phase

    began_ns = now_ns + int(answered.began_s * 1e9)
    attributes = {
        "guardrail.detector": answered.rule,
        "guardrail.family": answered.family,
        "guardrail.direction": answered.direction,
        "guardrail.result": answered.result,
    }
    ended_ns = began_ns + int(answered.seconds * 1e9)
    return Phase(f"detector {answered.rule}", began_ns, ended_ns, attributes, answered.result in _FAILED)
