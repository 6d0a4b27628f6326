"""Derived profiles: all of them, and what each says is true of its device."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import jsonschema
import pytest
import yaml

from aim_profile.cli.profiles import LISTED_PRECISIONS, listed, schema_of
from aim_profile.gpus.catalog import PartitionMode, by_name, catalog
from aim_profile.models.facts import ModelFacts
from aim_profile.models.known import by_id, known_ids
from aim_profile.plans.search.jobs import request_of
from aim_profile.plans.workload import parse_workloads
from aim_profile.serving.check import check
from aim_profile.serving.derive import NoSuchProfileError, Refusal, Wanted, derive, derive_from_id
from aim_profile.serving.engine_args import share_of
from aim_profile.serving.files import read, write
from aim_profile.serving.profile import AIM_GPUS, FineTuning, Metric, Profile, ProfileError, parse_reference
from aim_profile.sizing.fit import STEP_TOKENS, fit, weight_bytes
from aim_profile.units import GIB

LLAMA = by_id("meta-llama/Llama-3.1-8B-Instruct")

# What AIM's schema demands (amd-enterprise-ai/aim-build@2be2cf8, schemas/): its keys, its words, its ranges.
AIM_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["aim_id", "model_id", "metadata", "engine_args", "env_vars"],
    "properties": {
        "aim_id": {"type": "string"},
        "model_id": {"type": "string"},
        "engine_args": {
            "type": "object",
            "properties": {
                "gpu-memory-utilization": {"type": "number"},
                "max-model-len": {"type": ["integer", "null"]},
                "max-num-seqs": {"type": ["integer", "null"]},
                "max-num-batched-tokens": {"type": ["integer", "null"]},
                "tensor-parallel-size": {"type": "integer"},
                "quantization": {"type": ["string", "null"]},
                "distributed-executor-backend": {"type": "string"},
                "dtype": {"enum": ["auto", "bfloat16", "float", "float16", "float32", "half"]},
            },
        },
        "env_vars": {"type": "object", "patternProperties": {"^[A-Z0-9_]+$": {"type": "string"}}},
        "metadata": {
            "type": "object",
            "additionalProperties": False,
            "required": ["engine", "gpu", "precision", "gpu_count", "metric", "manual_selection_only", "type"],
            "properties": {
                "engine": {"enum": ["vllm"]},
                "gpu": {"enum": list(AIM_GPUS)},
                "precision": {"enum": ["fp4", "fp8", "fp16", "fp32", "bf16", "int4", "int8"]},
                "gpu_count": {"type": "integer", "minimum": 0, "maximum": 8},
                "metric": {"enum": ["latency", "throughput"]},
                "manual_selection_only": {"type": "boolean"},
                "type": {"enum": ["optimized", "unoptimized", "general", "preview"]},
            },
        },
    },
}


def load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def mode(label: str, gpu: str = "MI300X") -> PartitionMode:
    return by_name(gpu).mode(label)


def profile_of(model: ModelFacts, on: PartitionMode, **wanted: object) -> Profile:
    found = derive(model, on, Wanted.model_validate(wanted))
    assert isinstance(found, Profile), found
    return found


def test_every_model_on_every_gpu_in_every_mode_is_a_valid_profile_or_a_stated_refusal() -> None:
    counted: Counter[str] = Counter()
    # One of each size: the same dimensions under another name are the same arithmetic.
    known = [by_id(name) for name in known_ids() if by_id(name).sizable]
    sized = list({(model.architecture, model.total_params): model for model in known}.values())
    for accelerator in catalog().values():
        for row in listed(accelerator, "bare-metal", [model.id for model in sized], LISTED_PRECISIONS, everything=True):
            counted[type(row.found).__name__] += 1
            if isinstance(row.found, Refusal):
                assert row.found.shortfall_gib is None or row.found.shortfall_gib > 0
                assert row.found.reason
            else:
                assert not [finding for finding in check(row.found) if finding.level == "error"], row.found.reference
                budget, headroom = row.found.evidence.budget_gib, row.found.evidence.headroom_gib
                assert budget is not None
                assert headroom is not None
                assert 0 <= headroom < budget
    modes = sum(len(accelerator.modes("bare-metal")) for accelerator in catalog().values())
    assert modes == 49
    assert sum(counted.values()) == len(sized) * len(LISTED_PRECISIONS) * modes
    assert counted["Profile"] > 5000
    assert counted["Refusal"] > 500


def test_list_names_114_profiles_at_least_each_derivable_valid_and_exportable() -> None:
    schema = schema_of("profile")
    unified_schema = schema_of("unified")
    jsonschema.Draft202012Validator.check_schema(schema)
    aim = jsonschema.Draft7Validator(AIM_SCHEMA)
    ours, unified = jsonschema.Draft202012Validator(schema), jsonschema.Draft202012Validator(unified_schema)
    names = [name for name in known_ids() if by_id(name).sizable]
    rows = list(listed(by_name("MI300X"), "bare-metal", names, LISTED_PRECISIONS, everything=False))
    assert len(rows) == 3 * len(names) >= 114
    references = set()
    for row in rows:
        found = row.found
        if isinstance(found, Refusal):
            # The largest models, at more bits than eight whole cards hold.
            assert weight_bytes(row.model, row.precision) > 8 * 160 * GIB, found
            continue
        assert isinstance(found, Profile)
        references.add(found.reference)
        assert derive_from_id(*parse_reference(found.reference)) == found
        assert read(write(found, "ours")) == found
        assert read(write(found, "unified", row.model)) == found
        ours.validate(load_yaml(write(found, "ours")))
        unified.validate(json.loads(write(found, "unified", row.model)))
        aim.validate(load_yaml(write(found, "aim")))
        assert read(write(found, "aim")).engine_args == found.engine_args
    assert len(references) == sum(isinstance(row.found, Profile) for row in rows) >= 114


def test_a_partition_serves_what_its_memory_allows() -> None:
    found = profile_of(LLAMA, mode("CPX/NPS4"), precision="bf16", context=32768)
    assert found.id == "vllm-mi300x-cpx-nps4-bf16-tp1-latency"
    assert found.engine_args["max-model-len"] == 32768
    assert found.engine_args["max-num-seqs"] == 1
    assert found.engine_args["gpu-memory-utilization"] == 0.9
    assert found.engine_args["dtype"] == "bfloat16"
    assert "kv-cache-memory-bytes" not in found.engine_args


def test_tensor_parallel_runs_over_the_fewest_siblings() -> None:
    found = profile_of(by_id("Qwen/Qwen3-32B"), mode("CPX/NPS4"))
    assert found.metadata.gpu_count == 4
    assert found.engine_args["tensor-parallel-size"] == 4
    assert found.engine_args["distributed-executor-backend"] == "mp"


def test_a_validated_mode_does_not_speak_for_tensor_parallelism_over_its_partitions() -> None:
    alone, together = profile_of(LLAMA, mode("CPX/NPS4")), profile_of(by_id("Qwen/Qwen3-32B"), mode("CPX/NPS4"))
    assert (alone.unproven, alone.standing) == (False, "validated")
    assert (together.unproven, together.standing) == (True, "validated, tensor parallelism unproven")
    assert any("unproven" in note for note in together.evidence.notes)
    assert not any("unproven" in note for note in alone.evidence.notes)
    assert [finding.level for finding in check(together) if "unproven" in finding.problem] == ["note"]
    cards = profile_of(by_id("meta-llama/Llama-3.3-70B-Instruct"), mode("SPX/NPS1"), tensor_parallel=2)
    assert (cards.unproven, cards.standing) == (False, "validated")
    measured = together.model_copy(update={"evidence": together.evidence.model_copy(update={"measured": True})})
    assert measured.standing == "validated, measured"


def test_listing_prefers_one_device_to_partitions_together() -> None:
    (row,) = listed(by_name("MI300X"), "bare-metal", ["Qwen/Qwen3-32B"], ["bf16"], everything=False)
    assert isinstance(row.found, Profile)
    assert (row.found.metadata.gpu_count, row.found.standing) == (1, "validated")
    every = list(listed(by_name("MI300X"), "bare-metal", ["Qwen/Qwen3-32B"], ["bf16"], everything=True))
    assert any(isinstance(row.found, Profile) and row.found.unproven for row in every)


@pytest.mark.parametrize(("label", "count"), [("CPX/NPS4", 3), ("DPX/NPS2", 4), ("SPX/NPS1", 3)])
def test_no_tensor_parallel_that_the_card_cannot_have(label: str, count: int) -> None:
    found = derive(LLAMA, mode(label), Wanted(tensor_parallel=count))
    assert isinstance(found, Refusal)
    assert f"tensor parallel {count}" in found.reason


def test_what_does_not_fit_says_by_how_much() -> None:
    found = derive(by_id("deepseek-ai/DeepSeek-R1"), mode("CPX/NPS4"))
    assert isinstance(found, Refusal)
    assert found.shortfall_gib is not None
    # 641.3 GiB of files over eight devices, 2 % and 2.3 GiB beside, against 0.9 of 24574 MiB.
    need = 641.3 / 8 * 1.02 + 2.3 + 70272 * 8192 / GIB
    assert found.shortfall_gib == pytest.approx(need - 24574 / 1024 * 0.9, abs=0.01)


@pytest.mark.parametrize(("label", "sharing"), [("CPX/NPS1", 8), ("CPX/NPS4", 2), ("DPX/NPS1", 2), ("DPX/NPS2", 1)])
def test_where_devices_share_memory_each_engine_keeps_to_its_share(label: str, sharing: int) -> None:
    share = share_of(by_name("MI300X"), mode(label), "ALL")
    assert share.reported_bytes == sharing * share.share_bytes
    assert share.utilization == pytest.approx(0.9 / sharing, abs=1e-4)
    found = profile_of(LLAMA, mode(label), alloc_mode="ALL", precision="fp8")
    kv_bytes = found.engine_args["kv-cache-memory-bytes"]
    evidence = found.evidence
    assert isinstance(kv_bytes, int)
    assert evidence.weights_gib is not None
    assert evidence.overhead_gib is not None
    whole = kv_bytes / GIB + evidence.weights_gib + evidence.overhead_gib
    assert whole <= 0.9 * share.share_bytes / GIB + 0.01
    assert sharing * whole <= 192


def test_a_memory_limit_is_kept() -> None:
    limit = 40 * 10**9
    found = profile_of(LLAMA, mode("DPX/NPS2"), memory_limit_bytes=limit)
    utilization = found.engine_args["gpu-memory-utilization"]
    assert isinstance(utilization, float)
    assert utilization * mode("DPX/NPS2").memory_bytes <= limit
    assert utilization * mode("DPX/NPS2").memory_bytes > 0.99 * limit
    assert found.gpu_sharing.memory_limit_gb == 40


@pytest.mark.parametrize(
    ("precision", "weights", "quantization", "manual"),
    [
        ("bf16", "as published", None, False),
        ("fp16", "as published", None, False),
        ("fp8", "quantised at load", "fp8", False),
        ("int4", "needs a quantised checkpoint", None, True),
    ],
)
def test_where_weights_come_from_is_said(precision: str, weights: str, quantization: str | None, manual: bool) -> None:
    found = profile_of(LLAMA, mode("CPX/NPS4"), precision=precision)
    assert found.evidence.weights == weights
    assert found.engine_args.get("quantization") == quantization
    assert found.metadata.manual_selection_only is manual


def test_a_checkpoint_is_loaded_instead() -> None:
    found = profile_of(LLAMA, mode("CPX/NPS4"), precision="fp8", checkpoint="amd/Llama-3.1-8B-Instruct-FP8-KV")
    assert (found.aim_id, found.model_id) == (LLAMA.id, "amd/Llama-3.1-8B-Instruct-FP8-KV")
    assert "quantization" not in found.engine_args
    assert not found.metadata.manual_selection_only


def test_fp8_is_refused_where_the_gpu_has_none() -> None:
    found = derive(LLAMA, mode("SPX", "MI210"), Wanted(precision="fp8"))
    assert isinstance(found, Refusal)
    assert "fp8" in found.reason


def test_nothing_derived_claims_to_be_measured() -> None:
    found = profile_of(LLAMA, mode("SPX/NPS1"))
    assert (found.metadata.type, found.evidence.measured) == ("unoptimized", False)
    assert any("not measured" in note for note in found.evidence.notes)
    legal = profile_of(LLAMA, mode("QPX/NPS1"))
    assert any("not validated by AMD" in note for note in legal.evidence.notes)


def test_environment_follows_the_gfx_target_and_the_partition() -> None:
    whole = profile_of(LLAMA, mode("SPX/NPS1"), tensor_parallel=2)
    parts = profile_of(LLAMA, mode("CPX/NPS4"), tensor_parallel=2)
    old = profile_of(LLAMA, mode("SPX", "MI210"))
    assert whole.env_vars["NCCL_MIN_NCHANNELS"] == "112"
    assert "NCCL_MIN_NCHANNELS" not in parts.env_vars
    assert parts.env_vars["GPU_ARCHS"] == "gfx942"
    assert old.env_vars == {"VLLM_ROCM_USE_AITER": "0"}


def test_lora_slots_cost_memory_and_are_switched_on() -> None:
    plain = profile_of(LLAMA, mode("CPX/NPS4"), precision="fp8")
    tuned = profile_of(LLAMA, mode("CPX/NPS4"), precision="fp8", finetuning=FineTuning(lora_slots=4, lora_rank=64))
    assert tuned.engine_args["enable-lora"] is True
    assert tuned.engine_args["max-loras"] == 4
    assert tuned.engine_args["max-lora-rank"] == 64
    assert tuned.evidence.overhead_gib > plain.evidence.overhead_gib  # type: ignore[operator]


def test_metrics_differ_in_the_tokens_of_a_step() -> None:
    latency = profile_of(LLAMA, mode("SPX/NPS1"), metric="latency").engine_args["max-num-batched-tokens"]
    throughput = profile_of(LLAMA, mode("SPX/NPS1"), metric="throughput").engine_args["max-num-batched-tokens"]
    assert (latency, throughput) == (2048, 8192)


@pytest.mark.parametrize("metric", ["latency", "throughput"])
def test_the_cache_is_sized_for_the_tokens_of_the_step_that_is_set(metric: Metric) -> None:
    gemma, device = by_id("google/gemma-3-27b-it"), mode("QPX/NPS1")
    found = profile_of(gemma, device, metric=metric, precision="int4", context=32768)
    step = found.engine_args["max-num-batched-tokens"]
    assert step == STEP_TOKENS[metric]
    sized = fit(gemma, device.memory_bytes, precision="int4", context=32768, max_num_batched_tokens=step)
    assert found.engine_args["max-num-seqs"] == sized.max_concurrency
    assert check(found) == [finding for finding in check(found) if finding.level == "note"]
    workload = parse_workloads(
        f"workloads: [{{name: a, model: {gemma.id}, precision: int4, context: 32768, slo: {metric}}}]"
    ).workloads[0]
    assert request_of(workload, 1).max_num_batched_tokens == step


def test_check_sizes_with_the_profiles_own_step() -> None:
    gemma = by_id("google/gemma-3-27b-it")
    found = profile_of(gemma, mode("CPX/NPS2", "MI355X"), metric="latency", precision="int4", context=32768)
    assert not [finding for finding in check(found) if finding.level == "error"]
    wider = found.model_copy(update={"engine_args": {**found.engine_args, "max-num-batched-tokens": 8192}})
    assert [(finding.level, finding.field) for finding in check(wider)] == [("note", "engine_args.max-num-seqs")]
    widest = found.model_copy(update={"engine_args": {**found.engine_args, "max-num-batched-tokens": 65536}})
    assert [(finding.level, finding.field) for finding in check(widest)] == [("error", "engine_args")]
    garbled = found.model_copy(update={"engine_args": {**found.engine_args, "max-num-batched-tokens": 0}})
    assert [finding.field for finding in check(garbled)] == ["max_num_batched_tokens"]


def test_a_context_beyond_the_models_own_limit_is_an_error_unless_it_was_lengthened() -> None:
    found = profile_of(by_id("Qwen/Qwen3-8B"), mode("SPX/NPS1"))
    asked = {"max-model-len": 131072, "max-num-seqs": 1}
    long = found.model_copy(update={"engine_args": {**found.engine_args, **asked}})
    (finding,) = check(long)
    assert (finding.level, finding.field) == ("error", "engine_args.max-model-len")
    assert "40960 positions" in finding.problem
    scaled = {**long.engine_args, "hf-overrides": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}}
    assert [f.level for f in check(long.model_copy(update={"engine_args": scaled}))] == ["note"]
    other = long.model_copy(update={"model_id": "somebody/Qwen3-8B-128k"})
    assert [f.level for f in check(other)] == ["note"]


def test_a_short_model_gets_its_own_limit_as_context() -> None:
    found = profile_of(by_id("TinyLlama/TinyLlama-1.1B-Chat-v1.0"), mode("CPX/NPS4"))
    assert found.engine_args["max-model-len"] == 2048


def test_a_reference_without_a_profile_is_an_answer_a_wrong_one_an_error() -> None:
    with pytest.raises(NoSuchProfileError, match="short by"):
        derive_from_id(*parse_reference("deepseek-ai/DeepSeek-R1/vllm-mi300x-cpx-nps4-fp8-tp8-latency"))
    with pytest.raises(ProfileError, match="not a profile id"):
        parse_reference("deepseek-ai/DeepSeek-R1/vllm-mi300x-cpx-fp8-tp8-latency")
    with pytest.raises(ProfileError, match="is not derived"):
        derive_from_id(*parse_reference("deepseek-ai/DeepSeek-R1/vllm-mi300x-fp32-tp8-latency"))


def test_gpus_that_aim_does_not_know_are_exported_in_our_form_only() -> None:
    found = profile_of(LLAMA, mode("CPX/NPS1", "MI350P"))
    assert "MI350P" not in AIM_GPUS
    assert read(write(found, "ours")) == found
    with pytest.raises(ProfileError, match=r"metadata\.gpu"):
        write(found, "aim")
