"""Axolotl's configuration, as its reference (docs.axolotl.ai) has it, with the defaults that hold there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .conversion import Draft, Rule, batch, elsewhere, held_out, noted, only, passed, sharding, to, uri_of, words

_ADAMW = "the optimizer here is AdamW with moments in fp32"


def _special_tokens(draft: Draft, key: str, value: Any) -> None:
    if isinstance(value, Mapping) and set(value) <= {"pad_token"}:
        draft.note(f"{key}: padding is left out of the loss and needs no token of its own")
    else:
        draft.refuse(key, "tokens are those of the base model")


def _length(draft: Draft, key: str, value: Any) -> None:
    if value in ("drop", "truncate"):
        draft.set("dataset.overLong", value)
    else:
        draft.refuse(key, f"{value!r} has no counterpart (drop and truncate have)")


def _fsdp(draft: Draft, key: str, value: Any) -> None:
    draft.shards = bool(value)


def _targets(draft: Draft, key: str, value: Any) -> None:
    draft.set("hyperparameters.loraTargetModules", ["all-linear"] if value == "all-linear" else value)


def _every(path: str) -> Rule:
    def carry(draft: Draft, key: str, value: Any) -> None:
        if isinstance(value, int) and value >= 1:
            draft.set(path, value)
        else:
            draft.note(f"{key}: {value}: once an epoch instead")

    return carry


TABLE: dict[str, Rule] = {
    "base_model": to("baseModel.modelId"),
    "revision_of_model": to("baseModel.revision"),
    **dict.fromkeys(("adapter", "load_in_4bit", "load_in_8bit"), elsewhere),
    **dict.fromkeys(("datasets", "micro_batch_size", "gradient_accumulation_steps"), elsewhere),
    **dict.fromkeys(("use_ray", "ray_num_workers", "lora_target_linear", "output_dir", "hub_model_id"), elsewhere),
    "chat_template": noted("the tokenizer's own template is used; dataset.chatTemplate takes a Jinja file"),
    "val_set_size": held_out,
    "sequence_len": to("hyperparameters.maxSeqLength"),
    "excess_length_strategy": _length,
    "sample_packing": to("dataset.packing"),
    "lora_r": to("hyperparameters.loraRank"),
    "lora_alpha": to("hyperparameters.loraAlpha"),
    "lora_dropout": to("hyperparameters.loraDropout"),
    "lora_target_modules": _targets,
    "lora_modules_to_save": only([], why="vLLM loads no adapter with whole layers in it"),
    "peft_use_dora": only(False, why="vLLM loads no adapter made with DoRA"),
    "peft_use_rslora": to("hyperparameters.rslora"),
    "lora_fan_in_fan_out": only(False, why="it is read from the model"),
    "num_epochs": to("hyperparameters.epochs"),
    "max_steps": to("hyperparameters.maxSteps"),
    "learning_rate": to("hyperparameters.learningRate"),
    "lr_scheduler": words(
        "hyperparameters.schedule",
        {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"},
    ),
    "optimizer": only(
        *("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "paged_adamw_32bit"), why=_ADAMW
    ),
    "warmup_steps": to("hyperparameters.warmup"),
    "warmup_ratio": to("hyperparameters.warmup"),
    "weight_decay": to("hyperparameters.weightDecay"),
    "max_grad_norm": to("hyperparameters.maxGradNorm"),
    "adam_beta1": to("hyperparameters.adamBeta1"),
    "adam_beta2": to("hyperparameters.adamBeta2"),
    "adam_epsilon": to("hyperparameters.adamEpsilon"),
    "seed": to("hyperparameters.seed"),
    "neftune_noise_alpha": to("hyperparameters.neftuneAlpha"),
    "train_on_inputs": words("dataset.trainOn", {True: "all", False: "assistant"}),
    "bf16": words("hyperparameters.precision", {"auto": "auto", True: "bf16", "full": "bf16", False: "auto"}),
    "fp16": only(False, "auto", why="half precision is bf16 here"),
    "gradient_checkpointing": words("hyperparameters.gradientCheckpointing", {True: True, False: False}),
    "deepspeed": sharding,
    "fsdp": _fsdp,
    "fsdp_version": passed,
    "fsdp_config": noted("every decoder layer is sharded, and the rest as a whole"),
    "special_tokens": _special_tokens,
    "tokens": only([], why="tokens are those of the base model"),
    "group_by_length": only(False, why="rows are drawn by the seed alone"),
    "rl": only(why="preference tuning is not what a job does"),
    "early_stopping_patience": only(why="a run ends after its steps; keepBest keeps the best of them"),
    "trust_remote_code": noted("a model brings no code of its own here"),
    "eval_steps": _every("validation.everySteps"),
    "save_steps": _every("checkpoints.everySteps"),
    "save_total_limit": to("checkpoints.keepLast"),
    "evals_per_epoch": noted("measured once an epoch, or every validation.everySteps"),
    "saves_per_epoch": noted("saved once an epoch, or every checkpoints.everySteps"),
    **dict.fromkeys(
        (
            *("model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model", "strict", "debug"),
            *(
                "dataset_prepared_path",
                "dataset_processes",
                "dataset_num_proc",
                "pad_to_sequence_len",
                "eval_table_size",
            ),
            *("eval_sample_packing", "local_rank", "logging_steps", "tf32", "eval_batch_size", "eval_max_new_tokens"),
            *("flash_attention", "sdp_attention", "xformers_attention", "eager_attention", "flex_attention"),
            *("gradient_checkpointing_kwargs", "save_safetensors", "resume_from_checkpoint", "lora_on_cpu"),
            *(
                "auto_resume_from_checkpoints",
                "ray_run_name",
                "resources_per_worker",
                "hub_strategy",
                "low_cpu_mem_usage",
            ),
            *("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "wandb_run_id"),
            *("mlflow_tracking_uri", "mlflow_experiment_name", "dataloader_num_workers", "dataloader_pin_memory"),
            *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "use_tensorboard"),
        ),
        passed,
    ),
}


def finish(draft: Draft) -> None:
    """Method, rows, batches and place of the result."""
    _method(draft)
    sources = draft.given("datasets", [])
    if not isinstance(sources, list) or not all(isinstance(source, Mapping) for source in sources):
        draft.refuse("datasets", "a list of mappings is needed")
    else:
        draft.set("dataset.sources", [_source(draft, at, source) for at, source in enumerate(sources)])
    draft.set("dataset.overLong", draft.given("excess_length_strategy", "drop"))
    if draft.given("val_set_size") is None:
        draft.set("dataset.validation.share", 0)
    if draft.given("sequence_len") is None:
        draft.set("hyperparameters.maxSeqLength", 512)
    if draft.given("lr_scheduler") == "constant" and draft.given("warmup_steps") is None:
        draft.set("hyperparameters.warmup", 0)
    workers = draft.given("ray_num_workers", 1) if draft.given("use_ray", True) else 1
    batch(draft, draft.given("micro_batch_size", 1), draft.given("gradient_accumulation_steps", 1), workers)
    place = draft.given("hub_model_id")
    draft.set("output.registry", f"hf://{place}" if place else draft.given("output_dir", "./model-out"))


def _method(draft: Draft) -> None:
    adapter, four, eight = (draft.given(key) for key in ("adapter", "load_in_4bit", "load_in_8bit"))
    if adapter not in (None, "lora", "qlora"):
        draft.refuse("adapter", f"{adapter!r} has no counterpart (lora and qlora have)")
        return
    if adapter is None:
        if four or eight:
            draft.refuse("load_in_4bit" if four else "load_in_8bit", "quantized weights are not tuned without adapter")
        draft.set("method", "full")
        return
    quantized = "nf4" if four or adapter == "qlora" else "int8" if eight else None
    draft.set("method", "qlora" if quantized else "lora")
    draft.set("quantization", quantized)
    if draft.given("lora_target_linear"):
        if draft.given("lora_target_modules"):
            draft.note("lora_target_modules: every linear layer is tuned (lora_target_linear)")
        draft.set("hyperparameters.loraTargetModules", ["all-linear"])
    if draft.given("lora_dropout") is None:
        draft.set("hyperparameters.loraDropout", 0)


_ROLE_KEYS = {"field_messages", "message_field_role", "message_field_content", "message_property_mappings"}
_SOURCE_KEYS = {"path", "type", "name", "split", "revision", "ds_type", "roles", "roles_to_train", *_ROLE_KEYS}
_PASSED_KEYS = {"conversation", "chat_template", "train_on_eos", "train_on_eot", "trust_remote_code"}


def _source(draft: Draft, at: int, source: Mapping[str, Any]) -> dict[str, Any]:
    where = f"datasets[{at}]"
    for key in sorted(str(k) for k in source if source[k] is not None and k not in _SOURCE_KEYS | _PASSED_KEYS):
        draft.refuse(f"{where}.{key}", "has no counterpart in a job")
    if source.get("roles_to_train") not in (None, ["assistant"], ["gpt"]):
        draft.refuse(f"{where}.roles_to_train", f"{source['roles_to_train']}: what the assistant said is trained")
    made: dict[str, Any] = {"uri": _uri(source)}
    if source.get("split"):
        made["split"] = source["split"]
    kind = source.get("type")
    if kind in ("alpaca", "sharegpt"):
        made["format"] = kind
    elif kind == "chat_template":
        made |= _conversation(draft, where, source)
    else:
        draft.refuse(f"{where}.type", f"{str(kind)[:60]!r} has no counterpart (alpaca, sharegpt, chat_template have)")
    return made


def _uri(source: Mapping[str, Any]) -> str:
    uri = uri_of(str(source.get("path", "")))
    if uri.startswith("hf://"):
        uri += f"/{source['name']}" if source.get("name") else ""
        uri += f"@{source['revision']}" if source.get("revision") else ""
    return uri


def _conversation(draft: Draft, where: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """Turns under any two names: OpenAI's, or ShareGPT's."""
    named = source.get("message_property_mappings") or {}
    if not isinstance(named, Mapping):
        draft.refuse(f"{where}.message_property_mappings", f"a mapping is needed, not {str(named)[:60]!r}")
        return {}
    role = source.get("message_field_role") or named.get("role", "role")
    content = source.get("message_field_content") or named.get("content", "content")
    messages = source.get("field_messages", "messages")
    if (role, content) == ("role", "content"):
        return {"format": "conversation"} | ({"columns": {"messages": messages}} if messages != "messages" else {})
    if (role, content) == ("from", "value"):
        wanted = {"columns": {"conversations": messages}} if messages != "conversations" else {}
        return {"format": "sharegpt"} | wanted
    draft.refuse(f"{where}.message_property_mappings", f"turns are role/content or from/value, not {role}/{content}")
    return {}
