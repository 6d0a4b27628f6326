"""``aim-runtime compare``: the variants of a served name side by side, read off the server's own metrics.

Every figure is a counter's, or comes from a histogram's buckets as Prometheus' ``histogram_quantile`` reads them.
Without an earlier reading it is what the server has seen since it started.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from aim_kserve.identity.key_file import read_key
from aim_kserve.tables import plain_table, show

#: Histogram → the name of its figures, and how many of the shown unit a second has.
LATENCIES = {
    "aim_time_to_first_token_seconds": ("ttft_ms", 1e3),
    "aim_inter_token_latency_seconds": ("itl_ms", 1e3),
    "aim_request_duration_seconds": ("e2e_s", 1.0),
}
#: Below this many requests a share of failures or a 95th percentile says little.
FEW = 100
_TIMEOUT_S = 10
_MOST_BYTES = 64 * 2**20

#: (model, variant) → upper bound in seconds → observations up to it.
Buckets = dict[float, float]


class CompareError(Exception):
    """Nothing to compare, or no metrics there. One line."""


@dataclass(frozen=True, slots=True)
class Quantile:
    """``value`` None: nothing was observed. ``at_least``: it lies beyond the largest bucket, which is given."""

    value: float | None
    at_least: bool = False

    def __str__(self) -> str:
        return "-" if self.value is None else f"{'>' if self.at_least else ''}{self.value:.3g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One variant. ``failed``: answers 5xx; ``refused``: 4xx; ``left``: clients that did not wait (499)."""

    model: str
    variant: str
    requests: int
    share: float
    failed: int
    refused: int
    left: int
    tokens: float | None
    latencies: Mapping[str, Quantile]


