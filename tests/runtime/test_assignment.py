"""Settings, a node and a model become an assignment, or one line that says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aim_kserve.errors import StartupError
from aim_profile.gpus.catalog import PartitionMode, catalog
from aim_profile.nodes.emulated import emulate, export_node
from aim_profile.nodes.facts import Node
from aim_profile.units import GIB
from aim_runtime.assignment import Assignment, Refused
from aim_runtime.choose import spec_of
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import is_pod, prepare
from model_directory import write_model

MODES = [mode for accelerator in catalog().values() for mode in accelerator.modes("bare-metal")]
CPX = "CPX/NPS4"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-3.1-8B in bf16: 14.957 GiB of weights, 131072 bytes of cache a token."""
    return write_model(tmp_path_factory.mktemp("llama") / "8b")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape, with weights that fit anywhere."""
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny", parameters=10**9)


def load(*argv: str, **env: str) -> RuntimeSettings:
    return RuntimeSettings.load(argv, env, prog="aim-runtime", description="")


def saved(node: Node, folder: Path) -> Path:
    file = folder / "node.yaml"
    file.write_text(export_node(node))
    return file


class Machine:
    """An emulated node in a file, and what is assigned on it."""

    def __init__(self, folder: Path, node: Node | None = None, **emulated: Any) -> None:
        self.node = node or emulate(**{"gpu": "MI300X", "cards": 2, "partition": CPX, **emulated})
        self.file = saved(self.node, folder)

    def assign(self, model: Path, *argv: str, pod: bool = False, **env: str) -> Assignment:
        binding = "pod" if pod else "bare-metal"
        given = ["--node", str(self.file), "--model_dir", str(model), "--binding", binding, *argv]
        return prepare(load(*given, **env), {})

    def refusal(self, model: Path, *argv: str, pod: bool = False, **env: str) -> Refused:
        with pytest.raises(Refused) as caught:
            self.assign(model, *argv, pod=pod, **env)
        return caught.value


@pytest.fixture
def cpx(tmp_path: Path) -> Machine:
    """Two MI300X in CPX/NPS4: 16 devices of 24574 MiB."""
    return Machine(tmp_path)


# --- every GPU and mode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.accelerator}-{mode.label}")
def test_every_mode_of_every_gpu_gets_its_arguments(mode: PartitionMode, tiny: Path, tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=mode.accelerator, partition=mode.label)
    found = machine.assign(tiny, "--max_model_len", "4096")
    (device,) = found.devices
    assert (device.card, device.partition) == (0, 0)
    assert (device.memory_mib, device.compute_units) == (mode.memory_mib, mode.cus)
    assert (found.evidence.gpu, found.evidence.mode) == (mode.accelerator, mode.label)
    assert found.evidence.tier == mode.tier
    flags = found.engine_args
    assert (flags["tensor-parallel-size"], flags["max-model-len"], flags["gpu-memory-utilization"]) == (1, 4096, 0.9)
    assert found.env["ROCR_VISIBLE_DEVICES"] == "0"
    # Not one sequence more than the sum allows.
    room = mode.memory_bytes * 0.9 - 2e9 * 1.02 - 2.3 * GIB
    assert flags["max-num-seqs"] == min(512, int(room // (4096 * 131072)))
    assert found.fit["fits"] is True


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.accelerator}-{mode.label}")
def test_another_mode_is_refused_on_every_gpu(mode: PartitionMode, tiny: Path, tmp_path: Path) -> None:
    other = "DPX" if mode.compute == "SPX" else "SPX"
    machine = Machine(tmp_path, gpu=mode.accelerator, partition=mode.label)
    for pod in (True, False):
        refused = machine.refusal(tiny, "--compute_partition", other, pod=pod)
        assert (refused.field, refused.value) == ("compute-partition", other)
        assert f"card 0 is {mode.accelerator} {mode.label}" in str(refused)
        assert refused.remedy


# --- which devices --------------------------------------------------------------------------------------------------


def test_bare_metal_binds_by_card_and_partition(cpx: Machine, tiny: Path) -> None:
    found = cpx.assign(tiny, "--card", "1", "--partition_id", "3")
    assert [device.at for device in found.devices] == [(1, 3)]
    assert found.env["ROCR_VISIBLE_DEVICES"] == "11"
    assert "no card 2" in str(cpx.refusal(tiny, "--card", "2"))
    refused = cpx.refusal(tiny, "--partition_id", "8")
    assert refused.field == "partition-id"
    assert "partitions 0-7 here" in str(refused)


def test_a_model_over_partitions_gets_siblings_and_is_unproven(cpx: Machine, llama: Path) -> None:
    found = cpx.assign(llama, "--partition_count", "4", "--partition_id", "4")
    assert [device.at for device in found.devices] == [(0, 4), (0, 5), (0, 6), (0, 7)]
    assert found.engine_args["tensor-parallel-size"] == 4
    assert found.evidence.unproven
    assert found.env["ROCR_VISIBLE_DEVICES"] == "4,5,6,7"
    refused = cpx.refusal(llama, "--partition_count", "4", "--partition_id", "5")
    assert "no card has so many of MI300X CPX/NPS4 side by side here from partition 5 on" in str(refused)


def test_hsa_numbers_devices_as_kfd_does(tmp_path: Path, tiny: Path) -> None:
    """A card whose KFD nodes come first is numbered first, wherever it stands on the bus."""
    node = emulate("MI300X", cards=2, partition="SPX/NPS1")
    cards = tuple(
        card.model_copy(update={"partitions": (card.partitions[0].model_copy(update={"kfd_node": 9 - card.index}),)})
        for card in node.cards
    )
    machine = Machine(tmp_path, node.model_copy(update={"cards": cards}))
    assert machine.assign(tiny, "--card", "0").env["ROCR_VISIBLE_DEVICES"] == "1"
    assert machine.assign(tiny, "--card", "1").env["ROCR_VISIBLE_DEVICES"] == "0"


def test_in_a_pod_no_device_is_hidden_a_second_time(tmp_path: Path, tiny: Path) -> None:
    pod = Machine(tmp_path, visible_in_a_pod(emulate("MI300X", cards=2, partition=CPX), (1, 3), (1, 4)))
    found = pod.assign(tiny, "--partition_count", "2", pod=True)
    assert not [name for name in found.env if "VISIBLE" in name]
    # Numbered among those that are here: the engine would take the first else, whatever was assigned.
    assert pod.assign(tiny, "--partition_id", "4", pod=True).env["ROCR_VISIBLE_DEVICES"] == "1"


def visible_in_a_pod(node: Node, *devices: tuple[int, int]) -> Node:
    """The node as a container sees it that the plugin gave these devices."""
    cards = [
        card.model_copy(update={"partitions": tuple(p for p in card.partitions if (card.index, p.index) in devices)})
        for card in node.cards
    ]
    return node.model_copy(update={"cards": tuple(card for card in cards if card.partitions)})


def test_in_a_pod_what_is_here_is_used(tmp_path: Path, tiny: Path) -> None:
    whole = emulate("MI300X", cards=2, partition=CPX)
    pod = Machine(tmp_path, visible_in_a_pod(whole, (1, 3)))
    found = pod.assign(
        tiny, "--compute_partition", "cpx", "--memory_partition", "nps4", "--partition_id", "0", pod=True
    )
    assert [device.at for device in found.devices] == [(1, 3)]
    assert "partition-id 0 is not here: the device plugin has chosen 3" in found.evidence.notes


def test_in_a_pod_the_device_count_must_be_the_one_asked_for(tmp_path: Path, tiny: Path) -> None:
    whole = emulate("MI300X", cards=2, partition=CPX)
    pod = Machine(tmp_path, visible_in_a_pod(whole, (0, 0), (0, 1)))
    assert len(pod.assign(tiny, "--partition_count", "2", pod=True).devices) == 2
    refused = pod.refusal(tiny, "--partition_count", "4", pod=True)
    assert str(refused).startswith("partition-count 4: 2 devices are here (MI300X CPX/NPS4); request 4 of them")
    unsaid = pod.assign(tiny, pod=True)
    assert len(unsaid.devices) == 1
    assert "1 of the 2 devices here stay unused" in unsaid.evidence.notes


def test_tensor_parallelism_never_spans_cards_by_partitions(tmp_path: Path, tiny: Path) -> None:
    pod = Machine(tmp_path, visible_in_a_pod(emulate("MI300X", cards=2, partition=CPX), (0, 0), (1, 0)))
    refused = pod.refusal(tiny, "--partition_count", "2", pod=True)
    assert "no card has so many of MI300X CPX/NPS4 side by side" in str(refused)
    assert "parentDeviceID" in refused.remedy


def test_a_mixture_of_devices(tmp_path: Path, tiny: Path) -> None:
    mixed = emulate("MI300X", cards=2, partition=CPX)
    other = emulate("MI300X", cards=2, partition="SPX/NPS1")
    machine = Machine(tmp_path, mixed.model_copy(update={"cards": (mixed.cards[0], other.cards[1])}))
    assert "devices of 2 kinds are here" in str(machine.refusal(tiny, pod=True))
    found = machine.assign(tiny, "--compute_partition", "SPX")
    assert [device.at for device in found.devices] == [(1, 0)]
    assert found.env["ROCR_VISIBLE_DEVICES"] == "8"


def test_a_model_too_large_for_the_first_kind_gets_the_next(tmp_path: Path, llama: Path) -> None:
    small, large = emulate("MI300X", cards=2, partition=CPX), emulate("MI300X", cards=2, partition="SPX/NPS1")
    machine = Machine(tmp_path, small.model_copy(update={"cards": (small.cards[0], large.cards[1])}))
    found = machine.assign(llama, "--max_model_len", "131072")
    assert [device.at for device in found.devices] == [(1, 0)]


# --- does it fit ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_says_by_how_much_and_what_would(
    cpx: Machine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    large = write_model(tmp_path_factory.mktemp("large") / "70b", 35 * 10**9)
    refused = cpx.refusal(large, "--partition_count", "1")
    # 70e9 bytes * 1.02 + 2.3 GiB + 1 GiB of cache - 0.9 * 24574 MiB
    assert refused.shortfall_gib == pytest.approx(70e9 * 1.02 / GIB + 2.3 + 1 - 0.9 * 24574 / 1024, abs=0.002)
    assert f"short by {refused.shortfall_gib} GiB" in str(refused)
    assert any("on 4 devices" in option for option in refused.would_fit)
    assert str(refused).count("\n") == 0


def test_the_fewest_devices_that_hold_it(cpx: Machine, tmp_path: Path) -> None:
    large = write_model(tmp_path / "30b", 20 * 10**9)
    found = cpx.assign(large)
    assert len(found.devices) == found.engine_args["tensor-parallel-size"] == 4


def test_more_devices_than_are_here_is_a_shortfall(tmp_path: Path) -> None:
    large = write_model(tmp_path / "30b", 20 * 10**9)
    pod = Machine(tmp_path, visible_in_a_pod(emulate("MI300X", cards=1, partition=CPX), (0, 2)))
    refused = pod.refusal(large, pod=True)
    assert refused.shortfall_gib
    assert refused.shortfall_gib > 15
    assert any("on 4 devices" in option for option in refused.would_fit)


@pytest.mark.parametrize(
    ("argv", "field", "says"),
    [
        (["--memory_limit", "40GB"], "memory-limit", "one MI300X CPX/NPS4 has 23.998 GiB, 13.255 GiB less"),
        (["--memory_limit", "4GiB"], "model", "short by"),
        (["--max_model_len", "200000"], "max-model-len", "131072 positions"),
        (["--max_concurrency", "100", "--partition_count", "1"], "model", "concurrency 4"),
        (["--gpu_sharing", "disabled"], "gpu-sharing", "is a part of a card"),
        (["--memory_partition", "NPS1"], "memory-partition", "card 0 is MI300X CPX/NPS4"),
        (["--gpu_model", "MI355X"], "gpu-model", "the GPU here is MI300X"),
        (["--gpu_model", "H100"], "gpu", "no accelerator named 'H100'"),
        (["--precision", "int4"], "precision", "the files hold bf16"),
        (["--precision", "fp32"], "precision", "nothing here is sized at it"),
        (["--engine_args", '{"pipeline-parallel-size": 2}'], "pipeline-parallel-size", "does not assign"),
        (["--engine_args=-tp 2"], "engine_args", "'-tp' is no long option"),
        (["--engine_args", '{"max-model-len": "many"}'], "max-model-len", "'many'"),
        (["--engine_args", '{"gpu-memory-utilization": 2}'], "gpu-memory-utilization", "at most 1"),
        (["--engine_args=--max-model-len 64", "--max_model_len", "32"], "max-model-len", "contradict each other"),
        (["--partition_count", "2", "--tensor_parallel_size", "4"], "partition-count", "contradict each other"),
    ],
)
def test_refusals_name_field_value_and_remedy(
    cpx: Machine, llama: Path, argv: list[str], field: str, says: str
) -> None:
    refused = cpx.refusal(llama, "--engine", "vllm", *argv)
    assert refused.field == field
    assert says in str(refused)
    assert refused.remedy


def test_an_unknown_gpu_is_refused_with_what_to_report(tmp_path: Path, tiny: Path) -> None:
    node = emulate("MI300X", cards=1)
    card = node.cards[0].model_copy(update={"pci_id": "0x75a2", "product": "unknown", "report": "report lspci"})
    refused = Machine(tmp_path, node.model_copy(update={"cards": (card,)})).refusal(tiny)
    assert (refused.field, refused.value) == ("gpu", "0x75a2")
    assert "report lspci" in str(refused)


def test_a_memory_limit_bounds_what_the_engine_takes(cpx: Machine, llama: Path) -> None:
    found = cpx.assign(llama, "--memory_limit", "20GiB", "--max_model_len", "8192")
    assert found.engine_args["gpu-memory-utilization"] == pytest.approx(20 * 1024 / 24574, abs=1e-4)
    assert found.fit["budget_gib"] == pytest.approx(20, abs=0.01)
    higher = cpx.assign(llama, "--memory_limit", "20GiB", "--engine_args=--gpu-memory-utilization=0.95")
    assert higher.engine_args["gpu-memory-utilization"] == found.engine_args["gpu-memory-utilization"]


def test_sharing_a_whole_card_needs_a_limit(tmp_path: Path, tiny: Path) -> None:
    whole = Machine(tmp_path, partition="SPX/NPS1")
    assert whole.assign(tiny, "--gpu_sharing", "disabled").devices
    assert "set memory-limit" in whole.refusal(tiny, "--gpu_sharing", "enabled").remedy
    limited = whole.assign(tiny, "--gpu_sharing", "enabled", "--memory_limit", "40GB")
    assert limited.engine_args["gpu-memory-utilization"] == pytest.approx(40e9 / (196592 * 1024**2), abs=1e-4)


def test_in_allocation_mode_all_a_device_gets_its_share(tmp_path: Path, tiny: Path) -> None:
    """Every sibling reports the whole memory partition; nothing but the arguments keeps them apart."""
    node = emulate("MI300X", cards=1, partition="CPX/NPS4")
    parts = tuple(part.model_copy(update={"memory_mib": 49148}) for part in node.cards[0].partitions)
    card = node.cards[0].model_copy(update={"alloc_mode": "ALL", "partitions": parts})
    found = Machine(tmp_path, node.model_copy(update={"cards": (card,)})).assign(tiny)
    assert found.engine_args["gpu-memory-utilization"] == pytest.approx(0.45, abs=0.001)
    assert int(str(found.engine_args["kv-cache-memory-bytes"])) < 20 * GIB
    assert found.fit["budget_gib"] == pytest.approx(0.45 * 49148 / 1024, abs=0.05)


def test_given_flags_win_and_are_sized(cpx: Machine, llama: Path) -> None:
    found = cpx.assign(llama, "--engine_args", '{"max_model_len": "4096", "max-num-seqs": 2, "enforce-eager": true}')
    flags = found.engine_args
    assert (flags["max-model-len"], flags["max-num-seqs"], flags["enforce-eager"]) == (4096, 2, True)
    assert (found.fit["context"], found.fit["concurrency"]) == (4096, 2)


def test_throughput_takes_larger_steps(cpx: Machine, llama: Path) -> None:
    assert cpx.assign(llama).engine_args["max-num-batched-tokens"] == 2048
    assert cpx.assign(llama, "--metric", "throughput").engine_args["max-num-batched-tokens"] == 8192


def test_fp8_is_quantised_at_load(cpx: Machine, llama: Path) -> None:
    found = cpx.assign(llama, "--precision", "fp8")
    assert found.engine_args["quantization"] == "fp8"
    assert found.fit["weights_gib"] == pytest.approx(14.957 / 2, abs=0.01)


def test_a_model_that_cannot_be_sized_starts_only_if_told_to(cpx: Machine, tmp_path: Path) -> None:
    strange = write_model(tmp_path / "strange", num_hidden_layers=None)
    refused = cpx.refusal(strange)
    assert refused.field
    found = cpx.assign(strange, "--unsized", "start", "--max_model_len", "512")
    assert found.fit == {}
    assert found.engine_args == {"tensor-parallel-size": 1, "max-model-len": 512, "gpu-memory-utilization": 0.9}
    assert any(note.startswith("not sized: ") for note in found.evidence.notes)


# --- profiles -------------------------------------------------------------------------------------------------------


def test_a_profile_id_says_mode_precision_and_count(cpx: Machine, llama: Path) -> None:
    found = cpx.assign(llama, "--profile", "vllm-mi300x-cpx-nps4-fp8-tp2-throughput")
    assert found.profile is not None
    assert found.profile.endswith("vllm-mi300x-cpx-nps4-fp8-tp2-throughput")
    assert len(found.devices) == 2
    refused = cpx.refusal(llama, "--profile", "vllm-mi300x-bf16-tp1-latency")
    assert (refused.field, refused.value) == ("compute-partition", "SPX")
    refused = cpx.refusal(llama, "--profile", "vllm-mi300x-cpx-nps4-fp8-tp2-latency", "--precision", "bf16")
    assert str(refused).startswith(
        "profile vllm-mi300x-cpx-nps4-fp8-tp2-latency says precision fp8, the settings say bf16"
    )


AIM_PROFILE = """
aim_id: meta-llama/Llama-3.1-8B-Instruct
model_id: meta-llama/Llama-3.1-8B-Instruct
metadata: {engine: vllm, gpu: MI300X, gpu_count: 1, manual_selection_only: false, metric: throughput, precision: bf16,
  type: optimized}
