"""Loading the embedded engine for a test, and asking it."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aim_runtime.engines.base import Json, RequestContext
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine

MIB = 2**20
_numbers = itertools.count()


def new_engine(model: Path, **options: Any) -> LlamaCppEngine:
    """Small and on one thread; ``options`` override. Steps of fewer than 64 tokens: see same_but_for_ties."""
    small = {"threads": 1, "max_model_len": 512, "kv_cache_memory_bytes": 64 * MIB, "batch_tokens": 48}
    return LlamaCppEngine(model, served_model_name="smollm2", **{**small, **options})


@asynccontextmanager
async def loaded(model: Path, **options: Any) -> AsyncIterator[LlamaCppEngine]:
    engine = new_engine(model, **options)
    await engine.load()
    try:
        yield engine
    finally:
        await engine.close()


def context(priority: int = 0) -> RequestContext:
    return RequestContext(f"r{next(_numbers)}", priority=priority)


async def ask(engine: LlamaCppEngine, operation: str, body: Json, asked: RequestContext | None = None) -> Json:
    answer = await engine.operations[operation](body, asked or context())
    assert isinstance(answer, dict)
    return answer


async def stream(engine: LlamaCppEngine, operation: str, body: Json, asked: RequestContext | None = None) -> list[Json]:
    """All chunks of a streamed answer."""
    answer = await engine.operations[operation]({**body, "stream": True}, asked or context())
    assert not isinstance(answer, dict)
    return [json.loads(chunk) async for chunk in answer]


def chat(text: str, **fields: Any) -> Json:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0, **fields}


def text_of(chunks: list[Json], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)


def same_but_for_ties(one: Json, other: Json, tie: float = 0.75) -> None:
    """Two completions with ``logprobs: 2`` of one prompt say the same, or part where two tokens are about as likely.

    llama.cpp rounds differently when a sequence's cells lie in another order, or when a step has 64 tokens or more
    (both change how attention sums up); SmolLM2's quantised layers make logits differ by up to about a half of it.
    """
    a, b = one["logprobs"], other["logprobs"]
    for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=False)):
        if x == y:
            continue
        for top in (a["top_logprobs"][i], b["top_logprobs"][i]):
            best, second = sorted(top.values(), reverse=True)[:2]
            assert best - second < tie, (i, x, y, top)
        return
    assert one["text"] == other["text"]
