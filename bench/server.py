"""Our OpenAI server over the fake engine, beside a bare Starlette app over the same engine, in one run.

What is measured is the CPU of the serving process, which noisy neighbours disturb less than times. The difference
of the two is what our server adds: checks, metrics, access log, abort on disconnect. Both answer the same bytes
through uvicorn, httptools and uvloop.

``bench/server.py [--quick] [--json FILE]``; with ``--without cork`` our server as uvicorn writes by itself stands in
the floor's place: the ratios of paired rounds show what ``aim_kserve/corked.py`` is worth.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

ROOT = Path(__file__).parent.parent
SOURCES = [str(ROOT / name) for name in ("runtimes", "profiles", "tests/fakes", "bench")]
sys.path[:0] = SOURCES

from http_load import load  # noqa: E402

from ports import free_ports  # noqa: E402

TOKENS = 64
QUESTION = {"model": "m", "messages": [{"role": "user", "content": "What is a GPU? " * 8}], "max_tokens": TOKENS}


#: What of ours can be left out, and how.
WITHOUT = {
    "cork": "from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol\n"
    "from aim_kserve.corked import CorkedHttp\n"
    "CorkedHttp.on_headers_complete = HttpToolsProtocol.on_headers_complete\n"
}


@dataclass(frozen=True)
class Row:
    """One server, form of answer and concurrency. Medians over rounds."""

    server: str
    form: str
    concurrency: int
    requests_per_s: float
    p50_ms: float
    p95_ms: float
    cpu_us_per_request: float
    cpu_us_per_token: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the requests")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/server.json")
    parser.add_argument("--without", choices=sorted(WITHOUT), help="compare with ours without that, not with the floor")
    parser.add_argument("--floor", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floor:
        serve_floor(options.floor)
        return
    peer = f"no {options.without}" if options.without else "floor"
    rows, ratios = measure(peer, scale=0.2 if options.quick else 1.0)
    report = {"tokens_per_answer": TOKENS, "rows": [asdict(row) for row in rows], **summary(rows, peer)}
    report["ratios"] = ratios
    options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    print_table(rows, report)


# --- the floor ------------------------------------------------------------------------------------------------------


def serve_floor(port: int) -> None:
    """The least that speaks HTTP: Starlette's own request and response classes around the engine."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    from aim_runtime.engines.base import RequestContext, Stream
    from fake_engine import FakeEngine

    engine = FakeEngine("m")
    count = iter(range(10**9))

    async def chat(request: Request) -> Response:
        if not engine.operations:
            await engine.load()
        body = orjson.loads(await request.body())
        answer = await engine.operations["chat/completions"](body, RequestContext(f"{next(count):032x}"))
        if isinstance(answer, dict):
            return Response(orjson.dumps(answer), media_type="application/json")
        return StreamingResponse(framed(answer), media_type="text/event-stream")

    async def framed(chunks: Stream) -> Stream:
        async for chunk in chunks:
            yield b"data: " + chunk + b"\n\n"
        yield b"data: [DONE]\n\n"

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


# --- measuring ------------------------------------------------------------------------------------------------------