engine_args: {async-scheduling: null, disable-uvicorn-access-log: null, distributed_executor_backend: mp,
  enable-expert-parallel: false, gpu-memory-utilization: 0.92, max-model-len: 32768, max-num-seqs: 512,
  max-num-batched-tokens: 1024, no-enable-prefix-caching: null, tensor-parallel-size: 1}
env_vars: {GPU_ARCHS: gfx942, VLLM_ROCM_USE_AITER: '1'}
"""


def test_a_profile_chooses_the_engine_where_the_files_leave_it_open(cpx: Machine, tmp_path: Path) -> None:
    both = write_model(tmp_path / "both", parameters=10**9)
    (both / "also.gguf").write_bytes(b"")
    with pytest.raises(StartupError, match="choose with --engine"):
        cpx.assign(both)
    assert cpx.assign(both, "--profile", "vllm-mi300x-cpx-nps4-bf16-tp1-latency").engine == "vllm"


def test_a_profile_file_of_aims(tmp_path: Path, llama: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(AIM_PROFILE)
    whole = Machine(tmp_path, partition="SPX/NPS1")
    found = whole.assign(llama, "--profile", str(file))
    flags = found.engine_args
    assert flags["async-scheduling"] is flags["no-enable-prefix-caching"] is True
    assert flags["distributed-executor-backend"] == "mp"
    assert flags["gpu-memory-utilization"] == 0.92
    assert "enable-expert-parallel" not in flags
    assert "disable-uvicorn-access-log" not in flags
    assert any("disable-uvicorn-access-log" in note for note in found.evidence.notes)
    assert found.env == {"GPU_ARCHS": "gfx942", "VLLM_ROCM_USE_AITER": "1", "ROCR_VISIBLE_DEVICES": "0"}


def test_a_whole_gpus_profile_never_serves_a_partition(cpx: Machine, tmp_path: Path, llama: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(AIM_PROFILE)
    refused = cpx.refusal(llama, "--profile", str(file))
    assert refused.field == "profile"
    assert "is for whole GPUs, this is a CPX/NPS4 partition: 24574 MiB, 38 compute units" in str(refused)


def test_profiles_are_selected_from_aims_folder(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "profiles" / "meta-llama" / "Llama-3.1-8B-Instruct"
    folder.mkdir(parents=True)
    (folder / "vllm-mi300x-bf16-tp1-throughput.yaml").write_text(AIM_PROFILE)
    whole = Machine(tmp_path, partition="SPX/NPS1")
    given = ["--profiles", str(tmp_path / "profiles"), "--model_id", "meta-llama/Llama-3.1-8B-Instruct"]
    found = whole.assign(llama, *given, "--metric", "throughput")
    assert found.profile == "meta-llama/Llama-3.1-8B-Instruct/vllm-mi300x-bf16-tp1-throughput"
    assert found.engine_args["max-num-batched-tokens"] == 1024
    derived = whole.assign(llama, *given)  # none is stored for latency
    assert derived.engine_args["max-num-batched-tokens"] == 2048
    by_id = whole.assign(llama, *given, AIM_PROFILE_ID="vllm-mi300x-bf16-tp1-throughput")
    assert by_id.engine_args == found.engine_args


# --- to the engine --------------------------------------------------------------------------------------------------


def test_the_engine_gets_the_assignment_and_nothing_from_the_device_count(cpx: Machine, llama: Path) -> None:
    argv = ["--node", str(cpx.file), "--model_dir", str(llama), "--binding", "bare-metal", "--model_name", "chat"]
    settings = load(*argv)
    spec = spec_of(settings, prepare(settings, {}))
    assert (spec.engine, spec.served_model_name, spec.max_model_len, spec.max_concurrency) == ("vllm", "chat", 8192, 4)
    assert spec.options["tensor_parallel_size"] == 1
    flags = spec.options["engine_args"]
    assert flags["gpu-memory-utilization"] == 0.9
    assert not {"tensor-parallel-size", "max-model-len", "max-num-seqs"} & set(flags)


def test_sglang_gets_its_own_names_for_the_same_sum(cpx: Machine, llama: Path) -> None:
    argv = ["--node", str(cpx.file), "--model_dir", str(llama), "--binding", "bare-metal", "--engine", "sglang"]
    settings = load(*argv, "--engine_args", '{"attention-backend": "aiter"}', "--mem_fraction_static", "0.8")
    found = prepare(settings, {})
    spec = spec_of(settings, found)
    assert (spec.engine, spec.max_model_len, spec.max_concurrency) == (
        "sglang",
        8192,
        found.engine_args["max-num-seqs"],
    )
    assert spec.options["tensor_parallel_size"] == 1
    assert spec.options["mem_fraction_static"] == found.fit["utilization"] == 0.8
    assert spec.options["engine_args"] == {"attention-backend": "aiter", "dtype": "bfloat16"}
    assert not [name for name in found.env if name.startswith("VLLM_")]
    assert "ROCR_VISIBLE_DEVICES" in found.env


@pytest.mark.parametrize(
    "argv", [["--engine", "openai_server", "--server_url", "http://127.0.0.1:1"], ["--engine", "sglang"]]
)
def test_what_is_given_no_devices_is_started_as_its_settings_say(argv: list[str], tmp_path: Path) -> None:
    node = tmp_path / "cpu.yaml"
    node.write_text("version: 1\nkind: cpu\ncores: 2\nmemory: 4GiB\npartitions: 1\n")
    settings = load(*argv, "--node", str(node), "--max_model_len", "99", "--max_concurrency", "3")
    assert spec_of(settings, prepare(settings, {})) == spec_of(settings)


@pytest.mark.parametrize("name", ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"])
def test_a_filter_that_is_set_already(cpx: Machine, tiny: Path, name: str) -> None:
    argv = ["--node", str(cpx.file), "--model_dir", str(tiny)]
    with pytest.raises(Refused, match=f"{name}=1 is set"):
        prepare(load(*argv, "--binding", "bare-metal"), {name: "1"})
    found = prepare(load(*argv, "--binding", "pod"), {name: "0"})
    assert any(note.startswith(f"{name} is set") for note in found.evidence.notes)


def test_what_the_environment_says_stays(cpx: Machine, tiny: Path) -> None:
    settings = load("--node", str(cpx.file), "--model_dir", str(tiny))
    found = prepare(settings, {"VLLM_ROCM_USE_AITER": "0"})
    assert "VLLM_ROCM_USE_AITER" not in found.env
    assert "VLLM_ROCM_USE_AITER=0 stays as it is set, the profile says 1" in found.evidence.notes


def test_a_pod_is_known_by_the_kubelets_variable(cpx: Machine, tiny: Path) -> None:
    assert is_pod(load(), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert not is_pod(load(), {})
    assert not is_pod(load("--node", str(cpx.file)), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})


def test_without_a_gpu_a_part_of_one_cannot_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(StartupError, match="compute-partition CPX: "):
        prepare(load("--model_dir", str(tmp_path), "--compute_partition", "CPX"), {})


# --- the process ----------------------------------------------------------------------------------------------------


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "aim_runtime", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_dry_run_prints_the_assignment_and_imports_no_server_and_no_engine(cpx: Machine, llama: Path) -> None:
    done = run("--dry-run", "-o", "json", "--node", str(cpx.file), "--model_dir", str(llama))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"engine", "model", "devices", "engine_args", "env", "fit", "profile", "evidence"} <= set(found)
    assert found["devices"] == [
        {"card": 0, "partition": 0, "memory_mib": 24574, "compute_units": 38, "render_minor": None}
    ]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"kserve", "vllm", "torch", "llama_cpp", "uvicorn", "starlette", "fastapi"}


def test_dry_run_for_people(cpx: Machine, llama: Path) -> None:
    done = run("--dry_run", "--node", str(cpx.file), "--model_dir", str(llama))
    lines = done.stdout.splitlines()
    assert lines[0] == "model model: vllm on card 0 partition 0 (MI300X CPX/NPS4)"
    assert "  --max-num-seqs 4" in lines
    assert "  ROCR_VISIBLE_DEVICES=0" in lines


@pytest.mark.parametrize("dry", [True, False])
def test_a_refused_start_is_one_line_here_and_in_the_termination_log(
    cpx: Machine, llama: Path, tmp_path: Path, dry: bool
) -> None:
    log = tmp_path / "termination-log"
    argv = ["--node", str(cpx.file), "--model_dir", str(llama), "--memory_limit", "40GB", "--termination_log", str(log)]
    done = run(*argv, *(["--dry_run", "-o", "json"] if dry else []))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: memory-limit 37.253 GiB: one MI300X CPX/NPS4 has 23.998 GiB, 13.255 GiB less; ")
    assert log.read_text() == line.removeprefix("error: ")
    if dry:
        assert json.loads(done.stdout)["refused"]["shortfall_gib"] == 13.255
    else:
        assert done.stdout == ""


def evidence_file(folder: Path, model: Path, **hardware: Any) -> Path:
    """As `aim-runtime measure` writes it, of the model in bf16 on vLLM."""
    percentiles = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    counts = {"answered": 9, "requests_per_s": 1.0, "output_tokens_per_s": 9.0, "prompt_tokens": 9, "output_tokens": 9}
    lengths = {"prompt_tokens": "constant:1", "output_tokens": "constant:1", "prompts": "sha256:0", "seed": 1}
    measured = {
        "version": 1,
        "model": str(model),
        "served_as": "m",
        "precision": "bf16",
        "hardware": {"told_by": "node", "gpu": "MI300X", "partition": CPX, "gpu_count": 4, **hardware},
        "engine": {"name": "vllm"},
        "load": {"generator": "g", "arrivals": "poisson", **lengths, "warm_up": 0, "requests": 9, "duration_s": 9.0},
        "points": [{"offered": 1.0, "duration_s": 9.0, **counts, "ttft_ms": percentiles}],
        "command": "c",
        "date": "2026-01-02T03:04:05Z",
        "tool": "t",
    }
    file = folder / "evidence.json"
    file.write_text(json.dumps({"measurements": [measured]}))
    return file


def test_what_was_measured_is_said_and_evidence_of_other_hardware_refused(
    cpx: Machine, llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "evidence"
    folder.mkdir()
    split = ("--partition_count", "4")
    file = evidence_file(folder, llama)
    for where in (file, folder):
        found = cpx.assign(llama, *split, "--evidence", str(where)).evidence
        assert (found.measured, found.unproven) == (True, True)
    evidence_file(folder, llama, gpu="MI325X")
    refused = cpx.refusal(llama, *split, "--evidence", str(file))
    assert (refused.field, refused.value) == ("measurements[0].hardware.gpu", "MI325X")
    assert refused.remedy.startswith("give evidence measured there")
    elsewhere = cpx.assign(llama, *split, "--evidence", str(folder)).evidence
    assert (elsewhere.measured, elsewhere.unproven) == (False, True)
    assert any("hardware.gpu MI325X, this is MI300X" in note for note in elsewhere.notes)
