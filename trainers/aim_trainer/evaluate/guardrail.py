"""Answers through a running guardrail: `POST /filter/batch` of aim_guardrail."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any, NamedTuple

from aim_trainer.errors import StoreError

_AT_ONCE = 16  # texts in a request; the guardrail takes up to 256
_TIMEOUT_S = 60.0
_PAUSES_S = (0.5, 2.0)
_LONGEST_ANSWER_BYTES = 64 << 20


class Asked(NamedTuple):
    """A question and the answer that a model gave."""

    prompt: str
    answer: str


class Ruling(NamedTuple):
    """What the guardrail makes of an answer: allow, flag, redact or block, and the families it found."""

    action: str
    families: tuple[str, ...]


def rulings(url: str, policy: str | None, asked: Sequence[Asked]) -> list[Ruling]:
    """One for each, in order.

    Raises StoreError: the guardrail is away, refuses, judges by another policy than `policy`, or could not judge one;
    no answer that was not judged counts as a good one.
    """
    found: list[Ruling] = []
    for first in range(0, len(asked), _AT_ONCE):
        some = asked[first : first + _AT_ONCE]
        items = [{"text": each.answer, "direction": "answer", "prompt": each.prompt} for each in some]
        results = _ask(url.rstrip("/") + "/filter/batch", {"items": items})
        if len(results) != len(some):
            raise _failed(url, f"{len(results)} results for {len(some)} texts")
        found += [_ruling(url, policy, result) for result in results]
    return found


def _ruling(url: str, policy: str | None, result: Any) -> Ruling:
    if "error" in result:
        raise _failed(url, f"could not judge an answer: {_message(result)}")
    if policy is not None and result["policy"] != policy:
        raise StoreError(
            f"{url}: judges by policy {result['policy']!r}, not {policy!r}",
            field="spec.validation.guardrail.policy",
            value=policy,
            remedy="start the guardrail with that policy, or name the one it has",
        )
    return Ruling(result["action"], tuple(result["families"]))


def _ask(url: str, body: dict[str, Any]) -> list[Any]:
    """The results. A guardrail that is away is asked again, twice."""
    for pause_s in (*_PAUSES_S, None):
        try:
            return _once(url, body)
        except urllib.error.HTTPError as problem:
            if problem.code not in (429, 502, 503, 504) or pause_s is None:
                raise _failed(url, f"answered {problem.code}: {_said(problem)}") from None
        except (OSError, HTTPException) as problem:
            if pause_s is None:
                reason = getattr(problem, "reason", problem)
                raise _failed(url, f"the guardrail is away: {reason}") from None
        except (ValueError, KeyError, TypeError) as problem:
            raise _failed(url, f"not an answer of aim_guardrail's: {problem}") from None
        time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


_REMEDY = "start `aim-guardrail --model_name m --policy FILE`, and name its address under spec.validation.guardrail.url"


def _once(url: str, body: dict[str, Any]) -> list[Any]:
    if not url.startswith(("http://", "https://")):
        raise _failed(url, "neither http:// nor https://")
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        results = json.loads(answer.read(_LONGEST_ANSWER_BYTES))["results"]
    if not all("error" in each or {"action", "families", "policy"} <= set(each) for each in results):
        raise ValueError("results of another form")
    return list(results)


def _failed(url: str, why: str) -> StoreError:
    return StoreError(f"{url}: {why}", field="spec.validation.guardrail.url", value=url, remedy=_REMEDY)


def _message(body: Any) -> str:
    try:
        return str(body["error"]["message"])[:500]
    except (KeyError, TypeError):
        return "it gave no reason"


def _said(problem: urllib.error.HTTPError) -> str:
    try:
        return _message(json.loads(problem.read(65_536)))
    except (ValueError, OSError):
        return problem.reason
