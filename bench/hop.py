"""The hop: chat directly to a runtime, through our transformer with both detectors on, and through KServe's proxy.

One upstream (our runtime's server over the fake engine), one client for all, rounds interleaved, everything on the same
cores. A hop's cost is what it adds to the median at one request at a time; what it takes from the throughput at eight
is CPU, because client, hop and upstream share the machine. Streams: KServe's proxy cannot stream over HTTP (it answers
500), so only ours is there.

``bench/hop.py [--quick] [--json FILE]``
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import uvloop

ROOT = Path(__file__).parent.parent
SOURCES = [str(ROOT / name) for name in ("runtimes", "transformers", "profiles", "tests/fakes")]
sys.path[:0] = SOURCES

from ports import free_ports  # noqa: E402

VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
TOKENS = 32
TOKEN_S = 0.004
PROMPT = "Summarise the following note in two sentences for a colleague: the meeting was moved to Thursday. " * 3
BODY = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS}
MISSING = "not measured: .venv-vllm missing (make vllm)"


@dataclass
class Target:
    """Where requests go, and the process that is the hop (0: none)."""

    name: str
    port: int
    pid: int
    streams: bool = False


@dataclass
class Samples:
    """What a target did at one concurrency and form."""

    latencies_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    requests_per_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    requests: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/hop.json")
    options = parser.parse_args()
    with ExitStack() as stack:
        targets = start(stack)
        rows = uvloop.run(measure(targets, rounds=3 if options.quick else 10))
    notes = [] if VLLM_PYTHON.exists() else [f"KServe's OpenAIProxyModel: {MISSING}"]
    notes += ["KServe's OpenAIProxyModel does not stream over HTTP: 500"]
    report = {"tokens_per_answer": TOKENS, "stream_token_s": TOKEN_S, "rows": rows, "notes": notes, **ratios(rows)}
    options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    show(report)


# --- processes ------------------------------------------------------------------------------------------------------


def start(stack: ExitStack) -> list[Target]:
    upstream, transformer = pair(stack, token_s=0)
    targets = [upstream, transformer]
    if VLLM_PYTHON.exists():
        port = free_ports(1)[0]
        proxy = [str(VLLM_PYTHON), str(ROOT / "bench/kserve_proxy.py"), f"http://127.0.0.1:{upstream.port}", str(port)]
        targets.append(Target("kserve proxy", port, stack.enter_context(running(proxy, port))))
    # Streams come at a pace, or their first text would wait for the upstream's burst.
    return targets + [Target(item.name, item.port, item.pid, streams=True) for item in pair(stack, token_s=TOKEN_S)]


def pair(stack: ExitStack, token_s: float) -> tuple[Target, Target]:
    """An upstream at this pace and a transformer before it."""
    ports = free_ports(4)
    ours = ["--model_name", "m", "--host", "127.0.0.1", "--http_port"]
    fake = [str(ROOT / "tests/fakes/fake_server.py"), orjson.dumps({"token_s": token_s}).decode(), *ours, str(ports[0])]
    stack.enter_context(running([sys.executable, *fake, "--grpc_port", str(ports[1])], ports[0]))
    guardrail = [
        "-m",
        "aim_guardrail",
        "--policy",
        "values",
        "--predictor_host",
        f"127.0.0.1:{ports[0]}",
        *ours,
        str(ports[2]),
    ]
    pid = stack.enter_context(running([sys.executable, *guardrail, "--grpc_port", str(ports[3])], ports[2]))
    return Target("direct", ports[0], 0), Target("transformer", ports[2], pid)


@contextmanager
def running(command: list[str], port: int) -> Iterator[int]:
    """Its pid, once it answers 200 on its readiness route."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES), "PYTHONSAFEPATH": "1"}
    environment["VLLM_TARGET_DEVICE"] = "cpu"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            if ready(port):
                break
            time.sleep(0.1)
        else:
            raise SystemExit(f"{' '.join(command)} was not ready in 120 s")
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # KServe's OpenAI servers outlive SIGTERM
            process.kill()
            process.wait()


def ready(port: int) -> bool:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/v2/models/m/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def cpu_s(pid: int) -> float:
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- measuring ------------------------------------------------------------------------------------------------------


async def measure(targets: list[Target], rounds: int) -> list[dict[str, object]]:
    cases = [(stream, concurrency) for stream in (False, True) for concurrency in (1, 8)]
    found: dict[tuple[bool, int, str], Samples] = {}
    for number in range(-1, rounds):  # round -1 warms up
        for stream, concurrency in cases:
            for target in targets:
                if stream != target.streams:
                    continue
                samples = Samples() if number < 0 else found.setdefault((stream, concurrency, target.name), Samples())
                await one_round(target, stream, concurrency, _requests(stream, concurrency), samples)
    return [row(*key, samples) for key, samples in found.items()]


