"""LLaMA-Factory's configuration (its `hparams/*.py` and Hugging Face's TrainingArguments), with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from .conversion import Draft, Rule, batch, elsewhere, held_out, noted, only, passed, sharding, to, uri_of, words

_KERNEL = ("flash_attn", "enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "disable_gradient_checkpointing")


def _target(draft: Draft, key: str, value: Any) -> None:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    draft.set("hyperparameters.loraTargetModules", ["all-linear"] if names == ["all"] else names)


def _steps(path: str) -> Rule:
    def carry(draft: Draft, key: str, value: Any) -> None:
        if isinstance(value, int) and value >= 1:
            draft.set(path, value)
        else:
            draft.refuse(key, f"{value!r}: a number of steps is needed")

    return carry


TABLE: dict[str, Rule] = {
    "model_name_or_path": to("baseModel.modelId"),
    "model_revision": to("baseModel.revision"),
    "trust_remote_code": noted("a model brings no code of its own here"),
    "stage": only("sft", why="supervised tuning is what a job does"),
    "do_train": only(True, why="a job trains"),
    **dict.fromkeys(("finetuning_type", "quantization_bit", "dataset", "dataset_dir", "eval_dataset"), elsewhere),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "ray_num_workers"), elsewhere),
    **dict.fromkeys(("lora_alpha", "warmup_ratio", "warmup_steps", "train_on_prompt", "mask_history"), elsewhere),
    "quantization_method": only("bnb", "bitsandbytes", why="weights are quantized by bitsandbytes"),
    "quantization_type": only("nf4", why="four bits are nf4 here"),
    "double_quantization": only(True, why="nf4 is quantized twice here"),
    "lora_rank": to("hyperparameters.loraRank"),
    "lora_dropout": to("hyperparameters.loraDropout"),
    "lora_target": _target,
    "additional_target": only(why="vLLM loads no adapter with whole layers in it"),
    "use_dora": only(False, why="vLLM loads no adapter made with DoRA"),
    "use_rslora": to("hyperparameters.rslora"),
    "template": noted("the tokenizer's own template is used; dataset.chatTemplate takes a Jinja file"),
    "cutoff_len": to("hyperparameters.maxSeqLength"),
    "packing": to("dataset.packing"),
    "neat_packing": to("dataset.packing"),
    "default_system": to("dataset.systemPrompt"),
    "val_size": held_out,
    "output_dir": to("output.registry"),
    "save_steps": _steps("checkpoints.everySteps"),
    "eval_steps": _steps("validation.everySteps"),
    "save_total_limit": to("checkpoints.keepLast"),
    "learning_rate": to("hyperparameters.learningRate"),
    "num_train_epochs": to("hyperparameters.epochs"),
    "max_steps": _steps("hyperparameters.maxSteps"),
    "lr_scheduler_type": words(
        "hyperparameters.schedule",
        {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"},
    ),
    "optim": only("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", why="the optimizer here is AdamW in fp32"),
    "weight_decay": to("hyperparameters.weightDecay"),
    "max_grad_norm": to("hyperparameters.maxGradNorm"),
    "adam_beta1": to("hyperparameters.adamBeta1"),
    "adam_beta2": to("hyperparameters.adamBeta2"),
    "adam_epsilon": to("hyperparameters.adamEpsilon"),
    "seed": to("hyperparameters.seed"),
    "neftune_noise_alpha": to("hyperparameters.neftuneAlpha"),
    "bf16": words("hyperparameters.precision", {True: "bf16", False: "auto"}),
    "fp16": only(False, why="half precision is bf16 here"),
    "deepspeed": sharding,
    **dict.fromkeys(
        (
            *("logging_steps", "plot_loss", "overwrite_output_dir", "overwrite_cache", "save_only_model", "report_to"),
            *(
                "preprocessing_num_workers",
                "dataloader_num_workers",
                "ddp_timeout",
                "resume_from_checkpoint",
                "run_name",
            ),
            *(
                "per_device_eval_batch_size",
                "eval_strategy",
                "save_strategy",
                "logging_dir",
                "include_num_input_tokens_seen",
            ),
            *("ray_run_name", "ray_storage_path", "placement_strategy", "resources_per_worker", "tokenized_path"),
            *("cache_dir", "hf_hub_token", "upcast_layernorm", "ddp_find_unused_parameters", *_KERNEL),
        ),
        passed,
    ),
}


def finish(draft: Draft) -> None:
    """Method, rows and batches; and the defaults that hold there and not here."""
    _method(draft)
    _dataset(draft)
    batch(
        draft,
        draft.given("per_device_train_batch_size", 8),
        draft.given("gradient_accumulation_steps", 1),
        draft.given("ray_num_workers", 1),
    )
    for key, path, value in (
        ("learning_rate", "hyperparameters.learningRate", 5e-5),
        ("num_train_epochs", "hyperparameters.epochs", 3),
        ("lr_scheduler_type", "hyperparameters.schedule", "linear"),
        ("val_size", "dataset.validation.share", None if draft.given("eval_dataset") else 0),
    ):
        if draft.given(key) is None and value is not None:
            draft.set(path, value)
    draft.set("hyperparameters.warmup", draft.given("warmup_steps") or draft.given("warmup_ratio", 0))
    if draft.given("disable_gradient_checkpointing"):
        draft.set("hyperparameters.gradientCheckpointing", False)
    if draft.given("train_on_prompt") or draft.given("mask_history"):
        draft.set("dataset.trainOn", "all" if draft.given("train_on_prompt") else "last-assistant")
    if draft.given("packing") and not draft.given("neat_packing"):
        draft.note("packing: packed rows do not see each other here, as with neat_packing")
    draft.set("dataset.overLong", "truncate")


def _method(draft: Draft) -> None:
    kind, bits = draft.given("finetuning_type", "lora"), draft.given("quantization_bit")
    if kind not in ("lora", "full"):
        draft.refuse("finetuning_type", f"{kind!r} has no counterpart (lora and full have)")
    if bits not in (None, 4, 8):
        draft.refuse("quantization_bit", f"{bits!r} has no counterpart (4 and 8 have)")
    if kind != "lora":
        draft.set("method", "full")
        return
    draft.set("method", "qlora" if bits else "lora")
    draft.set("quantization", "nf4" if bits == 4 else "int8" if bits == 8 else None)
    rank = draft.given("lora_rank", 8)
    draft.set("hyperparameters.loraRank", rank)
    alpha = draft.given("lora_alpha", rank * 2 if isinstance(rank, int) else None)
    draft.set("hyperparameters.loraAlpha", alpha)
    draft.set("hyperparameters.loraDropout", draft.given("lora_dropout", 0))


def _dataset(draft: Draft) -> None:
    folder, known = _dataset_info(draft)
    draft.set("dataset.sources", [_source(draft, name, folder, known) for name in _names(draft, "dataset")])
    held = _names(draft, "eval_dataset")
    if len(held) > 1:
        draft.refuse("eval_dataset", "one source is held out")
    for name in held:
        source = _source(draft, name, folder, known)
        named: dict[str, Any] = {
            "source": source["uri"],
            **{key: source[key] for key in ("format", "columns") if key in source},
        }
        draft.set("dataset.validation", named)


def _names(draft: Draft, key: str) -> list[str]:
    value = draft.given(key, "")
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list):
        draft.refuse(key, f"{value!r}: names of datasets are needed")
        return []
    return [str(name).strip() for name in names if str(name).strip()]


def _dataset_info(draft: Draft) -> tuple[Path, Mapping[str, Any]]:
    """dataset_info.json of dataset_dir, and where it is: from here, as they read it, else from the configuration."""
    wanted = Path(str(draft.given("dataset_dir", "data")))
    for folder in (wanted, draft.folder / wanted, draft.folder.parent / wanted):
        file = folder / "dataset_info.json"
        try:
            if file.is_file():
                found = orjson.loads(file.read_bytes())
                return folder, found if isinstance(found, dict) else {}
        except (ValueError, OSError) as problem:
            draft.refuse("dataset_dir", f"{str(file)[:200]}: {problem!s:.200}")
            return folder, {}
    return wanted, {}


def _source(draft: Draft, name: str, folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    about = known.get(name)
    if not isinstance(about, Mapping):
        draft.refuse("dataset", f"{name} is not in {folder}/dataset_info.json")
        return {"uri": name}
    if about.get("ranking"):
        draft.refuse("dataset", f"{name} holds preferences (ranking)")
    hub, file = about.get("hf_hub_url"), about.get("file_name")
    if not hub and not file:
        draft.refuse("dataset", f"{name} has neither hf_hub_url nor file_name")
    uri = uri_of(str(hub)) if hub else str(folder / str(file))
    made: dict[str, Any] = {"uri": uri + (f"/{about['subset']}" if hub and about.get("subset") else "")}
    if about.get("split"):
        made["split"] = about["split"]
    for key in ("columns", "tags"):
        if not isinstance(about.get(key) or {}, Mapping):
            draft.refuse("dataset", f"{name}: {key} is no mapping")
            return made
    columns = {str(k): str(v) for k, v in (about.get("columns") or {}).items()}
    return made | (_turns(about, columns) if about.get("formatting") == "sharegpt" else _alpaca(draft, name, columns))


def _alpaca(draft: Draft, name: str, columns: Mapping[str, str]) -> dict[str, Any]:
    ours = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    if odd := sorted(set(columns) - set(ours)):
        draft.refuse("dataset", f"{name}: column {odd[0]} has no counterpart in alpaca's format")
    renamed = {ours[key]: column for key, column in columns.items() if key in ours and column != ours[key]}
    return {"format": "alpaca"} | ({"columns": renamed} if renamed else {})


def _turns(about: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    tags = about.get("tags") or {}
    openai = (tags.get("role_tag", "from"), tags.get("content_tag", "value")) == ("role", "content")
    ours = "messages" if openai else "conversations"
    column = columns.get("messages", "conversations")
    return {"format": "conversation" if openai else "sharegpt"} | (
        {"columns": {ours: column}} if column != ours else {}
    )
