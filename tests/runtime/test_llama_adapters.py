"""LoRA adapters of the embedded engine: each request gets its own weights, whatever runs beside it or ran before."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_kserve.errors import BadRequest, NotFound
from aim_runtime.engines.base import Engine, EngineSpec, Json, ModelLoadError
from aim_runtime.engines.llama_cpp.batch_plan import BatchPlan
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine
from aim_runtime.engines.llama_cpp.sequence import Generation, Sequence
from aim_runtime.engines.llama_cpp.slots import Slot
from aim_runtime.engines.llama_cpp.turns import Turns
from aim_runtime.supervisor.launch import Launch
from aim_runtime.supervisor.remote import RemoteEngine
from llama_engine import ask, loaded, same_but_for_ties, stream
from lora_files import Arrays, weights, write_gguf, write_peft

pytestmark = pytest.mark.model

PROMPT = "A long story about the sea, a ship and its crew, told by an old sailor who has seen every port of the world:"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {name: write_gguf(directory / f"{name}.gguf", weights(seed)) for seed, name in enumerate("abc", start=1)}


@pytest.fixture
async def engine(embedded_model: Path, files: dict[str, Path]) -> AsyncIterator[LlamaCppEngine]:
    async with loaded(embedded_model, adapters={name: files[name] for name in "ab"}, slots=6) as engine:
        yield engine


def completion(model: str | None, prompt: str = PROMPT, tokens: int = 12, **fields: object) -> Json:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 2, "ignore_eos": True, **fields}
    return body if model is None else {**body, "model": model}


async def choice(engine: Engine, model: str | None, **fields: object) -> Json:
    found: Json = (await ask(engine, "completions", completion(model, **fields)))["choices"][0]
    return found


async def likelihoods(engine: LlamaCppEngine, model: str | None) -> np.ndarray:
    """Log probabilities of the prompt's own tokens: numbers, where greedy texts only part or do not."""
    scored = await choice(engine, model, tokens=1, echo=True)
    return np.array(scored["logprobs"]["token_logprobs"][1:-1])


async def it_runs(engine: LlamaCppEngine) -> None:
    while not engine.stats().running:  # noqa: ASYNC110  the decode thread has no event for it
        await asyncio.sleep(0)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def cached(engine: LlamaCppEngine, model: str | None) -> int:
    answer = await ask(engine, "completions", completion(model))
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


# --- each its own weights ---------------------------------------------------------------------------------------------


async def test_an_answer_is_the_adapters_and_says_so(engine: LlamaCppEngine):
    answers = {model: await ask(engine, "completions", completion(model)) for model in ("smollm2", "a", "b")}
    assert [answer["model"] for answer in answers.values()] == ["smollm2", "a", "b"]
    assert len({answer["choices"][0]["text"] for answer in answers.values()}) == 3
    assert engine.adapters == ("a", "b")
    chunks = await stream(engine, "completions", completion("b"))
    assert {chunk["model"] for chunk in chunks} == {"b"}


async def test_rows_of_the_model_and_two_adapters_at_once_equal_each_alone(engine: LlamaCppEngine):
    models = (None, "a", "b", "a", None, "b")
    alone = {model: await likelihoods(engine, model) for model in ("a", "b", None)}
    for one, other in ((None, "a"), (None, "b"), ("a", "b")):
        assert np.abs(alone[one] - alone[other]).mean() > 1  # what a mix would show
    together = await asyncio.gather(*(likelihoods(engine, model) for model in models))
    for model, found in zip(models, together, strict=True):
        assert np.abs(found - alone[model]).mean() < 0.2, model


async def test_texts_at_once_equal_each_alone(engine: LlamaCppEngine):
    models = ("smollm2", "a", "b", "b", "a", "smollm2")
    alone = {model: await choice(engine, model) for model in ("smollm2", "a", "b")}
    together = await asyncio.gather(*(choice(engine, model) for model in models))
    for model, found in zip(models, together, strict=True):
        same_but_for_ties(found, alone[model])


