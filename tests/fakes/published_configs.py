"""Where the published config.json files are that tests read as data: `make configs` fetches them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("AIM_MODEL_CONFIGS", ROOT / ".models/configs"))


def require_configs() -> Path:
    """The folder of them, one folder each, named `organisation--model`; skips where they have not been fetched."""
    if not (FOLDER / ".fetched").is_file():
        pytest.skip(f"{FOLDER} is missing: make configs")
    return FOLDER
