"""The GGUF export's own arithmetic; that llama.cpp answers with it is shown in test_publish_served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aim_trainer.errors import JobError
from aim_trainer.publish.gguf.config import shape_of
from aim_trainer.publish.gguf.vocabulary import read_vocabulary
from aim_trainer.publish.gguf.write import write_gguf
from tiny_models import END_ID, VOCABULARY

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny Llama as a version holds it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END_ID, 0]}))
    return folder


def config(model: Path, **changed: Any) -> dict[str, Any]:
    return {**json.loads((model / "config.json").read_text()), **changed}


def test_llama3s_rotary_factors_are_transformers_own(model: Path) -> None:
    made = config(model, rope_parameters=LLAMA3, max_position_embeddings=131072)
    factors = shape_of(made).rope_factors
    assert factors is not None
    plain = 1 / 500000.0 ** (np.arange(0, 16, 2) / 16)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**made), "cpu")
    np.testing.assert_allclose(plain / factors, wanted.numpy(), rtol=1e-5)
    assert len(set(factors.tolist())) > 1


def test_a_file_holds_every_tensor_and_the_end_of_a_turn(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "m.gguf", name="tiny")
    read = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in read.tensors}
    held = load_file(model / "model.safetensors")
    assert len(tensors) == len(held)
    value = held["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"].data, value.astype(np.float16))
    assert tensors["output_norm.weight"].data.dtype == np.float32
    assert read.fields["tokenizer.ggml.eos_token_id"].contents() == END_ID
    assert read.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(read.fields["tokenizer.ggml.tokens"].contents()) == VOCABULARY


def test_rows_of_queries_and_keys_are_in_the_order_of_pairs(model: Path, tmp_path: Path) -> None:
    """transformers rotates row i of a head with row i + half; llama.cpp rows 2i and 2i + 1."""
    write_gguf(model, tmp_path / "m.gguf", name="tiny")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for theirs, ours, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        rows = load_file(model / "model.safetensors")[f"model.layers.0.self_attn.{theirs}.weight"].astype(np.float16)
        half = len(rows) // heads // 2
        for head in range(heads):
            at = head * 2 * half
            for row in range(half):
                np.testing.assert_array_equal(tensors[f"blk.0.{ours}.weight"][at + 2 * row], rows[at + row])
                np.testing.assert_array_equal(tensors[f"blk.0.{ours}.weight"][at + 2 * row + 1], rows[at + half + row])


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"attention_bias": True}, "attention_bias: True"),
        ({"sliding_window": 4096}, "sliding_window: 4096"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn' is not exported"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM is not of the Llama family"),
    ],
)
def test_what_llama_cannot_say_is_refused_by_name(model: Path, changed: dict[str, Any], why: str) -> None:
    with pytest.raises(JobError, match=why):
        shape_of(config(model, **changed))


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        (("pre_tokenizer",), {"type": "Metaspace"}, "how its tokenizer splits text"),
        (("normalizer",), {"type": "NFC"}, "how its tokenizer splits text"),
        (("model", "byte_fallback"), True, "not byte-level BPE"),
        (("model", "type"), "Unigram", "its tokenizer is Unigram"),
    ],
)
def test_a_tokenizer_llama_cpp_would_read_otherwise_is_refused(
    model: Path, place: tuple[str, ...], value: object, why: str
) -> None:
    file = model / "tokenizer.json"
    raw = json.loads(file.read_text())
    inner = raw
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    file.write_text(json.dumps(raw))
    with pytest.raises(JobError, match=why):
        read_vocabulary(model, VOCABULARY)


def test_a_weight_beyond_what_f16_holds_is_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    held = load_file(model / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(held, model / "model.safetensors")
    with pytest.raises(JobError, match=r"up_proj.weight holds values beyond ±65504"):
        write_gguf(model, tmp_path / "m.gguf", name="tiny")
