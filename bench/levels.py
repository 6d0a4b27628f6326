"""What service levels and identity cost: the real server with them beside the same server without, in one run.

Servers take turns, round by round, before one client; the engine is the fake one, in a process of its own. ``off`` has
neither; ``off again`` is the control: how far it is from ``off`` is this machine's noise. ``keys`` verifies API keys,
``tokens`` JWTs (ES256), ``qos`` has ``--qos``, ``both`` has keys and ``--qos``, ``deadline`` has ``--latency_slo_ms``
beside, so that each request's first token is predicted. All are asked by four tenants' keys in turn, those without
identity too, and ``tokens`` and ``off, tokens`` by tokens: compared is the server's work, not what a header costs.

Counted is the CPU of the front process, all its threads, and neither the engine's nor the client's. Forms: whole
answers, streams in bursts and paced, as in ``bench/models.py``. A ratio is the median of those of single rounds.

``bench/levels.py [--quick] [--rounds N] [--only NAME …] [--cells FORM,C …] [--json FILE]``
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

sys.path.insert(0, str(Path(__file__).parent))
from http_load import load
from models import ASK, FORMS, ROOT, SOURCES, TOKENS, until_ready

from ports import free_ports

OFF, AGAIN, OFF_TOKENS = "off", "off again", "off, tokens"
KEYS, TOKENS_ON, QOS, BOTH, DEADLINE = "keys", "tokens", "qos", "both", "deadline"
#: Form, concurrency, requests a round.
CELLS = (("unary", 1, 64), ("unary", 8, 96), ("burst", 8, 8), ("paced", 8, 8))
#: Of CPU per request, beside the same requests with neither.
BOUND = 1.02
BOUND_OF = (KEYS, TOKENS_ON, QOS, BOTH)
TENANTS = 4


@dataclass(frozen=True)
class Front:
    """One that is ready, and who asks it: header lines."""

    pid: int
    port: int
    credentials: Sequence[str]


Cell = tuple[str, int]
#: Cell → server → CPU µs of a request, round by round.
Taken = dict[Cell, dict[str, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--rounds", type=int, help="of each cell (default: 40, with --quick 8)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="servers beside off")
    parser.add_argument("--cells", nargs="+", metavar="FORM,C", help="some of: unary,1 unary,8 burst,8 paced,8")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/levels.json")
    options = parser.parse_args()
    cells = [cell for cell in CELLS if not options.cells or f"{cell[0]},{cell[1]}" in options.cells]
    started_at_load = os.getloadavg()[0]
    with TemporaryDirectory() as folder, ExitStack() as stack:
        fronts = fronts_of(Path(folder), stack, options.only)
        taken = measure(fronts, cells, options.rounds or (8 if options.quick else 40))
    report = report_of(taken) | {"load_1_min": [round(started_at_load, 2), round(os.getloadavg()[0], 2)]}
    options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    show(report)


# --- the servers ----------------------------------------------------------------------------------------------------


def fronts_of(folder: Path, stack: ExitStack, only: Sequence[str] | None) -> dict[str, Front]:
    keys, by_key = api_keys(folder)
    tokens, by_token = jwts(folder)
    qos = ["--qos"]
    flags = {
        OFF: [],
        AGAIN: [],
        KEYS: keys,
        TOKENS_ON: tokens,
        QOS: qos,
        BOTH: [*keys, *qos],
        DEADLINE: [*keys, *qos, "--latency_slo_ms", "10000"],
    }
    fronts: dict[str, Front] = {}
    for name, given in flags.items():
        if only and name not in {OFF, *only}:
            continue
        pid, port = stack.enter_context(running(given))
        fronts[name] = Front(pid, port, by_token if name == TOKENS_ON else by_key)
    if TOKENS_ON in fronts:
        fronts[OFF_TOKENS] = Front(fronts[OFF].pid, fronts[OFF].port, by_token)
    return fronts


def api_keys(folder: Path) -> tuple[list[str], list[str]]:
    """Flags, and header lines of four tenants."""
    from aim_kserve.identity import keys

    made = [keys.new_key(f"key-{number}", tenant=f"tenant-{number}") for number in range(TENANTS)]
    keys.write(folder / "keys.yaml", keys.KeyFile(version=1, keys=tuple(entry for _, entry in made)))
    return ["--api_keys", str(folder / "keys.yaml")], [f"authorization: Bearer {text}\r\n" for text, _ in made]


def jwts(folder: Path) -> tuple[list[str], list[str]]:
    """The same of tokens, good for longer than the benchmark takes."""
    from issuer import Issuer

    issuer = Issuer("ES256")
    (folder / "jwks.json").write_bytes(issuer.jwks())
    issuer.url = str(folder / "jwks.json")
    until = int(time.time()) + 3600
    texts = [issuer.token(sub=f"tenant-{number}", exp=until) for number in range(TENANTS)]
    return issuer.flags(), [f"authorization: Bearer {text}\r\n" for text in texts]


@contextmanager
def running(flags: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(pid, port) of a front that is ready. Its access log is written, to nobody."""
    port, grpc_port = free_ports(2)
    server = [str(ROOT / "tests/fakes/fake_server.py"), '{"process": true, "slots": 64}', "--model_name", "m"]
    where = ["--host", "127.0.0.1", "--http_port", str(port), "--grpc_port", str(grpc_port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"}
    process = subprocess.Popen(
        [sys.executable, *server, *where, *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        until_ready(process, port, "/v2/health/ready")
        yield process.pid, port
    finally:
        process.terminate()
        process.communicate()


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(fronts: dict[str, Front], cells: Sequence[tuple[str, int, int]], rounds: int) -> Taken:
    """Round by round each cell and each server, another one first each time. Cells share a round, so that what the
    machine does for a while is in all of them."""
    taken: Taken = {(form, concurrency): {name: [] for name in fronts} for form, concurrency, _ in cells}
    names = list(fronts)
    for number in range(-1, rounds):
        for form, concurrency, count in cells:
            for name in names[number % len(names) :] + names[: number % len(names)]:
                cpu_us = one_round(fronts[name], form, concurrency, count)
                if number >= 0:  # the first warms up
                    taken[form, concurrency][name].append(cpu_us)
    return taken


def one_round(front: Front, form: str, concurrency: int, count: int) -> float:
    """CPU µs of a request."""
    tokens = TOKENS[form]
    body = ASK | FORMS[form] | {"max_tokens": tokens}
    _, _, taken_s = load(
        front.pid, front.port, body, tokens, concurrency=concurrency, count=count, heads=front.credentials
    )
    return taken_s * 1e6 / count


# --- telling --------------------------------------------------------------------------------------------------------


def report_of(taken: Taken) -> dict[str, Any]:
    rows = [row_of(cell, name, rounds) for cell, rounds in taken.items() for name in rounds if name != OFF]
    return {
        "bench": "levels",
        "tokens_per_answer": TOKENS,
        "tenants": TENANTS,
        "rounds": len(next(iter(taken.values()))[OFF]),
        "bound": BOUND,
        "rows": rows,
        "over_the_bound": [
            f"{row['form']}, c={row['concurrency']}, {row['server']}"
            for row in rows
            if row["server"] in BOUND_OF and row["ratio"] > BOUND
        ],
    }


def row_of(cell: Cell, name: str, rounds: dict[str, list[float]]) -> dict[str, Any]:
    """A server in a cell, beside ``off`` asked alike. ``ratio_low`` and ``ratio_high``: 95 % of the medians that other
    rounds would have shown (order statistics). ``quiet_ratio``: of the fastest tenth of rounds, which others on the
    machine have disturbed least."""
    off, on = rounds[OFF_TOKENS if name == TOKENS_ON else OFF], rounds[name]
    ratios = sorted(mine / other for mine, other in zip(on, off, strict=True))
    n, reach = len(ratios), 0.98 * len(ratios) ** 0.5
    added = statistics.median(mine - other for mine, other in zip(on, off, strict=True))
    return {
        "form": cell[0],
        "concurrency": cell[1],
        "server": name,
        "cpu_us_per_request": round(statistics.median(on), 1),
        "off_us_per_request": round(statistics.median(off), 1),
        "added_us_per_request": round(added, 1),
        "added_us_per_token": round(added / TOKENS[cell[0]], 3),
        "ratio": round(statistics.median(ratios), 4),
        "quiet_ratio": round(tenth(on) / tenth(off), 4),
        "ratio_low": round(ratios[max(0, int(n / 2 - reach))], 4),
        "ratio_high": round(ratios[min(n - 1, int(n / 2 + reach))], 4),
    }


def tenth(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 10]


def show(report: dict[str, Any]) -> None:
    head = f"{'form':8}{'c':>2}  {'server':12}{'CPU µs a request':>18}{'off':>10}{'added':>9}{'ratio':>9}"
    print(f"{head}   {'95 % of it':16}{'quiet':>9}")
    for row in report["rows"]:
        print(
            f"{row['form']:8}{row['concurrency']:>2}  {row['server']:12}{row['cpu_us_per_request']:>18.1f}"
            f"{row['off_us_per_request']:>10.1f}{row['added_us_per_request']:>9.1f}{row['ratio']:>9.4f}"
            f"   {row['ratio_low']:.4f} to {row['ratio_high']:.4f}{row['quiet_ratio']:>9.4f}"
        )
    before, after = report["load_1_min"]
    print(f"load of this machine, 1 min: {before} before, {after} after; {os.cpu_count()} CPUs")
    over = "; ".join(report["over_the_bound"]) or "none"
    print(f"over the bound ({BOUND:g} of {', '.join(BOUND_OF)}): {over}; {report['rounds']} rounds")


if __name__ == "__main__":
    main()
