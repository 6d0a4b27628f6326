"""From what a run left to the words and drawings of its page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from aim_trainer.job.fields import without_signature
from aim_trainer.metrics.words import bytes_in_words, seconds_in_words

from .chart import Chart, draw, number
from .judged import comparison, gates, regressions, samples
from .read import Curves, Left
from .rows import rows_in_words
from .series import FEWEST_SMOOTHED, Point

_LOSS_SIZE = (1040, 320)
_MOST_EVENTS = 60


def page(left: Left) -> str:
    """The HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = _shown
    template = environment.from_string((files(__package__) / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(_content(left))


def _shown(value: Any) -> Any:
    """Text as a browser may have it: no control characters but line ends and tabs."""
    if type(value) is not str:
        return value
    return "".join(each if each in "\n\t" or each.isprintable() or each == "\u00a0" else "\ufffd" for each in value)


def _content(left: Left) -> dict[str, Any]:
    curves, job = left.curves, left.job
    return {
        "name": job.metadata.name if job else "a run without a job",
        "lead": _lead(left),
        "result": _result(left),
        "tiles": list(_tiles(left)),
        "warnings": [*left.warnings, *_warnings(left)],
        **_training(curves),
        "comparison": comparison(left.evaluation),
        "gates": gates(left.evaluation),
        **samples(left.evaluation),
        **regressions(left.evaluation),
        **rows_in_words(left.training, left.validation),
        "published": _published(curves),
        "events": list(_events(curves)),
        "groups": _groups(left),
        "versions": list(left.versions.items()),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _lead(left: Left) -> str:
    if left.job is None:
        return "job.yaml is missing"
    spec = left.job.spec
    method = {"lora": "LoRA", "qlora": "QLoRA", "full": "Full fine-tuning"}[spec.method]
    begun = left.curves.first_time
    day = datetime.fromtimestamp(begun, UTC).strftime(" · %d %B %Y, %H:%M UTC") if begun else ""
    return f"{method} of {spec.base_model.model_id} · {spec.template}{day}"


def _result(left: Left) -> dict[str, str]:
    kinds = [note.kind for _, note in left.curves.notes]
    failed = sum(not gate.get("passed") for gate in left.evaluation.get("gates", []))
    if failed:
        return {"mood": "bad", "text": f"{failed} of {len(left.evaluation['gates'])} gates failed"}
    last = left.curves.last
    if kinds and kinds[-1] in ("failed", "paused"):
        return {"mood": "bad" if kinds[-1] == "failed" else "warn", "text": kinds[-1]}
    if last is None or last.step < last.steps:
        return {"mood": "warn", "text": "not ended"}
    kept = len(left.evaluation.get("gates", []))
    return {"mood": "good", "text": f"done, {kept} of {kept} gates kept" if kept else "done"}


def _tiles(left: Left) -> Iterator[dict[str, str]]:
    curves, base, tuned = left.curves, left.evaluation.get("base", {}), left.evaluation.get("tuned", {})
    for metric, name in (("eval_loss", "Held-out loss"), ("perplexity", "Perplexity"), ("accuracy", "Accuracy")):
        if isinstance(after := tuned.get(metric), int | float):
            yield _tile(name, number(after), *_against(metric, base.get(metric), after))
    if curves.last is None:
        return
    yield _tile("Steps", f"{curves.last.step:,}", f"of {curves.last.steps:,}, {curves.last.epoch:.3g} epochs")
    yield _tile("Tokens", _short(curves.tokens), f"{_short(curves.trained_tokens)} of them trained")
    wall = curves.last_time - (curves.first_time or curves.last_time)
    yield _tile("Training time", seconds_in_words(curves.seconds), f"{seconds_in_words(wall)} in all")
    if curves.gpu_memory_bytes is not None:
        yield _tile("GPU memory", bytes_in_words(curves.gpu_memory_bytes), "at its peak")
    elif curves.seconds > 0:
        yield _tile("Speed", f"{curves.tokens / curves.seconds:,.0f}", "tokens a second")


def _tile(what: str, value: str, more: str, mood: str = "") -> dict[str, str]:
    return {"what": what, "value": value, "more": more, "mood": mood}


def _against(metric: str, before: Any, after: float) -> tuple[str, str]:
    if not isinstance(before, int | float) or before == after:
        return "", ""
    better = (after > before) == (metric == "accuracy")
    share = f", {abs(after - before) / abs(before):.0%} {'more' if after > before else 'less'}" if before else ""
    return f"base {number(before)}{share}", "good" if better else "bad"


def _warnings(left: Left) -> Iterator[str]:
    for metric, reason in left.evaluation.get("unmeasured", {}).items():
        yield f"{metric} was not measured: {reason}"
    broken = sum(not math.isfinite(value) for value in left.curves.loss.values)
    if broken:
        yield f"the loss of {broken:,} steps is no number"
    for _, note in left.curves.notes:
        if note.kind in ("failed", "retried"):
            yield f"{note.kind}: {note.message}"


def _training(curves: Curves) -> dict[str, Any]:
    held = [
        Point(step, metrics["eval_loss"])
        for step, metrics in sorted(curves.evaluations.items())
        if "eval_loss" in metrics
    ]
    loss = Chart("Loss", curves.loss, _LOSS_SIZE, held, curves.saved, curves.resumed)
    small = [
        ("Learning rate", Chart("Learning rate", curves.learning_rate, from_zero=True, smooth=False)),
        ("Gradient norm", Chart("Gradient norm", curves.grad_norm, from_zero=True)),
        ("Tokens a second", Chart("Tokens a second", curves.tokens_per_second, from_zero=True)),
    ]
    return {
        "loss": draw(loss) if len(curves.loss) else "",
        "small": [(title, draw(chart)) for title, chart in small],
        "smoothed": len(curves.loss) >= FEWEST_SMOOTHED,
        "measured": bool(held),
        "saved": bool(curves.saved),
        "resumed": bool(curves.resumed),
        "training_about": _training_about(curves),
    }


def _training_about(curves: Curves) -> str:
    """First and last loss, each the mean of a tenth of the steps: single ones say little."""
    values = [value for value in curves.loss.values if math.isfinite(value)]
    tenth = max(1, len(values) // 10)
    if len(values) < 2:
        return "Mean loss over the trained tokens of each step."
    first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    return (
        f"Mean loss over the trained tokens of each step: {first:.3f} over the first tenth, {last:.3f} over the last."
    )


def _published(curves: Curves) -> list[tuple[str, str]]:
    found = [note for _, note in curves.notes if note.kind == "done" and "uri" in note.fields]
    return [(key, str(value)) for key, value in found[-1].fields.items() if value is not None] if found else []


def _events(curves: Curves) -> Iterator[dict[str, str]]:
    moods = {"failed": "bad-text", "done": "good-text"}
    for time, note in curves.notes[-_MOST_EVENTS:]:
        after = seconds_in_words(time - (curves.first_time or time))
        yield {"after": after, "kind": note.kind, "message": note.message, "mood": moods.get(note.kind, "")}


def _groups(left: Left) -> list[tuple[str, list[dict[str, Any]]]]:
    """The job's fields by their part of the spec, and whether the job's file sets them."""
    if left.job is None:
        return []
    every = left.job.spec.model_dump(mode="json", by_alias=True)
    own = left.job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    top = {key: value for key, value in every.items() if not isinstance(value, Mapping)}
    parts = {"spec": top} | {key: value for key, value in every.items() if isinstance(value, Mapping)}
    return [
        (part, list(_fields(fields, own if part == "spec" else own.get(part, {})))) for part, fields in parts.items()
    ]


def _fields(fields: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, value in fields.items():
        is_set = name in own
        if is_set or value not in (None, [], {}):
            yield {"name": name, "value": _said(value), "is_set": is_set}


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_said(inner)}" for key, inner in value.items() if inner not in (None, [], {}))
    if isinstance(value, list):
        return "; ".join(map(_said, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else without_signature(str(value))


def _short(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{count:,}"