def _requests(stream: bool, concurrency: int) -> int:
    return (4 if stream else 30) * (concurrency + 2)


async def one_round(target: Target, stream: bool, concurrency: int, requests: int, samples: Samples) -> None:
    body = orjson.dumps({**BODY, "stream": True} if stream else BODY)
    left = iter(range(requests))
    cpu, started = cpu_s(target.pid), time.perf_counter()

    async def work() -> None:
        connection = await Connection.open(target.port, "/openai/v1/chat/completions", body)
        for _ in left:
            latency, first = await connection.ask(stream)
            samples.latencies_s.append(latency)
            samples.first_s.append(first)
        connection.close()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    samples.requests_per_s.append(requests / (time.perf_counter() - started))
    samples.cpu_s.append(cpu_s(target.pid) - cpu)
    samples.requests += requests


class Connection(asyncio.Protocol):
    """A kept connection that sends one prepared request again and again; the least a client can cost."""

    @classmethod
    async def open(cls, port: int, path: str, body: bytes) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, "127.0.0.1", port)
        lines = f"POST {path} HTTP/1.1", "host: bench", "content-type: application/json", f"content-length: {len(body)}"
        connection._request = "\r\n".join([*lines, "\r\n"]).encode() + body
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self._request = b""

    def close(self) -> None:
        self._transport.close()

    async def ask(self, stream: bool) -> tuple[float, float]:
        """Seconds to the whole answer, and to its first text."""
        self._stream, self._got, self._first_at = stream, b"", 0.0
        self._done = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self._transport.write(self._request)
        await self._done
        ended = time.perf_counter()
        if not self._got.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"not answered: {self._got[:400]!r}")
        return ended - started, (self._first_at or ended) - started

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._stream:
            if not self._first_at and b'"content":"the' in self._got:
                self._first_at = time.perf_counter()
            complete = self._got.endswith(b"0\r\n\r\n")
        else:
            head, _, body = self._got.partition(b"\r\n\r\n")
            at = head.lower().find(b"content-length: ")
            complete = at >= 0 and len(body) >= int(head[at + 16 :].split(b"\r\n", 1)[0])
        if complete and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(error or ConnectionError("closed"))


# --- reporting ------------------------------------------------------------------------------------------------------


def row(stream: bool, concurrency: int, name: str, samples: Samples) -> dict[str, object]:
    latencies = sorted(samples.latencies_s)
    return {
        "form": "stream" if stream else "unary",
        "concurrency": concurrency,
        "via": name,
        "p50_ms": statistics.median(latencies) * 1e3,
        "p95_ms": latencies[int(0.95 * (len(latencies) - 1))] * 1e3,
        "first_text_p50_ms": statistics.median(samples.first_s) * 1e3 if stream else None,
        "requests_per_s": statistics.median(samples.requests_per_s),
        "hop_cpu_ms_per_request": sum(samples.cpu_s) / samples.requests * 1e3,
        "requests": samples.requests,
    }


def ratios(rows: list[dict[str, object]]) -> dict[str, object]:
    by_key = {(row["form"], row["concurrency"], row["via"]): row for row in rows}
    found: dict[str, object] = {}
    for (form, concurrency, via), measured in by_key.items():
        if via == "direct":
            continue
        direct = by_key[form, concurrency, "direct"]
        name = f"{via}, {form}, c={concurrency}"
        found[name] = {
            "added_p50_ms": measured["p50_ms"] - direct["p50_ms"],
            "share_of_direct_requests_per_s": measured["requests_per_s"] / direct["requests_per_s"],
        }
        if form == "stream":
            found[name] |= {
                "added_first_text_ms": measured["first_text_p50_ms"] - direct["first_text_p50_ms"],
                "added_ms_per_token": (measured["p50_ms"] - direct["p50_ms"]) / TOKENS,
                "hop_cpu_ms_per_token": measured["hop_cpu_ms_per_request"] / TOKENS,
            }
    return {"ratios": found}


def show(report: dict[str, object]) -> None:
    print(f"{'':8}{'c':>2}  {'via':14}{'p50 ms':>8}{'p95 ms':>8}{'1st text':>9}{'req/s':>8}{'hop CPU ms':>12}")
    for row in report["rows"]:
        first = f"{row['first_text_p50_ms']:9.2f}" if row["first_text_p50_ms"] else " " * 9
        print(
            f"{row['form']:8}{row['concurrency']:2}  {row['via']:14}{row['p50_ms']:8.2f}{row['p95_ms']:8.2f}{first}"
            f"{row['requests_per_s']:8.0f}{row['hop_cpu_ms_per_request']:12.3f}"
        )
    for name, ratio in report["ratios"].items():
        print(f"  {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in ratio.items()))
    for note in report["notes"]:
        print(f"  {note}")


if __name__ == "__main__":
    main()
