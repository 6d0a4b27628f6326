"""The loss of a step is a mean over its trained tokens, however rows are padded, packed, and split up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aim_trainer.data.batches import Batches
from aim_trainer.data.tokens import Tokens
from aim_trainer.recipe.evaluation import held_out, judged
from aim_trainer.recipe.loss import summed_loss
from aim_trainer.recipe.model import load, save
from aim_trainer.worker import dealt
from tiny_models import ARCHITECTURES
from tiny_runs import chat_tokens, class_tokens, run_tiny, tiny_job

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return chat_tokens(tmp_path_factory.mktemp("rows"), 16)


def loss_of(model: Any, rows: Tokens) -> float:
    """transformers' own loss of each row alone, weighted by its trained tokens."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row.tokens.astype("int64"))
        labels[torch.tensor(row.trained) == 0] = -100
        trained = int((labels[1:] != -100).sum())
        with torch.no_grad():
            total += float(model(torch.tensor(row.tokens[None]).long(), labels=labels[None]).loss) * trained
        count += trained
    return total / count


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_loss_is_transformers_own(tiny: Tiny, rows: Tokens, tmp_path: Path, architecture: str) -> None:
    job = tiny_job(tiny(architecture), maxSteps=1, globalBatchSize=16, loraDropout=0.0)
    expected = loss_of(load(job).model.eval(), rows)
    for number, how in enumerate(({}, {"packing": True}, {"batchSize": 16}, {"gradientCheckpointing": True})):
        split = tiny_job(
            tiny(architecture), **{"maxSteps": 1, "globalBatchSize": 16, "loraDropout": 0.0, "batchSize": 4, **how}
        )
        ran = run_tiny(split, rows, tmp_path / str(number))
        assert ran.told.losses == [pytest.approx(expected, abs=2e-5)], how
        assert ran.told.steps[0].trained_tokens == sum(int(row.trained[1:].sum()) for row in rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_computes_what_is_trained_alone(tiny: Tiny, rows: Tokens, architecture: str) -> None:
    job = tiny_job(tiny(architecture), "full")
    loaded = load(job)
    (batch, *_) = dealt(job, rows).of(0)
    loss, logits = summed_loss(loaded.model, loaded, batch)
    assert logits.shape == (batch.trained_tokens, 1024)
    loss.backward()
    ours = {name: weight.grad.clone() for name, weight in loaded.model.named_parameters()}
    loaded.model.zero_grad()
    inputs = {"input_ids": torch.from_numpy(batch.input_ids), "attention_mask": torch.from_numpy(batch.attention_mask)}
    full = loaded.model(**inputs, labels=torch.from_numpy(batch.labels), use_cache=False)
    assert full.logits.shape == (*batch.input_ids.shape, 1024)
    (full.loss * batch.trained_tokens).backward()
    for name, weight in loaded.model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_held_out_is_weighted_by_tokens_and_draws_nothing(tiny: Tiny, rows: Tokens) -> None:
    loaded = load(tiny_job(tiny("llama"), neftuneAlpha=50.0, loraDropout=0.5))
    loaded.model.train()
    before = torch.get_rng_state()
    measured = [held_out(loaded, rows, micro_batch) for micro_batch in (1, 5, 16)]
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.model.training
    expected = loss_of(loaded.model.eval(), rows)
    for each in measured:
        assert each["eval_loss"] == pytest.approx(expected, abs=1e-5)
        assert each["perplexity"] == pytest.approx(2.718281828**expected, rel=1e-4)


def test_a_classifier_learns_its_classes(tiny: Tiny, tmp_path: Path) -> None:
    rows, held = class_tokens(tmp_path / "rows", 48), class_tokens(tmp_path / "held", 16, seed=7)
    for method in ("lora", "full"):
        job = tiny_job(
            tiny("llama"), method, template="classification", labels=["says", "asks"], maxSteps=20, learningRate=1e-2
        )
        ran = run_tiny(job, rows, tmp_path / method, held)
        first, last = ran.told.evaluations[0].metrics, ran.told.evaluations[-1].metrics
        assert last["eval_loss"] < first["eval_loss"]
        assert last["accuracy"] >= 0.9
        assert last["f1"] >= 0.9
        assert "perplexity" not in last
        assert held_out(ran.loaded, held, 3) == pytest.approx(last, abs=1e-5)
        save(ran.loaded, tmp_path / f"result-{method}")
        _says_the_same(ran.loaded.model, tmp_path / f"result-{method}", held)


def _says_the_same(model: Any, result: Path, held: Tokens) -> None:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    adapter = (result / "adapter_config.json").exists()
    kind = AutoPeftModelForSequenceClassification if adapter else AutoModelForSequenceClassification
    reloaded = kind.from_pretrained(result, num_labels=2) if adapter else kind.from_pretrained(result)
    row = torch.tensor(held[0].tokens[None]).long()
    with torch.no_grad():
        torch.testing.assert_close(reloaded.eval()(row).logits, model.eval()(row).logits, rtol=0, atol=1e-5)
    if not adapter:
        assert json.loads((result / "config.json").read_bytes())["id2label"] == {"0": "says", "1": "asks"}


@pytest.mark.parametrize(
    ("pairs", "accuracy", "f1"),
    [
        ([(0, 0), (1, 1)], 1.0, 1.0),
        ([(0, 0), (0, 0), (0, 0), (1, 0)], 0.75, (6 / 7 + 0) / 2),
        ([(0, 1), (1, 2), (2, 0)], 0.0, 0.0),
    ],
)
def test_macro_f1_counts_rare_classes_as_much(pairs: list[tuple[int, int]], accuracy: float, f1: float) -> None:
    assert judged(pairs) == {"accuracy": pytest.approx(accuracy), "f1": pytest.approx(f1)}


def test_neftune_adds_noise_of_its_size_while_training_alone(tiny: Tiny) -> None:
    plain, noisy = (load(tiny_job(tiny("llama"), neftuneAlpha=alpha)).model for alpha in (None, 8.0))
    ids = torch.arange(40)[None]
    difference = noisy.train().get_input_embeddings()(ids) - plain.get_input_embeddings()(ids)
    most = 8.0 / (40 * 64) ** 0.5
    assert 0.9 * most < float(difference.abs().max()) <= most * 1.0001
    assert torch.equal(noisy.eval().get_input_embeddings()(ids), plain.get_input_embeddings()(ids))


def test_batches_hold_every_row(rows: Tokens) -> None:
    """What held_out relies on: each row once."""
    batches = Batches(rows, seed=0, global_batch=6, micro_batch=3, max_seq_length=512)
    trained = sum(batch.trained_tokens for step in range(batches.steps_per_epoch) for batch in batches.of(step))
    assert trained == sum(int(row.trained[1:].sum()) for row in rows)
