"""All benchmarks in one go: each script prints its table and writes ``bench/<name>.json``.

``make bench`` runs them all but those named below; ``make bench BENCH_ARGS="hop engine --quick"`` runs some, shorter.
Each compares with a peer in the same run, because machines differ and are noisy: quote the ratios.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
#: In reading order: from the request's way in to the planner.
NAMES = ("start", "hop", "detectors", "server", "supervisor", "models", "levels", "engine", "vllm_server", "planner")
#: In the trainer's environment (`make trainer`); passed over where that is not there.
TRAINER_NAMES = ("trainer_data", "trainer_recipe", "trainer_ray")
TRAINER_PYTHON = HERE.parent / ".venv-trainer/bin/python"
#: Only when named: minutes, and for a person to judge; a machine of several devices with nobody else on it; an
#: environment of other guardrails; half an hour (`make soak`).
NAMED_ONLY = ("false_positives", "isolation", "peers", "qos_soak")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"some of: {', '.join(NAMES + TRAINER_NAMES)} (default: these); {', '.join(NAMED_ONLY)}",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look, not a figure to quote")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - {*NAMES, *TRAINER_NAMES, *NAMED_ONLY})
    if unknown:
        parser.error(f"no benchmark called {unknown[0]!r}; there are: {', '.join(NAMES + TRAINER_NAMES + NAMED_ONLY)}")
    failed = [name for name in options.names or NAMES + TRAINER_NAMES if not run(name, quick=options.quick)]
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, *, quick: bool) -> bool:
    print(f"\n=== {name}", flush=True)
    started = time.monotonic()
    python = str(TRAINER_PYTHON) if name in TRAINER_NAMES else sys.executable
    if not Path(python).exists():
        print("    not run: its environment is not there (make trainer)", flush=True)
        return True
    command = [python, str(HERE / f"{name}.py"), "--json", str(HERE / f"{name}.json")]
    done = subprocess.run([*command, "--quick"] if quick else command, cwd=HERE.parent, check=False)
    print(f"    ({time.monotonic() - started:.0f} s, bench/{name}.json)", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
