"""The environment of an AIM container is a setting here, too."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from aim_kserve.settings import SettingsError
from aim_profile.nodes.emulated import emulate, export_node
from aim_runtime.assignment import Refused
from aim_runtime.server import set_levels
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import located, prepare
from model_directory import write_model

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
#: Every variable that AIM's code reads or its images set (aim-build@2be2cf8: config.py, Dockerfile.aim-base), and the
#: one that its documentation names beside them.
AIM_POD = {
    "AIM_MODEL_ID": LLAMA,
    "AIM_PRECISION": "fp8",
    "AIM_GPU_COUNT": "1",
    "AIM_GPU_MODEL": "MI300X",
    "AIM_ENGINE": "vllm",
    "AIM_ENGINE_ARGS": '{"max-model-len": 4096, "gpu-memory-utilization": 0.85, "seed": null}',
    "AIM_METRIC": "throughput",
    "AIM_PROFILE_ID": "",
    "AIM_PORT": "8000",
    "AIM_LOG_LEVEL": "DEBUG",
    "AIM_LOG_LEVEL_ROOT": "WARNING",
    "AIM_CUSTOM_MODEL_NAME": "",
    "AIM_ALLOW_GENERAL_PROFILE_FALLBACK": "false",
    "AIM_BASE_IMAGE_REF": "registry/aim-base:0.9",
    "AIM_DEBUG": "true",
}


def load(*argv: str, **env: str) -> RuntimeSettings:
    return RuntimeSettings.load(argv, env, prog="aim-runtime", description="")


def test_an_aim_pod_s_environment_starts_the_same_model(tmp_path: Path) -> None:
    write_model(tmp_path / "cache" / LLAMA)
    node = tmp_path / "node.yaml"
    node.write_text(export_node(emulate("MI300X", cards=1)))
    settings = located(load("--node", str(node), **AIM_POD, AIM_CACHE_PATH=str(tmp_path / "cache")))
    assert (settings.http_port, settings.model_name) == (8000, LLAMA)
    found = prepare(settings, {})
    assert found.model_dir == tmp_path / "cache" / LLAMA
    flags = found.engine_args
    assert (flags["max-model-len"], flags["gpu-memory-utilization"], flags["quantization"]) == (4096, 0.85, "fp8")
    assert flags["max-num-batched-tokens"] == 8192  # throughput
    assert found.profile == f"{LLAMA}/vllm-mi300x-fp8-tp1-throughput"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"AIM_GPU_COUNT": "2"}, "partition-count 2: 1 of MI300X SPX/NPS1 is here"),
        ({"AIM_GPU_MODEL": "MI325X"}, "gpu-model MI325X: the GPU here is MI300X"),
        ({"AIM_PRECISION": "fp4"}, "precision"),
        ({"AIM_PROFILE_ID": "vllm-mi300x-fp16-tp1-latency"}, "says precision fp16, the settings say fp8"),
        ({"AIM_ENGINE_ARGS": '{"max-model-len": "not-a-number"}'}, "max-model-len is 'not-a-number'"),
        ({"AIM_CACHE_PATH": "/nowhere"}, "nothing is downloaded at start"),
    ],
)
def test_what_this_machine_is_not_is_refused(wrong: dict[str, str], says: str, tmp_path: Path) -> None:
    """AIM warns and falls back to a default; here a setting that cannot be met ends the start."""
    write_model(tmp_path / "cache" / LLAMA)
    node = tmp_path / "node.yaml"
    node.write_text(export_node(emulate("MI300X", cards=1)))
    env = {**AIM_POD, "AIM_CACHE_PATH": str(tmp_path / "cache"), **wrong}
    with pytest.raises(Refused) as refused:
        prepare(located(load("--node", str(node), **env)), {})
    assert says in str(refused.value)


def test_auto_is_not_asked_for() -> None:
    settings = load(AIM_PRECISION="auto", AIM_GPU_COUNT="auto", AIM_GPU_MODEL="NONE", AIM_METRIC="")
    assert (settings.precision, settings.partition_count, settings.gpu_model, settings.metric) == (None,) * 4


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"AIM_ID": "a/b", "AIM_MODEL_ID": "c/d"}, "AIM_ID: 'a/b' contradicts AIM_MODEL_ID: 'c/d'"),
        ({"AIM_PORT": "8000", "AIM_HTTP_PORT": "8080"}, "AIM_PORT: '8000' contradicts AIM_HTTP_PORT: '8080'"),
        ({"AIM_PORT": "http"}, "AIM_HTTP_PORT or AIM_PORT: "),
        ({"AIM_METRIC": "speed"}, "AIM_METRIC: "),
        ({"AIM_LOG_LEVEL": "LOUD"}, "AIM_LOG_LEVEL: "),
        ({"AIM_TYPO": "1"}, "AIM_TYPO: unknown setting"),
    ],
)
def test_wrong_variables_are_named(env: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError) as wrong:
        load(**env)
    assert says in str(wrong.value)


def test_a_flag_wins_over_aims_variable() -> None:
    assert load("--http_port", "9000", AIM_PORT="8000").http_port == 9000


def test_the_hub_s_layout_is_found(tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "models--org--m"
    write_model(hub / "snapshots" / "abc123", 1024)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc123\n")
    found = located(load(AIM_MODEL_ID="org/m", AIM_CACHE_PATH=str(tmp_path)))
    assert found.model_dir == hub / "snapshots" / "abc123"


def test_a_custom_directory_and_a_local_path(tmp_path: Path) -> None:
    own = write_model(tmp_path / "mine", 1024)
    env = {"AIM_MODEL_ID": "org/m", "AIM_CACHE_PATH": str(tmp_path)}
    assert located(load(**env, AIM_CUSTOM_MODEL_NAME="mine")).model_dir == own
    local = located(load(AIM_MODEL_ID=str(own)))
    assert (local.model_dir, local.model_name) == (own, "model")


def test_what_is_said_stays(tmp_path: Path) -> None:
    found = located(load("--model_dir", str(tmp_path), "--model_name", "chat", AIM_ID="org/m"))
    assert (found.model_dir, found.model_name) == (tmp_path, "chat")


def test_log_levels() -> None:
    before = {name: logging.getLogger(name).level for name in (None, "aim", "uvicorn")}
    try:
        set_levels(load(AIM_LOG_LEVEL="error", AIM_LOG_LEVEL_ROOT="debug"))
        assert [logging.getLogger(name).level for name in ("aim", None, "uvicorn")] == [40, 10, 10]
        set_levels(load(AIM_DEBUG="true"))
        assert logging.getLogger("aim").level == logging.DEBUG
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def test_of_two_names_for_one_setting_the_one_that_is_left_empty_says_nothing() -> None:
    assert load(AIM_MODEL_ID="", AIM_ID="org/m").model_id == "org/m"
    assert load(AIM_MODEL_ID="org/m", AIM_ID="").model_id == "org/m"
