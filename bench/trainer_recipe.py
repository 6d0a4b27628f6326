"""What a step of the trainer's recipe costs beside plain TRL: SFTTrainer with the same weights, rows, order and seed.

Each takes turns in a process of its own. On the CPU: SmolLM2 on one thread, and the CPU time of the steps alone. With
`--device cuda` (ROCm's GPUs are called so too): a random Llama of `--shape`, rows of random tokens, bfloat16, and the
time on the clock. The losses must be the same, or the figures compare different work.
Usage: ``python bench/trainer_recipe.py [--quick] [--device cuda --shape 1b|8b] [--json FILE]``; needs ``make trainer``
and ``make model``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-trainer/bin/python"
MODEL = ROOT / ".models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_HF = ROOT / ".models/smollm2-hf"
CHATS = ROOT / "docs/samples/finetuning/chats.jsonl"
OURS, PEER = "recipe", "trl"
SEED, RATE = 42, 2e-4
#: Dropout is off: the two draw it in another order, and losses could not be compared.
LORA = {"loraRank": 8, "loraAlpha": 16, "loraDropout": 0.0}
METHODS: dict[str, dict[str, Any]] = {"lora": LORA, "qlora": LORA, "full": {}}
#: hidden size, layers, feed-forward size, heads, key and value heads: of Llama 3.2 1B and 3.1 8B.
SHAPES = {"tiny": (64, 2, 128, 4, 2), "1b": (2048, 16, 8192, 32, 8), "8b": (4096, 32, 14336, 32, 8)}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where it is measured, and what. shape: of a random model; none: SmolLM2. batch: rows. context: tokens a row."""

    device: str
    shape: str | None
    batch: int
    context: int

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def model(self) -> Path:
        return ROOT / ".models" / f"random-{self.shape}" if self.shape else MODEL_HF

    @property
    def methods(self) -> list[str]:
        """4 bits are no gain on a CPU, and no peer's strength."""
        return list(METHODS) if self.on_gpu else ["lora", "full"]

    @property
    def unit(self) -> str:
        return "second" if self.on_gpu else "CPU second"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--shape", choices=SHAPES, help="a random model of it instead of SmolLM2")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--measure", nargs=3, metavar=("WHO", "METHOD", "STEPS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    on_gpu = given.device != "cpu"
    setting = Setting(given.device, given.shape, 8 if on_gpu else 4, 1024 if on_gpu else 512)
    if given.measure:
        who, method, steps = given.measure
        print(json.dumps((_ours if who == OURS else _peer)(setting, method, int(steps))))
        return
    steps, rounds = (4, 1) if given.quick else (24 if on_gpu else 8, 3)
    _make_model(setting)
    results = {method: _compared(setting, method, steps, rounds) for method in given.methods or setting.methods}
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))


def _compared(setting: Setting, method: str, steps: int, rounds: int) -> dict[str, Any]:
    told: dict[str, list[dict[str, Any]]] = {OURS: [], PEER: []}
    for number in range(rounds):
        for who in (OURS, PEER) if number % 2 == 0 else (PEER, OURS):
            told[who].append(_apart(setting, who, method, steps))
    took = {who: [each["seconds"] for each in said] for who, said in told.items()}
    apart = max(abs(ours - peer) for ours, peer in zip(told[OURS][0]["losses"], told[PEER][0]["losses"], strict=True))
    # Of each round, so that what else the machine does meets both.
    ratios = [peer / ours for ours, peer in zip(took[OURS], took[PEER], strict=True)]
    tokens = told[OURS][0]["tokens"]
    result = {
        "tokens_a_second": {who: tokens / statistics.median(each) for who, each in took.items()},
        "of": setting.unit,
        "times_as_fast": statistics.median(ratios),
        "rounds": ratios,
        "losses_apart": apart,
        "losses": told[OURS][0]["losses"],
        "peak_mib": {who: max(each["peak_mib"] for each in said) for who, said in told.items()},
    }
    print(f"\n{method}: {steps} steps of {setting.batch} rows, {tokens} tokens, median of {rounds}")
    for who in (OURS, PEER):
        print(
            f"  {who:<8}{result['tokens_a_second'][who]:10.1f} tokens a {setting.unit}"
            f"{result['peak_mib'][who]:10.0f} MiB peak"
        )
    print(f"  {result['times_as_fast']:.2f} times as fast as TRL; losses differ by at most {apart:.1e}", flush=True)
    return result


