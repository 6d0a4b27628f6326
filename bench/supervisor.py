"""What the hop to an engine in a process of its own costs: the fake engine through RemoteEngine, beside the same engine
in this process, in one run.

"a bare wake-up" is the floor of the paced row: a protocol that does nothing with as many bytes, as often. The whole way
to a client, HTTP and all, is in ``bench/models.py``.

Figures of the front are the CPU of this process, which noisy neighbours disturb less than times: per streamed token in
bursts (eight streams as fast as they come: many tokens a wake-up) and paced (one stream, a token every 5 ms: a wake-up
each), and per whole answer. In the process, the engine's own CPU is in it; through the hop it is the other process's.

``bench/supervisor.py [--quick] [--json FILE]``
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import statistics
import sys
import time
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

ROOT = Path(__file__).parent.parent
SOURCES = [str(ROOT / name) for name in ("runtimes", "profiles", "tests/fakes")]
sys.path[:0] = SOURCES

import psutil  # noqa: E402
import uvloop  # noqa: E402

from aim_runtime.engines.base import Engine, EngineSpec, RequestContext  # noqa: E402
from aim_runtime.supervisor import launch  # noqa: E402
from aim_runtime.supervisor.remote import RemoteEngine  # noqa: E402
from fake_engine import FakeEngine  # noqa: E402

TOKENS = 64
BOUNDS = {"burst": 10.0, "paced": 60.0, "unary": 0.3}
ASK = {"messages": [{"role": "user", "content": "What is a GPU? " * 8}], "max_tokens": TOKENS, "stream": True}
PACED = {**ASK, "fake": {"token_s": 0.005}}
WHOLE = {"prompt": "What is a GPU? " * 8}
CASES = (("burst", 8, ASK), ("paced", 1, PACED), ("unary", 1, WHOLE), ("unary", 8, WHOLE))


@dataclass(frozen=True)
class Row:
    """Medians over rounds. ``cpu_us``: this process's, per token (streams) or per answer (unary)."""

    where: str
    form: str
    concurrency: int
    cpu_us: float
    p50_ms: float
    p95_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/supervisor.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(measure(rounds=3 if options.quick else 7))
    options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    show(report)


async def measure(rounds: int) -> dict[str, object]:
    launch.CHILD = "odd_child"
    spec = EngineSpec("odd", ROOT, "m", max_concurrency=64)
    remote = RemoteEngine(launch.Launch(spec, env={"PYTHONPATH": os.pathsep.join(SOURCES)}))
    engines: dict[str, Engine] = {"in this process": FakeEngine("m"), "through the hop": remote}
    started = time.perf_counter()
    await remote.load()
    start_s = time.perf_counter() - started
    await engines["in this process"].load()
    try:
        (child,) = psutil.Process().children()
        child_rss_mib = child.memory_info().rss / 2**20
        rows = []
        for form, concurrency, ask in CASES:
            taken: dict[str, list[Row]] = {where: [] for where in engines}
            for where, engine in engines.items():
                await one_round(where, engine, form, concurrency, ask)  # warms up
            for _ in range(rounds):  # interleaved: both meet the same neighbours
                for where, engine in engines.items():
                    taken[where].append(await one_round(where, engine, form, concurrency, ask))
                if form == "paced":
                    taken.setdefault("a bare wake-up", []).append(await bare_wake_ups())
            rows += [median(each) for each in taken.values()]
    finally:
        for engine in engines.values():
            await engine.close()
    return {
        "bench": "supervisor",
        "rounds": rounds,
        "rows": [asdict(row) for row in rows],
        "child": {"start_s": round(start_s, 2), "rss_mib": round(child_rss_mib)},
        **summary(rows),
    }


