"""The runtime server, once over the fake engine and once over the embedded model, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from served import Served


@pytest.fixture(scope="session")
def fake() -> Iterator[Served]:
    """The real server, model ``m``, over the fake engine (no delay per token, 8 slots)."""
    with Served.fake(slots=8) as server:
        yield server


@pytest.fixture(scope="session")
def real(embedded_model: Path) -> Iterator[Served]:
    """``python -m aim_runtime`` with the embedded model, called ``smollm2``."""
    flags = ["--model_name", "smollm2", "--model_dir", str(embedded_model.parent), "--threads", "1"]
    with Served(["-m", "aim_runtime", *flags, "--max_model_len", "1024", "--max_concurrency", "4"]) as server:
        yield server
