"""Profiles as files: three forms, read strictly, written back as they were."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aim_profile.gpus.catalog import by_name
from aim_profile.models.known import by_id
from aim_profile.serving.check import check
from aim_profile.serving.derive import Wanted, derive
from aim_profile.serving.files import form_of, read, read_file, write
from aim_profile.serving.profile import GpuSharing, Guardrail, Profile, ProfileError, parse_id

# The form of AIM's own files (amd-enterprise-ai/aim-build, profiles/): flags without a value are null.
AIM = """
aim_id: meta-llama/Llama-3.1-8B-Instruct
model_id: amd/Llama-3.1-8B-Instruct-FP8-KV
metadata:
  engine: vllm
  gpu: MI300X
  gpu_count: 1
  manual_selection_only: false
  metric: throughput
  precision: fp8
  type: optimized
engine_args:
  async-scheduling: null
  distributed_executor_backend: mp
  gpu-memory-utilization: 0.9
  kv-cache-dtype: fp8
  max-model-len: 32768
  tensor-parallel-size: 1
env_vars:
  GPU_ARCHS: gfx942
  VLLM_ROCM_USE_AITER: '1'
"""

# The form of the AIM_Next prototype's files (Yu-amd/AIM_Next, runtime/aim_profiles/), which name no GPU.
UNIFIED = {
    "model_id": "Qwen/Qwen2.5-0.5B-Instruct",
    "variant_id": "Qwen/Qwen2.5-0.5B-Instruct-int4",
    "version": "1.0.0-int4",
    "parameters": "0.5B",
    "precision": "int4",
    "memory_requirement_gb": 1.0,
    "recommended_partition_gb": 1.25,
    "gpu_sharing": {
        "enabled": True,
        "memory_limit_gb": 1.25,
        "partition_id": None,
        "qos_priority": "medium",
        "compute_mode": "SPX",
        "memory_mode": "NPS1",
        "partition_count": 1,
        "partition_size_gb": 192.0,
    },
    "resource_requirements": {"gpu_memory_gb": 1.0, "gpu_count": 1, "cpu_cores": 2, "system_memory_gb": 16},
    "metadata": {"quantization": "int4", "base_model": "Qwen/Qwen2.5-0.5B-Instruct"},
}


def full_profile() -> Profile:
    found = derive(
        by_id("meta-llama/Llama-3.1-8B-Instruct"),
        by_name("MI300X").mode("CPX/NPS4"),
        Wanted(
            qos_priority="high", partition_id=3, guardrails=(Guardrail(type="pii", action="redact", threshold=0.5),)
        ),
    )
    assert isinstance(found, Profile)
    return found


def test_an_aim_profile_is_for_whole_gpus_and_comes_back() -> None:
    found = read(AIM)
    assert found.id == "vllm-mi300x-fp8-tp1-throughput"
    assert found.partition is None
    assert found.engine_args["async-scheduling"] is None
    assert form_of(AIM) == "aim"
    assert yaml.safe_load(write(found, "aim")) == yaml.safe_load(AIM)


def test_an_aim_export_holds_aims_keys_only_and_no_partition_is_taken_for_a_gpu() -> None:
    text = write(full_profile(), "aim")
    body = yaml.safe_load(text)
    assert list(body) == ["aim_id", "model_id", "metadata", "engine_args", "env_vars"]
    assert body["metadata"]["manual_selection_only"] is True
    assert text.startswith("# For 1 x MI300X in CPX/NPS4")


@pytest.mark.parametrize("form", ["ours", "unified"])
def test_our_forms_keep_everything(form: str) -> None:
    profile = full_profile()
    text = write(profile, form)  # type: ignore[arg-type]
    assert read(text) == profile
    assert form_of(text) == form


def test_our_yaml_is_written_as_a_person_would() -> None:
    text = write(full_profile(), "ours")
    assert "null" not in text
    assert list(yaml.safe_load(text))[:5] == ["profile_version", "aim_id", "model_id", "metadata", "engine_args"]


def test_the_prototypes_json_is_read_without_inventing_a_gpu() -> None:
    found = read(json.dumps(UNIFIED))
    assert found.metadata.gpu == "NONE"
    assert found.partition is not None
    assert found.partition.label == "SPX/NPS1"
    assert found.gpu_sharing == GpuSharing(memory_limit_gb=1.25)
    assert any("names no GPU" in note for note in found.evidence.notes)


def test_the_unified_export_says_what_the_prototype_says() -> None:
    body = json.loads(write(full_profile(), "unified", by_id("meta-llama/Llama-3.1-8B-Instruct")))
    assert set(body) == set(UNIFIED)
    assert set(body["gpu_sharing"]) == set(UNIFIED["gpu_sharing"])  # type: ignore[call-overload]
    assert set(body["resource_requirements"]) == set(UNIFIED["resource_requirements"])  # type: ignore[call-overload]
    assert body["parameters"] == "8.03B"
    assert body["gpu_sharing"]["partition_count"] == 8
    # 24574 MiB in decimal GB, as everything in that form.
    assert body["gpu_sharing"]["partition_size_gb"] == 25.77


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise: unknown key; did you mean"),
        ({"profile_version": 2}, "profile_version"),
        ({"metadata": {"gpu": "MI9000"}}, r"metadata\.gpu: no GPU of that name.*\(got 'MI9000'\)"),
        ({"metadata": {"precision": "fp7"}}, r"metadata\.precision"),
        ({"metadata": {"gpu_count": 9}}, r"metadata\.gpu_count"),
        ({"partition": {"compute": "TPX", "memory": "NPS1"}}, "no TPX mode"),
        ({"partition": {"compute": "CPX", "memory": "NPS4", "more": 1}}, r"partition\.more: unknown key"),
        ({"gpu_sharing": {"partition_id": 8}}, "partition_id 8"),
        ({"env_vars": {"HIP_VISIBLE_DEVICES": "0"}}, "leave it out"),
        ({"engine_args": {"tensor-parallel-size": 2}}, "gpu_count 1"),
        ({"aim_id": None}, "come together"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    body = yaml.safe_load(write(full_profile(), "ours"))
    for key, value in change.items():
        body[key] = {**body.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(ProfileError, match=message) as caught:
        read(yaml.safe_dump(body), "p.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("p.yaml:")


@pytest.mark.parametrize(
    "text", ["", "[]", "a: [", "- 1\n- 2", "1: 2", "\x00", "metadata:\n  engine: vllm", "a: !!python/object:x y"]
)
def test_what_is_no_profile_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ProfileError) as caught:
        read(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200))
def test_no_text_crashes_the_reader(text: str) -> None:
    with suppress(ProfileError):
        read(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"absent\.yaml"):
        read_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "profile_id",
    [
        "vllm-mi300x-fp8-tp1-latency",
        "vllm-mi300x-cpx-nps4-fp8-tp1-latency",
        "vllm-mi355x-dpx-nps2-fp4-tp2-throughput",
        "vllm-mi355x-mxfp4-tp8-throughput",
    ],
)
def test_ids_are_parsed(profile_id: str) -> None:
    parts = parse_id(profile_id)
    assert parts.gpu.lower() in profile_id
    assert (parts.partition is not None) == ("px-" in profile_id)


def test_check_finds_what_does_not_fit_and_what_is_over_admitted() -> None:
    body = yaml.safe_load(write(full_profile(), "ours"))
    body["engine_args"]["max-model-len"] = 131072
    assert [finding.level for finding in check(read(yaml.safe_dump(body)))] == ["error"]
    body["engine_args"] |= {"max-model-len": 8192, "max-num-seqs": 512}
    (finding,) = check(read(yaml.safe_dump(body)))
    assert (finding.level, finding.field) == ("note", "engine_args.max-num-seqs")
