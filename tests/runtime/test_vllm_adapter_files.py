"""The parts of vLLM's adapters that need no vLLM: what a directory must hold, and who may be computed beside whom."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from aim_kserve.errors import BadRequest, Unavailable
from aim_runtime.engines.vllm.adapter_files import CONFIG, WEIGHTS, BaseModel, Copies
from aim_runtime.engines.vllm.lanes import Lanes
from lora_files import LAYERS, VALUE_WIDTH, WIDTH, weights, write_gguf, write_peft

# --- directories ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A model whose attention is as wide as SmolLM2's, of empty bytes."""
    directory = tmp_path_factory.mktemp("base")
    widths = {"q_proj": WIDTH, "v_proj": VALUE_WIDTH}
    tensors = {
        f"model.layers.{layer}.self_attn.{name}.weight": np.zeros((out, WIDTH), np.float16)
        for layer in range(LAYERS)
        for name, out in widths.items()
    }
    save_file(tensors, directory / "model.safetensors")
    return BaseModel(directory, max_rank=8)


@pytest.fixture
def copies(base: BaseModel) -> Copies:
    return Copies(base)


def test_the_copy_is_named_by_its_content(copies: Copies, tmp_path: Path) -> None:
    source = write_peft(tmp_path / "a", weights(1))
    first = copies.take("a", source)
    assert first.path.name == first.digest
    assert len(first.modules) == 8
    assert copies.take("b", source) == first
    for file in (CONFIG, WEIGHTS):
        assert (first.path / file).read_bytes() == (source / file).read_bytes()
    (source / CONFIG).write_text((source / CONFIG).read_text().replace("16.0", "32.0"))
    second = copies.take("a", source)
    assert second.path != first.path
    assert "16.0" in (first.path / CONFIG).read_text()
    copies.drop(first)
    assert [path.name for path in first.path.parent.iterdir()] == [second.digest]
    copies.close()
    assert not first.path.parent.exists()


def bad_config(**changes: object) -> Callable[[Path], object]:
    return lambda path: write_peft(path, weights(1), **changes)


def only(path: Path, **tensors: tuple[int, ...]) -> None:
    write_peft(path, weights(1))
    arrays = {
        f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight": np.ones(shape, np.float32)
        for name, shape in tensors.items()
    }
    save_file(arrays, path / WEIGHTS)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "there is no such directory"),
    "empty": (Path.mkdir, f"has no {CONFIG}"),
    "file.gguf": (lambda path: write_gguf(path, weights(1)), "a GGUF file, and the vllm engine takes PEFT directories"),
    "no weights": (lambda path: (write_peft(path, weights(1)) / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "no JSON": (lambda path: (write_peft(path, weights(1)) / CONFIG).write_text("{"), "is no JSON"),
    "a list": (lambda path: (write_peft(path, weights(1)) / CONFIG).write_text("[]"), "peft_type"),
    "prompt tuning": (bad_config(peft_type="PROMPT_TUNING"), "peft_type .* is 'PROMPT_TUNING', not 'LORA'"),
    "rank": (
        lambda path: write_peft(path, weights(1, rank=16)),
        r"rank \(r\) is 16.* room for 8: .*--max-lora-rank 16",
    ),
    "rank of one": (bad_config(rank_pattern={"q_proj": 64}), r"rank_pattern\.q_proj\) is 64"),
    "no rank": (bad_config(r="many"), "r in adapter_config.json is 'many'"),
    "no tensors": (only, "holds no LoRA tensors"),
    "half": (lambda path: only(path, lora_A=(8, WIDTH)), "has one of lora_A and lora_B only"),
    "ranks apart": (lambda path: only(path, lora_A=(8, WIDTH), lora_B=(WIDTH, 4)), "do not belong together"),
    "a vector": (lambda path: only(path, lora_A=(WIDTH,), lora_B=(WIDTH, 8)), "do not belong together"),
    "narrower": (lambda path: write_peft(path, weights(1, width=64)), r"is \[576, 576\] in the model.* \[64, 64\]"),
    "wider": (lambda path: write_peft(path, weights(1, width=960)), r"changes \[960, 960\]: made for another model"),
    "cut": (lambda path: cut(write_peft(path, weights(1)) / WEIGHTS), "truncated"),
    "too long": (lambda path: (write_peft(path, weights(1)) / CONFIG).write_text(" " * 2**21), "more than 1048576"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_adapter_of_the_model_is_refused_by_name(copies: Copies, tmp_path: Path, case: str) -> None:
    write, reason = REFUSED[case]
    write(tmp_path / case)
    with pytest.raises(BadRequest, match=reason) as refusal:
        copies.take("x", tmp_path / case)
    assert f"adapter 'x' ({tmp_path / case})" in refusal.value.message
    assert not re.search(r"aim-adapters-|new-", refusal.value.message)
    assert refusal.value.param == "lora_path"
    copies.close()


def test_a_model_whose_shapes_are_unknown_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"x" * 2**21)
    copies = Copies(BaseModel(tmp_path / "base", max_rank=8))
    assert copies.take("a", write_peft(tmp_path / "a", weights(1))).modules
    copies.close()


# --- lanes ------------------------------------------------------------------------------------------------------------


class Request:
    """A request that is in its lane until it is told to go."""

    def __init__(self, lanes: Lanes, lane: str) -> None:
        self.lane, self.inside = lane, False
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._run(lanes))

    async def _run(self, lanes: Lanes) -> None:
        await lanes.enter(self.lane)
        self.inside = True
        try:
            await self.go.wait()
        finally:
            self.inside = False
            lanes.leave()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


ACTIONS = st.lists(
    st.one_of(st.sampled_from(["base", "adapted"]), st.tuples(st.sampled_from(["go", "cancel"]), st.integers(0, 9))),
    max_size=40,
)


@given(ACTIONS)
async def test_lanes_never_mix_and_nobody_is_forgotten(actions: list[str | tuple[str, int]]):
    lanes, requests = Lanes(), list[Request]()
    for action in actions:
        if isinstance(action, str):
            requests.append(Request(lanes, action))
        elif requests:
            request = requests[action[1] % len(requests)]
            request.go.set() if action[0] == "go" else request.task.cancel()
        await settle()
        assert len({request.lane for request in requests if request.inside}) <= 1
        undone = [request for request in requests if not request.task.done()]
        assert any(request.inside for request in undone) or not undone
    for _ in requests:
        for request in requests:
            request.go.set()
        await settle()
    assert all(request.task.done() for request in requests)
    assert lanes.waiting == 0


async def test_whoever_arrives_does_not_pass_who_waits():
    lanes = Lanes()
    first, other, later = Request(lanes, "base"), Request(lanes, "adapted"), Request(lanes, "base")
    await settle()
    assert (first.inside, other.inside, later.inside, lanes.waiting) == (True, False, False, 2)
    first.go.set()
    await settle()
    assert (other.inside, later.inside) == (True, False)
    other.go.set()
    await settle()
    assert later.inside
    later.go.set()
    await settle()


async def test_the_queue_is_bounded_and_ends():
    lanes = Lanes(most_waiting=1)
    await lanes.enter("base")
    waiting = asyncio.create_task(lanes.enter("adapted"))
    await settle()
    with pytest.raises(Unavailable, match="1 requests are waiting already"):
        await lanes.enter("adapted")
    lanes.end()
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting
