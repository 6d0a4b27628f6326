"""What was measured of a profile, for people: a block of facts and a table of figures for each measurement."""

from __future__ import annotations

from collections.abc import Iterator

from aim_profile.serving.evidence import Measurement, Percentiles, Point
from aim_profile.serving.profile import Profile

from .output import Facts, Table

_COLUMNS = (
    *("", "answered", "failed", "req/s", "tokens/s", "goodput/s"),
    *("TTFT p50", "p95", "p99 ms", "ITL p50", "p95", "p99 ms", "E2E p50", "p95", "p99 ms"),
)


def measured_blocks(profile: Profile) -> Iterator[Facts | Table]:
    """Nothing for a profile that nobody measured."""
    for measurement in profile.evidence.measurements:
        yield Facts(_facts(measurement, profile), title=f"Measured {measurement.date:%Y-%m-%d}")
        columns = (_offered(measurement), *_COLUMNS[1:])
        rows = [_row(point, measurement) for point in measurement.points]
        yield Table(columns, rows, right=columns)


def _offered(measurement: Measurement) -> str:
    return "clients" if measurement.load.arrivals == "closed" else "offered req/s"


def _facts(measurement: Measurement, profile: Profile) -> list[tuple[str, str]]:
    load, engine, here, slo = measurement.load, measurement.engine, measurement.hardware, measurement.slo
    unit = _offered(measurement)
    knee = measurement.knee
    promised = (f"TTFT {slo.ttft_ms:g} ms" if slo.ttft_ms else "", f"ITL {slo.itl_ms:g} ms" if slo.itl_ms else "")
    lengths = f"prompts {load.prompt_tokens}, answers {load.output_tokens} tokens"
    shared = f", {load.shared_prefix_tokens} of them shared" if load.shared_prefix_tokens else ""
    versions = (here.driver and f"driver {here.driver}", here.rocm and f"ROCm {here.rocm}")
    return [
        ("on", ", ".join(word for word in (here.label, *versions) if word)),
        ("engine", f"{engine.name} {engine.version or '(version unknown)'}"),
        ("otherwise", _different_arguments(measurement, profile)),
        ("load", f"{load.arrivals}, {lengths}{shared}, {load.requests} requests, seed {load.seed}"),
        ("SLO", ", ".join(word for word in promised if word)),
        ("knee", f"{knee.offered:g} {unit}: {knee.because}" if knee else "not reached"),
        ("command", measurement.command),
        ("tool", measurement.tool),
    ]


def _different_arguments(measurement: Measurement, profile: Profile) -> str:
    """Arguments that both know, and that were others when it was measured."""
    pairs = ((name, value, profile.engine_arg(name)) for name, value in measurement.engine.args.items())
    return ", ".join(f"{name} {value} (here {own})" for name, value, own in pairs if own is not None and own != value)


def _row(point: Point, measurement: Measurement) -> tuple[str, ...]:
    at_knee = measurement.knee is not None and point.offered == measurement.knee.offered
    mark = "* " if at_knee else "" if point.valid else "invalid "
    goodput = "-" if point.goodput_per_s is None else _figure(point.goodput_per_s)
    counts = (str(point.answered), str(sum(point.failed.values())))
    rates = (_figure(point.requests_per_s), _figure(point.output_tokens_per_s), goodput)
    latencies = (text for found in (point.ttft_ms, point.itl_ms, point.e2e_ms) for text in _three(found))
    return (f"{mark}{point.offered:g}", *counts, *rates, *latencies)


def _three(found: Percentiles | None) -> tuple[str, str, str]:
    return ("-", "-", "-") if found is None else (_figure(found.p50), _figure(found.p95), _figure(found.p99))


def _figure(value: float) -> str:
    """Three or four digits that count, never 1.2e+04."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
