"""Facts from files: Hugging Face directories and GGUF files, written here by the formats' own libraries."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from aim_profile.errors import ModelError
from aim_profile.models.facts import ModelFacts
from aim_profile.models.gguf import _TYPES, read_gguf, read_header
from aim_profile.models.load import by_id, load_model
from aim_profile.sizing.fit import SizingError, fit, weight_bytes
from aim_profile.sizing.kv_cache import kv_bytes_per_sequence, kv_bytes_per_token
from aim_profile.units import GIB

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LLAMA_8B: dict[str, Any] = {
    **TINY,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def llama_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as LlamaForCausalLM saves them."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (key, hidden),
            f"{at}.self_attn.v_proj.weight": (key, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (ffn, hidden),
            f"{at}.mlp.up_proj.weight": (ffn, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, ffn),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_weights(directory: Path, config: dict[str, Any], dtype: Any = np.float16) -> None:
    arrays = {name: np.zeros(shape, dtype) for name, shape in llama_tensors(config).items()}
    save_file(arrays, directory / "model.safetensors")


def write_sparse(file: Path, shapes: dict[str, tuple[int, ...]], dtype: str, width: int) -> None:
    """A full-size safetensors file whose data is a hole: its header is real, its disk use is not."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + at)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    directory = write_config(tmp_path / "tiny", TINY)
    write_weights(directory, TINY)
    return directory


def test_a_directory_gives_exact_bytes_and_the_same_count_as_the_formula(tiny: Path):
    facts = load_model(str(tiny))
    values = sum(int(np.prod(shape)) for shape in llama_tensors(TINY).values())
    assert facts.file_bytes == weight_bytes(facts) == 2 * values
    assert facts.bytes_by_dtype == (("F16", 2 * values),)
    assert facts.native_precision == "fp16"
    assert facts.max_positions == 4096
    (tiny / "model.safetensors").unlink()
    counted = load_model(tiny)
    assert (counted.total_params, counted.linear_params) == (values, facts.linear_params)
    assert facts.total_params == values
    # The embedding is read by the row, with files or without.
    assert facts.active_params == counted.active_params == values - (TINY["vocab_size"] - 1) * TINY["hidden_size"]


def test_llama_8b_from_its_files_equals_the_catalogue(tmp_path: Path):
    directory = write_config(tmp_path / "llama", LLAMA_8B)
    shapes = llama_tensors(LLAMA_8B)
    names = sorted(shapes)
    shards = {"model-00001-of-00002.safetensors": names[:150], "model-00002-of-00002.safetensors": names[150:]}
    for file, held in shards.items():
        write_sparse(directory / file, {name: shapes[name] for name in held}, "BF16", 2)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_sparse(directory / "consolidated.safetensors", shapes, "BF16", 2)  # a copy that must not count
    assert_is_llama_8b(load_model(directory))


def test_llama_8b_from_a_gguf_file_equals_the_catalogue(tmp_path: Path):
    file = tmp_path / "llama.gguf"
    write_gguf(file, LLAMA_8B, sparse=True)
    assert_is_llama_8b(load_model(file))


def assert_is_llama_8b(facts: ModelFacts) -> None:
    known = by_id("meta-llama/Llama-3.1-8B-Instruct")
    assert known.shape is not None
    assert facts.shape == known.shape
    assert weight_bytes(facts) == weight_bytes(known)
    assert weight_bytes(facts) / GIB == pytest.approx(14.96, abs=0.005)
    for precision in ("fp8", "int4"):
        assert weight_bytes(facts, precision) == weight_bytes(known, precision)  # type: ignore[arg-type]
    assert kv_bytes_per_token(facts) == kv_bytes_per_token(known) == 131072
    asked = {"precision": "bf16", "context": 32768}
    mine, theirs = fit(facts, 24574 * 2**20, **asked), fit(known, 24574 * 2**20, **asked)
    same = {"model", "notes"}
    assert mine.model_dump(exclude=same) == theirs.model_dump(exclude=same)


