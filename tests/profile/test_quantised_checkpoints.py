"""Checkpoints of AMD Quark and NVIDIA ModelOpt by their configuration alone: precision, size, how they are served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.errors import ModelError, SizingError
from aim_profile.gpus.catalog import by_name
from aim_profile.models.load import by_id, load_model
from aim_profile.models.parameters import BYTES_PER_LINEAR_PARAMETER, count_parameters, linear_modules
from aim_profile.models.quantization import Patterns, Quantization
from aim_profile.serving.derive import Refusal, Wanted, derive
from aim_profile.serving.profile import Profile
from aim_profile.sizing.fit import fit, weight_bytes
from aim_profile.units import GIB

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# What ModelOpt up to 0.29 writes beside a config.json that says nothing of it.
MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}
LINEAR, OTHER = 68_451_041_280, 2_102_665_216  # of Llama 70B: 131.42 GiB at two bytes


def spec(dtype: str, **more: Any) -> dict[str, Any]:
    """One tensor specification as Quark exports it."""
    return {"dtype": dtype, "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True, **more}


def ocp(dtype: str) -> dict[str, Any]:
    return spec(dtype, qscheme="per_group", group_size=32, scale_format="e8m0", scale_type="float")


def quark(
    weight: Any, *, exclude: tuple[str, ...] = ("lm_head",), layers: dict[str, Any] | None = None
) -> dict[str, Any]:
    """quantization_config as Quark exports it."""
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": {
            "weight": weight,
            "input_tensors": spec("fp8_e4m3"),
            "output_tensors": None,
            "bias": None,
        },
        "layer_quant_config": layers or {},
        "layer_type_quant_config": {},
        "exclude": list(exclude),
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }


def directory(tmp_path: Path, quantization: dict[str, Any] | None, hf_quant: Any = None, **config: Any) -> Path:
    stated = {} if quantization is None else {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, **config, **stated}))
    if hf_quant is not None:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(hf_quant))
    return tmp_path


def test_modelopts_own_file_says_what_config_json_does_not(tmp_path: Path):
    facts = load_model(directory(tmp_path, None, MODELOPT))
    assert (facts.native_precision, facts.quantization) == ("fp8", "modelopt")
    assert weight_bytes(facts) == LINEAR + 2 * OTHER
    assert fit(facts, 192 * GIB).weights_gib == pytest.approx(67.67, abs=0.01)


def test_config_json_goes_before_modelopts_file(tmp_path: Path):
    facts = load_model(directory(tmp_path, {"quant_method": "awq", "bits": 4}, MODELOPT))
    assert (facts.native_precision, facts.quantization) == ("int4", "awq")


@pytest.mark.parametrize(
    ("stated", "native", "linear_bytes"),
    [
        ({"quantization": {"quant_algo": "FP8_PB_WO"}}, "fp8", 1.0),
        ({"quantization": {"quant_algo": "fp8_pb_wo"}}, "fp8", 1.0),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, "nvfp4", 0.5625),
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, "int4", 0.53),
        ({"quantization": {"quant_algo": "MXFP8"}}, "fp8", 1.03125),
        # ModelOpt 0.31 and later, in config.json, without a quant_method.
        ({"quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}, "fp8", 1.0),
    ],
)
def test_each_algorithm_of_modelopt(tmp_path: Path, stated: dict[str, Any], native: str, linear_bytes: float):
    in_config = "quant_algo" in stated
    facts = load_model(directory(tmp_path, stated if in_config else None, None if in_config else stated))
    assert (facts.native_precision, facts.quantization) == (native, "modelopt")
    assert weight_bytes(facts) == int(LINEAR * linear_bytes) + 2 * OTHER


def test_mixed_precision_counts_each_layer_as_it_is_named(tmp_path: Path):
    layers = {
        f"model.layers.{n}.mlp.{part}_proj": {"quant_algo": "NVFP4"} for n in range(80) for part in ("up", "down")
    }
    layers |= {f"model.layers.{n}.self_attn": {"quant_algo": "FP8"} for n in range(80)}
    mixed = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    facts = load_model(directory(tmp_path, None, mixed))
    one = 80 * 8192 * 28672
    attention = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024)
    assert facts.native_precision == "nvfp4"
    assert weight_bytes(facts) == int(2 * one * 0.5625 + attention + 2 * one) + 2 * OTHER


@pytest.mark.parametrize(
    ("weight", "native", "linear_bytes"),
    [
        (spec("fp8_e4m3"), "fp8", 1.0),
        (spec("fp8_e4m3", qscheme="per_channel"), "fp8", 1.0),
        ([spec("fp8_e4m3")], "fp8", 1.0),
        (ocp("fp4"), "mxfp4", 0.53125),
        (ocp("fp8_e4m3"), "fp8", 1.03125),
        (spec("fp8_e4m3", qscheme="per_block", block_size=[32, 32], scale_type="float8_e8m0fnu"), "fp8", 1.03125),
        (ocp("fp6_e3m2"), "mxfp6", 0.78125),
        (ocp("fp6_e2m3"), "mxfp6", 0.78125),
        (spec("int8"), "int8", 1.0),
        (spec("uint4", qscheme="per_group", group_size=128), "int4", 0.53),
        # Two stages: what is stored is the last, except where the second quantises the first's scales.
        ([spec("fp8_e4m3"), spec("int4", qscheme="per_channel", ch_axis=0)], "int4", 0.53),
        ([spec("fp4", qscheme="per_group", group_size=16), spec("fp8_e4m3")], "nvfp4", 0.5625),
    ],
)
def test_each_format_of_quark(tmp_path: Path, weight: Any, native: str, linear_bytes: float):
    facts = load_model(directory(tmp_path, quark(weight)))
    assert (facts.native_precision, facts.quantization) == (native, "quark")
    assert weight_bytes(facts) == int(LINEAR * linear_bytes) + 2 * OTHER


def test_layers_quark_leaves_alone_or_stores_otherwise_are_counted_so(tmp_path: Path):
    attention = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024)
    kept = load_model(directory(tmp_path, quark(ocp("fp4"), exclude=("lm_head", "*self_attn*"))))
    assert (kept.native_precision, weight_bytes(kept)) == (
        "mxfp4",
        int((LINEAR - attention) * 0.53125 + 2 * attention) + 2 * OTHER,
    )
    layers = {"*self_attn*": {"weight": spec("fp8_e4m3")}}
    mixed = load_model(directory(tmp_path, quark(ocp("fp4"), layers=layers)))
    assert weight_bytes(mixed) == int((LINEAR - attention) * 0.53125 + attention) + 2 * OTHER
    # The FP8-KV checkpoints name their key and value projections again, with the cache's scales: the same weights.
    again = {name: {"weight": spec("fp8_e4m3"), "output_tensors": spec("fp8_e4m3")} for name in ("*k_proj", "*v_proj")}
    assert weight_bytes(load_model(directory(tmp_path, quark(spec("fp8_e4m3"), layers=again)))) == LINEAR + 2 * OTHER
    regex = load_model(directory(tmp_path, quark(ocp("fp4"), exclude=("re:.*self_attn.*",))))
    assert weight_bytes(regex) == weight_bytes(kept)


def test_a_pattern_that_is_not_understood_is_said(tmp_path: Path):
    facts = load_model(directory(tmp_path, quark(ocp("fp4"), exclude=(r"re:model\.layers\.[0-9]+\..*",))))
    assert facts.native_precision == "mxfp4"
    assert any("not every layer" in note for note in fit(facts, 192 * GIB).notes)


@pytest.mark.parametrize(
    ("weight", "precision", "gpu"),
    [(spec("fp8_e4m3"), "fp8", "MI300X"), (ocp("fp4"), "mxfp4", "MI355X"), (ocp("fp8_e4m3"), "fp8", "MI355X")],
)
def test_a_quark_checkpoint_is_served_as_it_is(tmp_path: Path, weight: Any, precision: str, gpu: str):
    facts = load_model(directory(tmp_path, quark(weight)))
    for asked in (None, precision):
        found = derive(facts, by_name(gpu).mode("SPX/NPS1"), Wanted.model_validate({"precision": asked}))
        assert isinstance(found, Profile)
        assert found.engine_args["quantization"] == "quark"
        assert (found.evidence.weights, found.metadata.manual_selection_only) == ("as published", False)
    assert fit(facts, 288 * GIB, precision=precision).weights_gib == fit(facts, 288 * GIB).weights_gib


def test_other_methods_are_left_for_vllm_to_find(tmp_path: Path):
    found = derive(load_model(directory(tmp_path, None, MODELOPT)), by_name("MI300X").mode("SPX/NPS1"))
    assert isinstance(found, Profile)
    assert "quantization" not in found.engine_args
    other = derive(
        load_model(directory(tmp_path, quark(spec("fp8_e4m3")))),
        by_name("MI300X").mode("SPX/NPS1"),
        Wanted(precision="bf16"),
    )
    assert not isinstance(other, Refusal)
    assert "quantization" not in other.engine_args


def test_what_no_profile_serves_is_refused_by_name(tmp_path: Path):
    facts = load_model(directory(tmp_path, quark(ocp("fp6_e3m2"))))
    with pytest.raises(SizingError, match="its own precision is mxfp6, which no profile serves"):
        derive(facts, by_name("MI355X").mode("SPX/NPS1"))


def test_show_and_fit_take_a_quark_directory(tmp_path: Path):
    path = str(directory(tmp_path, quark(spec("fp8_e4m3"))))
    shown = CliRunner().invoke(app, ["show", path, "--gpu", "MI300X", "-o", "json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["engine_args"]["quantization"] == "quark"
    fitted = CliRunner().invoke(app, ["fit", path, "--gpu", "MI300X", "--precision", "fp8", "-o", "json"])
    assert fitted.exit_code == 0, fitted.output
    assert json.loads(fitted.stdout)["weights_gib"] == pytest.approx(67.67, abs=0.01)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_garbled_modelopt_file_is_named(tmp_path: Path, content: str):
    directory(tmp_path, None)
    (tmp_path / "hf_quant_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"hf_quant_config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"quantization": 3},
        {"quantization": {"quant_algo": 8}},
        {"quant_method": "quark"},
        {"quant_method": "quark", "global_quant_config": {"weight": 3}, "exclude": [3], "layer_quant_config": []},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 3, "b": {"quant_algo": None}}},
        {"quant_method": None, "bits": "4"},
    ],
)
def test_any_stated_quantization_is_read_without_a_crash(tmp_path: Path, stated: dict[str, Any]):
    for facts in (load_model(directory(tmp_path, stated)), load_model(directory(tmp_path, None, stated))):
        assert facts.native_precision


@pytest.mark.parametrize(
    "model_id", ["meta-llama/Llama-3.3-70B-Instruct", "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-30B-A3B"]
)
def test_the_modules_by_name_are_all_linear_parameters(model_id: str):
    model = by_id(model_id)
    assert model.shape is not None
    counted = count_parameters(model.architecture, model.shape)
    assert sum(parameters for _, parameters in linear_modules(model.shape)) == counted.linear


def test_patterns_name_modules_wholes_and_parts():
    names = Patterns(["lm_head", "model.layers.0.mlp", "*self_attn.k_proj", "re:.*gate_proj$", 3])
    assert names.match("lm_head")
    assert names.match("model.layers.0.mlp.up_proj")
    assert not names.match("model.layers.01.mlp.up_proj")
    assert names.match("model.layers.7.self_attn.k_proj")
    assert names.match("model.layers.7.mlp.gate_proj")
    assert not names.match("model.layers.7.mlp.up_proj")
    assert Patterns(["model.language_model.layers.3*"]).match("model.layers.3.mlp.up_proj")
    assert Quantization.of({"quant_method": "fp8", "ignored_layers": ["lm_head"]}).stored("lm_head") == "bf16"  # type: ignore[union-attr]
    assert set(BYTES_PER_LINEAR_PARAMETER) >= {"bf16", "fp8", "int4", "mxfp4", "mxfp6", "mxfp8", "nvfp4"}
