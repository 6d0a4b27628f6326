"""One of four models behind the front beside the same model alone: the real server over the fake engine, in one run.

Four servers take turns, round by round, before one client: ``four`` has four models, each in a process of its own, and
is asked for one of them; ``one`` has that model only, in a process of its own; ``in it`` computes in the server's own
process; ``floor`` is no server: a uvloop protocol that passes each token on from a process of its own to the client,
and knows nothing of HTTP but the bytes it was given.

Counted is the CPU of the front process, all its threads, and neither the engines' nor the client's (with ``in it`` the
engine is the front's), without what the front takes when nobody asks, which has a line of its own. A request's own cost
is in the figure per token. Forms: whole answers (no token takes time), streams in bursts (as fast as they come: many
tokens a wake-up) and paced (a token every 5 ms: a wake-up each, as an engine's steps are).

``bench/models.py [--quick] [--json FILE]``
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).parent.parent
SOURCES = [str(ROOT / name) for name in ("runtimes", "profiles", "tests/fakes", "bench")]
sys.path[:0] = SOURCES

from http_load import cpu_s, load  # noqa: E402

from ports import free_ports  # noqa: E402

#: Form → tokens of an answer.
TOKENS = {"unary": 64, "burst": 256, "paced": 64}
TOKEN_S = 0.005
NAMES = ("m", "second", "third", "fourth")
ASK: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "What is a GPU? " * 8}],
}
#: Form → what is asked for beside.
FORMS: dict[str, dict[str, Any]] = {
    "unary": {},
    "burst": {"stream": True},
    "paced": {"stream": True, "fake": {"token_s": TOKEN_S}},
}
#: Form, concurrency, requests a round.
CELLS = (("unary", 1, 300), ("unary", 8, 600), ("burst", 8, 48), ("paced", 1, 4), ("paced", 8, 32))
FOUR, ONE, WITHIN, FLOOR = "four", "one", "in it", "floor"
BOUNDS = {"added_p50_ms_per_unary_request": 0.3, "cpu_us_per_token_in_bursts": 10.0, "cpu_us_per_token_paced": 60.0}


@dataclass(frozen=True)
class Row:
    """One server, form and concurrency: of one round, or the medians of all. ``cpu_us``: of the front, per whole
    answer or per token of a stream, beside what the front takes ``with_idle``."""

    server: str
    form: str
    concurrency: int
    p50_ms: float
    p95_ms: float
    cpu_us: float
    cpu_us_with_idle: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/models.json")
    parser.add_argument("--serve", choices=[FOUR, ONE, WITHIN], help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.serve:
        sys.exit(serve(options.serve, flags))
    started_at_load = os.getloadavg()[0]
    with ExitStack() as stack:
        servers = {name: stack.enter_context(running(name)) for name in (FOUR, ONE, WITHIN, FLOOR)}
        idle = idle_of(servers, seconds=2 if options.quick else 10)
        taken = measure(servers, idle, rounds=3 if options.quick else 11)
    report = report_of(taken) | {
        "idle_cpu_ms_per_s": idle,
        "load_1_min": [round(started_at_load, 2), round(os.getloadavg()[0], 2)],
    }
    options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    show(report)


# --- the servers ----------------------------------------------------------------------------------------------------


def serve(which: str, flags: list[str]) -> int:
    from aim_kserve.log import log_to_stderr
    from aim_runtime.engines.base import Engine, EngineSpec
    from aim_runtime.models.directory import Models
    from aim_runtime.models.entry import Launch, ModelEntry
    from aim_runtime.server import serve_models
    from aim_runtime.settings import RuntimeSettings
    from aim_runtime.supervisor import launch
    from aim_runtime.supervisor.remote import RemoteEngine
    from aim_runtime.telemetry import Telemetry
    from fake_engine import FakeEngine

    launch.CHILD = "odd_child"

    def engine(name: str) -> Engine:
        if which == WITHIN:
            return FakeEngine(name)
        return RemoteEngine(launch.Launch(EngineSpec("odd", ROOT, name, max_concurrency=64)))

    settings = RuntimeSettings.load(flags, prog="bench-models", description="a benchmark's server")
    log_to_stderr()
    entries = [
        ModelEntry(name, (Launch(lambda name=name: engine(name)),))  # type: ignore[misc]
        for name in (NAMES if which == FOUR else NAMES[:1])
    ]
    with Telemetry(settings) as telemetry:
        models = Models(entries, audit=telemetry.audit, gate=telemetry.gate)
        telemetry.show(models.states)
        return serve_models(settings, models)


@contextmanager
def running(name: str) -> Iterator[tuple[int, int]]:
    """(pid, port) of a front that is ready."""
    port, grpc_port = free_ports(2)
    flags = ["--model_name", "m", "--host", "127.0.0.1", "--http_port", str(port), "--grpc_port", str(grpc_port)]
    relay = [str(ROOT / "bench/relay.py"), str(port), str(TOKEN_S), str(TOKENS["paced"])]
    command = relay if name == FLOOR else [__file__, "--serve", name, *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        until_ready(process, port, "/v2/health/ready" if name != FLOOR else None)
        yield process.pid, port
    finally:
        process.terminate()
        process.communicate()


def until_ready(process: subprocess.Popen[bytes], port: int, path: str | None) -> None:
    """``path`` answers 200; None: the port is open."""
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server ended: {process.communicate()[1].decode()}")
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.connect()
            if path is None:
                return
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise SystemExit("the server is not ready after 60 s")


# --- measuring ------------------------------------------------------------------------------------------------------

Cell = tuple[str, int]
Taken = dict[Cell, dict[str, list[Row]]]


def idle_of(servers: dict[str, tuple[int, int]], seconds: float) -> dict[str, float]:
    """CPU ms per second of each front that nobody asks: heartbeats, the memory watch, uvicorn's own clock."""
    time.sleep(2)
    before = {name: cpu_s(pid) for name, (pid, _) in servers.items()}
    time.sleep(seconds)
    return {name: round((cpu_s(pid) - before[name]) / seconds * 1e3, 3) for name, (pid, _) in servers.items()}


