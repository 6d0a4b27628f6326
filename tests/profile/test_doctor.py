"""`aim-profile doctor`: a healthy node, and one fault at a time, each named with its remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.doctor.finding import Finding
from aim_profile.doctor.process import shared_memory, variables
from aim_profile.doctor.system import System
from aim_profile.nodes.read import emulate, export_node
from sysfs_tree import write_mi300x_cpx, write_sysfs_card

NODES = "sys/class/kfd/kfd/topology/nodes"
PCI = "sys/bus/pci/drivers/amdgpu"
CPX = {
    "vendor": "0x1002",
    "class": "0x120000",
    "device": "0x74a1",
    "available_compute_partition": "SPX, DPX, QPX, CPX",
    "current_compute_partition": "CPX",
    "available_memory_partition": "NPS1, NPS4",
    "current_memory_partition": "NPS4",
    "mem_info_vram_total": "206141652992",
    "numa_node": "1",
}
KUBE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {
        "name": "node-1",
        "labels": {
            "amd.com/gpu.device-id": "74a1",
            "amd.com/gpu.cu-count": "38",
            "amd.com/gpu.compute-memory-partition": "cpx_nps4",
            "amd.com/gpu.driver-version": "6.12.12",
            "dcm.amd.com/gpu-config-profile-state": "success",
        },
    },
    "spec": {"podCIDR": "10.0.0.0/24"},
    "status": {
        "allocatable": {"cpu": "96", "amd.com/cpx_nps4": "16"},
        "conditions": [{"type": "Ready", "status": "True"}],
    },
}


def write(root: Path, name: str, text: str, mode: int = 0o644) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A recording of all that is looked at: two MI300X in CPX/NPS4."""
    root = tmp_path / "tree"
    write_mi300x_cpx(root / NODES, cards=2)
    for bdf in ("0000:05:00.0", "0000:16:00.0"):
        write_sysfs_card(root / PCI, bdf, **CPX)
    write(root, "etc/hostname", "node-1\n")
    write(root, "proc/cpuinfo", "flags : fpu\n")
    write(root, "proc/sys/kernel/osrelease", "6.8.0-45-generic\n")
    write(root, "proc/mounts", "tmpfs /dev/shm tmpfs rw,nosuid,size=16777216k 0 0\n")
    write(root, "sys/module/amdgpu/version", "6.12.12\n")
    write(root, "sys/module/amdgpu/initstate", "live\n")
    write(root, "opt/rocm/.info/version", "6.4.1-83\n")
    for name in ("kfd", *(f"dri/renderD{minor}" for minor in range(128, 144))):
        write(root, f"dev/{name}", "", 0o666)
    return root


def examined(*arguments: object, code: int = 0) -> list[Finding]:
    found = CliRunner().invoke(app, ["doctor", *map(str, arguments), "-o", "json"])
    assert found.exit_code == code, (found.output, found.exception)
    data = json.loads(found.stdout)
    findings = [Finding(**one) for one in data["findings"]]
    assert sum(data["counts"].values()) == len(findings)
    for one in findings:
        assert one.where
        assert bool(one.remedy) == (one.severity != "ok"), one
    return findings


