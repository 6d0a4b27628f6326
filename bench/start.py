"""Process start → ready: the runtime with the embedded model, the transformer, and a bare KServe server as the peer.

CPU and memory are those of the server and of all processes it has started: the runtime's engine is in one of its own.
RSS counts a page in each process that has it, PSS shares it out among them.

Each start is a new process polled on its per-model readiness route every 10 ms; starts of the three are interleaved,
so that the machine's drift hits all alike. Usage: ``python bench/start.py [--quick] [--json FILE]``; with ``--without
lazy`` our two also start with everything imported that ``import kserve`` imports by itself (``aim_kserve/kserve.py``).
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
PEER = """
import kserve
class Echo(kserve.Model):
    def predict(self, payload, headers=None, response_headers=None):
        return payload
model = Echo("smollm2")
model.load()
kserve.ModelServer().start([model])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


#: KServe reads ``sys.argv`` when it is imported.
EAGER = """
import runpy, sys
argv, sys.argv = sys.argv[1:], sys.argv[:1]
import kserve, pandas, httpx
sys.argv = argv
runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
"""


def commands(model_dir: str, *, without: str | None) -> dict[str, list[str]]:
    """Name → argv without the ports; the peer last."""
    ours = {
        "runtime (embedded model)": ["aim_runtime", "--model_name", "smollm2", "--model_dir", model_dir],
        "transformer": ["aim_guardrail", "--model_name", "smollm2", "--predictor_host", "127.0.0.1:9"],
    }
    eager = {f"{name}, not lazy": ["-c", EAGER, *argv] for name, argv in ours.items()} if without else {}
    peer = {"peer: bare kserve.ModelServer": ["-c", PEER]}
    return {name: ["-m", *argv] for name, argv in ours.items()} | eager | peer


def start_once(argv: list[str]) -> dict[str, float]:
    """Wall seconds until ready; processes, their CPU seconds and resident MiB at that moment."""
    port = free_port()
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *argv, "--http_port", str(port), "--grpc_port", str(free_port())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    try:
        while not ready(port):
            if process.poll() is not None:
                raise SystemExit(f"{argv} ended with exit {process.returncode}")
            time.sleep(0.01)
        wall = time.perf_counter() - started
        return {"wall_s": wall, **tree(psutil.Process(process.pid))}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # KServe's own server does not always stop
            process.kill()
            process.wait()


def tree(server: psutil.Process) -> dict[str, float]:
    """What a server and all below it take, those included that have ended."""
    processes = [server, *server.children(recursive=True)]
    memory = [process.memory_full_info() for process in processes]
    return {
        "processes": len(processes),
        "cpu_s": sum(sum(process.cpu_times()[:4]) for process in processes),  # its own, and of ended children
        "rss_mib": sum(each.rss for each in memory) / 2**20,
        "pss_mib": sum(each.pss for each in memory) / 2**20,
    }


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/v2/models/smollm2/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--without", choices=["lazy"], help="also start ours without that")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/start.json")
    parser.add_argument("--model_dir", default=str(ROOT / ".models/smollm2"))
    options = parser.parse_args()
    rounds = 3 if options.quick else 9
    started = commands(options.model_dir, without=options.without)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in started}
    for _ in range(rounds):
        for name, argv in started.items():
            samples[name].append(start_once(argv))
    rows = [summary(name, taken) for name, taken in samples.items()]
    peer = rows[-1]["wall_p50_s"]
    print(
        f"{'process start → ready':34} {'wall p50':>9} {'p95':>7} {'x peer':>7}   of the whole process tree:"
        f" {'CPU s':>6} {'RSS MiB':>8} {'PSS MiB':>8} {'processes':>10}   n={rounds}"
    )
    for row in rows:
        row["ratio_to_peer"] = row["wall_p50_s"] / peer
        print(
            f"{row['name']:34} {row['wall_p50_s']:9.2f} {row['wall_p95_s']:7.2f} {row['ratio_to_peer']:7.2f}{'':30}"
            f"{row['cpu_p50_s']:6.2f} {row['rss_mib']:8.0f} {row['pss_mib']:8.0f} {row['processes']:10.0f}"
        )
    options.json.write_text(json.dumps({"bench": "start", "rounds": rounds, "rows": rows}, indent=1))


def summary(name: str, taken: list[dict[str, float]]) -> dict[str, float | str]:
    wall = sorted(sample["wall_s"] for sample in taken)
    return {
        "name": name,
        "wall_p50_s": statistics.median(wall),
        "wall_p95_s": wall[min(len(wall) - 1, round(0.95 * (len(wall) - 1)))],
        "cpu_p50_s": statistics.median(sample["cpu_s"] for sample in taken),
        **{name: statistics.median(sample[name] for sample in taken) for name in ("rss_mib", "pss_mib", "processes")},
    }


if __name__ == "__main__":
    main()