def write_gguf(file: Path, config: dict[str, Any], *, sparse: bool = False, kind: str = "llama") -> None:
    """The model as llama.cpp's converter writes it: metadata, tensor table, data (a hole if sparse)."""
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_token_list([f"t{n}" for n in range(config["vocab_size"])])
    dtype, ggml = np.dtype(np.float16), gguf.GGMLQuantizationType.BF16
    total = 0
    for name, shape in llama_tensors(config).items():
        kept = gguf.GGMLQuantizationType.F32 if len(shape) == 1 and not sparse else ggml
        ours = name.replace("model.layers", "blk").replace("model.embed_tokens", "token_embd")
        ours = ours.replace("model.norm", "output_norm").replace("lm_head", "output")
        size = int(np.prod(shape)) * (4 if kept == gguf.GGMLQuantizationType.F32 else 2)
        writer.add_tensor_info(ours, shape, dtype, size, kept)
        total += gguf.GGUFWriter.ggml_pad(size, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size + 32 + total)


def test_a_gguf_file_with_real_data_and_mixed_types(tmp_path: Path):
    file = tmp_path / "mixed.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_vocab_size(64)
    writer.add_key_length(96)
    quantized = gguf.quants.quantize(np.ones((512, 256), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", np.zeros((64, 256), np.float16))
    writer.add_tensor("blk.0.ffn_up.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.zeros(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = read_gguf(file)
    assert facts.bytes_by_dtype == (("fp16", 64 * 256 * 2), ("fp32", 1024), ("q8_0", 512 * 256 // 32 * 34))
    assert (facts.native_precision, facts.linear_params) == ("q8_0", 512 * 256)
    assert facts.shape is not None
    assert facts.shape.tied
    assert kv_bytes_per_token(facts) == 2 * 1 * 1 * 96 * 2
    with pytest.raises(SizingError, match="the files hold q8_0"):
        weight_bytes(facts, "bf16")
    assert weight_bytes(facts) == sum(size for _, size in facts.bytes_by_dtype)


def test_the_block_sizes_are_the_gguf_packages_own():
    theirs = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    shared = [kind for kind in _TYPES if kind in theirs]
    assert len(shared) >= 30
    assert {kind: _TYPES[kind][1:] for kind in shared} == {kind: theirs[kind] for kind in shared}


def test_a_split_gguf_counts_all_its_shards(tmp_path: Path):
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    for file in (first, second):
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"blk.{file.name[6]}.w", np.zeros((32, 32), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert read_gguf(first).file_bytes == read_gguf(second).file_bytes == 2 * 2048
    second.unlink()
    with pytest.raises(ModelError, match=r"shard m-00002-of-00002\.gguf is missing"):
        read_gguf(first)


# Published configurations, cut to what matters, with the sourced KV figures of models of that shape.
GEMMA_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
MIXTRAL = {
    **LLAMA_8B,
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"},
}
SCOUT = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8192,
        "no_rope_layers": [1, 1, 1, 0] * 12,
        "vocab_size": 202048,
    },
}
MLLAMA = {
    "model_type": "mllama",
    "text_config": {**LLAMA_8B, "num_hidden_layers": 40, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]},
}


@pytest.mark.parametrize(
    ("config", "model_id"),
    [
        (GEMMA_4B, "google/gemma-3-4b-it"),
        (MIXTRAL, "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        (DEEPSEEK, "deepseek-ai/DeepSeek-R1"),
        (SCOUT, "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
        (MLLAMA, "meta-llama/Llama-3.2-11B-Vision-Instruct"),
    ],
    ids=["gemma3", "mixtral", "deepseek_v3", "llama4", "mllama"],
)
def test_a_familys_config_gives_the_catalogues_cache(tmp_path: Path, config: dict[str, Any], model_id: str):
    directory = write_config(tmp_path / "model", config)
    write_sparse(directory / "model.safetensors", {"model.layers.0.q_proj.weight": (8, 8)}, "BF16", 2)
    facts, known = load_model(directory), by_id(model_id)
    assert facts.sizable
    assert kv_bytes_per_token(facts) == kv_bytes_per_token(known)
    for context in (100, 8192, 32768):
        assert kv_bytes_per_sequence(facts, context) == kv_bytes_per_sequence(known, context)


@pytest.mark.parametrize(
    ("quantization", "native"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}},
            "int4",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}},
            },
            "mxfp4",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
            },
            "nvfp4",
        ),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_quantised_files_count_as_they_are(tiny: Path, quantization: dict[str, Any], native: str):
    write_config(tiny, {**TINY, "quantization_config": quantization})
    facts = load_model(tiny)
    assert facts.native_precision == native
    assert weight_bytes(facts) == facts.file_bytes
    with pytest.raises(SizingError, match=f"the files hold {native}"):
        weight_bytes(facts, "bf16")


