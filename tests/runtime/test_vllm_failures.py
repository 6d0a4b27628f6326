"""A load that fails says what and where in one line, whoever found out: our checks, vLLM, or vLLM's children."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from vllm_lane import MODEL_DIR, PYTHON, require_vllm_lane

pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).parent / "vllm_failures.py"


@pytest.fixture(scope="module")
def reasons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    require_vllm_lane()
    work_dir = tmp_path_factory.mktemp("models")
    command = [str(PYTHON), str(SCRIPT), str(MODEL_DIR), str(work_dir)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found: dict[str, str] = json.loads((work_dir / "seen.json").read_text())
    return found


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("unknown flag", ["--bogus"]),
        ("abbreviated flag", ["unrecognized", "--max-model"]),
        ("bad value", ["--max-num-seqs", "'many'"]),
        ("http flag", ["--api-key", "HTTP server", "remove it"]),
        ("contradiction", ["--max-model-len 100", "200"]),
        ("half a pair", ["--enable-auto-tool-choice", "--tool-call-parser"]),
        ("architecture", ["unknown: ", "FooForCausalLM"]),
        ("too long", [f"{MODEL_DIR}: ", "100000", "8192"]),
        ("tensor parallel", ["attention heads (9)", "tensor parallel size (64)"]),
        ("kv cache", [f"{MODEL_DIR}: ", "4096", "KV cache"]),
    ],
)
def test_the_reason_is_told(reasons: dict[str, str], case: str, expected: list[str]) -> None:
    reason = reasons[case]
    assert all(part in reason for part in expected), reason
    assert "\n" not in reason
    assert len(reason) < 600


def test_cancelled_loading_leaves_no_process(reasons: dict[str, str]) -> None:
    started, alive = reasons["cancelled"].split(", ")
    assert started != "0 started"
    assert alive == "0 alive"


def test_a_dead_engine_is_a_503_and_not_healthy(reasons: dict[str, str]) -> None:
    assert reasons["killed"] == f"{['503 engine_dead'] * 3}, healthy False, 0 alive"