def kube_file(tmp_path: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    kube = json.loads(json.dumps(KUBE))
    change(kube)
    file = tmp_path / "kube.json"
    file.write_text(json.dumps(kube))
    return file


def only(findings: list[Finding], *severities: str) -> list[Finding]:
    return [one for one in findings if one.severity in severities]


def test_a_healthy_node_has_nothing_wrong(tree: Path, tmp_path: Path):
    findings = examined("--root", tree, "--kube-node", kube_file(tmp_path))
    assert only(findings, "error", "warning") == []
    # What a recording cannot hold, and what nobody saved: unknown, never ok.
    assert [(one.check, one.seen) for one in only(findings, "unknown")] == [
        ("witnesses", "amd-smi is not here"),
        ("variables", "another machine's environment"),
    ]
    seen = "\n".join(one.seen for one in only(findings, "ok"))
    for text in (
        "amdgpu is loaded",
        "KFD and sysfs agree on 2 cards",
        "CPX/NPS4 is validated on bare-metal",
        "amdgpu 6.12.12",
        "ROCm 6.4.1",
        "kernel 6.8.0",
        "/dev/kfd and 16 render nodes",
        "16.0 GiB",
        "amd.com/cpx_nps4: 16, as the kernel shows",
    ):
        assert text in seen


def remove(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


def put(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: write(root, name, text)


def fewer_kfd_nodes(root: Path) -> None:
    for number in (16, 17):
        for file in sorted((root / NODES / str(number)).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (root / NODES / str(number)).rmdir()


def a_card_of_vfio(root: Path) -> None:
    folder = root / "sys/bus/pci/devices/0000:27:00.0"
    write_sysfs_card(folder.parent, folder.name, vendor="0x1002", device="0x74a1", uevent="DRIVER=vfio-pci")


@pytest.mark.parametrize(
    ("fault", "check", "severity", "seen", "remedy"),
    [
        (put("sys/module/amdgpu/initstate", "coming"), "driver", "error", "not live", "dmesg"),
        (a_card_of_vfio, "driver", "error", "0x74a1 at 0000:27:00.0 is bound to vfio-pci", "virtual machine"),
        (put("sys/module/amdgpu/version", "6.10.5"), "versions", "error", "amdgpu 6.10.5", "update amdgpu to 6.12.12"),
        (put("opt/rocm/.info/version", "6.3.4-1"), "versions", "error", "ROCm 6.3.4", "update ROCm to 6.4"),
        (put("opt/rocm/.info/version", "7.0.1"), "versions", "warning", "miscount", "1.31.0.9"),
        (put(f"{PCI}/0000:16:00.0/current_compute_partition", "SPX"), "witnesses", "error", "SPX by sysfs", "restart"),
        (put(f"{PCI}/0000:16:00.0/current_memory_partition", "NPS1"), "modes", "error", "NPS1 and NPS4", "amd-smi set"),
        (put(f"{PCI}/0000:16:00.0/current_compute_partition", "?"), "witnesses", "error", "none of SPX", "record"),
        (put(f"{PCI}/0000:05:00.0/compute_partition_mem_alloc_mode", "ALL"), "modes", "warning", "ALL", "CAPPING"),
        (put(f"{NODES}/4/properties", "simd_count 152"), "witnesses", "error", "truncated: no simd_per_cu", "record"),
        (fewer_kfd_nodes, "cards", "error", "6 devices: CPX makes 8", "reload the driver"),
        (remove("dev/kfd"), "device files", "error", "/dev/kfd is not there", "dmesg"),
        (remove("dev/dri/renderD140"), "device files", "error", "renderD140 is not there", "device plugin"),
        (lambda root: (root / "dev/kfd").chmod(0o600), "device files", "error", "may not be read", "`render`"),
        (put("proc/mounts", "shm /dev/shm tmpfs rw,size=65536k 0 0"), "shared memory", "warning", "64 MiB", "8Gi"),
    ],
)
def test_each_fault_is_named_with_its_remedy(
    tree: Path, fault: Callable[[Path], object], check: str, severity: str, seen: str, remedy: str
):
    fault(tree)
    findings = examined("--root", tree, code=1 if severity == "error" else 0)
    assert [one for one in findings if (one.check, one.severity) == (check, severity)] != []
    named = [one for one in only(findings, severity) if one.check == check and seen in one.seen]
    assert named, only(findings, "error", "warning")
    assert remedy in named[0].remedy


@pytest.mark.parametrize(
    ("file", "check"),
    [
        ("sys/module/amdgpu/version", "versions"),
        ("opt/rocm/.info/version", "versions"),
        ("proc/sys/kernel/osrelease", "versions"),
        ("proc/mounts", "shared memory"),
        ("proc/cpuinfo", "modes"),
    ],
)
def test_what_cannot_be_read_is_unknown(tree: Path, file: str, check: str):
    before = {one.seen for one in only(examined("--root", tree), "unknown") if one.check == check}
    (tree / file).unlink()
    after = [one for one in examined("--root", tree) if one.check == check and one.severity == "unknown"]
    assert [one for one in after if one.seen not in before] != []


def test_what_a_garbled_file_holds_is_not_repeated(tree: Path):
    write(tree, f"{NODES}/3/properties", "simd_count hf_abcdefghijklmnop\n")
    assert "hf_abc" not in "".join(one.seen + one.where for one in examined("--root", tree, code=1))


def set_in(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(kube: dict[str, Any]) -> None:
        inner = kube
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "check", "severity", "seen", "remedy"),
    [
        (set_in("status", "allocatable", value={"amd.com/cpx_nps4": "12"}), "allocatable", "error", "shows 16", "#157"),
        (
            set_in("status", "allocatable", value={"amd.com/spx_nps1": 16}),
            "allocatable",
            "error",
            "make amd.com/cpx",
            "",
        ),
        (set_in("status", "allocatable", value={"cpu": "96"}), "allocatable", "error", "nothing of amd.com", "DRA"),
        (set_in("status", "allocatable", value={"amd.com/gpu": "16"}), "allocatable", "ok", "amd.com/gpu: 16", ""),
        (set_in("metadata", "labels", value={"a": "b"}), "labels", "warning", "none of AMD's", "node labeller"),
        (
            set_in("metadata", "labels", "amd.com/gpu.compute-memory-partition", value="spx_nps1"),
            *("labels", "error", "spx_nps1, the node is cpx_nps4", "#420"),
        ),
        (
            set_in("metadata", "labels", "amd.com/gpu.driver-version", value="6.10.5"),
            *("labels", "error", "6.10.5, the node is 6.12.12", "labeller"),
        ),
        (
            set_in("metadata", "labels", "dcm.amd.com/gpu-config-profile-state", value="failure"),
            *("labels", "error", "last switch: failure", "/dev/kfd"),
        ),
        (
            set_in("metadata", "labels", "amd.com/gpu.driver-version", value="6.12.12-2202139.22.04"),
            *("labels", "ok", "as the node is", ""),
        ),
        (set_in("spec", "unschedulable", value=True), "node", "warning", "cordoned", "uncordon"),
        (set_in("spec", "taints", value=[{"key": "amd-dcm", "effect": "NoExecute"}]), "node", "warning", "amd-dcm", ""),
        (set_in("status", "conditions", value=[]), "node", "unknown", "no Ready", ""),
        (
            set_in("status", "conditions", value=[{"type": "Ready", "status": "False"}]),
            *("node", "error", "Ready is False", "kubelet"),
        ),
        (set_in("metadata", "name", value="node-2"), "node", "warning", "node-2", "the node"),
    ],
)
def test_what_kubernetes_says_is_held_against_the_kernel(
    tree: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    check: str,
    severity: str,
    seen: str,
    remedy: str,
):
    findings = examined("--root", tree, "--kube-node", kube_file(tmp_path, change), code=int(severity == "error"))
    wrong = [one for one in findings if one.check in ("allocatable", "labels", "node") and one.severity == severity]
    assert [one for one in wrong if one.check == check and seen in one.seen and remedy in one.remedy] != []
    assert severity == "ok" or len(wrong) == 1


@pytest.mark.parametrize(
    ("devices", "plugin", "severity", "seen"),
    [
        (16, False, "ok", "16 devices by the DRA driver"),
        (15, False, "error", "15 devices by the DRA driver, but the kernel shows 16"),
        (16, True, "error", "and resources of the device plugin"),
    ],
)
def test_the_dra_drivers_devices_stand_in_slices(
    tree: Path, tmp_path: Path, devices: int, plugin: bool, severity: str, seen: str
):
    spec = {"driver": "gpu.amd.com", "nodeName": "node-1", "pool": {"name": "node-1"}}
    of_node = {"kind": "ResourceSlice", "spec": {**spec, "devices": [{"name": f"gpu-{n}"} for n in range(devices)]}}
    other = {"kind": "ResourceSlice", "spec": {**spec, "nodeName": "node-2", "devices": [{"name": "gpu-0"}]}}
    slices = tmp_path / "slices.json"
    slices.write_text(json.dumps({"kind": "List", "items": [of_node, other]}))
    change = (lambda _: None) if plugin else set_in("status", "allocatable", value={"cpu": "96"})
    findings = examined(
        *("--root", tree, "--kube-node", kube_file(tmp_path, change), "--resource-slices", slices),
        code=int(severity == "error"),
    )
    (found,) = (one for one in findings if one.check == "allocatable")
    assert found.severity == severity
    assert seen in found.seen


@pytest.mark.parametrize(
    ("environment", "severity", "seen"),
    [
        ({}, "ok", "nothing hides"),
        ({"ROCR_VISIBLE_DEVICES": "3"}, "ok", "no contradiction"),
        ({"ROCR_VISIBLE_DEVICES": "GPU-1,GPU-2", "HIP_VISIBLE_DEVICES": "1"}, "ok", "no contradiction"),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, "error", "differ"),
        ({"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "4,5"}, "error", "leaves 2, numbered from 0"),
        ({"ROCR_VISIBLE_DEVICES": "8"}, "error", "device 8 of 8"),
        ({"HIP_VISIBLE_DEVICES": ""}, "warning", "set to nothing"),
        ({"HIP_VISIBLE_DEVICES": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "warning", "set in a pod"),
        ({"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}, "warning", "kernels of another GPU"),
    ],
)
def test_variables_are_set_against_each_other(environment: dict[str, str], severity: str, seen: str):
    (found,) = variables(System(Path("/"), live=True, environment=environment), 8)
    assert found.severity == severity
    assert seen in found.seen


def test_shared_memory_of_this_machine_is_measured():
    assert shared_memory(System(Path("/"), live=True)).severity in ("ok", "warning")


def emulated(tmp_path: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    raw = yaml.safe_load(export_node(emulate("MI300X", 2, "CPX/NPS4", name="node-1")))
    change(raw["node"])
    file = tmp_path / "node.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def card(number: int, **facts: object) -> Callable[[dict[str, Any]], object]:
    return lambda node: node["cards"][number].update(facts)


def test_a_healthy_emulated_node_has_nothing_wrong(tmp_path: Path):
    findings = examined("--node", emulated(tmp_path), "--kube-node", kube_file(tmp_path))
    assert only(findings, "error", "warning") == []
    # An emulated node has no driver, no files and no processes: none of that is ok.
    checks = ("driver", "witnesses", "versions", "device files", "shared memory", "variables")
    assert {one.check for one in only(findings, "unknown")} == set(checks)
    assert {one.check for one in only(findings, "ok")}.isdisjoint(checks)


@pytest.mark.parametrize(
    ("change", "severity", "seen", "remedy"),
    [
        (card(1, memory_partition="NPS1"), "error", "cards in NPS1 and NPS4", "one memory mode"),
        (card(1, compute_partition="DPX"), "error", "DPX/NPS4, 8 devices: DPX makes 2", "reload"),
        (card(0, partitions=[]), "error", "0 devices: CPX makes 8", "reload"),
        (card(1, alloc_mode="ALL"), "warning", "allocation mode ALL", "CAPPING"),
        (card(1, pci_id="0x75a2", product="unknown"), "unknown", "unknown, CPX/NPS4", "amd-smi"),
        (lambda node: node.update(deployment="passthrough"), "error", "unsupported on passthrough", "passthrough"),
    ],
)
def test_broken_emulated_nodes(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], severity: str, seen: str, remedy: str
):
    findings = examined("--node", emulated(tmp_path, change), code=int(severity == "error"))
    assert [one for one in only(findings, severity) if seen in one.seen and remedy in one.remedy] != []


def test_saved_amd_smi_output_speaks_for_its_node_not_for_this_machine(tmp_path: Path):
    saved = tmp_path / "static.json"
    asic = {"device_id": "0x74a1", "num_compute_units": 304}
    partition = {"compute_partition": "SPX", "memory_partition": "NPS1", "partition_id": 0}
    bus = {"bdf": "0000:05:00.0"}
    saved.write_text(json.dumps({"gpu_data": [{"gpu": 0, "asic": asic, "bus": bus, "partition": partition}]}))
    findings = examined("--amd-smi", saved)
    assert {one.seen for one in only(findings, "ok")} == {"card 0: MI300X, SPX/NPS1, 1 device"}
    assert {one.check for one in only(findings, "unknown")} >= {"driver", "versions", "device files", "variables"}


def saved_amd_smi(file: Path, compute: str, devices: int, cards: int = 2) -> Path:
    rows = [
        {
            "gpu": card * devices + number,
            "bus": {"bdf": f"0000:{bus}:00.{number}"},
            "asic": {"device_id": "0x74a1"},
            "partition": {"compute_partition": compute, "memory_partition": "NPS4", "partition_id": number},
        }
        for card, bus in enumerate(("05", "16", "27")[:cards])
        for number in range(devices)
    ]
    file.write_text(json.dumps({"gpu_data": rows}))
    return file


@pytest.mark.parametrize(
    ("compute", "devices", "cards", "severity", "seen"),
    [
        ("CPX", 8, 2, "ok", "KFD and amd-smi agree on 2 cards"),
        ("CPX", 1, 2, "ok", "KFD and amd-smi agree on 2 cards"),
        ("CPX", 7, 2, "error", "card 1: 8 devices by KFD, 7 by amd-smi"),
        ("DPX", 2, 2, "error", "card 0: the compute partition is CPX by KFD, DPX by amd-smi"),
        ("CPX", 8, 1, "error", "KFD lists 2 cards, amd-smi 1"),
        ("CPX", 8, 3, "error", "KFD lists 2 cards, amd-smi 3"),
    ],
)
def test_saved_amd_smi_output_is_a_third_witness(
    tree: Path, tmp_path: Path, compute: str, devices: int, cards: int, severity: str, seen: str
):
    saved = saved_amd_smi(tmp_path / "static.json", compute, devices, cards)
    findings = examined("--root", tree, "--amd-smi", saved, code=int(severity == "error"))
    assert (severity, seen) in [(one.severity, one.seen) for one in findings]
    assert "card 1: MI300X, CPX/NPS4, 8 devices" in [one.seen for one in only(findings, "ok")]


def test_what_amd_smi_does_not_say_contradicts_nobody(tree: Path, tmp_path: Path):
    """`amd-smi list --json` and `static --partition --json` have no device id."""
    saved = saved_amd_smi(tmp_path / "static.json", "CPX", 8)
    rows = json.loads(saved.read_text())["gpu_data"]
    saved.write_text(json.dumps([{key: row[key] for key in ("gpu", "bus", "partition")} for row in rows]))
    assert only(examined("--root", tree, "--amd-smi", saved), "error", "warning") == []


def test_saved_output_that_is_none_leaves_the_tree_to_speak(tree: Path, tmp_path: Path):
    saved = tmp_path / "static.json"
    saved.write_text("[{")
    findings = examined("--root", tree, "--amd-smi", saved, code=1)
    assert [(one.check, one.where) for one in only(findings, "error")] == [("witnesses", str(saved))]
    assert "card 1: MI300X, CPX/NPS4, 8 devices" in [one.seen for one in only(findings, "ok")]


# Real trees, where they lie beside the checkout; a clone without them has no such tests.
RECORDED = Path(__file__).parents[3] / "shared" / "fixtures"
if RECORDED.is_dir():

    @pytest.mark.parametrize(
        ("recorded", "errors"),
        [
            ("sysfs/mi300x_spx_nps1", []),
            ("sysfs/mi300x_cpx_nps4", []),
            ("sysfs/mi210_unpartitionable", []),
            ("kfd/mi210", []),
            # Nine of its sixteen nodes were recorded.
            ("kfd/mi300x_cpx", ["card 1: MI300X, CPX/NPS?, 1 device: CPX makes 8"]),
        ],
    )
    def test_recorded_trees(recorded: str, errors: list[str]):
        findings = examined("--root", RECORDED / recorded, code=int(bool(errors)))
        assert [one.seen for one in only(findings, "error", "warning")] == errors


def test_a_plan_that_does_not_hold_is_an_error(tmp_path: Path):
    (tmp_path / "work.yaml").write_text(
        "version: 1\nworkloads:\n- {name: chat, model: Qwen/Qwen3-8B, precision: bf16, replicas: 1}\n"
    )
    node = emulated(tmp_path)
    plan = tmp_path / "plan.yaml"
    made = CliRunner().invoke(app, ["plan", str(node), str(tmp_path / "work.yaml"), "--out", str(plan)])
    assert made.exit_code == 0, made.output
    planned = yaml.safe_load(plan.read_text())
    as_planned = [one["mode"] for one in planned["cards"]] == ["CPX/NPS4"] * 2
    findings = examined("--node", node, "--plan", plan, code=int(not as_planned))
    assert {one.severity for one in findings if one.check == "plan"} == {"ok" if as_planned else "error"}
    for one in planned["cards"]:
        one.update(mode="SPX/NPS1", partitions=1)
    plan.write_text(yaml.safe_dump({**planned, "placements": []}))
    findings = examined("--node", node, "--plan", plan, code=1)
    assert "mode should be SPX/NPS1, is CPX/NPS4" in "".join(one.seen for one in findings if one.check == "plan")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--root", "absent"), "absent: no such directory"),
        (("--node", "absent.yaml"), "absent.yaml"),
        (("--node", "n", "--root", "r"), "--root r: --node n already says that"),
        (("--name", "n"), "--name n: no --plan"),
        (("--resource-slices", "s"), "--resource-slices s: no --kube-node"),
        (("--kube-node", "list.json"), "list.json:1: kind: Input should be 'Node'"),
        (("--kube-node", "count.json"), "'many' is not a number of devices"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text('{"kind": "List", "items": []}')
    bad = {**KUBE, "status": {"allocatable": {"amd.com/gpu": "many"}}}
    Path("count.json").write_text(json.dumps(bad))
    found = CliRunner().invoke(app, ["doctor", *arguments])
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.count("\n") == 1
    assert says in found.stderr
