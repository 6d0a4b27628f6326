"""`aim-profile doctor --bundle`: what a bug report carries and never carries, and that it is whole or not there."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from aim_profile.cli.app import app
from aim_profile.doctor import bundle
from aim_profile.doctor.examine import Asked, examine
from aim_profile.doctor.redaction import Redactor
from aim_profile.nodes.read import load_emulated
from sysfs_tree import write_mi300x_cpx, write_sysfs_card

NODES = "sys/class/kfd/kfd/topology/nodes"
PCI = "sys/bus/pci/drivers/amdgpu"
HOST, TOKEN, SERIAL, UNIQUE, HIVE = "gpu-prod-7", "hf_QwErTyUiOpAsDfGh", "PCB052012-0017", "16404946649897475633", "99"
ADDRESSES = (
    "10.11.12.13",
    "fd00::a1b2:3",
    "0c:42:a1:9f:00:7e",
    "alice@example.com",
    "9f3c2a1b-0000-4000-8000-123456789abc",
)
#: What is planted below and must be nowhere in a bundle.
PLANTED = (HOST, "gpu-prod", TOKEN, SERIAL, UNIQUE, *ADDRESSES, "corp.example.com", "acme", "chat-of-acme", "builder01")


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A recording with secrets in every file there is, in a folder whose name is one too."""
    root = tmp_path / "acme" / HOST
    write_mi300x_cpx(root / NODES, cards=2)
    for number in range(2, 18):
        file = root / NODES / str(number) / "properties"
        lines = [line for line in file.read_text().splitlines() if not line.startswith("unique_id")]
        unique = UNIQUE if number < 10 else "5"
        file.write_text("\n".join([*lines, f"unique_id {unique}", f"serial_number {UNIQUE}", f"gid_{HOST} 3"]) + "\n")
        (root / NODES / str(number) / "name").write_text(f"{HOST}\n")
    for bdf in ("0000:05:00.0", "0000:16:00.0"):
        write_sysfs_card(
            root / PCI,
            bdf,
            vendor="0x1002",
            device="0x74a1",
            available_compute_partition="SPX, DPX, QPX, CPX",
            current_compute_partition="CPX",
            available_memory_partition="NPS1, NPS4",
            current_memory_partition="NPS4",
            mem_info_vram_total="206141652992",
            serial_number=SERIAL,
            unique_id=hex(int(UNIQUE)),
            product_number=SERIAL,
        )
    write(root, "etc/hostname", f"{HOST}.corp.example.com\n")
    write(root, "proc/cpuinfo", f"flags : fpu\nmodel name : {TOKEN}\n")
    write(root, "proc/sys/kernel/osrelease", f"6.8.0-{HOST}-builder01\n")
    write(root, "proc/mounts", f"{ADDRESSES[0]}:/{HOST} /home nfs rw 0 0\n{HOST} /dev/shm tmpfs rw,size=65536k 0 0\n")
    write(root, "sys/module/amdgpu/version", f"6.10.5 {TOKEN}\n")
    write(root, "sys/module/amdgpu/initstate", "live\n")
    write(root, "opt/rocm/.info/version", "6.4.1-builder01\n")
    return root


def examined(*arguments: object, code: int = 1) -> Result:
    found = CliRunner().invoke(app, ["doctor", *map(str, arguments), "-o", "json"])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def members(file: Path) -> dict[str, str]:
    with tarfile.open(file) as tar:
        for info in tar.getmembers():
            assert (info.isfile(), info.uid, info.gid, info.uname, info.gname, info.mtime) == (True, 0, 0, "", "", 0)
        return {info.name: tar.extractfile(info).read().decode() for info in tar.getmembers()}  # type: ignore[union-attr]


def nothing_planted(file: Path) -> dict[str, str]:
    found = members(file)
    for name, text in found.items():
        for secret in PLANTED:
            assert secret.lower() not in name.lower(), name
            assert secret.lower() not in text.lower(), (name, secret)
    return found


