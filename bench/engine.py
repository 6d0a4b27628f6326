"""The embedded engine against llama.cpp's own server and against ``Llama`` behind a lock, on the same GGUF file.

One compute thread each, each in its own process, only one of them under load at a time, interleaved round by round so
that a busy machine hurts all alike. Every prompt is new from its first word on: no prefix cache can help.

* ours: ``LlamaCppEngine`` through the Engine protocol, in the worker process. No HTTP.
* server: llama-server (PyPI ``xllamacpp``) over HTTP, one connection a request; its CPU time excludes the client's.
* lock: ``llama_cpp.Llama`` with one request at a time, what a plain model server does with it. No HTTP.
* exact: ours with ``deterministic``; only if asked for.

``python bench/engine.py [--quick] [--rounds N] [--sides ours server] [--streams 4 8]
[--clock cpu] [--json FILE] [--model FILE]``

Ratios are medians over rounds, each of two sides' runs of the same round. With ``--clock cpu`` every time is the side's
own process time, not the wall's: on a machine that others keep busy it says what the wall would on an idle one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIDES = ("ours", "server", "lock", "exact")
STREAMS = (1, 4, 8)
SLOTS = 8
PROMPT_WORDS = 48
ANSWER_TOKENS = 64
CONTEXT_TOKENS = 1024  # per slot
WORDS = [
    "river",
    "stone",
    "green",
    "letter",
    "window",
    "morning",
    "paper",
    "garden",
    "yellow",
    "engine",
    "table",
    "silver",
    "winter",
    "ocean",
    "music",
    "number",
    "planet",
    "village",
    "market",
    "doctor",
    "summer",
    "bridge",
    "island",
    "forest",
    "camera",
    "history",
    "mountain",
    "butter",
    "pencil",
    "station",
    "question",
    "lemon",
]


@dataclass
class Round:
    """What one side did with one load."""

    side: str
    streams: int
    tokens: int
    wall_s: float
    elapsed_s: float  # by the chosen clock
    cpu_s: float
    foreign_share: float
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


def prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(PROMPT_WORDS)) for _ in range(count)]


def request_body(prompt: str) -> dict[str, Any]:
    return {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


# -- load ------------------------------------------------------------------------------------------------------

Stream = Callable[[str], AsyncIterator[dict[str, Any]]]
Clock = Callable[[], float]


async def load(stream: Stream, texts: list[str], streams: int, clock: Clock) -> dict[str, Any]:
    """``streams`` clients, each sending its share of ``texts`` one after the other; ``clock`` in seconds."""
    tokens, ttft_s, gaps_s = 0, [], []

    async def client(mine: list[str]) -> None:
        nonlocal tokens
        for text in mine:
            began = last = clock()
            first = True
            async for chunk in stream(text):
                if (chunk.get("usage") or {}).get("completion_tokens"):
                    tokens += chunk["usage"]["completion_tokens"]
                if not chunk["choices"] or not chunk["choices"][0]["text"]:
                    continue
                now = clock()
                (ttft_s if first else gaps_s).append(now - (began if first else last))
                first, last = False, now

    wall, began = time.perf_counter(), clock()
    await asyncio.gather(*(client(texts[i::streams]) for i in range(streams)))
    took = {"wall_s": time.perf_counter() - wall, "elapsed_s": clock() - began}
    return {"tokens": tokens, **took, "ttft_s": ttft_s, "gaps_s": gaps_s}


# -- workers: read loads from stdin, write results to stdout ---------------------------------------------------


async def ours_stream(model: Path, *, deterministic: bool = False) -> Stream:
    sys.path.insert(0, str(ROOT / "runtimes"))
    from aim_runtime.engines.base import RequestContext
    from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine

    engine = LlamaCppEngine(
        model,
        served_model_name="bench",
        slots=SLOTS,
        threads=1,
        max_model_len=CONTEXT_TOKENS,
        deterministic=deterministic,
    )
    await engine.load()

    async def stream(prompt: str) -> AsyncIterator[dict[str, Any]]:
        answer: Any = await engine.operations["completions"](request_body(prompt), RequestContext("bench"))
        async for chunk in answer:
            yield json.loads(chunk)

    return stream


async def lock_stream(model: Path) -> Stream:
    from llama_cpp import Llama

    llama = Llama(str(model), n_ctx=CONTEXT_TOKENS, n_threads=1, n_threads_batch=1, verbose=False)
    lock = threading.Lock()

    def generate(prompt: str, put: Callable[[dict[str, Any] | None], object]) -> None:
        with lock:
            tokens = 0
            for chunk in llama.create_completion(
                prompt, max_tokens=ANSWER_TOKENS, temperature=0, repeat_penalty=1.0, stream=True
            ):
                tokens += 1
                put(chunk)
            put({"choices": [], "usage": {"completion_tokens": tokens}})
        put(None)

    async def stream(prompt: str) -> AsyncIterator[dict[str, Any]]:
        loop, chunks = asyncio.get_running_loop(), asyncio.Queue()
        put = lambda chunk: loop.call_soon_threadsafe(chunks.put_nowait, chunk)  # noqa: E731 (one line, two uses)
        thread = threading.Thread(target=generate, args=(prompt, put), daemon=True)
        thread.start()
        while (chunk := await chunks.get()) is not None:
            yield chunk

    return stream


async def worker(make: Callable[[Path], Awaitable[Stream]], model: Path) -> None:
    stream = await make(model)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        clock = time.process_time if order["clock"] == "cpu" else time.perf_counter
        print(json.dumps(await load(stream, order["texts"], order["streams"], clock)), flush=True)


def serve(model: Path, port: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = SLOTS * CONTEXT_TOKENS
    params.n_parallel = SLOTS
    params.kv_unified = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], port
    server = xllamacpp.Server(params)
    print("ready", flush=True)
    sys.stdin.read()
    del server


# -- the parent's side -----------------------------------------------------------------------------------------


class Worker:
    """One side's process."""

    def __init__(self, side: str, model: Path, clock: str) -> None:
        self.side = side
        self._clock_name = clock
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [sys.executable, __file__, "--worker", side, "--model", str(model), "--port", str(self._port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        while (line := self._read()) != "ready":
            if not line:
                raise SystemExit(f"the worker {side} ended: {' '.join(command)}")

    def run(self, texts: list[str], streams: int) -> Round:
        cpu, machine = self._cpu_s(), _machine_cpu_s()
        own = time.process_time()
        if self.side == "server":
            clock = self._process_time if self._clock_name == "cpu" else time.perf_counter
            result = asyncio.run(load(self._http_stream, texts, streams, clock))
        else:
            self._write(json.dumps({"texts": texts, "streams": streams, "clock": self._clock_name}))
            result = json.loads(self._read())
        cpu_s = self._cpu_s() - cpu
        foreign_s = _machine_cpu_s() - machine - cpu_s - (time.process_time() - own)
        share = max(0.0, foreign_s) / (result["wall_s"] * (os.cpu_count() or 1))
        return Round(self.side, streams, cpu_s=cpu_s, foreign_share=share, **result)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    async def _http_stream(self, prompt: str) -> AsyncIterator[dict[str, Any]]:
        import aiohttp

        url = f"http://127.0.0.1:{self._port}/v1/completions"
        connector = aiohttp.TCPConnector(force_close=True)  # llama-server drops kept-alive connections
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(url, json=request_body(prompt)) as answer,
        ):
            answer.raise_for_status()
            async for line in answer.content:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _process_time(self) -> float:
        """CPU seconds of the worker, fine-grained: the kernel's clock of another process (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self._process.pid << 3) | 2)

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _machine_cpu_s() -> float:
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(rounds: list[Round]) -> dict[str, float]:
    """Of all rounds of one side and load: rates are medians over rounds, percentiles over all requests."""
    ttft = [value for r in rounds for value in r.ttft_s]
    gaps = [value for r in rounds for value in r.gaps_s]
    return {
        "tokens_per_s": median(r.tokens / r.elapsed_s for r in rounds),
        "ttft_p50_ms": 1e3 * percentile(ttft, 0.5),
        "ttft_p95_ms": 1e3 * percentile(ttft, 0.95),
        "itl_p50_ms": 1e3 * percentile(gaps, 0.5),
        "itl_p95_ms": 1e3 * percentile(gaps, 0.95),
        "cpu_ms_per_token": median(1e3 * r.cpu_s / r.tokens for r in rounds),
        "foreign_percent": 100 * median(r.foreign_share for r in rounds),
    }


def report(rounds: list[Round]) -> dict[str, Any]:
    table = {
        streams: {
            side: summary(of) for side in SIDES if (of := [r for r in rounds if (r.side, r.streams) == (side, streams)])
        }
        for streams in sorted({r.streams for r in rounds})
    }
    ratios = {
        f"{streams} streams, {side} vs {peer}": paired(rounds, streams, side, peer)
        for streams, row in table.items()
        for side, peer in (("ours", "server"), ("ours", "lock"), ("exact", "ours"))
        if side in row and peer in row
    }
    return {"table": table, "ratios": ratios}


def paired(rounds: list[Round], streams: int, side: str, peer: str) -> dict[str, float]:
    """Medians of one side's figures over another's, round by round: what a busy machine does to one round, it does to
    both of its sides."""
    ours, theirs = ([summary([r]) for r in rounds if (r.side, r.streams) == (name, streams)] for name in (side, peer))
    names = ("tokens_per_s", "cpu_ms_per_token", "ttft_p50_ms", "itl_p50_ms", "itl_p95_ms")
    return {name: median(a[name] / b[name] for a, b in zip(ours, theirs, strict=True)) for name in names}


def show(result: dict[str, Any]) -> None:
    print("streams side    tok/s  TTFT p50   p95 ms  ITL p50   p95 ms  CPU ms/tok  foreign %")
    for streams, row in result["table"].items():
        for side, of in row.items():
            print(
                f"{streams:7} {side:6} {of['tokens_per_s']:6.1f}  {of['ttft_p50_ms']:8.0f} {of['ttft_p95_ms']:8.0f}"
                f" {of['itl_p50_ms']:8.1f} {of['itl_p95_ms']:8.1f} {of['cpu_ms_per_token']:11.2f}"
                f" {of['foreign_percent']:10.0f}"
            )
    for pair, of in result["ratios"].items():
        print(f"{pair}: " + ", ".join(f"{name} {value:.2f}" for name, value in of.items()))


def measure(workers: list[Worker], *, rounds: int, per_stream: int, streams: list[int]) -> list[Round]:
    seed = random.SystemRandom().randrange(2**32)
    done: list[Round] = []
    try:
        for side_worker in workers:
            side_worker.run(prompts(1, seed), 1)  # warm up
        for turn in range(rounds):
            for count in streams:
                first = turn % len(workers)
                for side_worker in workers[first:] + workers[:first]:
                    seed += 1
                    done.append(side_worker.run(prompts(count * per_stream, seed), count))
    finally:
        for side_worker in workers:
            side_worker.stop()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side with each number of streams")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "server", "lock"])
    parser.add_argument("--streams", nargs="+", type=int, default=list(STREAMS), help="clients at once")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the side's own process time")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/engine.json", help="where the figures go")
    parser.add_argument("--model", type=Path, default=MODEL, help="GGUF file")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.model.exists():
        raise SystemExit(f"{options.model} is missing: make model")
    if options.worker == "server":
        serve(options.model, options.port)
    elif options.worker:
        exact = partial(ours_stream, deterministic=True)
        make = {"ours": ours_stream, "exact": exact, "lock": lock_stream}[options.worker]
        asyncio.run(worker(make, options.model))
    else:
        rounds = measure(
            [Worker(side, options.model, options.clock) for side in options.sides],
            rounds=1 if options.quick else options.rounds,
            per_stream=2,
            streams=options.streams,
        )
        result = report(rounds)
        show(result)
        options.json.write_text(json.dumps({**result, "rounds": [asdict(r) for r in rounds]}, indent=1))


if __name__ == "__main__":
    main()
