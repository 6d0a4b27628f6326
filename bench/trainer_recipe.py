"""What a step of the trainer's recipe costs beside plain TRL: SFTTrainer with the same weights, rows, order and seed.

Each takes turns in a process of its own, on one thread; counted is the CPU time of the steps alone. The losses must be
the same, or the figures compare different work. Usage: ``python bench/trainer_recipe.py [--quick] [--json FILE]``;
needs ``make trainer`` and ``make model``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-trainer/bin/python"
MODEL = ROOT / ".models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_HF = ROOT / ".models/smollm2-hf"
CHATS = ROOT / "docs/samples/finetuning/chats.jsonl"
OURS, PEER = "recipe", "trl"
BATCH, CONTEXT, SEED, RATE = 4, 512, 42, 2e-4
#: Dropout is off: the two draw it in another order, and losses could not be compared.
METHODS = {"lora": {"loraRank": 8, "loraAlpha": 16, "loraDropout": 0.0}, "full": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("WHO", "METHOD", "STEPS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        who, method, steps = given.measure
        print(json.dumps((_ours if who == OURS else _peer)(method, int(steps))))
        return
    if not PYTHON.exists() or not MODEL.exists():
        sys.exit("the trainer's environment or the model is missing: make trainer model")
    steps, rounds = (4, 1) if given.quick else (8, 3)
    _make_model()
    results = {method: _compared(method, steps, rounds) for method in METHODS}
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))


def _compared(method: str, steps: int, rounds: int) -> dict[str, Any]:
    told: dict[str, list[dict[str, Any]]] = {OURS: [], PEER: []}
    for number in range(rounds):
        for who in (OURS, PEER) if number % 2 == 0 else (PEER, OURS):
            told[who].append(_apart(who, method, steps))
    cpu = {who: [each["cpu_s"] for each in said] for who, said in told.items()}
    apart = max(abs(ours - peer) for ours, peer in zip(told[OURS][0]["losses"], told[PEER][0]["losses"], strict=True))
    # Of each round, so that what else the machine does meets both.
    ratios = [peer / ours for ours, peer in zip(cpu[OURS], cpu[PEER], strict=True)]
    tokens = told[OURS][0]["tokens"]
    result = {
        "tokens_a_cpu_second": {who: tokens / statistics.median(each) for who, each in cpu.items()},
        "times_as_fast": statistics.median(ratios),
        "rounds": ratios,
        "losses_apart": apart,
        "losses": told[OURS][0]["losses"],
        "peak_mib": {who: max(each["peak_mib"] for each in said) for who, said in told.items()},
    }
    print(f"\n{method}: {steps} steps of {BATCH} rows, {tokens} tokens, median of {rounds}")
    for who in (OURS, PEER):
        print(
            f"  {who:<8}{result['tokens_a_cpu_second'][who]:8.1f} tokens a CPU second"
            f"{result['peak_mib'][who]:10.0f} MiB peak"
        )
    print(f"  {result['times_as_fast']:.2f} times as fast as TRL; losses differ by at most {apart:.1e}", flush=True)
    return result


def _apart(who: str, method: str, steps: int) -> dict[str, Any]:
    command = [str(PYTHON), __file__, "--measure", who, method, str(steps)]
    paths = os.pathsep.join(str(ROOT / root) for root in ("profiles", "trainers"))
    env = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=tempfile.gettempdir())
    if done.returncode:
        sys.exit(f"{who} {method} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _make_model() -> None:
    if not (MODEL_HF / "model.safetensors").exists():
        script = ROOT / "tests/runtime/make_smollm2_safetensors.py"
        subprocess.run([str(PYTHON), str(script), str(MODEL), str(MODEL_HF)], check=True)


def _job(method: str, steps: int) -> Any:
    from aim_trainer.job.job import FineTuningJob

    hyperparameters = {
        "learningRate": RATE, "batchSize": BATCH, "maxSteps": steps, "maxSeqLength": CONTEXT, "seed": SEED,
        "warmup": 2, "gradientCheckpointing": False, "precision": "fp32",
    }  # fmt: skip
    spec = {
        "baseModel": {"modelId": str(MODEL_HF)},
        "method": method,
        "dataset": {"source": str(CHATS)},
        "hyperparameters": hyperparameters | METHODS[method],
    }
    kind = {"apiVersion": "aim.amd.com/v1alpha1", "kind": "FineTuningJob", "metadata": {"name": "bench"}}
    return FineTuningJob.model_validate(kind | {"spec": spec})


def _loaded(method: str, steps: int) -> tuple[Any, Any, Any]:
    """(the job, its model, its rows as the recipe orders them): the same for both."""
    import numpy as np
    import torch

    from aim_trainer.data.batches import Batches
    from aim_trainer.data.tokens import Row, Tokens, write_tokens
    from aim_trainer.recipe.model import load

    torch.set_num_threads(1)
    job = _job(method, steps)
    loaded = load(job)
    directory = Path(tempfile.mkdtemp())
    read = [_read(loaded.tokenizer, json.loads(line)["messages"]) for line in CHATS.read_text().splitlines()]
    rows = [Row(np.asarray(ids, np.int32), np.asarray(trained, np.uint8)) for ids, trained in read]
    write_tokens(directory, [row for row in rows if len(row.tokens) <= CONTEXT], {})
    batches = Batches(
        Tokens(directory), seed=SEED, global_batch=BATCH, micro_batch=BATCH, max_seq_length=CONTEXT,
        pad_id=loaded.tokenizer.pad_token_id,
    )  # fmt: skip
    return job, loaded, batches


def _read(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """A conversation's tokens, and which of them the assistant said, its end of turn included."""
    ids: list[int] = []
    trained: list[int] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for upto, said in ((messages[:number], 0), (messages[: number + 1], 1)):
            text = tokenizer.apply_chat_template(upto, tokenize=False, add_generation_prompt=not said)
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            trained += [said] * (len(whole) - len(ids))
            ids = whole
    return ids, trained