async def one_round(where: str, engine: Engine, form: str, concurrency: int, ask: dict[str, object]) -> Row:
    count = {"burst": 160, "paced": 4, "unary": 1000}[form]
    left = iter(range(count))
    times: list[float] = []
    work = whole if form == "unary" else stream

    async def client() -> None:
        for _ in left:
            started = time.perf_counter()
            await work(engine, ask)
            times.append(time.perf_counter() - started)

    cpu = time.process_time()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    cpu_us = (time.process_time() - cpu) * 1e6 / count / (1 if form == "unary" else TOKENS)
    times.sort()
    return Row(where, form, concurrency, cpu_us, times[len(times) // 2] * 1e3, times[int(len(times) * 0.95)] * 1e3)


SENDER = """
import socket, sys, time
out = socket.socket(fileno=int(sys.argv[1]))
out.recv(1)
for _ in range(256):
    time.sleep(0.005)
    out.send(bytes(300))
"""


class Counting(asyncio.Protocol):
    def __init__(self) -> None:
        self.left = 256 * 300
        self.done = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.left -= len(data)
        if not self.left:
            self.done.set_result(None)


async def bare_wake_ups() -> Row:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", SENDER, str(theirs.fileno())]
        sender = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()])
    transport, counting = await asyncio.get_running_loop().create_unix_connection(Counting, sock=ours)
    cpu = time.process_time()
    transport.write(b"x")
    await counting.done
    cpu_us = (time.process_time() - cpu) * 1e6 / 256
    transport.close()
    await sender.wait()
    return Row("a bare wake-up", "paced", 1, cpu_us, 0.0, 0.0)


async def whole(engine: Engine, ask: dict[str, object]) -> None:
    answer = await engine.operations["tokenize"](ask, RequestContext("r"))
    assert isinstance(answer, dict)
    assert answer["count"] == 32


async def stream(engine: Engine, ask: dict[str, object]) -> None:
    answer = await engine.operations["chat/completions"](ask, RequestContext("r"))
    assert not isinstance(answer, dict)
    async with aclosing(answer):
        chunks = [chunk async for chunk in answer]
    assert len(chunks) == TOKENS + 2


def median(rows: list[Row]) -> Row:
    """Each figure's own median."""
    values = {
        name: round(statistics.median(getattr(row, name) for row in rows), 3) for name in ("cpu_us", "p50_ms", "p95_ms")
    }
    return Row(rows[0].where, rows[0].form, rows[0].concurrency, **values)


def summary(rows: list[Row]) -> dict[str, object]:
    by = {(row.where, row.form, row.concurrency): row for row in rows}
    here, there = "in this process", "through the hop"
    return {
        "front_cpu_us_per_token_in_bursts": by[there, "burst", 8].cpu_us,
        "front_cpu_us_per_token_paced": by[there, "paced", 1].cpu_us,
        "bare_wake_up_cpu_us": by["a bare wake-up", "paced", 1].cpu_us,
        "added_p50_ms_per_unary_request": round(by[there, "unary", 1].p50_ms - by[here, "unary", 1].p50_ms, 3),
        "bounds": BOUNDS,
    }


def show(report: dict[str, object]) -> None:
    print(f"{'engine':18}{'form':8}{'c':>3}{'CPU µs of this process':>24}{'p50 ms':>10}{'p95 ms':>10}")
    for row in report["rows"]:
        per = "answer" if row["form"] == "unary" else "token"
        print(
            f"{row['where']:18}{row['form']:8}{row['concurrency']:>3}{row['cpu_us']:>14.2f} per {per:6}"
            f"{row['p50_ms']:>10.3f}{row['p95_ms']:>10.3f}"
        )
    print(f"the process: loaded after {report['child']['start_s']} s, {report['child']['rss_mib']} MiB")
    for name, form in (("front_cpu_us_per_token_in_bursts", "burst"), ("front_cpu_us_per_token_paced", "paced")):
        print(f"{name}: {report[name]:.2f} (bound {BOUNDS[form]:g})")
    print(f"added_p50_ms_per_unary_request: {report['added_p50_ms_per_unary_request']:.3f} (bound {BOUNDS['unary']:g})")


if __name__ == "__main__":
    main()