async def test_choices_of_one_request_all_have_its_adapter(engine: LlamaCppEngine):
    answer = await ask(engine, "completions", completion("a", n=3))
    first, *others = answer["choices"]
    same_but_for_ties(first, await choice(engine, "a"))
    for other in others:
        same_but_for_ties(other, first)


async def test_every_group_gets_on_while_the_others_run(engine: LlamaCppEngine):
    """A short answer of one adapter is not held up by long ones of the others."""
    long = [asyncio.create_task(ask(engine, "completions", completion(model, tokens=300))) for model in ("a", "a", "b")]
    for model in ("smollm2", "b", "a"):
        await ask(engine, "completions", completion(model, prompt="Hi", tokens=4))
    assert not any(task.done() for task in long)
    for task in long:
        task.cancel()
    await asyncio.gather(*long, return_exceptions=True)


# --- cached tokens ----------------------------------------------------------------------------------------------------


async def test_new_weights_under_an_old_name_find_no_cached_token(
    engine: LlamaCppEngine, embedded_model: Path, files: dict[str, Path]
):
    async with loaded(embedded_model, adapters={"a": files["c"]}, slots=6) as fresh:
        cold = {"new a": await choice(fresh, "a")}
    for model in ("a", "b", None):
        cold[str(model)] = await choice(engine, model)
    assert await cached(engine, "a") > 10  # the same weights again
    same_but_for_ties(await choice(engine, "b"), cold["b"])
    await engine.load_adapter("a", files["c"])
    assert await cached(engine, "a") == 0
    again = await choice(engine, "a")
    same_but_for_ties(again, cold["new a"])
    assert again["text"] != cold["a"]["text"]
    same_but_for_ties(await choice(engine, None), cold["None"])


async def test_the_digest_tells_weights_apart_not_the_path(
    engine: LlamaCppEngine, files: dict[str, Path], tmp_path: Path
):
    path = shutil.copy(files["a"], tmp_path / "current.gguf")
    await engine.load_adapter("current", path)
    old = await choice(engine, "current")
    assert await cached(engine, "a") > 10  # equal weights under another name
    shutil.copy(files["c"], path)
    await engine.unload_adapter("current")
    await engine.load_adapter("current", path)
    assert await cached(engine, "current") == 0
    assert (await choice(engine, "current"))["text"] != old["text"]


# --- loading and unloading while it serves ----------------------------------------------------------------------------


async def test_a_request_keeps_its_weights_when_they_are_replaced_or_unloaded(
    engine: LlamaCppEngine, files: dict[str, Path]
):
    alone = await choice(engine, "a", tokens=24)
    for change in (engine.load_adapter("a", files["c"]), engine.unload_adapter("a")):
        before = await choice(engine, "a", tokens=24)
        running = asyncio.create_task(choice(engine, "a", tokens=24))
        await it_runs(engine)
        await change
        same_but_for_ties(await running, before)
        if "a" in engine.adapters:
            assert (await choice(engine, "a", tokens=24))["text"] != alone["text"]
    with pytest.raises(NotFound, match="model 'a' does not exist; this engine has: smollm2, b"):
        await choice(engine, "a")
    same_but_for_ties(await choice(engine, "b"), await choice(engine, "b"))


async def test_unloading_waits_for_the_requests_that_use_it(engine: LlamaCppEngine):
    running = asyncio.create_task(choice(engine, "a", tokens=40))
    await it_runs(engine)
    unloading = asyncio.create_task(engine.unload_adapter("a"))
    await asyncio.sleep(0)
    assert engine.adapters == ("b",)  # nobody new gets it
    await unloading
    assert len((await running)["logprobs"]["tokens"]) == 40
    with pytest.raises(NotFound, match="adapter 'a' is not loaded; loaded are: b"):
        await engine.unload_adapter("a")


async def test_loading_a_hundred_times_leaves_nothing_behind(engine: LlamaCppEngine, files: dict[str, Path]):
    before = await choice(engine, "b")
    descriptors = open_files()
    for _ in range(100):
        await engine.load_adapter("a", files["a"])
    await engine.unload_adapter("a")
    assert open_files() <= descriptors + 1
    same_but_for_ties(await choice(engine, "b"), before)