def measure(servers: dict[str, tuple[int, int]], idle: dict[str, float], rounds: int) -> Taken:
    """Every round of every cell; round by round each server's turn is another one."""
    taken: Taken = {}
    for form, concurrency, count in CELLS:
        there = [name for name in servers if form == "paced" or name != FLOOR]
        rows = taken[form, concurrency] = {name: [] for name in there}
        for name in there:  # the first requests warm up
            one_round(name, servers[name], idle[name], form, concurrency, max(concurrency, count // 4))
        for number in range(rounds):
            for name in there if number % 2 else there[::-1]:
                rows[name].append(one_round(name, servers[name], idle[name], form, concurrency, count))
    return taken


def one_round(name: str, where: tuple[int, int], idle: float, form: str, concurrency: int, count: int) -> Row:
    tokens = TOKENS[form]
    body = ASK | FORMS[form] | {"max_tokens": tokens}
    times, wall_s, taken_s = load(*where, body, tokens, concurrency=concurrency, count=count)
    units = count * (1 if form == "unary" else tokens)
    p50_s, p95_s = times[len(times) // 2], times[int(len(times) * 0.95)]
    cpu_us = (taken_s - wall_s * idle / 1e3) * 1e6 / units
    return Row(name, form, concurrency, p50_s * 1e3, p95_s * 1e3, cpu_us, taken_s * 1e6 / units)


# --- telling --------------------------------------------------------------------------------------------------------


def report_of(taken: Taken) -> dict[str, Any]:
    rows = [median(each) for cell in taken.values() for each in cell.values()]
    by = {(row.form, row.concurrency, row.server): row for row in rows}
    paired = {
        f"{form}, c={concurrency}": {
            f"{FOUR} to {name}": against(cell[FOUR], others) for name, others in cell.items() if name != FOUR
        }
        for (form, concurrency), cell in taken.items()
    }
    unary = paired["unary, c=1"]
    return {
        "bench": "models",
        "tokens_per_answer": TOKENS,
        "token_s": TOKEN_S,
        "rounds": len(next(iter(taken.values()))[FOUR]),
        "rows": [asdict(row) for row in rows],
        "pairs": paired,
        "added_p50_ms_per_unary_request": unary[f"{FOUR} to {ONE}"]["added_p50_ms"]["p50"],
        "added_p50_ms_per_unary_request_to_in_it": unary[f"{FOUR} to {WITHIN}"]["added_p50_ms"]["p50"],
        "cpu_us_per_token_in_bursts": by["burst", 8, FOUR].cpu_us,
        "cpu_us_per_token_paced": by["paced", 1, FOUR].cpu_us,
        "cpu_us_per_token_paced_floor": by["paced", 1, FLOOR].cpu_us,
        "bounds": BOUNDS,
    }


def median(rows: list[Row]) -> Row:
    """Each figure's own median."""
    values = {
        name: round(statistics.median(getattr(row, name) for row in rows), 3)
        for name in ("p50_ms", "p95_ms", "cpu_us", "cpu_us_with_idle")
    }
    return Row(rows[0].server, rows[0].form, rows[0].concurrency, **values)


def against(ours: list[Row], others: list[Row]) -> dict[str, dict[str, float]]:
    """Round by round: how much more, and how many times as much. The median, and the 95th percentile."""
    pairs = list(zip(ours, others, strict=True))
    return {
        "added_p50_ms": quantiles([a.p50_ms - b.p50_ms for a, b in pairs]),
        "p50_ratio": quantiles([a.p50_ms / b.p50_ms for a, b in pairs]),
        "cpu_ratio": quantiles([a.cpu_us / b.cpu_us for a, b in pairs]),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {"p50": round(statistics.median(values), 3), "p95": round(values[int(0.95 * (len(values) - 1))], 3)}


def show(report: dict[str, Any]) -> None:
    print(f"{'form':8}{'c':>2}  {'server':8}{'p50 ms':>10}{'p95 ms':>10}{'CPU µs of the front':>22}{'with idle':>13}")
    for row in report["rows"]:
        per = "answer" if row["form"] == "unary" else "token"
        print(
            f"{row['form']:8}{row['concurrency']:>2}  {row['server']:8}{row['p50_ms']:>10.2f}{row['p95_ms']:>10.2f}"
            f"{row['cpu_us']:>12.1f} per {per:6}{row['cpu_us_with_idle']:>12.1f}"
        )
    for cell, pairs in report["pairs"].items():
        for name, figures in pairs.items():
            told = ", ".join(f"{key} {each['p50']:.3f} (p95 {each['p95']:.3f})" for key, each in figures.items())
            print(f"{cell}, {name}: {told}")
    idle = ", ".join(f"{name} {value:.2f}" for name, value in report["idle_cpu_ms_per_s"].items())
    print(f"CPU ms a second of a front that nobody asks: {idle}")
    before, after = report["load_1_min"]
    print(f"load of this machine, 1 min: {before} before, {after} after; {os.cpu_count()} CPUs")
    for name in ("added_p50_ms_per_unary_request", "cpu_us_per_token_in_bursts", "cpu_us_per_token_paced"):
        print(f"{name}: {report[name]:.3f} (bound {BOUNDS[name]:g})")
    print(f"cpu_us_per_token_paced_floor: {report['cpu_us_per_token_paced_floor']:.3f}")


if __name__ == "__main__":
    main()
