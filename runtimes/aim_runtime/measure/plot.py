"""The picture of a measurement: latency and throughput against the load that was offered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aim_profile.serving.evidence import Measurement, Percentiles, Point
from aim_runtime.measure.errors import MeasureError

_DPI = 120
# Colours that people of every colour vision tell apart (Okabe and Ito), and a mark of its own for each line.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#555555"


def needs_matplotlib() -> None:
    """Raises MeasureError where it is not installed: said before the load, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MeasureError(
            "--plot: matplotlib is not here: pip install 'aim-kserve[measure]', or --plot none", exit_code=2
        ) from None


def draw(measurement: Measurement, files: Sequence[Path]) -> None:
    """Into each file, by its ending (.png, .svg)."""
    from matplotlib.figure import Figure  # not pyplot: that keeps every figure, and looks for a screen

    figure = Figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _latency(above, measurement)
    _throughput(below, measurement)
    for axes in (above, below):
        _mark(axes, measurement)
        axes.grid(alpha=0.25)
        axes.legend(loc="center left", bbox_to_anchor=(1.1, 0.5), fontsize=9)  # beside it: nothing is covered
    below.set_xlabel(_unit(measurement))
    figure.suptitle(_title(measurement), fontsize=11)
    for file in files:
        figure.savefig(file, dpi=_DPI, metadata={"Date": None} if file.suffix == ".svg" else None)


def _unit(measurement: Measurement) -> str:
    if measurement.load.arrivals == "closed":
        return "clients at once (closed loop)"
    return f"offered load, requests per second ({measurement.load.arrivals})"


def _title(measurement: Measurement) -> str:
    engine, load = measurement.engine, measurement.load
    return (
        f"{measurement.model}, {measurement.precision or 'precision unknown'}, {engine.name} {engine.version or ''}\n"
        f"on {measurement.hardware.label}; prompts {load.prompt_tokens}, answers {load.output_tokens} tokens; "
        f"{measurement.date:%Y-%m-%d}"
    )


def _latency(axes: Any, measurement: Measurement) -> None:
    points, slo = measurement.points, measurement.slo
    ttft, itl = (lambda point: point.ttft_ms), (lambda point: point.itl_ms)
    _line(axes, points, ttft, lambda found: found.p50, color=_BLUE, marker="o", linestyle="--", label="TTFT p50")
    _line(axes, points, ttft, lambda found: found.p95, color=_BLUE, marker="o", label="TTFT p95")
    _line(axes, points, itl, lambda found: found.p95, color=_ORANGE, marker="s", label="ITL p95")
    for name, limit, color in (("TTFT", slo.ttft_ms, _BLUE), ("ITL", slo.itl_ms, _ORANGE)):
        if limit is not None:
            axes.axhline(limit, color=color, linestyle=":", linewidth=1.5, label=f"SLO: {name} {limit:g} ms")
    axes.set_yscale("log")
    axes.set_ylabel("latency, ms (log)")


def _line(
    axes: Any,
    points: Sequence[Point],
    which: Callable[[Point], Percentiles | None],
    value: Callable[[Percentiles], float],
    **style: Any,
) -> None:
    found = [(point.offered, value(seen)) for point in points if (seen := which(point)) is not None]
    axes.plot([at for at, _ in found], [shown for _, shown in found], **style)


def _throughput(axes: Any, measurement: Measurement) -> None:
    points = measurement.points
    offered = [point.offered for point in points]
    rates = [point.requests_per_s for point in points]
    axes.plot(offered, rates, color=_GREEN, marker="^", label="answered")
    if any(point.goodput_per_s is not None for point in points):
        good = [point.goodput_per_s or 0.0 for point in points]
        axes.plot(offered, good, color=_PURPLE, marker="v", linestyle="--", label="goodput (within the SLO)")
    axes.set_ylabel("requests per second")
    axes.set_ylim(bottom=0)
    tokens = axes.twinx()
    tokens.plot(offered, [point.output_tokens_per_s for point in points], color=_GREY, marker=".", linewidth=1)
    tokens.set_ylabel("output tokens per second (grey)", color=_GREY)
    tokens.set_ylim(bottom=0)


def _mark(axes: Any, measurement: Measurement) -> None:
    if measurement.knee is not None:
        at = measurement.knee.offered
        axes.axvline(at, color="black", linestyle="-.", linewidth=1.2, label=f"knee: {at:g}")
    for index, point in enumerate(each for each in measurement.points if not each.valid):
        label = "client did not keep up" if index == 0 else None
        axes.axvline(point.offered, color="red", linestyle=":", linewidth=1.2, label=label)
