"""A Hugging Face model directory of a real size that takes no space: its weights are a hole in the file."""

from __future__ import annotations

import json
from pathlib import Path

#: Llama-3.1-8B's own dimensions (meta-llama/Llama-3.1-8B-Instruct config.json).
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
LLAMA_8B_PARAMETERS = 8_030_261_248


def write_model(directory: Path, parameters: int = LLAMA_8B_PARAMETERS, **changes: object) -> Path:
    """``directory`` with that configuration and bf16 weights of so many parameters."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**LLAMA_8B, **changes}))
    size_bytes = parameters // 1024 * 1024 * 2
    tensor = {"dtype": "BF16", "shape": [parameters // 1024, 1024], "data_offsets": [0, size_bytes]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": tensor}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size_bytes)
    return directory
