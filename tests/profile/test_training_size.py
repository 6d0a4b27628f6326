"""What fine-tuning takes: each part by its own arithmetic, and as a workload of the planner."""

from __future__ import annotations

from typing import Any

import pytest

from aim_profile.errors import SizingError
from aim_profile.models.known import by_id
from aim_profile.plans.fleet import parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.workload import parse_workloads
from aim_profile.sizing.training import Memory, Training, adapter_parameters, largest_batch, memory
from aim_profile.units import GIB

LLAMA = by_id("meta-llama/Llama-3.1-8B-Instruct")
PARAMETERS = 8_030_261_248


def sized(model: str = LLAMA.id, **asked: Any) -> Memory:
    return memory(by_id(model), Training.model_validate({"model": model, **asked}))


def test_what_adamw_keeps_of_full_tuning_is_sixteen_bytes_a_parameter() -> None:
    """arXiv:1910.02054 §3.1: weights, gradient and two moments, each fp32."""
    need = sized(method="full", precision="fp32")
    assert (need.weights, need.gradients, need.optimizer) == (4 * PARAMETERS, 4 * PARAMETERS, 8 * PARAMETERS)
    assert (need.adapter, need.copies) == (0, 0)


def test_an_adapter_is_rank_times_inputs_and_outputs() -> None:
    """Llama 3.1 8B, r=16 on all linear layers: 41,943,040 trainable parameters, as PEFT prints it."""
    assert adapter_parameters(LLAMA, 16) == 41_943_040
    assert adapter_parameters(LLAMA, 8, ("q_proj", "v_proj")) == 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    need = sized(lora_rank=16)
    assert (need.weights, need.adapter, need.optimizer) == (2 * PARAMETERS, 4 * 41_943_040, 8 * 41_943_040)


def test_nf4_takes_half_a_byte_and_its_constants() -> None:
    """arXiv:2305.14314 §3: 0.127 bits a parameter after double quantization; embeddings, head and norms stay bf16."""
    linear, other = LLAMA.linear_params or 0, LLAMA.other_params or 0
    assert sized(method="qlora").weights == pytest.approx(linear * (4 + 0.127) / 8 + 2 * other, rel=1e-4)
    assert sized(method="qlora", quantization="int8").weights == pytest.approx(linear + 2 * other, rel=0.01)


def test_zero_shards_what_its_stage_says() -> None:
    plain = sized(method="full", precision="fp32", workers=8)
    parts = ("optimizer", "gradients", "weights")
    for stage in (1, 2, 3):
        need = sized(method="full", precision="fp32", workers=8, strategy="deepspeed", zero_stage=stage)
        assert [getattr(plain, part) // getattr(need, part) for part in parts] == [8] * stage + [1] * (3 - stage)
    sharded = sized(method="full", precision="fp32", workers=8, strategy="fsdp2")
    assert [getattr(plain, part) // getattr(sharded, part) for part in parts] == [8, 8, 8]
    assert sharded.copies > 0


def test_checkpointing_keeps_one_input_a_layer_and_the_layer_at_work() -> None:
    kept, again = sized(gradient_checkpointing=False), sized(gradient_checkpointing=True)
    layer = kept.activations // 32
    assert again.activations == 32 * 2048 * 4096 * 2 + layer


def test_activations_grow_with_rows_tokens_and_logits_with_what_is_trained() -> None:
    one, four = sized(batch=1, context=1024), sized(batch=2, context=2048)
    assert (four.activations, four.logits) == (4 * one.activations, 4 * one.logits)
    assert sized(trained_share=0.25).logits == sized().logits // 4
    assert one.logits == 1024 * 128_256 * 18


def test_gradients_stand_beside_activations_only_where_passes_add_up() -> None:
    single, added = (sized(method="full", accumulation=n) for n in (1, 4))
    assert added.total - single.total == min(single.gradients, single.activations + single.logits)


def test_a_classification_has_a_small_head() -> None:
    need = sized(method="full", classes=3)
    assert need.logits < 1000
    assert need.weights == 4 * (PARAMETERS - 128_256 * 4096 + 3 * 4096)


@pytest.mark.parametrize(
    ("model", "asked", "told"),
    [
        ("deepseek-ai/DeepSeek-V3", {}, "what training a deepseek_v3 takes is not established here"),
        (LLAMA.id, {"lora_targets": ("qkv_proj",)}, "'qkv_proj' is no linear layer of a llama; there are down_proj"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", {"lora_targets": ("gate_proj",)}, "'gate_proj' is no linear layer"),
    ],
)
def test_what_is_not_known_is_refused(model: str, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(SizingError, match=told):
        sized(model, **asked)


@pytest.mark.parametrize("asked", [{"method": "qlora", "strategy": "fsdp2"}, {"quantization": "nf4"}])
def test_what_contradicts_itself_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"qlora|not sharded"):
        Training(model="x", **asked)


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    training = Training(model=LLAMA.id, context=2048)
    most = largest_batch(LLAMA, training, 64 * GIB)
    assert most > 1
    for rows, fits in ((most, True), (most + 1, False)):
        assert (memory(LLAMA, training.model_copy(update={"batch": rows})).total <= 64 * GIB) is fits
    assert largest_batch(LLAMA, training, 8 * GIB) == 0


FLEET = parse_fleet("nodes: [{name: a, gpu: MI300X, cards: 2}]")


def test_a_training_is_planned_for_like_any_workload() -> None:
    """The same job by its training, and by the memory that it comes to: the same place, the same need."""
    training = "{model: Qwen/Qwen3-8B, method: qlora, batch: 1, context: 1024, workers: 2}"
    plan = make_plan(FLEET, parse_workloads(f"workloads: [{{name: bot, kind: finetune, training: {training}}}]"))
    need = memory(by_id("Qwen/Qwen3-8B"), Training(model="x", method="qlora", batch=1, context=1024, workers=2)).total
    assert [round(placed.need_gib * GIB / 2**20) for placed in plan.placements] == [round(need / 2**20)] * 2
    assert {placed.model for placed in plan.placements} == {"Qwen/Qwen3-8B"}


def test_a_training_that_fits_nowhere_says_what_would_help() -> None:
    text = (
        "workloads: [{name: big, kind: finetune, training: {model: meta-llama/Llama-3.3-70B-Instruct, method: full}}]"
    )
    plan = make_plan(FLEET, parse_workloads(text))
    assert plan.placements == ()
    assert "qlora" in str(plan.unplaced[0])
