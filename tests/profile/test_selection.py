"""Selection: AIM's order, true to partitions, with a reason for every candidate."""

from __future__ import annotations

from pathlib import Path

import pytest

from aim_profile.gpus.catalog import by_name
from aim_profile.models.known import by_id
from aim_profile.serving.derive import Wanted, derive
from aim_profile.serving.files import write
from aim_profile.serving.profile import Profile, ProfileError
from aim_profile.serving.selection import Candidate, Devices, Selection, Wish, select, stored_profiles

MODEL = by_id("meta-llama/Llama-3.1-8B-Instruct")


def devices(label: str = "CPX/NPS4", number: int = 1, gpu: str = "MI300X") -> Devices:
    return Devices(by_name(gpu).mode(label), number)


def profile(label: str | None = None, **changes: object) -> Profile:
    """A stored profile; label None: as AIM writes it, for whole GPUs."""
    found = derive(MODEL, by_name("MI300X").mode(label or "SPX/NPS1"), Wanted(precision="bf16"))
    assert isinstance(found, Profile)
    metadata = found.metadata.model_copy(update=changes)
    return found.model_copy(update={"metadata": metadata, "partition": found.partition if label else None})


def verdicts(found: Selection) -> dict[str, str]:
    return {judged.path or judged.reference.rpartition("/")[2]: judged.reason for judged in found.judged}


def test_a_partition_never_takes_a_whole_gpus_profile() -> None:
    stored = [Candidate(profile(), "custom", "aim.yaml")]
    found = select(MODEL, devices("CPX/NPS4"), stored=stored)
    assert found.chosen is not None
    assert found.chosen.id == "vllm-mi300x-cpx-nps4-bf16-tp1-latency"
    assert "is for whole GPUs, this is a CPX/NPS4 partition: 24574 MiB" in verdicts(found)["aim.yaml"]


def test_eight_partitions_are_not_eight_gpus() -> None:
    stored = [Candidate(profile(gpu_count=8), "model", "tp8.yaml")]
    found = select(MODEL, devices("CPX/NPS4", 8), stored=stored)
    assert found.chosen is not None
    assert found.chosen.is_partitioned
    assert "whole GPUs" in verdicts(found)["tp8.yaml"]


def test_a_whole_gpu_takes_no_partitions_profile() -> None:
    found = select(MODEL, devices("SPX/NPS1"), stored=[Candidate(profile("CPX/NPS4"), "custom", "cpx.yaml")])
    assert found.chosen is not None
    assert not found.chosen.is_partitioned
    assert verdicts(found)["cpx.yaml"] == "is for CPX/NPS4, this is SPX/NPS1"


def test_memory_mode_and_allocation_mode_count_too() -> None:
    stored = [
        Candidate(profile("CPX/NPS1"), "custom", "nps1.yaml"),
        Candidate(profile("CPX/NPS4"), "custom", "nps4.yaml"),
    ]
    shared = Devices(by_name("MI300X").mode("CPX/NPS4"), 1, "ALL")
    reasons = verdicts(select(MODEL, shared, stored=stored))
    assert reasons["nps1.yaml"] == "is for CPX/NPS1, this is CPX/NPS4"
    assert reasons["nps4.yaml"] == "is for allocation mode CAPPING, this is ALL"


def test_a_smaller_device_than_the_profile_was_made_for_is_seen() -> None:
    small = by_name("MI300X").mode("CPX/NPS4").model_copy(update={"memory_mib": 24558})
    found = select(MODEL, Devices(small), stored=[Candidate(profile("CPX/NPS4"), "custom", "p.yaml")])
    assert verdicts(found)["p.yaml"] == "is for devices of 24574 MiB, the smallest here has 24558"
    assert found.chosen is not None
    assert found.chosen.partition is not None
    assert found.chosen.partition.device_memory_mib == 24558


def test_custom_goes_before_model_before_derived_before_general() -> None:
    general = profile("CPX/NPS4", type="general").model_copy(update={"aim_id": None, "model_id": None})
    stored = [
        Candidate(general, "general", "general.yaml"),
        Candidate(profile("CPX/NPS4"), "model", "model.yaml"),
        Candidate(profile("CPX/NPS4"), "custom", "custom.yaml"),
    ]
    found = select(MODEL, devices(), stored=stored)
    assert [judged.path or judged.origin for judged in found.judged[:3]] == ["custom.yaml", "model.yaml", "derived"]
    last = [judged for judged in found.judged if judged.verdict == "eligible"][-1]
    assert last.path == "general.yaml"
    assert last.reason == "custom goes before general"