def _apart(setting: Setting, who: str, method: str, steps: int) -> dict[str, Any]:
    command = [sys.executable if setting.on_gpu else str(PYTHON), __file__, "--measure", who, method, str(steps)]
    command += ["--device", setting.device] + (["--shape", setting.shape] if setting.shape else [])
    paths = [str(ROOT / root) for root in ("profiles", "trainers")] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths))),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=tempfile.gettempdir())
    if done.returncode:
        sys.exit(f"{who} {method} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _make_model(setting: Setting) -> None:
    if (setting.model / "config.json").exists():
        return
    if setting.shape:
        make_random(setting.shape, setting.model)
        return
    if not PYTHON.exists() or not MODEL.exists():
        sys.exit("the trainer's environment or the model is missing: make trainer model")
    script = ROOT / "tests/runtime/make_smollm2_safetensors.py"
    subprocess.run([str(PYTHON), str(script), str(MODEL), str(MODEL_HF)], check=True)


def make_random(shape: str, into: Path) -> None:
    """A Llama of a shape with random bfloat16 weights, and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, layers, inner, heads, kv_heads = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_HF)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _job(setting: Setting, method: str, steps: int) -> Any:
    from aim_trainer.job.job import FineTuningJob

    hyperparameters = {
        "learningRate": RATE, "batchSize": setting.batch, "maxSteps": steps, "maxSeqLength": setting.context,
        "seed": SEED, "warmup": 2, "gradientCheckpointing": False, "precision": "bf16" if setting.on_gpu else "fp32",
    }  # fmt: skip
    spec = {
        "baseModel": {"modelId": str(setting.model)},
        "method": method,
        "dataset": {"source": str(CHATS)},
        "hyperparameters": hyperparameters | METHODS[method],
    }
    kind = {"apiVersion": "aim.amd.com/v1alpha1", "kind": "FineTuningJob", "metadata": {"name": "bench"}}
    return FineTuningJob.model_validate(kind | {"spec": spec})


def _loaded(setting: Setting, method: str, steps: int) -> tuple[Any, Any, Any]:
    """(the job, its model, its rows as the recipe orders them): the same for both."""
    import torch

    from aim_trainer.data.batches import Batches
    from aim_trainer.data.tokens import Tokens, write_tokens
    from aim_trainer.recipe.model import load

    torch.set_num_threads(1)
    job = _job(setting, method, steps)
    loaded = load(job, f"{setting.device}:0" if setting.on_gpu else setting.device)
    directory = Path(tempfile.mkdtemp())
    rows = _random_rows(setting, steps, len(loaded.tokenizer)) if setting.shape else _chats(loaded.tokenizer)
    write_tokens(directory, [row for row in rows if len(row.tokens) <= setting.context], {})
    batches = Batches(
        Tokens(directory), seed=SEED, global_batch=setting.batch, micro_batch=setting.batch,
        max_seq_length=setting.context, pad_id=loaded.tokenizer.pad_token_id,
    )  # fmt: skip
    return job, loaded, batches


def _random_rows(setting: Setting, steps: int, words: int) -> Iterator[Any]:
    """A row for each that is asked for, of half the context to all of it, its later half trained."""
    import numpy as np

    from aim_trainer.data.tokens import Row

    chance = np.random.default_rng(SEED)
    for _ in range(setting.batch * steps):
        length = int(chance.integers(setting.context // 2, setting.context, endpoint=True))
        trained = np.arange(length) >= length // 2
        yield Row(chance.integers(0, words, length, np.int32), trained.astype(np.uint8))


def _chats(tokenizer: Any) -> Iterator[Any]:
    import numpy as np

    from aim_trainer.data.tokens import Row

    for line in CHATS.read_text().splitlines():
        ids, trained = _read(tokenizer, json.loads(line)["messages"])
        yield Row(np.asarray(ids, np.int32), np.asarray(trained, np.uint8))


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


def _ours(setting: Setting, method: str, steps: int) -> dict[str, Any]:
    from aim_trainer.metrics.records import Step
    from aim_trainer.recipe.train import train
    from aim_trainer.recipe.workers import Workers

    job, loaded, batches = _loaded(setting, method, steps)
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

    clock = _Clock(setting)
    train(job, loaded, batches, None, Workers(device=loaded.device), Nowhere(), Kept(), clock.tick)
    return _figures(clock, [step.loss for step in told], sum(step.tokens for step in told[1:]))


def _peer(setting: Setting, method: str, steps: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    _, loaded, batches = _loaded(setting, method, steps)
    rows: list[dict[str, list[int]]] = []
    tokens = []
    for step in range(steps):
        (batch,) = batches.of(step)
        tokens.append(int(batch.attention_mask.sum()))
        for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
            length = int(mask.sum())
            rows.append({"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()})
    clock, losses = _Clock(setting), []

    class Watch(TrainerCallback):
        def on_step_end(self, *_args: Any, **_more: Any) -> None:
            clock.tick()

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_more: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=setting.batch, learning_rate=RATE,
        lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.0, max_grad_norm=1.0, max_length=setting.context,
        bf16=setting.on_gpu, use_cpu=not setting.on_gpu, gradient_checkpointing=False, logging_steps=1, seed=SEED,
        save_strategy="no", report_to=[],
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
    """Time from the end of the first step, which pays for what is made once, to the end of the last."""

    def __init__(self, setting: Setting) -> None:
        self.on_gpu = setting.on_gpu
        self.ticks: list[float] = []

    def tick(self) -> bool:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter() if self.on_gpu else time.process_time())
        return False

    def peak_mib(self) -> float:
        """Of the GPU's memory, else of the process."""
        if self.on_gpu:
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _figures(clock: _Clock, losses: list[float], tokens: int) -> dict[str, Any]:
    return {
        "seconds": clock.ticks[-1] - clock.ticks[0],
        "losses": losses,
        "tokens": tokens,
        "peak_mib": clock.peak_mib(),
    }


if __name__ == "__main__":
    main()
