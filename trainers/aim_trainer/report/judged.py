"""`evaluation.json` in the words of the page. It may be of another version, or by anybody: what is odd is left out."""

from __future__ import annotations

import math
import re
from typing import Any

from .chart import number

_MOST_SAMPLES, _MOST_REGRESSIONS, _LONGEST = 8, 100, 1500
_NAMES = {
    "eval_loss": "Held-out loss",
    "perplexity": "Perplexity",
    "exact_match": "Exact match",
    "rouge_l": "ROUGE-L",
    "regressions": "Regression prompts kept",
    "guardrail_blocked": "Blocked by the guardrail",
    "accuracy": "Accuracy",
    "f1": "F1, macro",
}
_ROLE = re.compile(r"^(system|developer|user|assistant|tool|model)$\n?", re.MULTILINE)
_SHARES = frozenset({"exact_match", "rouge_l", "regressions", "guardrail_blocked", "accuracy", "f1"})
_LESS_IS_BETTER = frozenset({"eval_loss", "perplexity", "guardrail_blocked"})
_BOUNDS = {"min": "at least", "max": "at most", "minDelta": "change at least", "maxDelta": "change at most"}


def comparison(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each measure of either model."""
    base, tuned, of = (_part(evaluation, key) for key in ("base", "tuned", "n"))
    return [_row(metric, base.get(metric), tuned.get(metric), of.get(metric)) for metric in {**base, **tuned}]


def gates(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each bound."""
    return [_gate(gate) for gate in _list(evaluation, "gates")]


def samples(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The first answers, side by side."""
    every = _list(evaluation, "samples")
    shown = [_sample(each) for each in every[:_MOST_SAMPLES]]
    return {"samples": shown, "samples_about": f"To {len(shown)} held-out rows, chosen by chance before training."}


def regressions(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Those that are wrong first."""
    every = _list(evaluation, "regressions")
    wrong = sorted(every, key=lambda each: each.get("tuned_holds") is True)
    shown = [_texts(each) | {"holds": each.get("tuned_holds") is True} for each in wrong[:_MOST_REGRESSIONS]]
    right = sum(each.get("tuned_holds") is True for each in every)
    return {"regressions": shown, "regressions_about": f"{right} of {len(every)} answered as they must be."}


def name_of(metric: str) -> str:
    """As a person calls it."""
    return _NAMES.get(metric, metric)


def _row(metric: str, base: Any, tuned: Any, of: Any) -> dict[str, str]:
    change, mood = "", ""
    if _is_number(base) and _is_number(tuned):
        delta = tuned - base
        change = "none" if delta == 0 else f"{'+' if delta > 0 else '−'}{_change(metric, abs(delta))}"
        if delta:
            mood = "good-text" if (delta < 0) == (metric in _LESS_IS_BETTER) else "bad-text"
    rows = f"{of:,}" if isinstance(of, int) else ""
    return {
        "name": name_of(metric),
        "base": _value(metric, base),
        "tuned": _value(metric, tuned),
        "change": change,
        "mood": mood,
        "of": rows,
    }


def _gate(gate: dict[str, Any]) -> dict[str, str]:
    metric, bound, passed = str(gate.get("metric")), str(gate.get("bound")), gate.get("passed") is True
    said = _change if bound.endswith("Delta") else _value
    return {
        "name": name_of(metric),
        "bound": f"{_BOUNDS.get(bound, bound)} {said(metric, gate.get('limit'))}",
        "value": said(metric, gate.get("value")),
        "mood": "good" if passed else "bad",
        "said": "kept" if passed else "failed",
        "reason": str(gate.get("reason") or ""),
    }


def _value(metric: str, value: Any) -> str:
    if not _is_number(value):
        return "unknown"
    return f"{100 * value:.1f} %" if metric in _SHARES else number(value)


def _change(metric: str, value: Any) -> str:
    return f"{100 * value:.1f} points" if metric in _SHARES and _is_number(value) else _value(metric, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _part(evaluation: dict[str, Any], key: str) -> dict[str, Any]:
    found = evaluation.get(key)
    return found if isinstance(found, dict) else {}


def _list(evaluation: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = evaluation.get(key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _sample(each: dict[str, Any]) -> dict[str, Any]:
    texts = _texts(each)
    return texts | {"blocked": each.get("blocked") is True, "turns": _turns(texts["prompt"])}


def _turns(prompt: str) -> list[tuple[str, str]]:
    """(role, text) of each turn, where a line names a role alone, as chat templates have it; else ("", the prompt)."""
    first, *rest = _ROLE.split(prompt)
    turns = [("", first.strip())] if first.strip() else []
    return turns + [(role, text.strip()) for role, text in zip(rest[::2], rest[1::2], strict=True)]


def _texts(each: dict[str, Any]) -> dict[str, Any]:
    return {key: _cut(each.get(key)) for key in ("prompt", "base", "tuned", "wanted")}


def _cut(text: Any) -> str:
    said = str(text or "")
    return said if len(said) <= _LONGEST else said[:_LONGEST] + " …"
