"""The planner at fleet scale: workloads and cards from 10² to 10⁴, five a card: seconds, and how they grow.

Fleets: `as found` (every node already in a mode that suits), `switching` (all in SPX, most must change), and
`crowded` (more asked than fits). Then the command as people run it, up to 30,000 workloads in one file: its CPU beside
that of planning and of parsing the YAML alone. *Loaded* fleets: what is placed of what the totals allow, and the CPU of
planning up to 100,000 workloads with the largest memory of the process. On small fleets the heuristic is compared with
CP-SAT in the same run, where OR-Tools is installed. Usage: ``python bench/planner.py [--quick] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from aim_profile.errors import AimProfileError
from aim_profile.files.read import parse_yaml
from aim_profile.files.write import dump
from aim_profile.plans.fleet import Fleet, parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import PRIORITIES, Plan, PlanOptions
from aim_profile.plans.replan import replan
from aim_profile.plans.search.aggregate import aim
from aim_profile.plans.search.intake import make_problem
from aim_profile.plans.search.problem import with_avoided
from aim_profile.plans.workload import Workload, Workloads, load_workloads, workloads_of

SOURCES = [str(Path(__file__).resolve().parents[1] / name) for name in ("profiles", "tests/fakes")]
SIZES = (100, 300, 1_000, 3_000, 10_000)
COMMAND_SIZES = (1_000, 10_000, 30_000)
# workloads, cards, seeds
LOADED = ((1_000, 192, 10), (10_000, 2_000, 3))
LARGEST = ((1_000, 192), (10_000, 2_000), (100_000, 20_000))
T = TypeVar("T")
MODELS = (
    # id, precision: from what fits one CPX partition to what wants a whole card
    ("meta-llama/Llama-3.2-1B-Instruct", "bf16"),
    ("meta-llama/Llama-3.2-3B-Instruct", "bf16"),
    ("meta-llama/Llama-3.1-8B-Instruct", "bf16"),
    ("meta-llama/Llama-3.1-8B-Instruct", "fp8"),
    ("google/gemma-3-4b-it", "bf16"),
    ("Qwen/Qwen3-4B", "bf16"),
    ("Qwen/Qwen3-8B", "fp8"),
    ("Qwen/Qwen3-14B", "int4"),
)
LARGE = (("Qwen/Qwen3-32B", "bf16"), ("google/gemma-3-27b-it", "bf16"), ("meta-llama/Llama-3.3-70B-Instruct", "fp8"))


def fleet(cards: int, modes: tuple[str, ...]) -> Fleet:
    """Nodes of 8 cards, the given modes in turn, half of them MI300X and half MI355X."""
    return parse_fleet(fleet_text(cards, modes))


def fleet_text(cards: int, modes: tuple[str, ...]) -> str:
    """That fleet's file."""
    nodes = max(1, cards // 8)
    lines = ["version: 1", "nodes:"]
    for at in range(nodes):
        gpu = ("MI300X", "MI355X")[at * 2 // nodes]
        compute = modes[at % len(modes)]
        lines.append(f"- {{name: n{at:04d}, gpu: {gpu}, cards: 8, compute_partition: {compute}}}")
    return "\n".join(lines)


def workloads(count: int, seed: int, large_share: float) -> Workloads:
    """`count` workloads of one replica, mostly small models, each with its own context and concurrency."""
    random_ = random.Random(seed)
    made = []
    for at in range(count):
        model, precision = random_.choice(LARGE if random_.random() < large_share else MODELS)
        made.append(
            Workload(
                name=f"w{at}",
                model=model,
                precision=precision,
                context=random_.choice((2048, 4096, 8192, 16384)),
                concurrency=random_.choice((1, 2, 4)),
                priority=random_.choice(("low", "medium", "high")),
                kind=random_.choice(("serve", "serve", "serve", "guardrail")),
            )
        )
    return workloads_of(made)


CASES = {
    "as found": (("CPX", "CPX", "CPX", "SPX"), 0.04),
    "switching": (("SPX",), 0.04),
    "crowded": (("SPX", "CPX"), 0.25),
}


def measure(case: str, count: int, rounds: int) -> dict[str, object]:
    modes, large = CASES[case]
    here, asked = fleet(count // 5, modes), workloads(count, count, large)
    times, cpu = [], []
    plan: Plan | None = None
    for _ in range(rounds):
        started, cpu_started = time.perf_counter(), time.process_time()
        plan = make_plan(here, asked)
        times.append(time.perf_counter() - started)
        cpu.append(time.process_time() - cpu_started)
    assert plan is not None
    totals = plan.totals
    return {
        "case": case,
        "workloads": count,
        "cards": totals.cards,
        "seconds": round(min(times), 4),
        "cpu_seconds": round(min(cpu), 4),
        "placed": sum(totals.placed.values()),
        "cards_used": totals.cards_used,
        "bound": totals.bound,
        "gap": totals.gap,
        "nodes_drained": totals.nodes_drained,
    }


def measure_replan(case: str, count: int, rounds: int) -> dict[str, object]:
    """One workload more, then a node less, beside planning anew: CPU seconds, and how many replicas stay."""
    modes, large = CASES[case]
    here, asked = fleet(count // 5, modes), workloads(count, count, large)
    plan_s, plan = _cpu(lambda: make_plan(here, asked))
    one = Workload(name="one-more", model="Qwen/Qwen3-4B", precision="bf16", priority="high")
    more = workloads_of([*asked.workloads, one])
    fewer = replace(here, nodes=here.nodes[1:])
    grown = [_cpu(lambda: replan(here, more, plan)) for _ in range(rounds)]
    shrunk = [_cpu(lambda: replan(fewer, asked, plan)) for _ in range(rounds)]
    workload_s, node_s = (min(seconds for seconds, _ in runs) for runs in (grown, shrunk))
    return {
        "workloads": count,
        "plan": round(plan_s, 3),
        "workload more": round(workload_s, 3),
        "stay": grown[0][1].stays,
        "node less": round(node_s, 3),
        "moved": len(shrunk[0][1].moved),
        "ratio": round(max(workload_s, node_s) / plan_s, 3),
    }


def measure_command(count: int, folder: Path) -> dict[str, object]:
    """`aim-profile plan` on files, as a process: its CPU beside that of planning and of parsing its YAML alone."""
    modes, large = CASES["switching"]
    cards = count // 5
    file, fleet_file = folder / f"workloads-{count}.yaml", folder / f"fleet-{count}.yaml"
    body = workloads(count, count, large).model_dump(mode="json", exclude_defaults=True)
    file.write_text(dump(body), encoding="utf-8")
    fleet_file.write_text(fleet_text(cards, modes), encoding="utf-8")
    parse_s, _ = _cpu(lambda: parse_yaml(file.read_text(encoding="utf-8"), "w", AimProfileError))
    read_s, asked = _cpu(lambda: load_workloads(file))
    here = parse_fleet(fleet_text(cards, modes))
    plan_s, _ = _cpu(lambda: make_plan(here, asked))
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "aim_profile", "plan", str(fleet_file), str(file)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cli_s = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    found = {"yaml": parse_s, "read": read_s, "plan": plan_s, "command": cli_s, "ratio": cli_s / (parse_s + plan_s)}
    return {"workloads": count, **{name: round(value, 3) for name, value in found.items()}}


def _cpu(work: Callable[[], T]) -> tuple[float, T]:
    started = time.process_time()
    done = work()
    return time.process_time() - started, done


def command_table(rows: list[dict[str, object]]) -> None:
    print("\naim-profile plan, CPU seconds; ratio: the whole command to planning and parsing YAML")
    columns(rows)


def replan_table(rows: list[dict[str, object]]) -> None:
    print("\nplanned again, CPU seconds; ratio: to planning anew")
    columns(rows)


def columns(rows: list[dict[str, object]]) -> None:
    print("".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value!s:>14}" for value in row.values()))


def table(rows: list[dict[str, object]]) -> None:
    columns = ("workloads", "cards", "seconds", "cpu_seconds", "placed", "cards_used", "gap", "nodes_drained")
    print(f"{'case':10}" + "".join(f"{name:>14}" for name in (*columns, "us/workload")))
    for row in rows:
        each = 1e6 * float(str(row["cpu_seconds"])) / int(str(row["workloads"]))
        print(f"{row['case']:10}" + "".join(f"{row[name]!s:>14}" for name in columns) + f"{each:>14.0f}")


def measure_loaded(count: int, cards: int, seed: int) -> dict[str, object]:
    """A loaded fleet: replicas placed by level (high serving, high filling, medium …) beside what totals allow."""
    from loaded_fleets import loaded

    here, asked = loaded(count, cards, seed)
    aimed = aim(with_avoided(make_problem(here, asked, PlanOptions())))
    cpu_s, plan = _cpu(lambda: make_plan(here, asked))
    placed = Counter((run.priority, run.kind == "serve") for run in plan.placements)
    reached = [placed[priority, serves] for priority in PRIORITIES for serves in (True, False)]
    bound = [-number for number in aimed.placed] if aimed else []
    return {
        "workloads": count,
        "cards": cards,
        "seed": seed,
        "placed": sum(reached),
        "bound": sum(bound),
        "first_four": reached[:4] == bound[:4],
        "low": f"{sum(reached[4:])} of {sum(bound[4:])}",
        "cpu_seconds": round(cpu_s, 2),
    }


def measure_largest(count: int, cards: int) -> dict[str, object]:
    """Files to plan in a process of its own: CPU of reading and of planning, and the most memory it took."""
    code = (
        "import json, resource, sys, time; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from aim_profile.plans.fleet import load_fleet\n"
        "from aim_profile.plans.make import make_plan\n"
        "from aim_profile.plans.workload import load_workloads\n"
        "begun = time.process_time(); fleet, asked = load_fleet(Path(sys.argv[1])), load_workloads(Path(sys.argv[2]))\n"
        "read = time.process_time(); placed = len(make_plan(fleet, asked).placements); done = time.process_time()\n"
        "memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "print(json.dumps({'placed': placed, 'read_s': round(read - begun, 2), 'plan_s': round(done - read, 2),"
        " 'memory_mib': memory}))"
    )
    from loaded_fleets import loaded_texts

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("fleet.json", "workloads.json")]
        for file, text in zip(files, loaded_texts(count, cards, 1), strict=True):
            file.write_text(text, encoding="utf-8")
        command = [sys.executable, "-c", code, *map(str, files), *SOURCES]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return {"workloads": count, "cards": cards, **json.loads(answer)}


def growth(rows: list[dict[str, object]]) -> float:
    """The exponent by which planning grows from the second largest to the largest: 1 is linear."""
    (small, large) = ((int(str(row["workloads"])), float(str(row["plan_s"]))) for row in rows[-2:])
    return round(math.log(large[1] / small[1]) / math.log(large[0] / small[0]), 2)


def plain_table(title: str, rows: list[dict[str, object]]) -> None:
    print(f"\n{title}")
    print("".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value!s:>14}" for value in row.values()))


def compare_with_exact(instances: int) -> dict[str, object] | None:
    """Small fleets: the heuristic beside CP-SAT, both objective values and times."""
    try:
        import ortools  # noqa: F401
    except ImportError:
        print("OR-Tools is not installed (extra `exact`): no comparison")
        return None
    heuristic_s, exact_s, same = [], [], 0
    for seed in range(instances):
        asked = workloads(14, seed, 0.2)
        here = fleet(24, ("SPX", "CPX", "DPX"))
        started = time.perf_counter()
        fast = make_plan(here, asked).totals
        between = time.perf_counter()
        best = make_plan(here, asked, PlanOptions(exact=True)).totals
        heuristic_s.append(between - started)
        exact_s.append(time.perf_counter() - between)
        same += (fast.placed, fast.nodes_drained, fast.cards_switched, fast.cards_used) == (
            best.placed,
            best.nodes_drained,
            best.cards_switched,
            best.cards_used,
        )
    return {
        "instances": instances,
        "as_good_as_exact": same,
        "heuristic_median_s": round(statistics.median(heuristic_s), 4),
        "exact_median_s": round(statistics.median(exact_s), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    sys.path[:0] = SOURCES
    sizes = SIZES[:3] if options.quick else SIZES
    measure("as found", 100, 1)  # catalogue files are read once
    rows = [measure(case, size, 1 if options.quick else 3) for case in CASES for size in sizes]
    table(rows)
    again = [measure_replan("switching", size, 1 if options.quick else 3) for size in sizes[-2:]]
    replan_table(again)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            measure_command(size, Path(folder)) for size in (COMMAND_SIZES[:1] if options.quick else COMMAND_SIZES)
        ]
    command_table(command)
    sizes_loaded = ((LOADED[0][0], LOADED[0][1], 1),) if options.quick else LOADED
    crowded = [measure_loaded(count, cards, seed) for count, cards, most in sizes_loaded for seed in range(1, most + 1)]
    plain_table("loaded fleets: placed of what the totals allow", crowded)
    largest = [measure_largest(count, cards) for count, cards in (LARGEST[:2] if options.quick else LARGEST)]
    plain_table("loaded fleets, from files, each in a process of its own", largest)
    print(f"growth exponent of planning: {growth(largest)}")
    peer = compare_with_exact(3 if options.quick else 10)
    if peer is not None:
        print(f"CP-SAT: {peer}")
    measured = {"sizes": rows, "command": command, "loaded": crowded, "largest": largest, "growth": growth(largest)}
    measured |= {"replan": again, "cp_sat": peer}
    options.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
