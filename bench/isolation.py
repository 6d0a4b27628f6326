"""What a busy neighbour on other devices costs a model: CPU per token and wall time, beside it and alone.

Two engines in processes of their own (``RemoteEngine``), each bound to its devices: here one CPU each, with one compute
thread. A round asks the measured one for a few answers, one after the other; the neighbour either rests or answers four
streams without a pause. Rounds come in threes (alone, alone again, beside) in changing order, so that the machine's
drift hits all alike: ``beside ÷ alone`` is the interference, ``alone again ÷ alone`` is what the noise of this machine
looks like. Engines on CPU sets still share the last cache and the memory's bandwidth: the table says which.

``python bench/isolation.py [--quick] [--json FILE]``. On a GPU node bind by what the runtime binds by, e.g. two
partitions of one card, or one partition on each of two:

    python bench/isolation.py --engine vllm --model DIR --python .venv-vllm/bin/python \\
        --measured ROCR_VISIBLE_DEVICES=0 --neighbour ROCR_VISIBLE_DEVICES=1

There the wall time of an answer is the figure, and the CPU is what the engine's host thread costs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "runtimes"), str(ROOT / "profiles")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2] + os.environ.get("PYTHONPATH", "").split(os.pathsep))

from aim_runtime.engines.base import EngineSpec, RequestContext  # noqa: E402
from aim_runtime.measure.figures import percentile  # noqa: E402
from aim_runtime.supervisor.launch import Launch  # noqa: E402
from aim_runtime.supervisor.remote import RemoteEngine  # noqa: E402

MODEL = ROOT / ".models/smollm2"
PROMPT_WORDS, TOKENS, NEIGHBOUR_STREAMS, ANSWERS = 48, 64, 4, 4
CASES = ("alone", "alone again", "beside")
WORDS = ("river", "stone", "green", "letter", "window", "morning", "paper", "garden", "yellow", "engine", "silver")
AIM = 1.05  #: on CPU sets, CPU per token


@dataclass(frozen=True)
class Round:
    """What the measured engine did. ``foreign``: CPUs that others than the two engines and we kept busy meanwhile."""

    case: str
    cpu_ms_per_token: float
    wall_p50_ms: float
    wall_p95_ms: float
    neighbour_tokens_per_s: float
    foreign: float


def main() -> None:
    options = _options()
    if not options.model.exists():
        raise SystemExit(f"{options.model} is missing: make model")
    bound = {name: _binding(getattr(options, name)) for name in ("measured", "neighbour")}
    rounds = asyncio.run(measure(options, bound, threes=4 if options.quick else 12))
    found = {
        "engine": options.engine,
        "model": str(options.model),
        "bound": {name: getattr(options, name) for name in bound},
        "shared": shared(*(cpus for cpus, _ in bound.values())),
        **report(rounds),
        "rounds": [asdict(each) for each in rounds],
    }
    options.json.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    show(found)


def _options() -> argparse.Namespace:
    cpus = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 rounds of each instead of 12")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/isolation.json", help="where the figures go")
    parser.add_argument("--engine", default="llama_cpp")
    parser.add_argument("--model", type=Path, default=MODEL, help="directory or .gguf file")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the engine's library")
    where = "cpus=0,1 or VARIABLE=VALUE of the engine's environment"
    parser.add_argument("--measured", default=f"cpus={cpus[0]}", help=f"{where} (default: the first CPU)")
    parser.add_argument("--neighbour", default=f"cpus={cpus[-1]}", help=f"{where} (default: the last CPU)")
    return parser.parse_args()


def _binding(text: str) -> tuple[frozenset[int] | None, dict[str, str]]:
    """CPUs and environment."""
    name, _, value = text.partition("=")
    if name != "cpus":
        return None, {name: value}
    return frozenset(map(int, value.split(","))), {"OMP_NUM_THREADS": str(len(value.split(",")))}


# --- measuring ------------------------------------------------------------------------------------------------------


async def measure(options: argparse.Namespace, bound: dict[str, Any], *, threes: int) -> list[Round]:
    draw = random.Random(7)
    done: list[Round] = []
    async with running(options, *bound["measured"]) as engine, running(options, *bound["neighbour"]) as neighbour:
        for each in (engine, neighbour):
            await answer(each, draw)
        for _ in range(threes):
            done += [await round_of(case, engine, neighbour, draw) for case in draw.sample(CASES, len(CASES))]
    return done


@asynccontextmanager
async def running(
    options: argparse.Namespace, cpus: frozenset[int] | None, env: dict[str, str]
) -> AsyncIterator[RemoteEngine]:
    own = {"threads": len(cpus)} if cpus and options.engine == "llama_cpp" else {}
    spec = EngineSpec(options.engine, options.model, "bench", 1024, NEIGHBOUR_STREAMS, own)
    engine = RemoteEngine(Launch(spec, python=options.python, env=env, cpus=cpus))
    try:
        await engine.load()
        yield engine
    finally:
        await engine.close()


async def round_of(case: str, engine: RemoteEngine, neighbour: RemoteEngine, draw: random.Random) -> Round:
    """The neighbour is at work before the first answer is asked for, and until the last one is there."""
    count = [0]
    streams = NEIGHBOUR_STREAMS if case == "beside" else 0
    beside = [asyncio.create_task(_without_a_pause(neighbour, count)) for _ in range(streams)]
    await asyncio.sleep(0.5)
    count[0], began, wall_ms = 0, time.perf_counter(), []
    cpu, theirs, ours, machine = cpu_s(engine), cpu_s(neighbour), time.process_time(), machine_cpu_s()
    for _ in range(ANSWERS):
        started = time.perf_counter()
        await answer(engine, draw)
        wall_ms.append(1e3 * (time.perf_counter() - started))
    wall_s, cpu = time.perf_counter() - began, cpu_s(engine) - cpu
    known = cpu + cpu_s(neighbour) - theirs + time.process_time() - ours
    foreign = (machine_cpu_s() - machine - known) / wall_s
    tokens = count[0]
    await _cancel(beside)
    return Round(
        case,
        cpu_ms_per_token=1e3 * cpu / (ANSWERS * TOKENS),
        wall_p50_ms=statistics.median(wall_ms),
        wall_p95_ms=percentile(sorted(wall_ms), 0.95),
        neighbour_tokens_per_s=tokens / wall_s,
        foreign=max(0.0, foreign),
    )


async def answer(engine: RemoteEngine, draw: random.Random) -> None:
    """A new prompt each time: no prefix cache can help."""
    prompt = " ".join(draw.choice(WORDS) for _ in range(PROMPT_WORDS))
    body = {"model": "bench", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    found: Any = await engine.operations["completions"](body, RequestContext("bench"))
    assert found["usage"]["completion_tokens"] == TOKENS


async def _without_a_pause(engine: RemoteEngine, count: list[int]) -> None:
    draw = random.Random()
    while True:
        await answer(engine, draw)
        count[0] += TOKENS


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)


def cpu_s(engine: RemoteEngine) -> float:
    """Of all threads of the engine's processes, in nanoseconds: ``/proc/PID/stat`` counts in 10 ms."""
    first = psutil.Process(engine.pid)
    total = 0
    for process in (first, *first.children(recursive=True)):
        for task in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            with suppress(OSError):
                total += int(task.read_text().split()[0])
    return total / 1e9