class Reading:
    """One text of metrics: what it says of every (model, variant)."""

    def __init__(self, text: str) -> None:
        self.counts: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.buckets: dict[tuple[str, str], dict[str, Buckets]] = defaultdict(lambda: defaultdict(dict))
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("variant"):
                    self._take(sample.name, sample.labels, sample.value)

    def _take(self, name: str, labels: Mapping[str, str], value: float) -> None:
        key = (labels["model_name"], labels["variant"])
        histogram = name.removesuffix("_bucket")
        if name == "aim_requests_total":
            self.counts[key][labels["status"]] += value
        elif name == "aim_generation_tokens_total":
            self.counts[key]["tokens"] += value
        elif histogram != name and histogram in LATENCIES:
            buckets, bound = self.buckets[key][histogram], float(labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + value

    def since(self, earlier: Reading) -> None:
        """Leave what has happened after ``earlier``.

        Raises:
            CompareError: a counter is smaller than before: the server has been started anew.
        """
        for key, counts in earlier.counts.items():
            _subtract(self.counts[key], counts)
        for key, histograms in earlier.buckets.items():
            for name, buckets in histograms.items():
                _subtract(self.buckets[key][name], buckets)


def _subtract(now: dict[str, float] | Buckets, earlier: Mapping[str, float] | Mapping[float, float]) -> None:
    for name, value in earlier.items():
        rest = now.get(name, 0.0) - value  # type: ignore[arg-type]  # both are of one kind
        if rest < 0:
            raise CompareError("counters are smaller than in the earlier reading: the server has been started anew")
        now[name] = rest  # type: ignore[index]


def quantile(buckets: Mapping[float, float], share: float) -> Quantile:
    """As Prometheus' ``histogram_quantile``, linear within a bucket, of upper bound → observations up to it."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0
    if not total:
        return Quantile(None)
    low, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= share * total:
            if math.isinf(bound):
                return Quantile(low, at_least=True)
            return Quantile(low + (bound - low) * (share * total - below) / (buckets[bound] - below))
        low, below = bound, buckets[bound]
    raise AssertionError  # unreachable: the last bucket has all


def rows(reading: Reading, model: str | None = None) -> list[Row]:
    """The variants of every name that has some, or of ``model``.

    Raises:
        CompareError: there are none; says what there is.
    """
    keys = sorted(key for key in reading.counts if model in (None, key[0]))
    if not keys:
        known = sorted({name for name, _ in reading.counts})
        if model is None or not known:
            raise CompareError("no request to a name with variants has been counted: give models.yaml 'variants'")
        raise CompareError(f"--model {model}: no such name with variants; there are: {', '.join(known)}")
    totals: dict[str, float] = defaultdict(float)
    for key in keys:
        totals[key[0]] += _requests(reading.counts[key])
    return [_row(reading, key, totals[key[0]]) for key in keys]


def _requests(counts: Mapping[str, float]) -> float:
    return sum(value for status, value in counts.items() if status != "tokens")


def _row(reading: Reading, key: tuple[str, str], total: float) -> Row:
    counts = reading.counts[key]
    requests = _requests(counts)
    answered = counts.get("200", 0.0)
    return Row(
        *key,
        requests=round(requests),
        share=requests / total if total else 0.0,
        failed=round(sum(value for status, value in counts.items() if status.startswith("5"))),
        refused=round(sum(value for status, value in counts.items() if status.startswith("4") and status != "499")),
        left=round(counts.get("499", 0.0)),
        tokens=counts.get("tokens", 0.0) / answered if answered else None,
        latencies={
            f"{name}_p{percent}": _in_unit(quantile(reading.buckets[key].get(family, {}), percent / 100), unit)
            for family, (name, unit) in LATENCIES.items()
            for percent in (50, 95)
        },
    )


def _in_unit(seconds: Quantile, unit: float) -> Quantile:
    return seconds if seconds.value is None else Quantile(round(seconds.value * unit, 6), seconds.at_least)


def read(source: str, key: str | None = None) -> Reading:
    """Args:
        source: a server's address (with or without ``/metrics``), a file, or ``-`` for standard input.
        key: is sent to a server.

    Raises:
        CompareError: nobody answers, no such file, or it holds no metrics.
    """
    try:
        return Reading(_text(source, key))
    except urllib.error.HTTPError as error:
        closed = error.code in (401, 403)
        wants = "it wants a key of scope metrics: give --api-key-file" if closed else "give the address of a server"
        raise CompareError(f"{source}: answers {error.code}, {wants}") from error
    except urllib.error.URLError as error:
        raise CompareError(f"{source}: {error.reason}: give the address of a running server, or a file") from error
    except OSError as error:
        raise CompareError(f"{source}: {error.strerror or error}: give a server's address, a file or -") from error
    except (KeyError, ValueError) as error:
        raise CompareError(f"{source}: holds no metrics in Prometheus' text form ({error})") from error


def _text(source: str, key: str | None) -> str:
    if source == "-":
        return sys.stdin.read(_MOST_BYTES)
    if not source.startswith(("http://", "https://")):
        return Path(source).read_text(encoding="utf-8")
    address = source.rstrip("/")
    address += "" if address.endswith("/metrics") else "/metrics"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        return str(answer.read(_MOST_BYTES).decode("utf-8"))


def _key(file: Path | None) -> str | None:
    try:
        return read_key(file).decode() if file else None
    except ValueError as error:
        raise CompareError(f"--api-key-file {file}: {error}") from None


def table(found: Iterable[Row]) -> Table:
    """For people."""
    latencies = [f"{name}_p{percent}" for name, _ in LATENCIES.values() for percent in (50, 95)]
    figures = ("requests", "share", "5xx", "4xx", "left", "tokens", *(name.replace("_", " ") for name in latencies))
    shown = plain_table(("model", "variant"), figures)
    for row in found:
        tokens = "-" if row.tokens is None else f"{row.tokens:.1f}"
        counts = (str(row.requests), f"{row.share:.1%}", str(row.failed), str(row.refused), str(row.left), tokens)
        shown.add_row(row.model, row.variant, *counts, *(str(row.latencies[name]) for name in latencies))
    return shown


def _json(found: Iterable[Row]) -> str:
    plain = [
        {**asdict(row), "latencies": {name: asdict(value) for name, value in row.latencies.items()}} for row in found
    ]
    return json.dumps(plain, indent=2)


def main(argv: Sequence[str]) -> int:
    """Entry point. Exit codes: 0, 1 nothing to compare, 2 wrong arguments (argparse)."""
    parser = argparse.ArgumentParser(
        prog="aim-runtime compare", description=__doc__.partition("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("source", help="http://HOST:PORT of a server, a file of its /metrics, or - for standard input")
    parser.add_argument("--since", metavar="FILE", help="an earlier reading (saved /metrics): show what came after")
    parser.add_argument("--model", metavar="NAME", help="only this name's variants")
    parser.add_argument("--api-key-file", metavar="FILE", type=Path, help="holds the key to send; its scope: metrics")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    given = parser.parse_args(argv)
    try:
        reading = read(given.source, _key(given.api_key_file))
        if given.since:
            reading.since(read(given.since))
        found = rows(reading, given.model)
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  the command's own output
        return 1
    if given.output == "json":
        print(_json(found))  # noqa: T201
        return 0
    show(table(found))
    few = [row.variant for row in found if row.requests < FEW]
    if few:
        print(f"{', '.join(few)}: fewer than {FEW} requests, too few to tell")  # noqa: T201
    return 0
