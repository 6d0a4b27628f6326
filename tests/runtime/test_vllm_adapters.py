"""Adapters on vLLM: each request gets its own weights, whatever runs beside it or ran before."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vllm_lane import MODEL_DIR, PYTHON, require_vllm_lane

pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).parent / "vllm_adapters.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    require_vllm_lane()
    work_dir = tmp_path_factory.mktemp("adapters")
    command = [str(PYTHON), str(SCRIPT), str(MODEL_DIR), str(work_dir)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found: dict[str, Any] = json.loads((work_dir / "seen.json").read_text())
    return found


def test_adapters_are_served_by_name(seen: dict[str, Any]) -> None:
    assert seen["adapters"] == ["a", "b"]
    assert seen["differ"] == 3
    assert seen["model"] == "b"


def test_rows_of_the_model_and_two_adapters_at_once_equal_each_alone(seen: dict[str, Any]) -> None:
    assert seen["at once"] == [True] * 6


def test_without_lanes_rows_of_the_model_are_wrong(seen: dict[str, Any]) -> None:
    """Why there are lanes. Where this fails, vLLM has mended its CPU kernels: away with ``lanes.py``."""
    without_adapter = [same for same, model in zip(seen["without lanes"], "-ab-ba", strict=True) if model == "-"]
    assert not all(without_adapter)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("rank", "its rank (r) is 16, and this engine has room for 8"),
        ("width", "made for another model"),
        ("nowhere", "the model has no place for 8 of its modules (model.layers.40.self_attn.q_proj"),
        ("partly", "the model has no place for 8 of its modules"),
        ("module", "expected target modules in"),
        ("dora", "vLLM does not yet support DoRA"),
        ("missing", "there is no such directory"),
        ("gguf", "the vllm engine takes PEFT directories"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused(seen: dict[str, Any], case: str, reason: str) -> None:
    told = seen["refused"][case]
    assert told.startswith("400 lora_path: adapter 'bad' ("), told
    assert reason in told
    assert "\n" not in told
    assert "aim-adapters-" not in told


def test_a_refused_adapter_disturbs_nobody(seen: dict[str, Any]) -> None:
    assert seen["undisturbed"]
    assert seen["kept"] == ["a", "b"]


def test_new_weights_under_an_old_name_are_computed_anew(seen: dict[str, Any]) -> None:
    assert seen["replaced"] == {"running": True, "new": True, "changed": True}


def test_unloading_lets_requests_finish(seen: dict[str, Any]) -> None:
    assert seen["unloaded"] == {"finished": True, "listed": False, "after": "404 model_not_found"}


def test_a_client_that_leaves_lets_the_others_in(seen: dict[str, Any]) -> None:
    assert seen["left"]


def test_closing_leaves_no_copies(seen: dict[str, Any]) -> None:
    assert seen["cleaned"]
