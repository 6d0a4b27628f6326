"""Evidence of any origin in one form: rows of one model in one precision on one kind of device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from aim_profile.errors import AimProfileError
from aim_profile.gpus.catalog import Accelerator, by_name
from aim_profile.gpus.modes import DeviceMode
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.models.known import by_id
from aim_profile.sizing.asked import RequestShape
from aim_profile.sizing.constants import Observed
from aim_profile.sizing.work import Speeds, speeds_of, work_of

from .evidence import NO_GPU, Measurement, Point
from .profile import to_model_precision
from .published import Published, PublishedRun, published


class Row(NamedTuple):
    """n sequences at once on one device; latencies are means, or medians where only those are known."""

    shape: RequestShape
    sequences: float
    itl_ms: float
    ttft_ms: float | None


class Observation(NamedTuple):
    """What was seen of one engine on one device. label: whose it is; ours: measured, not published by a vendor."""

    model: ModelFacts
    precision: Precision
    accelerator: Accelerator
    mode: DeviceMode
    rows: tuple[Row, ...]
    label: str
    ours: bool

    @property
    def speeds(self) -> Speeds | None:
        """The peaks of that device, None where they are not established."""
        return speeds_of(self.accelerator, self.mode, self.precision)

    def observed(self) -> list[Observed]:
        """The rows with the work of each. Raises SizingError for a model that is not sized."""
        return [
            Observed(work_of(self.model, self.precision, row.shape), row.shape, row.sequences, row.itl_ms, row.ttft_ms)
            for row in self.rows
        ]


def of_vendors() -> Iterator[Observation]:
    """Every published run of the catalogue."""
    for page in published():
        accelerator = by_name(page.gpu)
        for run in page.runs:
            mode, rows = accelerator.mode(run.partition), tuple(_published_rows(page, run))
            yield Observation(by_id(page.model), page.precision, accelerator, mode, rows, page.label(run), False)


def of_measurements(measurements: Iterable[Measurement], asked: ModelFacts) -> Iterator[Observation]:
    """Those of one device of a GPU, by vLLM, of a model whose facts are known (the asked one's are)."""
    for each in measurements:
        here, precision = each.hardware, to_model_precision(each.precision) if each.precision else None
        if here.told_by == "unknown" or here.gpu == NO_GPU or here.gpu_count != 1 or each.engine.name != "vllm":
            continue
        facts = asked if each.model == asked.id else _facts(each.model)
        rows = tuple(row for point in each.points for row in _measured_row(point))
        if facts is None or precision is None or not any(row.ttft_ms is not None for row in rows):
            continue
        accelerator = by_name(here.gpu)
        mode = accelerator.mode(here.partition or "SPX/NPS1")
        yield Observation(facts, precision, accelerator, mode, rows, label_of(each), True)


def label_of(measurement: Measurement) -> str:
    """Whose figures of what, in one line."""
    what = f"{measurement.model} {measurement.precision} on {measurement.hardware.label}"
    return f"measured on {measurement.date:%Y-%m-%d} by {measurement.tool}: {what}"


def shape_of_point(point: Point) -> RequestShape | None:
    """The mean lengths of its requests; None where nothing was answered."""
    if not point.answered or not point.prompt_tokens or not point.output_tokens:
        return None
    mean = (max(1, round(tokens / point.answered)) for tokens in (point.prompt_tokens, point.output_tokens))
    return RequestShape(prompt_tokens=next(mean), answer_tokens=next(mean))


def _facts(model: str) -> ModelFacts | None:
    """None for a model that the catalogue does not size: nothing can be carried over from it."""
    try:
        found = by_id(model)
    except AimProfileError:
        return None
    return found if found.sizable else None


def _measured_row(point: Point) -> Iterator[Row]:
    """The median request's time between tokens, where it is known from its end; else the median gap."""
    shape = shape_of_point(point)
    if not point.valid or shape is None or point.ttft_ms is None or point.itl_ms is None or not point.itl_ms.p50:
        return
    itl_ms = point.itl_ms.p50
    if point.e2e_ms is not None and shape.answer_tokens > 1 and point.e2e_ms.p50 > point.ttft_ms.p50:
        itl_ms = (point.e2e_ms.p50 - point.ttft_ms.p50) / (shape.answer_tokens - 1)
    yield Row(shape, point.output_tokens_per_s * itl_ms / 1000, itl_ms, point.ttft_ms.p50)


def _published_rows(page: Published, run: PublishedRun) -> Iterator[Row]:
    if run.one_stream_itl_ms is not None:
        shape = RequestShape(prompt_tokens=page.prompt_tokens, answer_tokens=run.rows[0].answer_tokens)
        yield Row(shape, 1.0, run.one_stream_itl_ms, None)
    for row in run.rows:
        shape = RequestShape(prompt_tokens=page.prompt_tokens, answer_tokens=row.answer_tokens)
        yield Row(shape, row.tokens_per_s * row.itl_ms / 1000 / run.servers, row.itl_ms, row.ttft_ms)
