"""Where the vLLM lane is: its own environment, beside the one the tests run in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("AIM_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
MODEL_DIR = Path(os.environ.get("AIM_VLLM_MODEL", ROOT / ".models/smollm2-hf"))


def require_vllm_lane() -> None:
    """Skip, and say how to get it, where the lane has not been made."""
    for part in (PYTHON, MODEL_DIR / "model.safetensors"):
        if not part.is_file():
            pytest.skip(f"{part} is missing: make vllm")
