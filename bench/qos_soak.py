"""Three times what an engine can serve: what each class gets of it, by our service levels and by their peers.

Sides: the embedded engine with service levels on and, the same engine and load, off (first come, first served); vLLM's
own server with every request at one priority (first come, first served), and with the classes as its priorities. The
load: 4 tenants, half Poisson and half bursts, log-normal lengths; high is a quarter of it, medium a tenth. Each side's
load is three times what *it* serves, measured first, and its high requests alone are what they are compared with. Legs
take turns, each round with other arrivals; times are engine seconds (tests/fakes/qos_load.py), rates too.

Usage: ``python bench/qos_soak.py [--quick] [--rounds N] [--seconds S] [--no-vllm] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SOURCES = [str(ROOT / name) for name in ("runtimes", "transformers", "profiles", "tests/fakes", "bench")]
sys.path[:0] = SOURCES
os.environ["PYTHONPATH"] = os.pathsep.join(SOURCES)

import vllm_server  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from aim_kserve.identity import QosClass  # noqa: E402
from aim_runtime.qos.fair import W_IN, W_OUT  # noqa: E402
from qos_load import (  # noqa: E402
    CLASSES,
    TENANTS,
    Sent,
    Side,
    Sizes,
    key_folder,
    of,
    overtaken,
    refused_after_s,
    service,
    ttft,
    unclean,
)
from served import Served  # noqa: E402

MODEL_DIR = ROOT / ".models/smollm2"
SLOTS = 4
OVERLOAD = 3.0
SHARES: Mapping[QosClass, float] = {"high": 0.25, "medium": 0.10, "low": 0.65}
SIZES = Sizes.of("lognormal:16:0.7", "lognormal:5:0.7")
#: Within so many times the mean time of a request at the knee a first token is wanted. Of high it is only counted: it
#: is not to be refused, or the rest would look better than all of it.
WANTED: Mapping[QosClass, float] = {"high": 10, "medium": 20, "low": 40}
PRIORITY: Mapping[QosClass, int] = {"high": -1, "medium": 0, "low": 1}
#: Tenants of equal weight, one of which asks for ten times as much at once.
SMALL, LARGE = Sizes.of("constant:12", "constant:3"), Sizes.of("constant:120", "constant:30")
CLIENTS_EACH = 2 * SLOTS
#: How late a refusal may be, by the clock of a busy machine.
LATE_S = 1.0


class Knee(NamedTuple):
    """What the engine serves while all its slots are taken: requests an engine second; mean clock seconds of one."""

    per_s: float
    wall_s: float


async def knee_of(side: Side, seconds: float) -> Knee:
    asks = [sent.ask for sent in side.asks("knee", 1000, [("high", "ada", 3.0)], SIZES, seed=77)]
    before_s, began_s = side.clock.now_s(), time.monotonic()
    each = [("high", tenant, asks[number :: len(TENANTS) * 2]) for number, tenant in enumerate(TENANTS * 2)]
    sent = await side.closed(each, seconds)  # type: ignore[arg-type]
    answered = sum(one.answered for one in sent)
    passed_s = side.clock.at(max(one.outcome.ended_s for one in sent)) - before_s
    return Knee(answered / passed_s, (time.monotonic() - began_s) / answered)


def rates(knee: Knee, classes: Sequence[QosClass] = CLASSES) -> list[tuple[QosClass, str, float]]:
    return [
        (name, tenant, OVERLOAD * knee.per_s * SHARES[name] / len(TENANTS)) for name in classes for tenant in TENANTS
    ]


class Legs:
    """What was seen of one way to serve: a list a round."""

    def __init__(
        self, name: str, side: Side, knee: Knee, seconds: float, classes: Sequence[QosClass] = CLASSES
    ) -> None:
        self.name, self.side, self.knee, self.seconds, self._classes = name, side, knee, seconds, classes
        self.rounds: list[list[Sent]] = []

    async def run(self, number: int) -> None:
        sent = self.side.asks(
            f"{self.name} {number}", self.seconds, rates(self.knee, self._classes), SIZES, seed=number
        )
        self.rounds.append(await self.side.leg(sent, self.seconds))
        high = of(sent, "high")
        print(
            f"  round {number} {self.name}: {len(sent)} sent, {sum(each.answered for each in sent)} answered, "
            f"high {ttft(high, 0.5):.2f}/{ttft(high, 0.95):.2f} s, by the clock "
            f"{statistics.median(each.wall_ttft_s for each in high):.2f} s",
            flush=True,
        )

    @property
    def all(self) -> list[Sent]:
        return [each for sent in self.rounds for each in sent]

    def row(self, alone: Legs) -> dict[str, Any]:
        """The figures; ratios are to the same high arrivals alone, round by round."""
        high, seconds = of(self.all, "high"), self.seconds * len(self.rounds)
        pairs = list(zip(self.rounds, alone.rounds, strict=True))
        ratios = sorted(ttft(of(own, "high"), 0.95) / ttft(of(base, "high"), 0.95) for own, base in pairs)
        low = [each for each in of(self.all, "low") if each.answered]
        in_time = [
            each for each in self.all if each.answered and each.ttft_s <= WANTED[each.qos_class] / self.knee.per_s
        ]
        return {
            "side": self.name,
            "offered": len(self.all),
            "answered": dict(Counter(each.qos_class for each in self.all if each.answered)),
            "high_ttft_p50_s": ttft(high, 0.5),
            "high_ttft_p95_s": ttft(high, 0.95),
            "high_p95_to_alone": ttft(high, 0.95) / ttft(alone.all, 0.95),
            "high_p95_to_alone_by_round": [round(each, 3) for each in ratios],
            "high_p95_to_alone_median": statistics.median(ratios),
            "high_wall_ttft_p50_s": statistics.median(each.wall_ttft_s for each in high),
            "overtaken_mean": statistics.mean(overtaken(self.all) or [0]),
            "low_tokens_per_s": sum(each.outcome.output_tokens for each in low) / seconds,
            "rejections": dict(Counter(_how(each) for each in self.all if each.outcome.refusal)),
            "cut_off": sum(each.outcome.failed == "cut off" for each in self.all),
            "unclean": unclean(self.all),
            "good_per_s": len(in_time) / seconds,
            "good": dict(Counter(each.qos_class for each in in_time)),
        }


def _how(sent: Sent) -> str:
    refusal = sent.outcome.refusal
    return f"{sent.qos_class} {refusal.status} {refusal.code}" if refusal else ""


# --- our own server -----------------------------------------------------------------------------------------------


def ours(keys: Path, *flags: str) -> Served:
    model = ["--model_name", "smollm2", "--model_dir", str(MODEL_DIR), "--threads", "1", "--max_model_len", "1024"]
    more = ["--max_concurrency", str(SLOTS), "--access_log=false", "--api_keys", str(keys)]
    return Served(["-m", "aim_runtime", *model, *more, *flags])


def policy(folder: Path, knee: Knee) -> Path:
    """The defaults, and deadlines for medium and low."""
    classes = {name: {"slo": {"ttft_ms": round(1e3 * WANTED[name] * knee.wall_s)}} for name in CLASSES[1:]}
    file = folder / "policy.json"
    file.write_text(json.dumps({"version": 1, "classes": classes}))
    return file


async def fairness(side: Side, seconds: float) -> dict[str, Any]:
    """Two tenants of equal weight, always with more requests than there are slots, of 1:10 in size."""
    clients = []
    for tenant, sizes in (("ada", SMALL), ("bell", LARGE)):
        asks = [sent.ask for sent in side.asks("fair", 1000, [("high", tenant, 4.0)], sizes)]
        clients += [("high", tenant, asks[number::CLIENTS_EACH]) for number in range(CLIENTS_EACH)]
    began_s = side.clock.now_s()
    sent = await side.closed(clients, seconds)  # type: ignore[arg-type]
    curves = [[(when, cost) for when, cost in service(sent, name) if when > began_s] for name in ("ada", "bell")]
    total = [sum(cost for _, cost in curve) for curve in curves]
    steps = sorted([*curves[0], *((when, -cost) for when, cost in curves[1])])
    apart, furthest = 0.0, 0.0
    for _, cost in steps:
        apart += cost
        furthest = max(furthest, abs(apart))
    return {
        "seconds": seconds,
        "service": total,
        "jain": sum(total) ** 2 / (2 * sum(each**2 for each in total)),
        "furthest_apart": furthest,
        "bound": 2 * max(W_IN * 120, W_OUT * SLOTS * (120 + 30)),
        "largest_request": W_IN * 120 + W_OUT * 30,
        "requests": [sum(each.answered for each in sent if each.tenant == name) for name in ("ada", "bell")],
    }


def first_tokens(metrics: str) -> tuple[float, float, float]:
    """How many were predicted, how many of them came within what was said with 90 % certainty; the share of that among
    the last 1,000, those that waited in vain included."""
    within = count = last = 0.0
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "aim_qos_ttft_prediction_ratio_bucket" and float(sample.labels["le"]) == 1.0:
                within += sample.value
            elif sample.name == "aim_qos_ttft_prediction_ratio_count":
                count += sample.value
            elif sample.name == "aim_qos_ttft_calibration_ratio":
                last = sample.value
    return count, within, last


async def calibration(side: Side, before: tuple[float, float, float]) -> dict[str, float]:
    count, within, last = first_tokens(await side.metrics())
    number = count - before[0]
    return {"n": number, "within_q90": (within - before[1]) / number, "within_q90_last_1000": last}


async def embedded(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    keys = key_folder(folder)
    async with AsyncExitStack() as stack:
        plain = stack.enter_context(ours(keys))
        fcfs = await stack.enter_async_context(Side(plain.url, plain.process.pid, key_file=keys))
        knee = await knee_of(fcfs, options.knee_seconds)
        print(f"  knee: {knee.per_s:.2f} requests/s; {knee.wall_s:.2f} s each by the clock", flush=True)
        file = policy(folder, knee)
        turns = stack.enter_context(ours(keys, "--qos_policy", str(file)))
        levels = await stack.enter_async_context(Side(turns.url, turns.process.pid, key_file=keys))
        fair = await fairness(levels, options.fair_seconds)
        print(f"  {fair}", flush=True)
        alone = Legs("high alone", levels, knee, options.seconds, ("high",))
        both = [Legs("service levels", levels, knee, options.seconds), Legs("FCFS", fcfs, knee, options.seconds)]
        before = first_tokens(await levels.metrics())
        await rounds([alone, *both], options.rounds)
        found = await calibration(levels, before)
        wanted_s = {name: json.loads(file.read_text())["classes"][name]["slo"]["ttft_ms"] / 1e3 for name in CLASSES[1:]}
        late_s = {name: refused_after_s(of(both[0].all, name)) - wanted_s[name] for name in CLASSES[1:]}
        return {
            "knee": knee._asdict(),
            "rows": [each.row(alone) for each in (alone, *both)],
            "fairness": fair,
            "calibration": found,
            "refused_after_deadline_s": late_s,
        }


async def rounds(legs: Sequence[Legs], number: int) -> None:
    """Each round begins with another one."""
    for turn in range(number):
        first = turn % len(legs)
        for each in (*legs[first:], *legs[:first]):
            await each.run(turn)


# --- vLLM's -------------------------------------------------------------------------------------------------------


async def vllm(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    flags = {"scheduling-policy": "priority", "max-num-seqs": SLOTS}
    server = vllm_server.start(vllm_server.PEER, folder / "vllm.log", flags)
    url, process = f"http://127.0.0.1:{server.port}", server.process.pid
    try:
        async with (
            Side(url, process, key_file=None) as same,
            Side(url, process, key_file=None, extra=lambda name: {"priority": PRIORITY[name]}) as by_class,
        ):
            knee = await knee_of(same, options.knee_seconds)
            print(f"  vLLM's knee: {knee.per_s:.2f} requests/s", flush=True)
            alone = Legs("vLLM, high alone", same, knee, options.seconds, ("high",))
            both = [
                Legs("vLLM, priority", by_class, knee, options.seconds),
                Legs("vLLM, FCFS", same, knee, options.seconds),
            ]
            await rounds([alone, *both], options.vllm_rounds)
            return {"knee": knee._asdict(), "rows": [each.row(alone) for each in (alone, *both)]}
    finally:
        vllm_server.stop(server)


# --- the report ---------------------------------------------------------------------------------------------------


def broken(found: Mapping[str, Any], *, whole: bool) -> list[str]:
    """What was promised and is not so. whole: as many requests were sent as the figures need."""
    ours_ = found["embedded"]
    _, levels, _ = ours_["rows"]
    claims = [
        (not levels["unclean"], f"refusals that are not clean: {levels['unclean'][:3]}"),
        (not any(how.startswith("high") for how in levels["rejections"]), f"high refused: {levels['rejections']}"),
        (levels["low_tokens_per_s"] > 0, "low stands still"),
        (
            max(ours_["refused_after_deadline_s"].values()) < LATE_S,
            f"refused after the deadline: {ours_['refused_after_deadline_s']}",
        ),
    ]
    if whole:
        fair, seen = ours_["fairness"], ours_["calibration"]
        claims += [
            (levels["high_p95_to_alone"] <= 1.3, f"high's TTFT p95 is {levels['high_p95_to_alone']:.2f} times alone's"),
            (fair["jain"] >= 0.99, f"Jain's index is {fair['jain']:.4f}"),
            (fair["furthest_apart"] <= fair["bound"], f"tenants {fair['furthest_apart']:.0f} apart"),
            (seen["n"] >= 1000, f"only {seen['n']:.0f} predictions"),
            (abs(seen["within_q90"] - 0.9) <= 0.03, f"q90 holds for {seen['within_q90']:.1%}"),
        ]
    return [text for holds, text in claims if not holds]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    print(
        f"\n{'':18}{'high p50 s':>11}{'p95 s':>8}{'x alone':>9}{'(rounds)':>14}{'low tok/s':>11}{'good/s':>8}  refused"
    )
    for row in rows:
        spread = row["high_p95_to_alone_by_round"]
        print(
            f"{row['side']:18}{row['high_ttft_p50_s']:>11.2f}{row['high_ttft_p95_s']:>8.2f}"
            f"{row['high_p95_to_alone']:>9.2f}{f'({spread[0]:.2f}-{spread[-1]:.2f})':>14}"
            f"{row['low_tokens_per_s']:>11.2f}{row['good_per_s']:>8.2f}  {row['rejections']}, cut off {row['cut_off']}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--vllm-rounds", type=int)
    parser.add_argument("--seconds", type=float, help="engine seconds of a leg")
    parser.add_argument("--fair-seconds", type=float)
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/qos_soak.json")
    options = parser.parse_args()
    quick = options.quick
    options.rounds = options.rounds or (1 if quick else 7)
    options.vllm_rounds = options.vllm_rounds or (1 if quick else 3)
    options.seconds = options.seconds or (8.0 if quick else 20.0)
    options.fair_seconds = options.fair_seconds or (8.0 if quick else 60.0)
    options.knee_seconds = 4.0 if quick else 10.0
    lane = vllm_server.PYTHON.is_file() and (vllm_server.MODEL_DIR / "model.safetensors").is_file()
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"bench": "qos_soak", "embedded": asyncio.run(embedded(options, Path(folder)))}
        if lane and not options.no_vllm:
            found["vllm"] = asyncio.run(vllm(options, Path(folder)))
        elif not lane:
            print("vLLM's sides are skipped: the lane has not been made (make vllm)")
    show([row for name in ("embedded", "vllm") if name in found for row in found[name]["rows"]])
    print({name: found["embedded"][name] for name in ("calibration", "fairness", "refused_after_deadline_s")})
    options.json.write_text(json.dumps(found, indent=1))
    problems = broken(found, whole=not quick)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
