"""What becomes of adapters on vLLM's CPU build, in one process of the vLLM lane: its start takes a minute.

The arguments are ``MODEL_DIR WORK_DIR``; ``WORK_DIR/seen.json`` gets case → what was seen.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from aim_kserve.errors import ServingError
from aim_runtime.engines.base import RequestContext
from aim_runtime.engines.vllm.engine import VllmEngine
from lora_files import weights, write_gguf, write_peft

PROMPT = (
    "A long story about the sea, a ship and its crew, told by an old sailor: " * 12
)  # more than a block of the cache
MIX = (None, "a", "b", None, "b", "a")


async def answer(engine: VllmEngine, model: str | None, tokens: int = 12, prompt: str = PROMPT) -> dict[str, Any]:
    body = {"model": model or "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    found = await engine.operations["completions"](body, RequestContext(f"r{id(body)}"))
    assert isinstance(found, dict)
    return found


async def text(engine: VllmEngine, model: str | None, **fields: Any) -> str:
    found: str = (await answer(engine, model, **fields))["choices"][0]["text"]
    return found


async def it_runs(engine: VllmEngine) -> None:
    while not engine.stats().running:  # noqa: ASYNC110  vLLM has no event for it
        await asyncio.sleep(0)


async def all_at_once(engine: VllmEngine, alone: dict[str | None, str]) -> list[bool]:
    """Whether each row of a mix says what it says alone."""
    texts = await asyncio.gather(*(text(engine, model) for model in MIX))
    return [found == alone[model] for model, found in zip(MIX, texts, strict=True)]


async def refusal(engine: VllmEngine, path: Path) -> str:
    try:
        await engine.load_adapter("bad", path)
    except ServingError as error:
        return f"{error.status} {error.param}: {error.message}"
    return "it loaded"


async def refusals(engine: VllmEngine, work_dir: Path) -> dict[str, str]:
    arrays = weights(1)
    away = {name.replace("blk.", "blk.4"): pair for name, pair in arrays.items()}
    paths = {
        "rank": write_peft(work_dir / "rank", weights(1, rank=16)),
        "width": write_peft(work_dir / "width", weights(1, width=64)),
        "nowhere": write_peft(work_dir / "nowhere", away),
        "partly": write_peft(work_dir / "partly", {**arrays, **away}),
        "module": write_peft(work_dir / "module", {f"{name}_x": pair for name, pair in arrays.items()}),
        "dora": write_peft(work_dir / "dora", arrays, use_dora=True),
        "missing": work_dir / "missing",
        "gguf": write_gguf(work_dir / "x.gguf", arrays),
    }
    return {case: await refusal(engine, path) for case, path in paths.items()}


async def replaced(engine: VllmEngine, work_dir: Path) -> dict[str, Any]:
    """New weights at the same path, under the same name, while a request has the old ones."""
    path = write_peft(work_dir / "current", weights(1))
    await engine.load_adapter("current", path)
    old = await text(engine, "current", tokens=40)
    running = asyncio.create_task(text(engine, "current", tokens=40))
    await it_runs(engine)
    (path / "adapter_model.safetensors").write_bytes((work_dir / "c" / "adapter_model.safetensors").read_bytes())
    changing = asyncio.create_task(engine.load_adapter("current", path))
    adapters: Any = engine._adapters
    while not adapters._loaded["current"].closed and not changing.done():  # noqa: ASYNC110  as above
        await asyncio.sleep(0)
    new = await text(engine, "current", tokens=40)  # begun while the old ones are still in use
    await changing
    await engine.load_adapter("c", work_dir / "c")
    return {
        "running": await running == old,
        "new": new == await text(engine, "c", tokens=40),
        "changed": new != old,
    }


async def unloaded(engine: VllmEngine) -> dict[str, Any]:
    before = await text(engine, "b", tokens=30)
    running = asyncio.create_task(text(engine, "b", tokens=30))
    await it_runs(engine)
    unloading = asyncio.create_task(engine.unload_adapter("b"))
    await asyncio.sleep(0)
    listed = "b" in engine.adapters
    await unloading
    try:
        await text(engine, "b")
        after = "it answered"
    except ServingError as error:
        after = f"{error.status} {error.code}"
    return {"finished": await running == before, "listed": listed, "after": after}


async def left(engine: VllmEngine) -> bool:
    """A client that leaves its stream leaves its lane, too."""
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    stream = await engine.operations["completions"](body, RequestContext("leaves"))
    assert not isinstance(stream, dict)
    await anext(stream)
    waiting = asyncio.create_task(text(engine, "a"))
    await asyncio.sleep(0.2)
    waits = not waiting.done() and engine.stats().waiting == 1
    await stream.aclose()
    return waits and bool(await asyncio.wait_for(waiting, 60))


async def main(model_dir: Path, work_dir: Path) -> None:
    for seed, name in enumerate("abc", start=1):
        write_peft(work_dir / name, weights(seed))
    engine = VllmEngine(
        model_dir,
        served_model_name="m",
        max_model_len=1024,
        max_num_seqs=8,
        engine_args=["--enforce-eager", "--kv-cache-memory-bytes=256M", "--max-loras=2", "--max-lora-rank=8"],
        adapters={"a": work_dir / "a"},
    )
    await engine.load()
    await engine.load_adapter("b", work_dir / "b")
    seen: dict[str, Any] = {"adapters": engine.adapters}
    alone = {model: await text(engine, model) for model in (None, "a", "b")}
    seen["differ"] = len(set(alone.values()))
    seen["model"] = (await answer(engine, "b"))["model"]
    seen["at once"] = await all_at_once(engine, alone)
    running = asyncio.create_task(text(engine, "a", tokens=60))
    seen["refused"] = await refusals(engine, work_dir)
    seen["undisturbed"] = (await running).startswith(alone["a"])
    seen["kept"] = engine.adapters
    seen["replaced"] = await replaced(engine, work_dir)
    seen["left"] = await left(engine)
    seen["unloaded"] = await unloaded(engine)
    await engine.load_adapter("b", work_dir / "b")
    adapters: Any = engine._adapters
    adapters._lanes = None  # what the lanes are for
    rounds = [await all_at_once(engine, alone) for _ in range(3)]  # whether rows meet in a step is a matter of time
    seen["without lanes"] = [all(same) for same in zip(*rounds, strict=True)]
    copies = adapters._copies._directory
    await engine.close()
    seen["cleaned"] = not copies.exists()
    (work_dir / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