def kube_file(tmp_path: Path) -> Path:
    file = tmp_path / f"{HOST}.json"
    labels = {
        "kubernetes.io/hostname": HOST,
        "amd.com/gpu.device-id": TOKEN,
        "amd.com/gpu.driver-version": ADDRESSES[0],
        "amd.com/gpu.compute-memory-partition": "spx_nps1",
        "dcm.amd.com/gpu-config-profile-state": ADDRESSES[4],
    }
    metadata = {"name": f"{HOST}.corp.example.com", "labels": labels, "annotations": {"a": TOKEN}}
    status = {"allocatable": {"amd.com/cpx_nps4": "12"}, "addresses": [{"address": ADDRESSES[0]}]}
    file.write_text(json.dumps({"kind": "Node", "metadata": metadata, "status": status}))
    return file


def test_no_planted_secret_is_in_the_bundle(tree: Path, tmp_path: Path):
    write(tree, f"{NODES}/9/gpu_id", f"{UNIQUE}\n")
    out = tmp_path / "report.tar.gz"
    result = examined("--root", tree, "--kube-node", kube_file(tmp_path), "--bundle", out)
    found = nothing_planted(out)
    assert result.stderr.startswith(f"{out}: {out.stat().st_size} bytes, ")
    findings = json.loads(found["aim-profile-doctor/findings.json"])["findings"]
    here = json.loads(result.stdout)["findings"]
    assert [(one["check"], one["severity"]) for one in findings] == [(one["check"], one["severity"]) for one in here]
    assert {"<--kube-node>", "<--root>/sys/class/kfd/kfd/topology/nodes and <--root>/sys/bus/pci/drivers/amdgpu"} <= {
        one["where"] for one in findings
    }
    versions = json.loads(found["aim-profile-doctor/versions.json"])
    assert (versions["kernel"], versions["amdgpu"], versions["ROCm"]) == ("6.8.0", "6.10.5", "6.4.1")


def test_a_garbled_file_says_nothing_of_what_it_holds(tree: Path, tmp_path: Path):
    write(tree, f"{NODES}/3/properties", f"simd_count {TOKEN}\npassword {SERIAL}\n")
    write(tree, f"{PCI}/0000:05:00.0/current_compute_partition", f"{TOKEN}\n")
    out = tmp_path / "report.tar.gz"
    examined("--root", tree, "--bundle", out)
    found = nothing_planted(out)
    left_out = json.loads(found["aim-profile-doctor/left_out.json"])
    assert left_out == [f"{PCI}/0000:05:00.0/current_compute_partition"]
    seen = [one["seen"] for one in json.loads(found["aim-profile-doctor/findings.json"])["findings"]]
    assert any("is not `key number`" in text for text in seen)


def test_the_tree_in_it_reads_as_the_node_it_is_of(tree: Path, tmp_path: Path):
    out = tmp_path / "report.tar.gz"
    here = json.loads(examined("--root", tree, "--bundle", out).stdout)["findings"]
    with tarfile.open(out) as tar:
        tar.extractall(tmp_path / "got", filter="data")
    again = tmp_path / "got/aim-profile-doctor"
    there = json.loads(examined("--root", again / "tree").stdout)["findings"]
    checks = ("driver", "witnesses", "cards", "modes", "versions", "shared memory")
    told = [[(one["check"], one["seen"]) for one in each if one["check"] in checks] for each in (here, there)]
    assert told[0] == told[1]
    assert len(told[0]) > 8
    node = load_emulated(again / "node.yaml")
    assert [card.mode_label for card in node.cards] == ["CPX/NPS4"] * 2
    assert {(card.unique_id, card.hive_id) for card in node.cards} == {(None, None)}
    assert node.name is None


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_to_the_tree_is_a_stack_trace_or_a_leak(tree: Path, tmp_path: Path, data: st.DataObject):
    """Any file empty, cut, of other bytes, or a directory: findings, and a bundle without what is planted."""
    files = sorted(file for file in tree.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files), label="file")
    damage = data.draw(
        st.sampled_from([b"", b"\xff\0", TOKEN.encode(), f"{HOST} {UNIQUE}".encode(), None]), label="damage"
    )
    before = file.read_bytes()
    file.unlink()
    try:
        file.mkdir() if damage is None else file.write_bytes(damage)
        found = examine(Asked(root=tree))
        bundle.write_bundle(tmp_path / "report.tar.gz", Asked(root=tree), found)
        nothing_planted(tmp_path / "report.tar.gz")
    finally:
        file.rmdir() if damage is None else file.unlink()
        file.write_bytes(before)


