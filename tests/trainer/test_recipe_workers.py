"""Two workers do what one does: the same losses for the same global batch, whole copies or sharded weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob
from tiny_runs import Ran, chat_tokens, run_tiny, tiny_job
from tiny_workers import run_together

Tiny = Callable[[str], Path]
STEPS = 5
#: Rows of a step: 8 on one worker as 4 micro-batches of 2, on two as 2 each. No dropout: workers draw their own.
COMMON: dict[str, Any] = {"loraDropout": 0.0, "maxSteps": STEPS, "globalBatchSize": 8, "batchSize": 2, "everySteps": 2}
FULL = {key: value for key, value in COMMON.items() if key != "loraDropout"}
HOW: dict[str, dict[str, Any]] = {
    "ddp-lora": {"strategy": "ddp", "method": "lora", **COMMON},
    "ddp-full": {"strategy": "ddp", "method": "full", **FULL},
    "ddp-nf4": {"strategy": "ddp", "method": "qlora", "quantization": "nf4", **COMMON},
    "ddp-packed": {"strategy": "ddp", "method": "lora", **COMMON, "packing": True, "gradientCheckpointing": True},
    "fsdp2-lora": {"strategy": "fsdp2", "method": "lora", **COMMON},
    "fsdp2-full": {"strategy": "fsdp2", "method": "full", **FULL},
    "fsdp2-packed": {"strategy": "fsdp2", "method": "full", **FULL, "packing": True, "gradientCheckpointing": True},
}


class Together:
    """All runs of this file, made by one pair of processes; each told beside its run on one worker."""

    def __init__(self, tiny: Tiny, directory: Path) -> None:
        self.directory, self.tiny = directory, tiny
        self.rows, self.held = chat_tokens(directory / "rows", 36), chat_tokens(directory / "held", 7, seed=3)
        self.alone: dict[str, Ran] = {}
        runs = {name: self._run(name, how) for name, how in HOW.items()}
        runs["asked"] = self._run("asked", HOW["ddp-lora"]) | {"stop": [1, 3]}
        runs["bfloat16"] = self._run("bfloat16", {**HOW["fsdp2-lora"], "precision": "bf16"})
        runs["no-room"] = self._run("no-room", HOW["ddp-lora"])
        (directory / "no-room").mkdir()
        (directory / "no-room/full").touch()
        runs["to-one"] = self._run("to-one", HOW["fsdp2-full"]) | {"stop": [0, 3]}
        # From one worker's checkpoint to two.
        self.alone["stopped"] = run_tiny(self.job(HOW["ddp-full"]), self.rows, directory / "to-two", stop=_third())
        runs["to-two"] = self._run("to-two", HOW["fsdp2-full"])
        self.told = run_together(runs, directory)

    def job(self, how: dict[str, Any]) -> FineTuningJob:
        changed = {key: value for key, value in how.items() if key not in ("method", "strategy")}
        return tiny_job(self.tiny("llama"), how["method"], **changed)

    def one(self, name: str) -> Ran:
        """The same run on one worker."""
        how = HOW[name]
        key = str({each: value for each, value in how.items() if each != "strategy"})
        if key not in self.alone:
            self.alone[key] = run_tiny(self.job(how), self.rows, self.directory / f"alone-{name}", self.held)
        return self.alone[key]

    def _run(self, name: str, how: dict[str, Any]) -> dict[str, Any]:
        method = how["method"]
        changed = {key: value for key, value in how.items() if key != "method"}
        job = tiny_job(self.tiny("llama"), method, workers=2, **changed)
        return {
            "job": job.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "tokens": str(self.directory / "rows"),
            "validation": str(self.directory / "held"),
            "store": str(self.directory / name),
            "result": str(self.directory / f"result-{name}"),
        }


def _third() -> Callable[[], bool]:
    asked = iter([False, False, True])
    return lambda: next(asked)


@pytest.fixture(scope="module")
def together(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(tiny, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("name", HOW)
def test_two_workers_lose_what_one_loses(together: Together, name: str) -> None:
    first, second = together.told[name]
    alone = together.one(name)
    assert first["losses"] == pytest.approx(alone.told.losses, abs=1e-5)
    assert first["norms"] == pytest.approx([step.grad_norm for step in alone.told.steps], rel=1e-4)
    assert first["evaluations"] == [pytest.approx(each.metrics, rel=1e-5) for each in alone.told.evaluations]
    assert first["saved"] == [2, 4, STEPS]
    if "packed" not in name:  # what fills packed sequences up is dealt otherwise
        assert first["tokens"] == [step.tokens for step in alone.told.steps]
    # Only the first speaks, both know.
    assert (second["losses"], second["saved"]) == ([], [])
    assert second["metrics"] == first["metrics"]


@pytest.mark.parametrize("name", [name for name in HOW if name.startswith("fsdp2")])
def test_each_worker_holds_its_part_alone(together: Together, name: str) -> None:
    for told in together.told[name]:
        assert told["sharded"]
        assert told["local_elements"] == pytest.approx(told["elements"] / 2, rel=0.01)


def test_copies_are_whole(together: Together) -> None:
    for told in together.told["ddp-full"]:
        assert not told["sharded"]
        assert told["local_elements"] == told["elements"]


def test_what_was_sharded_is_written_whole(together: Together) -> None:
    row = torch.tensor(together.rows[0].tokens[None]).long()
    model = AutoModelForCausalLM.from_pretrained(together.directory / "result-fsdp2-full")
    assert type(model).__name__ == "LlamaForCausalLM"
    alone = together.one("fsdp2-full").loaded.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(row).logits, alone(row).logits, rtol=0, atol=1e-3)
    names = {file.name for file in (together.directory / "result-fsdp2-lora").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names


def test_one_that_is_asked_to_stop_stops_both(together: Together) -> None:
    for told in together.told["asked"]:
        assert (told["step"], told["stopped"]) == (3, True)
    assert together.told["asked"][0]["saved"] == [2, 3]


def test_bfloat16_is_near(together: Together) -> None:
    first, _ = together.told["bfloat16"]
    assert first["losses"] == pytest.approx(together.told["fsdp2-lora"][0]["losses"], rel=0.01)
    assert first["losses"] != together.told["fsdp2-lora"][0]["losses"]


def test_a_store_that_fails_the_first_fails_both(together: Together) -> None:
    for told in together.told["no-room"]:
        assert told == {"problem": "StoreError: no space left; make room"}


def test_two_sharded_workers_go_on_as_one(together: Together) -> None:
    first, _ = together.told["to-one"]
    resumed = run_tiny(together.job(HOW["fsdp2-full"]), together.rows, together.directory / "to-one")
    alone = together.one("fsdp2-full").told.losses
    assert first["losses"] + resumed.told.losses == pytest.approx(alone, abs=1e-5)
    assert len(resumed.told.losses) == STEPS - 3


def test_one_goes_on_as_two_sharded_workers(together: Together) -> None:
    first, _ = together.told["to-two"]
    assert len(first["losses"]) == STEPS - 3
    before = together.alone["stopped"].told.losses
    assert before + first["losses"] == pytest.approx(together.one("fsdp2-full").told.losses, abs=1e-5)


def test_what_cannot_be_sharded_is_refused(tiny: Tiny, together: Together, tmp_path: Path) -> None:
    job = tiny_job(tiny("llama"), workers=2, strategy="fsdp2")
    told = "^spec.distributed.strategy: fsdp2 shards over workers, and this run has one; set ddp, or "
    with pytest.raises(JobError, match=told):
        run_tiny(job, together.rows, tmp_path)
