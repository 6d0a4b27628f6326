"""The file: metadata first, then one tensor after the other, so that memory holds one of them.

llama.cpp rotates pairs of neighbours where transformers rotates halves: rows of the query and key projections are put
in that order (llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from aim_trainer.errors import JobError

from .config import Shape, shape_of
from .vocabulary import Vocabulary, read_vocabulary

Array = npt.NDArray[Any]

_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Path, into: Path, *, name: str) -> None:
    """The Hugging Face directory `model` (safetensors, tokenizer.json, chat template) as the f16 file `into`.

    Its generation_config.json says which ids end an answer. Raises JobError: not of the family, a tokenizer without
    a name in llama.cpp, a weight beyond what f16 holds.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    shape = shape_of(config)
    vocabulary = read_vocabulary(model, shape.vocab)
    tensors = _tensors(model)
    with closing(gguf.GGUFWriter(into, "llama")) as writer:
        _say_shape(writer, shape, name)
        _say_vocabulary(writer, vocabulary, model)
        _announce(writer, tensors, shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in _arrays(tensors, shape):
            writer.write_tensor_data(array)


def _announce(writer: gguf.GGUFWriter, tensors: dict[str, tuple[Path, tuple[int, ...]]], shape: Shape) -> None:
    """Names and sizes, in the order in which the tensors follow: vectors in float32, matrices in f16."""
    for held, (_, dimensions) in tensors.items():
        kind: np.dtype[Any] = np.dtype(np.float32 if len(dimensions) == 1 else np.float16)
        writer.add_tensor_info(_renamed(held), dimensions, kind, int(np.prod(dimensions)) * kind.itemsize)
    if (factors := shape.rope_factors) is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)


def _tensors(model: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Name → file and dimensions. Raises JobError for one that has no place in a Llama."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: (file, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()}  # noqa: SIM118
    # Tied embeddings are one tensor: llama.cpp takes token_embd for the output where there is no other.
    for name in found:
        _renamed(name)
    return found


def _renamed(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    parts = name.split(".")
    module = ".".join(parts[3:-1])
    if parts[:2] != ["model", "layers"] or module not in _IN_A_LAYER or parts[-1] != "weight":
        raise JobError(f"spec.output.gguf: tensor {name} has no place in llama.cpp's llama", field="spec.output.gguf")
    return f"blk.{parts[2]}.{_IN_A_LAYER[module]}.weight"


def _arrays(tensors: dict[str, tuple[Path, tuple[int, ...]]], shape: Shape) -> Iterator[Array]:
    for name, (file, _) in tensors.items():
        with safe_open(file, framework="pt") as opened:
            yield _array(name, opened.get_tensor(name), shape)
    if shape.rope_factors is not None:
        yield shape.rope_factors


def _array(name: str, tensor: torch.Tensor, shape: Shape) -> Array:
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
    if heads is not None:
        rows, columns = tensor.shape
        tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    made: Array = tensor.to(torch.float32 if tensor.ndim == 1 else torch.float16).contiguous().numpy()
    if not np.isfinite(made).all():
        raise JobError(
            f"spec.output.gguf: {name} holds values beyond ±65504, which f16 cannot", field="spec.output.gguf"
        )
    return made


def _say_shape(writer: gguf.GGUFWriter, shape: Shape, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    if shape.rope_linear is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope_linear)


def _say_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, model: Path) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    ends = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if bos in vocabulary.tokens:
        writer.add_bos_token_id(vocabulary.tokens.index(bos))
    writer.add_add_bos_token(_begins_with_bos(model, bos))
    template = model / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _begins_with_bos(model: Path, bos: str | None) -> bool:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return bos is not None and tokenizer.encode("a").tokens[0] == bos