def test_a_plan_s_names_are_left_out(tmp_path: Path):
    node = tmp_path / "node.yaml"
    node.write_text(f"version: 1\nname: {HOST}\ngpu: MI300X\ncards: 2\npartition: CPX/NPS4\n")
    work = tmp_path / "work.yaml"
    work.write_text(
        "version: 1\nworkloads:\n- {name: chat-of-acme, model: Qwen/Qwen3-8B, precision: bf16, replicas: 1}\n"
    )
    plan = tmp_path / "plan.yaml"
    assert CliRunner().invoke(app, ["plan", str(node), str(work), "--out", str(plan)]).exit_code == 0
    node.write_text(node.read_text().replace("CPX/NPS4", "DPX/NPS2").replace("cards: 2", "cards: 1"))
    out = tmp_path / "report.tar.gz"
    assert HOST in examined("--node", node, "--plan", plan, "--bundle", out).stdout
    found = nothing_planted(out)
    assert "should be 2 cards, is 1 cards" in found["aim-profile-doctor/findings.json"]
    assert not [name for name in found if "/tree/" in name]


@pytest.mark.parametrize(
    "secret", [*ADDRESSES, TOKEN, UNIQUE, hex(int(UNIQUE)), "GPU-9f3c2a1b00", "eyJhbGciOiJIUzI1NiJ9.e30.x"]
)
@pytest.mark.parametrize("around", ["{}", "is {}, the node is", "({})", "a={}", "'{}'", "http://{}/", "{}."])
def test_what_has_the_form_of_a_secret_is_replaced(secret: str, around: str):
    assert secret not in Redactor(()).text(around.format(secret))


@pytest.mark.parametrize(
    "text", ["token: s3cret!", "password=s3cret!", "Authorization: Bearer s3cret!", '"api_key": "s3cret!"']
)
def test_what_is_called_a_secret_is_replaced(text: str):
    assert "s3cret!" not in Redactor(()).text(text)


@pytest.mark.parametrize(
    "text",
    [
        "card 1: the compute partition is CPX by KFD, SPX by sysfs",
        "the GPU 0x74a1 at 0000:27:00.0 is bound to vfio-pci, not to amdgpu",
        "use device plugin 1.31.0.9 or newer, and compare allocatable (--kube-node)",
        "/sys/bus/pci/drivers/amdgpu/0000:05:00.0/current_compute_partition",
        "amdgpu 6.12.12, and the cards are partitioned: AMD asks for 6.12.12 or newer",
        "amd.com/cpx_nps4: 12, but the kernel shows 16 devices",
    ],
)
def test_facts_stay(text: str):
    assert Redactor([("n7", "node"), ("node", "node")]).text(text) == text


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_private_name_is_nowhere_between_other_words(before: str, after: str):
    assert HOST not in Redactor([(HOST, "node")]).text(f"{before} {HOST} {after}")


def test_it_has_a_bound(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bundle, "_MAX_FILES", 10)
    write(tree, f"{NODES}/4/properties", "simd_count 152\n" * 100_000)
    out = tmp_path / "report.tar.gz"
    examined("--root", tree, "--bundle", out)
    found = members(out)
    kept = [name for name in found if "/tree/" in name]
    assert len(kept) == 10
    assert not [name for name in kept if name.endswith("nodes/4/properties")]
    assert len(json.loads(found["aim-profile-doctor/left_out.json"])) == 10


def test_equal_nodes_give_equal_bytes_and_what_was_there_is_replaced_whole(tree: Path, tmp_path: Path):
    out = tmp_path / "report.tar.gz"
    out.write_text("what was there")
    examined("--root", tree, "--bundle", out)
    first = out.read_bytes()
    examined("--root", tree, "--bundle", out)
    assert out.read_bytes() == first
    assert sorted(one.name for one in tmp_path.iterdir()) == ["acme", "report.tar.gz"]


def test_a_bundle_that_cannot_be_written_leaves_what_was_there(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "report.tar.gz"
    out.write_text("what was there")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in examined("--root", tree, "--bundle", out, code=2).stderr
    assert out.read_text() == "what was there"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["acme", "report.tar.gz"]
    assert "absent" in examined("--root", tree, "--bundle", tmp_path / "absent/x.tar.gz", code=2).stderr
