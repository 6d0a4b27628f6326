"""batchSize auto: what fits is found, on all workers the same, kept, and disturbs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aim_trainer.data.tokens import Tokens
from aim_trainer.errors import ResourceError
from aim_trainer.recipe import batch_size
from aim_trainer.recipe.model import load
from aim_trainer.recipe.workers import Workers
from forked import forked
from short_memory import try_batches
from tiny_runs import chat_tokens, tiny_job

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return chat_tokens(tmp_path_factory.mktemp("rows"), 40)


class Budget:
    """Stands in for a device on which so many rows fit."""

    def __init__(self, most: int) -> None:
        self.most, self.tried = most, list[int]()

    def __call__(self, _loaded: object, batch: object) -> bool:
        self.tried.append(len(batch.input_ids))  # type: ignore[attr-defined]
        return self.tried[-1] <= self.most


def test_what_the_job_says_is_taken(tiny: Tiny, rows: Tokens, tmp_path: Path) -> None:
    job = tiny_job(tiny("llama"), batchSize=3)
    assert batch_size.find(job, load(job), Workers(), rows, tmp_path / "kept") == 3
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("fit", "whole", "tried", "found"),
    [
        (64, None, [40], 40),
        (11, None, [40, 20, 10], 10),
        (11, 24, [24, 12, 6], 6),
        (4, 30, [30, 15, 6, 3], 3),
    ],
)
def test_it_is_halved_until_it_fits_and_divides(
    tiny: Tiny, rows: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: int, whole: int | None,
    tried: list[int], found: int,
) -> None:  # fmt: skip
    budget = Budget(fit)
    monkeypatch.setattr(batch_size, "fits", budget)
    given = {} if whole is None else {"globalBatchSize": whole}
    job = tiny_job(tiny("llama"), batchSize="auto", **given)
    loaded, kept = load(job), tmp_path / "kept"
    assert batch_size.find(job, loaded, Workers(), rows, kept) == found
    assert budget.tried == tried
    assert json.loads(kept.read_bytes()) == {"batchSize": found}
    # A run that goes on does not look again, on whatever device.
    budget.most = 0
    assert batch_size.find(job, loaded, Workers(), rows, kept) == found
    assert budget.tried == tried


def test_where_nothing_fits_it_says_so(
    tiny: Tiny, rows: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "fits", Budget(0))
    job = tiny_job(tiny("llama"), batchSize="auto")
    with pytest.raises(ResourceError, match=r"not one row of \d+ tokens fits the memory of cpu; lower maxSeqLength"):
        batch_size.find(job, load(job), Workers(), rows, tmp_path / "kept")


def test_a_small_device_begins_small(tiny: Tiny, rows: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate goes first: with room for little more than the process itself, few rows are tried."""
    job = tiny_job(tiny("llama"), batchSize="auto")
    loaded, budget = load(job), Budget(1000)
    monkeypatch.setattr(batch_size, "fits", budget)
    monkeypatch.setattr(batch_size, "_memory_bytes", lambda _device, _workers: 700 * 2**20)
    found = batch_size.find(job, loaded, Workers(), rows, tmp_path / "kept")
    assert 1 <= found < 40
    assert budget.tried == [found]


def test_to_try_leaves_weights_gradients_and_generators_as_they_were(tiny: Tiny, rows: Tokens, tmp_path: Path) -> None:
    job = tiny_job(tiny("llama"), batchSize="auto", loraDropout=0.5, neftuneAlpha=5.0)
    loaded = load(job)
    before = {name: weight.detach().clone() for name, weight in loaded.model.named_parameters()}
    generator = torch.get_rng_state()
    assert batch_size.find(job, loaded, Workers(), rows, tmp_path / "kept") == 40
    assert torch.equal(torch.get_rng_state(), generator)
    for name, weight in loaded.model.named_parameters():
        assert weight.grad is None
        assert torch.equal(weight, before[name])


def test_memory_that_runs_out_is_a_no_and_not_the_end(tiny: Tiny) -> None:
    """In a process whose memory is limited for real."""
    process = forked(try_batches, tiny("llama"))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0