def test_types_are_ordered_as_in_aim() -> None:
    stored = [
        Candidate(profile("CPX/NPS4", type=kind), "custom", kind) for kind in ("general", "unoptimized", "optimized")
    ]
    found = select(MODEL, devices(), stored=stored)
    assert found.judged[0].path == "optimized"


def test_the_published_weights_go_before_a_loss_while_loading() -> None:
    found = select(MODEL, devices())
    assert found.chosen is not None
    assert found.chosen.metadata.precision == "bf16"
    asked = select(MODEL, devices(), Wish(precision="fp8"))
    assert asked.chosen is not None
    assert asked.chosen.metadata.precision == "fp8"


def test_weights_that_do_not_exist_are_never_chosen_by_themselves() -> None:
    found = select(MODEL, devices(), Wish(precision="int4"))
    assert found.relaxed == ("GPU count", "precision")
    assert verdicts(found)["vllm-mi300x-cpx-nps4-int4-tp1-latency"] == (
        "is for manual selection only: needs a quantised checkpoint"
    )


def test_gpu_count_is_let_go_first_and_never_exceeded() -> None:
    found = select(MODEL, devices("CPX/NPS4", 3))
    assert found.chosen is not None
    assert (found.relaxed, found.chosen.metadata.gpu_count) == (("GPU count",), 2)


def test_the_engine_is_let_go_last() -> None:
    found = select(MODEL, devices(), Wish(engine="llama_cpp"))
    assert found.relaxed == ("GPU count", "precision", "engine")
    assert found.chosen is not None
    assert found.chosen.metadata.engine == "vllm"


def test_nothing_matching_is_an_answer_with_reasons() -> None:
    found = select(by_id("deepseek-ai/DeepSeek-R1"), devices("CPX/NPS4"))
    assert found.chosen is None
    assert any("short by" in judged.reason for judged in found.judged if judged.verdict == "refused")
    assert all(judged.reason for judged in found.judged)


def test_a_model_that_is_not_sized_says_so() -> None:
    found = select(by_id("OdiaGenAI-LLM/qwen_1.5_odia_7b"), devices())
    assert found.chosen is None
    assert found.judged[-1].reason.startswith("known, not sized")


def test_metric_and_model_are_never_let_go() -> None:
    other = profile("CPX/NPS4").model_copy(update={"aim_id": "Qwen/Qwen3-8B", "model_id": "Qwen/Qwen3-8B"})
    stored = [Candidate(profile("CPX/NPS4"), "custom", "latency.yaml"), Candidate(other, "custom", "other.yaml")]
    found = select(MODEL, devices(), Wish(metric="throughput"), stored)
    assert found.chosen is not None
    assert found.chosen.metadata.metric == "throughput"
    assert verdicts(found)["latency.yaml"] == "metric is latency, asked for throughput"
    assert verdicts(select(MODEL, devices(), stored=stored))["other.yaml"] == "is for Qwen/Qwen3-8B"


def test_folders_are_laid_out_as_aims(tmp_path: Path) -> None:
    for place in ("custom/mine", "meta-llama/Llama-3.1-8B-Instruct", "general", "Qwen/Qwen3-8B"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "p.yaml").write_text(write(profile("CPX/NPS4"), "ours"), encoding="utf-8")
    found = stored_profiles(tmp_path, MODEL.id)
    assert [candidate.origin for candidate in found] == ["custom", "model", "general"]
    flat = stored_profiles(tmp_path / "general", MODEL.id)
    assert [candidate.origin for candidate in flat] == ["custom"]
    (tmp_path / "general" / "p.yaml").write_text("nonsense: 1", encoding="utf-8")
    with pytest.raises(ProfileError, match=r"general/p\.yaml"):
        stored_profiles(tmp_path, MODEL.id)
    with pytest.raises(ProfileError, match="no such directory"):
        stored_profiles(tmp_path / "absent", MODEL.id)
