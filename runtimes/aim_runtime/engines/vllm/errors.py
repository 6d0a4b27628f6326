"""vLLM's refusals as ours. One table for exceptions, error objects and error events of a stream."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from jinja2 import TemplateError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.exceptions import VLLMError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from aim_kserve.errors import BadRequest, NotFound, Overloaded, ServingError, Unavailable

LONGEST_VALUE = 80

#: What vLLM's serving objects raise because of a request. vLLM's own server maps the same raw exceptions to 4xx.
REFUSALS: tuple[type[Exception], ...] = (
    VLLMError,
    ValueError,  # pydantic's ValidationError too
    TypeError,
    OverflowError,
    NotImplementedError,
    TemplateError,  # a chat template refuses, e.g. roles that do not alternate
)

BY_STATUS: dict[int, type[ServingError]] = {404: NotFound, 429: Overloaded, 503: Unavailable}


def from_exception(error: BaseException) -> ServingError:
    """The refusal for one of :data:`REFUSALS`.

    An error while the engine takes a request in arrives wrapped and without its text: the cause tells.
    """
    if isinstance(error, ValidationError):
        return invalid_body(error)
    if isinstance(error, EngineDeadError):
        return dead()
    if isinstance(error, EngineGenerateError) and isinstance(error.__cause__, (ValueError, TypeError)):
        error = error.__cause__
    return from_response(create_error_response(error))


def dead() -> Unavailable:
    return Unavailable("the engine has died: its log has the cause", code="engine_dead")


def from_response(response: ErrorResponse) -> ServingError:
    """vLLM's error object. Its ``code`` repeats the HTTP status, so that ours says what OpenAI's would."""
    return _refusal(response.error.message, response.error.code, response.error.param)


def from_event(event: str) -> ServingError:
    """``data: {"error": …}``, vLLM's way to fail inside a stream."""
    info: dict[str, Any] = json.loads(event.removeprefix("data: "))["error"]
    if info["message"] == str(EngineDeadError()):
        return dead()
    return _refusal(info["message"], int(info["code"]), info.get("param"))


def _refusal(message: str, status: int, param: str | None) -> ServingError:
    kind = BY_STATUS.get(status, BadRequest if 400 <= status < 500 else ServingError)
    code = "model_not_found" if status == 404 and param == "model" else None
    return kind(message or "vLLM gave no reason", status=status, param=param, code=code)


def invalid_body(error: ValidationError) -> ServingError:
    """What is wrong with a body, in one problem.

    Where a field or a request may have several forms, each form reports its own problems. The field that most of
    them complain of is at fault; but a whole form's missing field says little, as the request may have another form.
    """
    problems = [(field_of(problem["loc"]), problem) for problem in error.errors(include_url=False)]
    complaints = Counter(param for param, _ in problems)

    def weakness(candidate: tuple[str | None, ErrorDetails]) -> tuple[int, bool]:
        param, problem = candidate
        missing = problem["type"] == "missing"
        return (-1 if missing and "." not in (param or "") else -complaints[param], missing)

    param, first = min(problems, key=weakness)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] != "missing":
        reason += f" (got {repr(first['input'])[:LONGEST_VALUE]})"
    return BadRequest(f"{param}: {reason}" if param else reason, param=param)


def field_of(location: tuple[int | str, ...]) -> str | None:
    """``messages.0.content``: without pydantic's wrappers and the class names of a union's branches."""
    named = tuple(part for part in location if not str(part)[:1].isupper())
    return clean_loc_for_param(named) or None


def raise_if_cancelled() -> None:
    """vLLM answers a cancelled request with "Client disconnected" and forgets the cancellation."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
