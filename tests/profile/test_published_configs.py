"""89 published config.json files: weights counted to the parameter, refusals by name, the catalogue held to them.

published_counts.csv: parameters, and buffers that files keep (routers' biases, scales of layers), of the families' own
classes in transformers 5.19.0 made of each configuration without weights (the meta device). Text models that it does
not know by name are the decoders of ones it does: MiniMax-M3 of its vision model, Kimi-K2 of Kimi-K2.5.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from aim_profile.errors import ModelError, SizingError
from aim_profile.gpus.catalog import by_name
from aim_profile.models.facts import ModelFacts
from aim_profile.models.known import by_id, known_ids
from aim_profile.models.load import load_model
from aim_profile.serving.derive import derive
from aim_profile.sizing.fit import fit, weight_bytes
from aim_profile.sizing.kv_cache import kv_bytes_per_token, state_bytes_per_sequence
from aim_profile.units import GIB
from published_configs import require_configs

COUNTS = Path(__file__).parent / "published_counts.csv"
# Small models of families that the published ones do not have, counted in the same way.
FAMILIES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "family_counts.json").read_text())
# Their configurations leave out how many heads the sliding layers have.
REFUSED = {"stepfun-ai--Step-3.7-Flash", "stepfun-ai--Step-3.7-Flash-FP8"}
PACKAGE = "PyPI aiconfigurator-core 0.12.0 model_configs/"
# Billions that work on one token, as published, without the input embedding where the source counts it.
ACTIVE_B = {
    "openai--gpt-oss-120b": 5.13,
    "openai--gpt-oss-20b": 3.61,
    "deepseek-ai--DeepSeek-V3": 37 - 0.4,
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 3.6 - 0.35,
    "Qwen--Qwen3-235B-A22B": 22 - 0.6,
    "Qwen--Qwen3.5-397B-A17B": 17 - 1.0,
    "mistralai--Mixtral-8x7B-v0.1": 12.9 - 0.13,
}
# GiB of the published files.
FILES_GIB = {"openai--gpt-oss-120b": 60.8, "openai--gpt-oss-20b": 12.8}
FLAGSHIPS = {
    *("Qwen/Qwen3-VL-235B-A22B-Instruct", "Qwen/Qwen3.5-397B-A17B", "deepseek-ai/DeepSeek-V3.2"),
    *("deepseek-ai/DeepSeek-V4-Pro", "moonshotai/Kimi-K2.5", "moonshotai/Kimi-K3", "zai-org/GLM-5.3"),
    *("MiniMaxAI/MiniMax-M2.7", "MiniMaxAI/MiniMax-M3", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
    *("openai/gpt-oss-120b", "google/gemma-4-31B-it", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
}


def counts() -> dict[str, int]:
    with COUNTS.open(encoding="utf-8") as opened:
        return {row["configuration"]: int(row["parameters"]) for row in csv.DictReader(opened)}


@pytest.fixture(scope="module")
def read() -> dict[str, ModelFacts]:
    folder = require_configs()
    return {path.name: load_model(path) for path in sorted(folder.iterdir()) if path.is_dir()}


def test_all_but_two_of_89_are_sized(read: dict[str, ModelFacts]) -> None:
    assert len(read) == 89
    assert {name for name, facts in read.items() if not facts.sizable} == REFUSED
    for name in set(read) - REFUSED:
        assert weight_bytes(read[name]) > 0
        assert kv_bytes_per_token(read[name]) > 0
        assert read[name].max_positions


def test_a_refused_one_says_why(read: dict[str, ModelFacts]) -> None:
    for name in REFUSED:
        with pytest.raises(SizingError, match="known, not sized: the weights' size"):
            fit(read[name], 192 * GIB)


def test_parameters_are_those_of_the_families_own_classes(read: dict[str, ModelFacts]) -> None:
    theirs = counts()
    assert len(theirs) >= 80
    assert {name: read[name].total_params for name in theirs} == theirs


@pytest.mark.parametrize("name", sorted(ACTIVE_B))
def test_active_parameters_are_the_published_ones(name: str, read: dict[str, ModelFacts]) -> None:
    active = read[name].active_params
    assert active is not None
    assert active / 1e9 == pytest.approx(ACTIVE_B[name], rel=0.025)


def test_a_dense_model_uses_all_but_the_embedding(read: dict[str, ModelFacts]) -> None:
    facts = read["meta-llama--Meta-Llama-3.1-8B"]
    assert facts.expert_params == 0
    assert facts.active_params == 8_030_261_248 - 128_255 * 4096


@pytest.mark.parametrize("name", sorted(FILES_GIB))
def test_block_scales_make_the_published_size(name: str, read: dict[str, ModelFacts]) -> None:
    assert weight_bytes(read[name]) / GIB == pytest.approx(FILES_GIB[name], rel=0.002)


def test_the_files_hold_the_predicting_layer_and_its_copies_besides(read: dict[str, ModelFacts]) -> None:
    facts = read["deepseek-ai--DeepSeek-R1"]
    assert facts.prediction_params is not None
    copies = 2 * 129280 * 7168 * 2
    files = weight_bytes(facts) + facts.prediction_params * (1 + 4 / 128**2) + copies
    assert files / GIB == pytest.approx(641.3, rel=0.001)
    assert any("further tokens are not counted (11.61 B" in note for note in facts.notes)


def test_what_is_stored_how_is_read_module_by_module(read: dict[str, ModelFacts]) -> None:
    held = {name: read[name].native_precision for name in read}
    assert held["moonshotai--Kimi-K2.5"] == "int4"
    assert held["moonshotai--Kimi-K3"] == held["deepseek-ai--DeepSeek-V4-Flash"] == "mxfp4"
    assert held["nvidia--DeepSeek-V4-Flash-NVFP4"] == held["nvidia--MiniMax-M3-NVFP4"] == "nvfp4"
    # Experts alone are 4-bit in Kimi-K2.5: groups of 32 with a 16-bit scale.
    facts = read["moonshotai--Kimi-K2.5"]
    assert facts.expert_params is not None
    assert facts.total_params is not None
    expected = facts.expert_params * (0.5 + 2 / 32) + (facts.total_params - facts.expert_params) * 2
    assert weight_bytes(facts) == pytest.approx(expected, rel=1e-6)


def test_a_hybrid_says_what_a_sequence_keeps_however_short(read: dict[str, ModelFacts]) -> None:
    facts = read["Qwen--Qwen3.5-27B"]
    held = state_bytes_per_sequence(facts)
    assert held > 48 * 2 * (48 * 128 * 128 * 4)
    asked = {name: fit(facts, 192 * GIB, context=16, concurrency=count) for name, count in (("one", 1), ("two", 2))}
    assert asked["two"].kv_gib - asked["one"].kv_gib >= held / GIB
    assert any("states, however short" in note for note in asked["one"].notes)
    assert state_bytes_per_sequence(read["Qwen--Qwen3-8B"]) == 0


def test_adapters_of_layers_unlike_llamas_are_not_guessed(read: dict[str, ModelFacts]) -> None:
    for name in ("Qwen--Qwen3.5-27B", "deepseek-ai--DeepSeek-V3.2", "google--gemma-4-26B-A4B"):
        with pytest.raises(SizingError, match="adapter sizes for"):
            fit(read[name], 192 * GIB, lora_slots=1)


def test_the_catalogue_has_the_flagships_and_says_of_each_where_from() -> None:
    assert set(known_ids()) >= FLAGSHIPS
    for name in FLAGSHIPS:
        facts = by_id(name)
        assert facts.sizable
        assert facts.source.startswith("PyPI ")
        assert facts.max_positions_source
    profile = derive(by_id("openai/gpt-oss-120b"), by_name("MI355X").mode("SPX/NPS1"))
    assert profile.model_id == "openai/gpt-oss-120b"


def test_the_catalogue_says_what_the_configurations_say(read: dict[str, ModelFacts]) -> None:
    held = 0
    for name in known_ids():
        facts = by_id(name)
        if not facts.source.startswith(PACKAGE):
            continue
        held += 1
        theirs = read[facts.source.removeprefix(PACKAGE).removesuffix("_config.json")]
        if facts.architecture == "llama4":
            # Its image tower is counted in the catalogue; the configuration does not describe it.
            assert facts.shape is not None
            assert theirs.shape is not None
            assert facts.shape.experts == theirs.shape.experts
            assert facts.shape.attention == theirs.shape.attention
            assert facts.expert_params == theirs.expert_params
            continue
        same: dict[str, Any] = {
            key: getattr(facts, key)
            for key in ("shape", "total_params", "active_params", "max_positions", "rope_scaling")
        }
        assert same == {key: getattr(theirs, key) for key in same}, name
        if facts.confidence == "documented":
            assert (facts.native_precision, facts.native_bytes) == (theirs.native_precision, theirs.native_bytes), name
    assert held >= 40


@pytest.mark.parametrize("case", FAMILIES, ids=[case["config"]["model_type"] for case in FAMILIES])
def test_a_small_model_of_a_family_counts_as_its_own_class_does(case: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    facts = load_model(tmp_path)
    assert facts.sizable
    assert facts.total_params == case["parameters"]


def test_gemma_3_is_counted_with_its_image_tower_and_its_classes_defaults(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # As published on the hub for google/gemma-3-4b-it.
    assert load_model(tmp_path).total_params == 4_300_079_472


# What a family needs, left out or odd: refused with the field's name, never a stack trace or a guess.
@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("Qwen--Qwen3.5-27B", {"linear_num_value_heads": None}, "linear_num_value_heads"),
        ("Qwen--Qwen3.5-27B", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Qwen--Qwen3.5-27B", {"layer_types": ["ring_attention"] * 64}, "ring_attention"),
        ("Qwen--Qwen3.5-27B", {"num_hidden_layers": 10**9}, "num_hidden_layers|layers"),
        ("deepseek-ai--DeepSeek-V3.2", {"kv_lora_rank": 0}, "kv_lora_rank"),
        ("deepseek-ai--DeepSeek-V3.2", {"index_head_dim": "wide"}, "index_head_dim"),
        ("deepseek-ai--DeepSeek-V4-Flash", {"compress_ratios": [2] * 44}, "compress_ratios"),
        ("deepseek-ai--DeepSeek-V4-Flash", {"n_routed_experts": 0}, "n_routed_experts"),
        ("MiniMaxAI--MiniMax-M3", {"sparse_attention_config": {}}, "sparse_attention_freq"),
        ("moonshotai--Kimi-K3", {"linear_attn_config": {"full_attn_layers": [4]}}, "num_heads"),
        ("nvidia--Nemotron-H-56B-Base-8K", {"hybrid_override_pattern": "M"}, "hybrid_override_pattern"),
        ("nvidia--Nemotron-H-56B-Base-8K", {"hybrid_override_pattern": "Q" * 118}, "unknown blocks Q"),
        ("nvidia--Llama-3_3-Nemotron-Super-49B-v1", {"block_configs": [{}] * 80}, "block_configs"),
        ("nvidia--Llama-3_3-Nemotron-Super-49B-v1", {"block_configs": None}, "block_configs"),
        ("google--gemma-4-26B-A4B", {"num_kv_shared_layers": 2**40}, "num_kv_shared_layers"),
        ("openai--gpt-oss-20b", {"layer_types": ["linear_attention"] * 24}, "linear attention: state is None"),
        ("nvidia--Gemma-4-31B-IT-NVFP4", {"vision_config": {"hidden_size": 1}}, "num_attention_heads"),
    ],
)
def test_an_odd_configuration_is_refused_by_its_field(
    name: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = json.loads((require_configs() / name / "config.json").read_text())
    target = config if "vision_config" in change else config.get("text_config", config)
    target.update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=named) as refused:
        load_model(tmp_path)
    assert str(tmp_path) in str(refused.value)