@contextmanager
def server(name: str) -> Iterator[tuple[int, int]]:
    """(pid, port) of a serving process."""
    port, grpc_port = free_ports(2)
    flags = ["{}", "--model_name", "m", "--host", "127.0.0.1", "--http_port", str(port), "--grpc_port", str(grpc_port)]
    run = "import fake_server\nfake_server.main()"
    commands = {
        "floor": [__file__, "--floor", str(port)],
        "ours": [str(ROOT / "tests/fakes/fake_server.py"), *flags],
        **{f"no {name}": ["-c", change + run, *flags] for name, change in WITHOUT.items()},
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [sys.executable, *commands[name]], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        asyncio.run(until_serving(port, process))
        yield process.pid, port
    finally:
        process.terminate()
        process.communicate()


async def until_serving(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server ended: {process.communicate()[1].decode()}")
        try:
            await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            await asyncio.sleep(1)
            return
    raise SystemExit("the server does not listen after 60 s")


def measure(peer: str, scale: float) -> tuple[list[Row], dict[str, dict[str, float]]]:
    rounds, requests = (3 if peer == "floor" else 9, {"unary": int(2000 * scale), "stream": int(800 * scale)})
    rows, ratios = [], {}
    with server("ours") as ours, server(peer) as other:
        servers = {"ours": ours, peer: other}
        for form, count in requests.items():
            for name in servers:  # first requests warm up caches and the interpreter
                ask(servers[name], form, 8, max(50, count // 10))
            for concurrency in (1, 8, 64):
                results: dict[str, list[Row]] = {name: [] for name in servers}
                for _ in range(rounds):  # interleaved: both meet the same neighbours
                    for name in servers:
                        results[name].append(round_of(name, servers[name], form, concurrency, count))
                rows += [median(each) for each in results.values()]
                ratios[f"{form}, c={concurrency}"] = ratio(results["ours"], results[peer])
    return rows, ratios


def ratio(ours: list[Row], peers: list[Row]) -> dict[str, float]:
    """Ours to the peer's, round by round: the median, which neighbours and a drifting clock move least."""
    return {
        field: round(
            statistics.median(getattr(a, field) / getattr(b, field) for a, b in zip(ours, peers, strict=True)), 3
        )
        for field in ("cpu_us_per_request", "p50_ms")
    }


def round_of(name: str, where: tuple[int, int], form: str, concurrency: int, count: int) -> Row:
    times, wall_s, cpu_s = ask(where, form, concurrency, count)
    return Row(
        server=name,
        form=form,
        concurrency=concurrency,
        requests_per_s=round(count / wall_s, 1),
        p50_ms=round(times[len(times) // 2] * 1e3, 2),
        p95_ms=round(times[int(len(times) * 0.95)] * 1e3, 2),
        cpu_us_per_request=round(cpu_s / count * 1e6, 1),
        cpu_us_per_token=round(cpu_s / count / TOKENS * 1e6, 2) if form == "stream" else None,
    )


def median(rows: list[Row]) -> Row:
    """The round with the median CPU."""
    return sorted(rows, key=lambda row: row.cpu_us_per_request)[len(rows) // 2]


def ask(where: tuple[int, int], form: str, concurrency: int, count: int) -> tuple[list[float], float, float]:
    """Seconds of each request, of all, and of the server's CPU."""
    body = {**QUESTION, "stream": form == "stream"}
    return load(*where, body, TOKENS, concurrency=concurrency, count=count)


# --- telling --------------------------------------------------------------------------------------------------------


def summary(rows: list[Row], peer: str) -> dict[str, float]:
    """What our server adds to its peer: medians over the concurrencies."""
    by = {(row.server, row.form, row.concurrency): row for row in rows}

    def added(form: str, field: str) -> float:
        values = [getattr(by["ours", form, c], field) - getattr(by[peer, form, c], field) for c in (1, 8, 64)]
        return round(statistics.median(values), 2)

    return {
        "added_cpu_us_per_unary_request": added("unary", "cpu_us_per_request"),
        "added_cpu_us_per_stream": added("stream", "cpu_us_per_request"),
        "added_cpu_us_per_streamed_token": added("stream", "cpu_us_per_token"),
    }


def print_table(rows: list[Row], report: dict[str, object]) -> None:
    print(f"{'server':8}{'form':8}{'c':>4}{'req/s':>9}{'p50 ms':>9}{'p95 ms':>9}{'CPU µs/req':>12}{'CPU µs/token':>14}")
    for row in rows:
        token = "" if row.cpu_us_per_token is None else f"{row.cpu_us_per_token:.2f}"
        print(
            f"{row.server:8}{row.form:8}{row.concurrency:>4}{row.requests_per_s:>9.0f}{row.p50_ms:>9.2f}"
            f"{row.p95_ms:>9.2f}{row.cpu_us_per_request:>12.0f}{token:>14}"
        )
    for case, ratios in report["ratios"].items():
        print(f"ours to {rows[1].server}, {case}: CPU {ratios['cpu_us_per_request']:.3f}, p50 {ratios['p50_ms']:.3f}")
    for name in ("added_cpu_us_per_unary_request", "added_cpu_us_per_stream", "added_cpu_us_per_streamed_token"):
        print(f"{name}: {report[name]}")


if __name__ == "__main__":
    main()