async def test_closing_ends_an_unloading_that_waits(embedded_model: Path, files: dict[str, Path]):
    async with loaded(embedded_model, adapters={"a": files["a"]}) as engine:
        running = asyncio.create_task(choice(engine, "a", tokens=300))
        await it_runs(engine)
        unloading = asyncio.create_task(engine.unload_adapter("a"))
        await asyncio.sleep(0)
    results = await asyncio.gather(running, unloading, return_exceptions=True)
    assert all("the engine has stopped" in str(result) for result in results), results


# --- what is no adapter of this model ---------------------------------------------------------------------------------


def one(name: str, a: tuple[int, ...], b: tuple[int, ...], kind: type = np.float32) -> Arrays:
    return {name: (np.ones(a, kind), np.ones(b, kind))}


Q = "blk.0.attn_q"
Writer = Callable[[Path], object]
REFUSED: dict[str, tuple[Writer, str]] = {
    "nothing there": (lambda path: None, "there is no such file"),
    "a directory": (Path.mkdir, "not a file: give the path of a GGUF adapter"),
    "a PEFT directory": (lambda path: write_peft(path, weights(1)), "PEFT directory.*convert_lora_to_gguf.py"),
    "not a GGUF": (lambda path: path.write_bytes(b"x" * 100), "not a GGUF file"),
    "empty": (lambda path: path.touch(), "truncated or not a GGUF file"),
    "no tensors": (lambda path: write_gguf(path, {}), "holds no LoRA tensors.*it would change nothing"),
    "no such modules": (
        lambda path: write_gguf(path, {f"blk.{i}.attn_q": pair for i, pair in enumerate(weights(1).values(), 40)}),
        r"8 of its 8 modules are not in the model \(blk\.40\.attn_q\.weight, .*…\): made for another model",
    ),
    "one module too many": (
        lambda path: write_gguf(path, {**weights(1), **one("blk.30.attn_q", (8, 576), (576, 8))}),
        r"1 of its 9 modules are not in the model \(blk\.30",
    ),
    "another width": (
        lambda path: write_gguf(path, one(Q, (8, 960), (960, 8))),
        r"blk\.0\.attn_q\.weight is 576 x 576 in the model, and its A 960 x 8 and B 8 x 960 do not make that",
    ),
    "ranks that differ": (lambda path: write_gguf(path, one(Q, (8, 576), (576, 4))), "do not make that"),
    "three dimensions": (lambda path: write_gguf(path, one(Q, (2, 8, 576), (3, 576, 8))), "do not make that"),
    "integers": (lambda path: write_gguf(path, one(Q, (8, 576), (576, 8), np.int32)), "of type i32"),
    "a norm": (lambda path: write_gguf(path, one("blk.0.attn_norm", (1, 576), (1, 1))), "no matrix of a linear layer"),
    "tied embeddings": (
        lambda path: write_gguf(path, one("token_embd", (49152, 8), (576, 8))),
        "shares with its output layer",
    ),
    "another architecture": (
        lambda path: write_gguf(path, weights(1), general__architecture="qwen2"),
        "architecture 'qwen2'; this one is 'llama'",
    ),
    "a model": (lambda path: write_gguf(path, weights(1), general__type="model"), "general.type is 'model'"),
    "alpha no float": (lambda path: write_gguf(path, weights(1), alpha=16), "adapter.lora.alpha is no 32-bit float"),
    "half a pair": (lambda path: half_a_pair(path), "has one of .lora_a and .lora_b only"),
    "cut off": (lambda path: cut_off(path), "truncated"),
    "larger than the model": (lambda path: sparse(path), "more than the model's own tensors"),
}