def _ours(method: str, steps: int) -> dict[str, Any]:
    from aim_trainer.metrics.records import Step
    from aim_trainer.recipe.train import train
    from aim_trainer.recipe.workers import Workers

    job, loaded, batches = _loaded(method, steps)
    told: list[Step] = []

    class Kept:
        def tell(self, record: Any) -> None:
            told.extend([record] if isinstance(record, Step) else [])

        def close(self) -> None: ...

    class Nowhere:
        """Checkpoints are not what is measured: TRL's are off too."""

        def newest_valid(self) -> None: ...
        def prune(self) -> None: ...
        def save(self, step: int, files: Path, world_size: int, metrics: dict[str, float]) -> Any:
            from aim_trainer.checkpoints.checkpoint import Checkpoint

            return Checkpoint(step, "", world_size, metrics)

        def fetch(self, checkpoint: Any, into: Path) -> Path:
            return into

    clock = _Clock()
    train(job, loaded, batches, None, Workers(), Nowhere(), Kept(), clock.tick)
    return _figures(clock, [step.loss for step in told], sum(step.tokens for step in told[1:]))


def _peer(method: str, steps: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    _, loaded, batches = _loaded(method, steps)
    rows: list[dict[str, list[int]]] = []
    tokens = []
    for step in range(steps):
        (batch,) = batches.of(step)
        tokens.append(int(batch.attention_mask.sum()))
        for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
            length = int(mask.sum())
            rows.append({"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()})
    clock, losses = _Clock(), []

    class Watch(TrainerCallback):
        def on_step_end(self, *_args: Any, **_more: Any) -> None:
            clock.tick()

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_more: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=RATE,
        lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.0, max_grad_norm=1.0, max_length=CONTEXT, seed=SEED,
        bf16=False, use_cpu=True, gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[],
        train_sampling_strategy="sequential", disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        loaded.model, config, train_dataset=Dataset.from_list(rows), processing_class=loaded.tokenizer,
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    return _figures(clock, losses, sum(tokens[1:]))


class _Clock:
    """CPU time from the end of the first step, which pays for what is made once, to the end of the last."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def tick(self) -> bool:
        self.ticks.append(time.process_time())
        return False


def _figures(clock: _Clock, losses: list[float], tokens: int) -> dict[str, Any]:
    import resource

    return {
        "cpu_s": clock.ticks[-1] - clock.ticks[0],
        "losses": losses,
        "tokens": tokens,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()