def test_float32_files_are_served_in_16_bits(tmp_path: Path):
    directory = write_config(tmp_path / "wide", {**TINY, "torch_dtype": "float32"})
    write_weights(directory, TINY, np.float32)
    facts = load_model(directory)
    assert (facts.native_precision, facts.file_bytes) == ("bf16", None)
    assert weight_bytes(facts) == 2 * (facts.total_params or 0)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({**TINY, "model_type": "mistral", "sliding_window": 512}, [("sliding", 2, 512)]),
        ({**TINY, "model_type": "mistral", "sliding_window": None}, [("full", 2, None)]),
        ({**TINY, "model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, [("full", 2, None)]),
        (
            {**TINY, "model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 1},
            [("full", 1, None), ("sliding", 1, 512)],
        ),
        (
            {**TINY, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
            [("full", 1, None), ("sliding", 1, 64)],
        ),
        ({**TINY, "model_type": "gemma2", "sliding_window": 64}, [("full", 1, None), ("sliding", 1, 64)]),
    ],
)
def test_which_layers_slide(tmp_path: Path, config: dict[str, Any], layers: list[tuple[str, int, int | None]]):
    facts = load_model(write_config(tmp_path / "m", config))
    assert facts.shape is not None
    assert [(g.kind, g.layers, g.window) for g in facts.shape.attention] == layers


@pytest.mark.parametrize(
    ("more", "limit", "stated"),
    [
        ({}, 4096, None),
        ({"rope_scaling": None}, 4096, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 4096, None),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
            4096,
            "rope scaling yarn, factor 4 of 1024",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}},
            4096,
            "rope scaling llama3, factor 8 of 512",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, 4096, "rope scaling linear, factor 2"),
        ({"rope_scaling": "yarn"}, 4096, None),
        ({"model_max_length": 131072}, 131072, None),
        ({"max_position_embeddings": None}, None, None),
    ],
)
def test_the_context_limit_and_rope_scaling_come_from_config_json(
    tmp_path: Path, more: dict[str, Any], limit: int | None, stated: str | None
):
    facts = load_model(write_config(tmp_path / "m", {**TINY, **more}))
    assert (facts.max_positions, facts.rope_scaling) == (limit, stated)
    answer = fit(facts, 24 * GIB, context=limit or 1_000_000)
    assert answer.context_limit == limit
    assert any("limit unknown" in note for note in answer.notes) == (limit is None)
    assert stated is None or any(stated in note for note in answer.notes)
    if limit:
        with pytest.raises(SizingError, match=f"more than the {limit} positions"):
            fit(facts, 24 * GIB, context=limit + 1)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({**TINY, "model_type": "mamba2"}, "cache layout of architecture 'mamba2' is not established"),
        ({**TINY, "layer_types": ["linear_attention", "full_attention"]}, "unknown kinds: ['linear_attention']"),
        ({"model_type": "llama"}, "config.json has no hidden_size, num_attention_heads"),
        ({**TINY, "vision_config": {}}, "no safetensors files beside config.json"),
    ],
)
def test_what_is_not_established_is_not_sized(tmp_path: Path, config: dict[str, Any], missing: str):
    facts = load_model(write_config(tmp_path / "m", config))
    assert not facts.sizable
    assert missing in facts.status
    with pytest.raises(SizingError, match="known, not sized"):
        fit(facts, 24 * GIB)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"hidden_size": 3}', "model_type must be a string"),
        (json.dumps({**TINY, "hidden_size": "x"}), "hidden_size is 'x', not a whole number"),
        (json.dumps({**TINY, "num_attention_heads": 0}), "num_attention_heads is missing or 0"),
        (json.dumps({**TINY, "hidden_size": -1}), "hidden_size is -1"),
    ],
)
def test_a_bad_config_names_the_file_and_field(tmp_path: Path, content: str, says: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as refused:
        load_model(tmp_path)
    assert says in str(refused.value)


def test_missing_files_and_shards_are_named(tiny: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        load_model(tmp_path / "tiny" / "..")
    with pytest.raises(ModelError, match="no such file or directory"):
        load_model(tmp_path / "absent.gguf")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"1 missing shards, gone\.safetensors"):
        load_model(tiny)
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(ModelError, match="file names of this directory"):
        load_model(tiny)


def test_a_truncated_weight_file_is_named(tiny: Path):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
        load_model(tiny)


def mutations(raw: bytes) -> st.SearchStrategy[bytes]:
    """The file cut anywhere, or with some bytes replaced."""
    cut = st.integers(0, len(raw)).map(lambda at: raw[:at])
    patch = st.tuples(st.integers(0, len(raw) - 1), st.binary(min_size=1, max_size=9)).map(
        lambda change: raw[: change[0]] + change[1] + raw[change[0] + len(change[1]) :]
    )
    return cut | patch


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    write_config(folder, TINY)
    write_weights(folder, TINY)
    write_gguf(folder / "model.gguf", TINY)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
def test_a_mutated_file_is_facts_or_a_model_error(
    name: str, samples: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.mktemp("mutated", numbered=True)
    (folder / "config.json").write_bytes(samples["config.json"])
    raw = samples[name]
    # Headers are where parsers break: keep the cuts and patches there.
    mutated = data.draw(mutations(raw[:6000]).map(lambda head: head + raw[6000:] if len(raw) > 6000 else head))
    (folder / name).write_bytes(mutated)
    try:
        facts = load_model(folder / name if name.endswith("gguf") else folder)
    except ModelError:
        return
    assert isinstance(facts, ModelFacts)


def test_half_a_download_does_not_pass_for_the_model(tiny: Path):
    (whole,) = tiny.glob("*.safetensors")
    for number in (1, 3):
        (tiny / f"model-{number:05d}-of-00003.safetensors").write_bytes(whole.read_bytes())
    whole.unlink()
    with pytest.raises(ModelError, match=r"one of 3 shards, of which model-00002-of-00003.safetensors is missing"):
        load_model(tiny)


def test_a_name_no_file_can_have_is_no_crash(tiny: Path):
    with pytest.raises(ModelError, match="not in the catalogue"):
        load_model("a" * 5000)
    with pytest.raises(ModelError, match="not in the catalogue"):
        load_model("org/\0")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 5000}}), encoding="utf-8")
    with pytest.raises(ModelError, match="missing shards"):
        load_model(tiny)


def test_an_impossible_dimension_is_named_in_one_line(tmp_path: Path):
    config = LLAMA_8B | {"hidden_size": 1}
    config.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError) as refused:
        load_model(tmp_path)
    assert str(refused.value).endswith(
        "config.json: impossible dimensions: head_dim: Input should be greater than or equal to 1 (got 0)"
    )


def test_a_vocabulary_is_passed_over_and_cut_off_is_named(tmp_path: Path):
    file = tmp_path / "words.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_token_list([f"token {number} \N{SNOWMAN}" for number in range(1000)])
    writer.add_array("nested", [["a", "b"], ["c"]])
    writer.add_block_count(7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, _, _ = read_header(file)
    assert metadata["llama.block_count"] == 7
    assert metadata["tokenizer.ggml.tokens"].items == 1000
    whole = file.read_bytes()
    at = whole.index(b"token 500 ")
    for cut in (whole[: at + 4], whole[: at - 4], whole[: at - 8] + b"\xff" * 8 + whole[at:]):
        file.write_bytes(cut)
        with pytest.raises(ModelError, match=r"words\.gguf: truncated"):
            read_header(file)
