"""What the trainer's tests share: tiny models of each architecture, and the embedded model as transformers reads it.

Nothing heavy is imported here: tests that need no torch also run without it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_session import ray_cluster as ray_cluster  # a fixture
from rclone_servers import s3_server

ROOT = Path(__file__).parent.parent.parent
SMOLLM2_HF = ROOT / ".models/smollm2-hf"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("llama")`: the directory of a random model (tests/fakes/tiny_models.py), made once: never change it."""
    pytest.importorskip("transformers", reason="make trainer")
    from tiny_models import write_tiny_model

    made: dict[str, Path] = {}

    def directory(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = write_tiny_model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return directory


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server of S3 that has a bucket `bucket`."""
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with s3_server(root, written_to=True) as port:
        yield port


@pytest.fixture(scope="session")
def smollm2_hf(embedded_model: Path) -> Path:
    """The embedded model as a Hugging Face directory (bfloat16, 269 MB), made where it is missing (10 s)."""
    if not (SMOLLM2_HF / "model.safetensors").is_file():
        pytest.importorskip("transformers", reason="make trainer")
        script = ROOT / "tests/runtime/make_smollm2_safetensors.py"
        subprocess.run([sys.executable, str(script), str(embedded_model), str(SMOLLM2_HF)], check=True)
    return SMOLLM2_HF


@pytest.fixture(scope="session")
def filter_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real guardrail, by the policy of tests/fakes/filter_service.py."""
    from filter_service import SERVING_PYTHON, filter_service

    if not SERVING_PYTHON.exists():
        pytest.skip(".venv is missing: make test sets it up")
    with filter_service(tmp_path_factory.mktemp("guardrail")) as url:
        yield url
