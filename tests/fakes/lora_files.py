"""Small LoRA adapters for SmolLM2-135M, made of random numbers: as a GGUF file, or as a PEFT directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

LAYERS, WIDTH, VALUE_WIDTH = 30, 576, 192
RANK = 8
#: Large enough that every greedy text changes.
STRENGTH = 1.2

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def weights(seed: int, *, rank: int = RANK, width: int = WIDTH, layers: int = 4, strength: float = STRENGTH) -> Arrays:
    """``blk.N.attn_q`` and ``attn_v`` of the first layers → A (rank x in) and B (out x rank)."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, strength / np.sqrt(columns), (rows, columns)).astype(np.float32)

    outputs = {"attn_q": width, "attn_v": VALUE_WIDTH}
    names = [(f"blk.{layer}.{name}", out) for layer in range(layers) for name, out in outputs.items()]
    return {name: (matrix(rank, width), matrix(out, rank)) for name, out in names}


def write_gguf(path: Path, arrays: Arrays, *, alpha: float = 16.0, **metadata: Any) -> Path:
    """An adapter as llama.cpp's ``convert_lora_to_gguf.py`` writes it. ``metadata`` (dots as ``__``) overrides."""
    writer = gguf.GGUFWriter(path, metadata.get("general__architecture", "llama"))
    writer.add_string("general.type", metadata.get("general__type", "adapter"))
    writer.add_string("adapter.type", metadata.get("adapter__type", "lora"))
    if isinstance(alpha, int):
        writer.add_uint32("adapter.lora.alpha", alpha)
    else:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in arrays.items():
        writer.add_tensor(f"{name}.weight.lora_a", a)
        writer.add_tensor(f"{name}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_peft(directory: Path, arrays: Arrays, *, alpha: float = 16.0, **config: Any) -> Path:
    """The same as a PEFT directory. ``config`` overrides fields of adapter_config.json."""
    directory.mkdir()
    rank = next(iter(arrays.values()))[0].shape[0]
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file(dict(_peft_tensors(arrays)), directory / "adapter_model.safetensors")
    return directory


def _peft_tensors(arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    modules = {"attn_q": "self_attn.q_proj", "attn_v": "self_attn.v_proj"}
    for name, (a, b) in arrays.items():
        _, layer, kind = name.split(".")
        module = f"base_model.model.model.layers.{layer}.{modules.get(kind, kind)}"
        yield f"{module}.lora_A.weight", a
        yield f"{module}.lora_B.weight", b
