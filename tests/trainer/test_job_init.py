"""A job to start from: out of a template, or of what another trainer was told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from aim_trainer.cli.app import app
from aim_trainer.cli.init import template
from aim_trainer.errors import JobError
from aim_trainer.job.conversion import read_foreign
from aim_trainer.job.read import read_job

AXOLOTL = """\
base_model: org/Model-8B
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
strict: false
chat_template: chatml
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
  - path: ./data/turns.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
  - path: org/talk
    name: default
    split: train[:90%]
    type: chat_template
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.1
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
early_stopping_patience:
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
save_steps: 50
weight_decay: 0.01
special_tokens:
  pad_token: "<|end_of_text|>"
use_ray: true
ray_num_workers: 4
"""

LLAMA_FACTORY = """\
### model
model_name_or_path: org/Model-8B
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
quantization_bit: 4
deepspeed: examples/deepspeed/ds_z3_config.json
### dataset
dataset: identity,turns
template: llama3
cutoff_len: 2048
overwrite_cache: true
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
ray_num_workers: 2
"""
INFO = {
    "identity": {"file_name": "identity.json", "columns": {"prompt": "ask", "response": "output"}},
    "turns": {
        "hf_hub_url": "org/turns",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
    "pairs": {"file_name": "p.json", "ranking": True},
}


def put(folder: Path, text: str, name: str = "their.yml") -> Path:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/dataset_info.json").write_text(json.dumps(INFO))
    file = folder / name
    file.write_text(text)
    return file


def test_axolotl_is_carried_over(tmp_path: Path) -> None:
    job, notes = read_foreign(put(tmp_path, AXOLOTL))
    spec, hyper = job.spec, job.spec.hyperparameters
    assert (job.metadata.name, spec.base_model.model_id) == ("their", "org/Model-8B")
    assert (spec.method, spec.quantization, spec.dataset.packing) == ("qlora", "nf4", True)
    assert (hyper.lora_rank, hyper.lora_alpha, hyper.lora_dropout, hyper.target_modules) == (32, 16, 0.1, "all-linear")
    assert (hyper.batch_size, hyper.global_batch_size, spec.distributed.workers) == (2, 32, 4)
    assert (hyper.warmup, hyper.weight_decay, hyper.max_seq_length, hyper.epochs) == (10, 0.01, 4096, 4)
    assert [(s.uri, s.format, s.columns, s.split) for s in spec.dataset.sources] == [
        ("hf://tatsu-lab/alpaca", "alpaca", {}, "train"),
        ("./data/turns.jsonl", "sharegpt", {}, "train"),
        ("hf://org/talk/default", "conversation", {}, "train[:90%]"),
    ]
    assert (spec.dataset.over_long, spec.dataset.validation.share) == ("drop", 0.05)
    assert (spec.checkpoints.every_steps, spec.output.registry) == (50, "./outputs/qlora-out")
    assert any(note.startswith("chat_template: chatml: the tokenizer's own") for note in notes)


def test_llama_factory_is_carried_over(tmp_path: Path) -> None:
    job, notes = read_foreign(put(tmp_path, LLAMA_FACTORY))
    spec, hyper = job.spec, job.spec.hyperparameters
    assert (spec.method, spec.quantization) == ("qlora", "nf4")
    # Alpha is twice the rank there, dropout none, where nothing is said.
    assert (hyper.lora_rank, hyper.lora_alpha, hyper.lora_dropout) == (8, 16, 0)
    assert hyper.target_modules == ["q_proj", "v_proj"]
    assert (hyper.batch_size, hyper.global_batch_size, spec.distributed.workers) == (1, 16, 2)
    assert spec.distributed.strategy == "ddp"
    assert any(note.startswith("sharded weights: whole on each worker") for note in notes)
    assert (hyper.warmup, hyper.learning_rate, hyper.precision) == (0.1, 1e-4, "bf16")
    assert [(s.uri, s.format, s.columns) for s in spec.dataset.sources] == [
        (f"{tmp_path}/data/identity.json", "alpaca", {"instruction": "ask"}),
        ("hf://org/turns", "conversation", {}),
    ]
    assert (spec.dataset.over_long, spec.dataset.validation.share) == ("truncate", 0)
    assert any(note.startswith("template: llama3") for note in notes)


@pytest.mark.parametrize(
    ("config", "workers", "strategy"),
    [("ds_z3_config.json", 2, "fsdp2"), ("zero2.json", 2, "ddp"), ("zero3_bf16.json", 1, "ddp")],
)
def test_zero_3_is_fsdp2(tmp_path: Path, config: str, workers: int, strategy: str) -> None:
    text = f"model_name_or_path: a/b\ndataset: identity\ndeepspeed: {config}\nray_num_workers: {workers}\n"
    job, _ = read_foreign(put(tmp_path, text))
    assert job.spec.distributed.strategy == strategy


def test_their_defaults_hold_where_nothing_is_said(tmp_path: Path) -> None:
    job, _ = read_foreign(put(tmp_path, "model_name_or_path: a/b\ndataset: identity\n"))
    hyper = job.spec.hyperparameters
    assert (hyper.learning_rate, hyper.epochs, hyper.schedule, hyper.batch_size) == (5e-5, 3, "linear", 8)
    job, _ = read_foreign(put(tmp_path, "base_model: a/b\ndatasets: [{path: x.jsonl, type: alpaca}]\n"))
    assert (job.spec.method, job.spec.hyperparameters.max_seq_length, job.spec.dataset.validation.share) == (
        "full",
        512,
        0,
    )


@pytest.mark.parametrize(
    ("base", "extra", "told"),
    [
        (AXOLOTL, {"rl": "dpo"}, "rl: 'dpo': preference tuning is not what a job does"),
        (AXOLOTL, {"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save: ['lm_head']: vLLM loads no adapter"),
        (AXOLOTL, {"optimizer": "adamw_bnb_8bit"}, "optimizer: 'adamw_bnb_8bit': the optimizer here is AdamW"),
        (AXOLOTL, {"unfrozen_parameters": ["x"]}, "unfrozen_parameters: has no counterpart in a job"),
        (AXOLOTL, {"deepspeed": "mine.json"}, "deepspeed: 'mine.json' names no ZeRO stage"),
        (AXOLOTL, {"datasets": [{"path": "x", "type": "completion"}]}, "datasets[0].type: 'completion' has no"),
        (AXOLOTL, {"datasets": "x"}, "datasets: a list of mappings is needed"),
        (AXOLOTL, {"val_set_size": 500}, "val_set_size: 500 is a number of rows"),
        (AXOLOTL, {"special_tokens": {"eos_token": "x"}}, "special_tokens: tokens are those of the base model"),
        (LLAMA_FACTORY, {"stage": "dpo"}, "stage: 'dpo': supervised tuning is what a job does"),
        (LLAMA_FACTORY, {"finetuning_type": "freeze"}, "finetuning_type: 'freeze' has no counterpart"),
        (LLAMA_FACTORY, {"max_samples": 1000}, "max_samples: has no counterpart in a job"),
        (LLAMA_FACTORY, {"pissa_init": True}, "pissa_init: has no counterpart in a job"),
        (LLAMA_FACTORY, {"dataset": "other"}, "dataset: other is not in "),
        (LLAMA_FACTORY, {"dataset": 1.5}, "dataset: 1.5: names of datasets are needed"),
        (LLAMA_FACTORY, {"eval_dataset": True}, "eval_dataset: True: names of datasets are needed"),
        (LLAMA_FACTORY, {"quantization_bit": [4]}, "quantization_bit: [4] has no counterpart (4 and 8 have)"),
        (LLAMA_FACTORY, {"dataset_dir": "a" * 5000}, "dataset_dir: aaa"),
        (LLAMA_FACTORY, {"dataset": "pairs"}, "dataset: pairs holds preferences (ranking)"),
        (LLAMA_FACTORY, {"additional_target": "lm_head"}, "additional_target: 'lm_head': vLLM loads no adapter"),
    ],
)
def test_what_cannot_be_carried_over_is_named(tmp_path: Path, base: str, extra: dict[str, Any], told: str) -> None:
    text = json.dumps({**yaml.safe_load(base), **extra})
    with pytest.raises(JobError) as refused:
        read_foreign(put(tmp_path, text))
    assert f"\n  {told}" in str(refused.value)


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ('{"chats": {"file_name": "x.json", "columns": 5}}', "dataset: chats: columns is no mapping"),
        (
            '{"chats": {"file_name": "x.json", "formatting": "sharegpt", "tags": 7}}',
            "dataset: chats: tags is no mapping",
        ),
        ("[" * 100_000, "dataset_dir: "),
    ],
)
def test_what_dataset_info_says_wrong_is_named(tmp_path: Path, about: str, told: str) -> None:
    (tmp_path / "dataset_info.json").write_text(about)
    text = json.dumps({**yaml.safe_load(LLAMA_FACTORY), "dataset": "chats", "dataset_dir": str(tmp_path)})
    with pytest.raises(JobError) as refused:
        read_foreign(put(tmp_path, text))
    assert f"\n  {told}" in str(refused.value)


def test_turns_whose_names_are_no_mapping_and_keys_that_are_no_texts_are_named(tmp_path: Path) -> None:
    source = {"path": "x.jsonl", "type": "chat_template", "message_property_mappings": ["role"], 1: 2, None: 3}
    with pytest.raises(JobError) as refused:
        read_foreign(put(tmp_path, yaml.safe_dump({**yaml.safe_load(AXOLOTL), "datasets": [source]})))
    for told in (
        "datasets[0].message_property_mappings: a mapping is needed",
        "datasets[0].1: has",
        "datasets[0].None:",
    ):
        assert f"\n  {told}" in str(refused.value)


def test_everything_that_cannot_be_is_told_at_once_and_can_be_left_out(tmp_path: Path) -> None:
    file = put(tmp_path, AXOLOTL + "rl: dpo\nloraplus_lr_ratio: 16\n")
    with pytest.raises(JobError, match=r"2 keys cannot be carried over:\n  rl: .*\n  loraplus_lr_ratio: "):
        read_foreign(file)
    _, notes = read_foreign(file, ["rl", "loraplus_lr_ratio"])
    assert "rl: dpo: left out, as asked" in notes


@pytest.mark.parametrize("text", ["- a", "a: 1", "base_model: [", ""])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(JobError, match=r"their\.yml"):
        read_foreign(put(tmp_path, text))


@pytest.mark.parametrize("name", ["chat", "code", "summarization", "classification"])
def test_a_template_is_a_job(tmp_path: Path, name: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(template(name))
    assert read_job(file).spec.template == name


def test_the_verb_writes_a_job_that_validates_and_never_over_a_file(tmp_path: Path) -> None:
    out = tmp_path / "job.yaml"
    command = ["init", "--from", str(put(tmp_path, AXOLOTL)), "--out", str(out)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert out.read_text().startswith("# Made from their.yml.\n# - ")
    assert read_job(out).spec == read_foreign(tmp_path / "their.yml")[0].spec
    again = CliRunner().invoke(app, command)
    assert (again.exit_code, "is there already" in again.output) == (2, True)
