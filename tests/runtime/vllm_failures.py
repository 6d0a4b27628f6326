"""Every way to fail that we know, while loading and after, in one process of the vLLM lane.

One, because importing vLLM takes 15 s of CPU. The arguments are ``MODEL_DIR WORK_DIR``; ``WORK_DIR/seen.json`` gets
case → the ModelLoadError's text, or what was seen.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import psutil

from aim_kserve.errors import ServingError
from aim_runtime.engines.base import ModelLoadError, RequestContext, Stream
from aim_runtime.engines.vllm.engine import VllmEngine


def variant(model_dir: Path, copy: Path, **changes: object) -> Path:
    """``model_dir`` with a changed config.json."""
    copy.mkdir()
    for path in model_dir.iterdir():
        if path.name != "config.json":
            (copy / path.name).symlink_to(path)
    config = json.loads((model_dir / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


async def reason(model_dir: Path, **settings: Any) -> str:
    engine = VllmEngine(model_dir, served_model_name="m", **settings)
    try:
        await engine.load()
    except ModelLoadError as error:
        return str(error)
    await engine.close()
    return "it loaded"


def engine_processes() -> list[psutil.Process]:
    """vLLM's: Python's own resource tracker lives as long as we do."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


async def cancelled_while_loading(model_dir: Path) -> str:
    """What is left of the engine's processes after the load was cancelled."""
    engine = VllmEngine(model_dir, served_model_name="m", engine_args=["--enforce-eager"])
    loading = asyncio.create_task(engine.load())
    while not (processes := engine_processes()) and not loading.done():  # noqa: ASYNC110 - a process is no event
        await asyncio.sleep(0.2)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    _, alive = psutil.wait_procs(processes, timeout=30)
    return f"{len(processes)} started, {len(alive)} alive"


async def engine_killed(model_dir: Path) -> str:
    """What a running stream, a new request, the health check and ``close`` make of a dead engine process."""
    engine = VllmEngine(
        model_dir,
        served_model_name="m",
        max_model_len=512,
        engine_args=["--enforce-eager", "--kv-cache-memory-bytes=64M"],
    )
    await engine.load()
    assert engine.healthy()
    processes = engine_processes()
    chat = engine.operations["chat/completions"]
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "ignore_eos": True}
    stream = await chat(body | {"stream": True}, RequestContext("a"))
    assert not isinstance(stream, dict)
    for process in processes:
        if "EngineCore" in " ".join(process.cmdline()):
            process.kill()
    seen = [await refused(drained(stream)), await refused(chat(body, RequestContext("b")))]
    seen.append(await refused(chat(body | {"stream": True}, RequestContext("c"))))
    healthy = engine.healthy()
    await engine.drain(5)
    await engine.close()
    _, alive = psutil.wait_procs(processes, timeout=30)
    return f"{seen}, healthy {healthy}, {len(alive)} alive"


async def drained(stream: Stream) -> None:
    async for _ in stream:
        pass


async def refused(work: Awaitable[Any]) -> str:
    try:
        await work
    except ServingError as error:
        return f"{error.status} {error.code}"
    return "answered"


async def main(model_dir: Path, work_dir: Path) -> None:
    unknown = variant(model_dir, work_dir / "unknown", architectures=["FooForCausalLM"])
    eager = ["--enforce-eager"]
    reasons = {
        "unknown flag": await reason(model_dir, engine_args=["--bogus", "1"]),
        "abbreviated flag": await reason(model_dir, engine_args=["--max-model", "12"]),
        "bad value": await reason(model_dir, engine_args=["--max-num-seqs", "many"]),
        "http flag": await reason(model_dir, engine_args={"api-key": "secret"}),
        "contradiction": await reason(model_dir, engine_args=["--max-model-len", "100"], max_model_len=200),
        "half a pair": await reason(model_dir, engine_args=["--enable-auto-tool-choice"]),
        "architecture": await reason(unknown),
        "too long": await reason(model_dir, max_model_len=100_000),
        "tensor parallel": await reason(model_dir, tensor_parallel_size=64),
        # Found out by a child process:
        "kv cache": await reason(model_dir, max_model_len=4096, engine_args=[*eager, "--kv-cache-memory-bytes", "8M"]),
        "killed": await engine_killed(model_dir),
        "cancelled": await cancelled_while_loading(model_dir),
    }
    (work_dir / "seen.json").write_text(json.dumps(reasons))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
