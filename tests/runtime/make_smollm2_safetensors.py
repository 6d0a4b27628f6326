"""Dequantise the embedded GGUF into the safetensors directory that the vLLM test lane serves.

Run with the lane's Python, which has transformers, torch, gguf and accelerate:

    .venv-vllm/bin/python tests/runtime/make_smollm2_safetensors.py GGUF_FILE OUTPUT_DIR

The output directory appears complete or not at all.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def dequantise(gguf_file: Path, output_dir: Path) -> None:
    """Write config, tokenizer (with its chat template) and bfloat16 weights of ``gguf_file``."""
    source, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=output_dir.name, dir=output_dir.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: make_smollm2_safetensors.py GGUF_FILE OUTPUT_DIR (GGUF_FILE must exist)")
    dequantise(Path(sys.argv[1]), Path(sys.argv[2]))
