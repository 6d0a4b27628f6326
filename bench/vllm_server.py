"""What our HTTP layer costs on top of vLLM: the runtime beside vLLM's own server, same engine, same arguments.

Both are up at once and take turns, cell by cell. Counted is the CPU of the front process alone (all its threads,
no children): the engine's processes are the same code on both sides and would drown the difference. Short answers,
so that the layer shows. What either front takes when nobody asks (clocks, watches, loggers) is measured first and told
beside: a slow machine has more of it per request. Usage: ``python bench/vllm_server.py [--quick] [--json FILE]``; needs
``make vllm``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-vllm/bin/python"
MODEL_DIR = ROOT / ".models/smollm2-hf"
TOKENS = 16
REQUESTS = {1: 6, 4: 16}  # concurrency → requests a cell
ENGINE = {"enforce-eager": True, "kv-cache-memory-bytes": "512M", "dtype": "float32"}
START_TIMEOUT_S = 400
OURS, PEER = "aim_runtime", "vllm api_server"


@dataclass
class Server:
    name: str
    port: int
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """Of all threads, to the nanosecond: ``/proc/PID/stat`` counts in 10 ms."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(name: str, log: Path, more: Mapping[str, object] = MappingProxyType({})) -> Server:
    """Start one server and wait until it lists its model as ready. more: flags of vLLM's own server."""
    port = free_port()
    command = [str(PYTHON), "-m", *(ours(port) if name == OURS else peer(port, more))]
    roots = os.pathsep.join(str(ROOT / root) for root in ("runtimes", "profiles"))
    environment = {
        **os.environ,
        "PYTHONPATH": roots,
        "PYTHONSAFEPATH": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    server = Server(name, port, process)
    path = "/v1/models/smollm2" if name == OURS else "/v1/models"
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(server, path):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            sys.exit(f"{name} did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)
    return server


def ours(port: int) -> list[str]:
    flags = {
        "model_name": "smollm2",
        "model_dir": MODEL_DIR,
        "engine": "vllm",
        "host": "127.0.0.1",
        "http_port": port,
        "enable_grpc": "false",
        "max_model_len": 1024,
        "max_concurrency": 8,
        "engine_args": json.dumps(ENGINE),
    }
    return ["aim_runtime", *(f"--{name}={value}" for name, value in flags.items())]


def peer(port: int, more: Mapping[str, object]) -> list[str]:
    flags = {
        "model": MODEL_DIR,
        "served-model-name": "smollm2",
        "host": "127.0.0.1",
        "port": port,
        "max-model-len": 1024,
        "max-num-seqs": 8,
        **ENGINE,
        **more,
    }
    line = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    return ["vllm.entrypoints.openai.api_server", *line]


def answers(server: Server, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def client(server: Server, *, stream: bool) -> Callable[[int], None]:
    """One kept-alive connection; the call sends request number ``n`` and reads its whole answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)

    def ask(n: int) -> None:
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": f"Tell me a story about the number {n}."}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": stream,
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        data = response.read()
        # A stream is a chunk with the role, one per token and [DONE]; vLLM may merge tokens that are late.
        tokens = data.count(b"data: ") - 2 if stream else json.loads(data)["usage"]["completion_tokens"]
        if response.status != 200 or not TOKENS * 0.75 <= tokens <= TOKENS:
            raise SystemExit(f"{server.name} answered {response.status} with {tokens} tokens: {data[:300]!r}")

    return ask


def idle_of(servers: list[Server], seconds: float = 15.0) -> dict[str, float]:
    """CPU seconds per second of each front that nobody asks."""
    time.sleep(3)
    before = [server.cpu_s() for server in servers]
    time.sleep(seconds)
    return {server.name: (server.cpu_s() - then) / seconds for server, then in zip(servers, before, strict=True)}


def measure(server: Server, idle: float, *, stream: bool, concurrency: int) -> dict[str, float]:
    """CPU of the front process per request, with and without its idle share, and wall seconds of the cell."""
    requests = REQUESTS[concurrency]
    asks = [client(server, stream=stream) for _ in range(concurrency)]
    started, cpu_before = time.perf_counter(), server.cpu_s()
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(lambda k: [asks[k](n) for n in range(k, requests, concurrency)], range(concurrency)))
    cpu_s, wall_s = server.cpu_s() - cpu_before, time.perf_counter() - started
    return {
        "cpu_ms_per_request": 1e3 * (cpu_s - idle * wall_s) / requests,
        "cpu_ms_with_idle": 1e3 * cpu_s / requests,
        "wall_s": wall_s,
    }


def compare(servers: list[Server], idle: dict[str, float], rounds: int) -> list[dict[str, object]]:
    cells = [(stream, concurrency) for stream in (False, True) for concurrency in REQUESTS]
    taken: dict[tuple[bool, int, str], list[dict[str, float]]] = {}
    for number in range(rounds + 1):
        for stream, concurrency in cells:
            for server in servers if number % 2 else servers[::-1]:
                sample = measure(server, idle[server.name], stream=stream, concurrency=concurrency)
                if number:  # round 0 warms up
                    taken.setdefault((stream, concurrency, server.name), []).append(sample)
    return [row(stream, concurrency, taken) for stream, concurrency in cells]


def row(
    stream: bool, concurrency: int, taken: dict[tuple[bool, int, str], list[dict[str, float]]]
) -> dict[str, object]:
    ours, peers = ([s["cpu_ms_per_request"] for s in taken[stream, concurrency, name]] for name in (OURS, PEER))
    pairs = sorted(a / b for a, b in zip(ours, peers, strict=True))
    with_idle = ([s["cpu_ms_with_idle"] for s in taken[stream, concurrency, name]] for name in (OURS, PEER))
    per_token = {"ours_cpu_ms_per_token": statistics.median(ours) / TOKENS} if stream else {}
    return {
        "mode": "stream" if stream else "whole",
        "concurrency": concurrency,
        "ours_cpu_ms_per_request": statistics.median(ours),
        "peer_cpu_ms_per_request": statistics.median(peers),
        **per_token,
        "ratio": statistics.median(pairs),
        "ratio_min": pairs[0],
        "ratio_max": pairs[-1],
        "ratio_with_idle": statistics.median(a / b for a, b in zip(*with_idle, strict=True)),
        "ours_wall_s": statistics.median(s["wall_s"] for s in taken[stream, concurrency, OURS]),
        "peer_wall_s": statistics.median(s["wall_s"] for s in taken[stream, concurrency, PEER]),
    }


def stop(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(30)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/vllm_server.json")
    options = parser.parse_args()
    if not PYTHON.is_file() or not (MODEL_DIR / "model.safetensors").is_file():
        print("skipped: the vLLM lane has not been made (make vllm)")
        return
    rounds = 3 if options.quick else 8
    servers: list[Server] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for name in (OURS, PEER):
                servers.append(start(name, Path(logs) / f"{name}.log"))  # noqa: PERF401 - the finally needs the first
            idle = idle_of(servers)
            rows = compare(servers, idle, rounds)
        finally:
            for server in servers:
                stop(server)
    print(
        f"front process, {TOKENS} tokens a request   {'ours ms/req':>12} {'vLLM ms/req':>12} {'ratio':>7}"
        f"   (min to max)   with idle   wall ours/vLLM s   n={rounds} rounds"
    )
    for line in rows:
        print(
            f"{line['mode']:>8} c={line['concurrency']}{'':24} {line['ours_cpu_ms_per_request']:12.2f} "
            f"{line['peer_cpu_ms_per_request']:12.2f} {line['ratio']:7.2f}   ({line['ratio_min']:.2f} to "
            f"{line['ratio_max']:.2f}){line['ratio_with_idle']:12.2f}   {line['ours_wall_s']:.1f}/"
            f"{line['peer_wall_s']:.1f}"
        )
    told = {name: round(1e3 * each, 2) for name, each in idle.items()}
    print(f"CPU ms a second of a front that nobody asks: {told}; load of this machine: {os.getloadavg()[0]:.1f}")
    report = {"bench": "vllm_server", "rounds": rounds, "idle_cpu_ms_per_s": told, "rows": rows}
    options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