def half_a_pair(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor(f"{Q}.weight.lora_a", np.ones((8, 576), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def cut_off(path: Path) -> None:
    write_gguf(path, weights(1))
    path.write_bytes(path.read_bytes()[:-1000])


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**31)


async def test_what_is_no_adapter_of_this_model_is_refused_and_disturbs_nobody(engine: LlamaCppEngine, tmp_path: Path):
    running = asyncio.create_task(choice(engine, "a", tokens=150))
    descriptors = open_files()
    for case, (write, reason) in REFUSED.items():
        path = tmp_path / f"{case}.gguf"
        write(path)
        with pytest.raises(BadRequest, match=reason) as refusal:
            await engine.load_adapter("bad", path)
        assert f"adapter 'bad' ({path})" in refusal.value.message, case
        assert refusal.value.param == "lora_path"
    assert open_files() <= descriptors
    assert engine.adapters == ("a", "b")
    assert len((await running)["logprobs"]["tokens"]) == 150


@pytest.mark.parametrize("name", ["", " a", "a\nb", "x" * 257, "smollm2"])
async def test_a_name_that_nobody_can_ask_for_is_refused(engine: LlamaCppEngine, files: dict[str, Path], name: str):
    with pytest.raises(BadRequest) as refusal:
        await engine.load_adapter(name, files["a"])
    assert refusal.value.param == "lora_name"


async def test_a_bad_adapter_at_the_start_is_a_load_error(embedded_model: Path, tmp_path: Path):
    with pytest.raises(ModelLoadError, match=r"adapter 'a' \(.*nowhere.gguf\): there is no such file"):
        async with loaded(embedded_model, adapters={"a": tmp_path / "nowhere.gguf"}):
            pass


# --- turns ------------------------------------------------------------------------------------------------------------


class Weights:
    """An adapter, as far as a turn looks at it."""

    def __init__(self, digest: str) -> None:
        self.digest = digest


async def slot_of(number: int, digest: str) -> Slot:
    adapter = Weights(digest) if digest else None
    generation = Generation(np.array([1], np.int32), max_tokens=1)
    return Slot(number, sequence=Sequence(generation, 0, print, adapter=adapter))  # type: ignore[arg-type]


@given(st.lists(st.sets(st.sampled_from(["", "a", "b", "c"]), min_size=1), min_size=1, max_size=40))
async def test_whoever_is_always_there_is_served_once_a_round(steps: list[set[str]]):
    """However the others come and go, at most as many steps pass between two of its own as there are others."""
    turns, waited = Turns(), 0
    for step in steps:
        digests = sorted({"b", *step})
        turn = turns.next([await slot_of(index, digest) for index, digest in enumerate(digests * 2)])
        served = {slot.running.weights for slot in turn.slots}
        assert len(served) == 1
        assert len(turn.slots) == 2
        assert turn.groups == len(digests)
        waited = 0 if served == {"b"} else waited + 1
        assert waited <= 3


async def test_a_step_takes_the_shorter_the_more_take_turns():
    """So that a token of one group does not wait for whole prompts of all others."""
    plan = BatchPlan(room=512)
    plan.learn(100, computed_s=0.1)  # 1 ms a token: 250 tokens in a step
    prompt = Sequence(Generation(np.zeros(400, np.int32), max_tokens=1), 0, print)
    steps = [plan.batches([Slot(0, sequence=prompt)], groups) for groups in (1, 2, 5)]
    assert [[entry.count for entry in batch] for (batch,) in steps] == [[250], [125], [50]]


# --- in a process of its own ------------------------------------------------------------------------------------------


async def test_a_supervised_engine_has_them_too(embedded_model: Path, files: dict[str, Path], tmp_path: Path):
    options = {"threads": 1, "adapters": {"a": str(files["a"])}}
    spec = EngineSpec("llama_cpp", embedded_model, "smollm2", max_model_len=512, max_concurrency=4, options=options)
    engine = RemoteEngine(Launch(spec))
    try:
        await engine.load()
        await engine.load_adapter("b", files["b"])
        assert engine.adapters == ("a", "b")
        texts = [(await choice(engine, model))["text"] for model in ("smollm2", "a", "b")]
        assert len(set(texts)) == 3
        with pytest.raises(BadRequest, match="there is no such file") as refusal:
            await engine.load_adapter("c", tmp_path / "c.gguf")
        assert refusal.value.param == "lora_path"
        await engine.unload_adapter("a")
        with pytest.raises(NotFound, match="model 'a' does not exist"):
            await choice(engine, "a")
    finally:
        await engine.close()