def machine_cpu_s() -> float:
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def shared(one: frozenset[int] | None, other: frozenset[int] | None) -> str:
    """What two CPU sets share, as sysfs says; where nothing is bound to CPUs, nobody knows."""
    if one is None or other is None:
        return "not CPU sets: what two devices share is the card's business (cache, bandwidth, power)"
    found = ["the CPU itself"] if one & other else []
    for name, file in {
        "a core (SMT)": "topology/thread_siblings_list",
        "the last cache": "cache/index3/shared_cpu_list",
    }.items():
        texts = [(Path(f"/sys/devices/system/cpu/cpu{cpu}") / file) for cpu in one]
        if any(_listed(text) & other for text in texts if text.exists()):
            found.append(name)
    return ", ".join([*found, "the memory's bandwidth"])


def _listed(file: Path) -> set[int]:
    """``0-3,8``."""
    parts = (part.split("-") for part in file.read_text().strip().split(","))
    return {cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)}


# --- telling --------------------------------------------------------------------------------------------------------


def report(rounds: list[Round]) -> dict[str, Any]:
    by_case = {case: [each for each in rounds if each.case == case] for case in CASES}
    table = {
        case: {
            "cpu_ms_per_token": statistics.median(each.cpu_ms_per_token for each in of),
            "wall_p50_ms": statistics.median(each.wall_p50_ms for each in of),
            "wall_p95_ms": statistics.median(each.wall_p95_ms for each in of),
            "neighbour_tokens_per_s": statistics.median(each.neighbour_tokens_per_s for each in of),
            "foreign_cpus": statistics.median(each.foreign for each in of),
        }
        for case, of in by_case.items()
    }
    ratios = {
        case: {
            figure: _ratio(
                [getattr(each, figure) for each in by_case[case]], [getattr(each, figure) for each in by_case["alone"]]
            )
            for figure in ("cpu_ms_per_token", "wall_p50_ms")
        }
        for case in CASES[1:]
    }
    return {"table": table, "ratios_to_alone": ratios}


def _ratio(these: list[float], alone: list[float]) -> dict[str, float]:
    """Of paired rounds."""
    ratios = [one / other for one, other in zip(these, alone, strict=True)]
    return {"p50": statistics.median(ratios), "p95": percentile(sorted(ratios), 0.95)}


def show(found: dict[str, Any]) -> None:
    print(f"{found['engine']}: {found['bound']['measured']}, its neighbour {found['bound']['neighbour']}")
    print(f"shared: {found['shared']}")
    print("case           CPU ms/token  wall p50 ms  p95 ms  neighbour tok/s  foreign CPUs")
    for case, row in found["table"].items():
        print(
            f"{case:14}{row['cpu_ms_per_token']:13.3f}{row['wall_p50_ms']:13.1f}{row['wall_p95_ms']:8.1f}"
            f"{row['neighbour_tokens_per_s']:17.1f}{row['foreign_cpus']:14.2f}"
        )
    for case, row in found["ratios_to_alone"].items():
        cpu, wall = row["cpu_ms_per_token"], row["wall_p50_ms"]
        print(
            f"{case} ÷ alone: CPU per token p50 {cpu['p50']:.3f}, p95 {cpu['p95']:.3f}; "
            f"wall p50 {wall['p50']:.3f}, p95 {wall['p95']:.3f}"
        )
    price = found["ratios_to_alone"]["beside"]["cpu_ms_per_token"]["p50"]
    print(f"aim on CPU sets: CPU per token <= {AIM:.2f}: {'met' if price <= AIM else 'missed'} here")
    print("on a GPU node: bench/isolation.py --help says how; the report is this one")


if __name__ == "__main__":
    main()
