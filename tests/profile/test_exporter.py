"""`aim-profile exporter`: cards, partitions, drift and prices as Prometheus reads them; the unknown is absent."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.exporter.followed import Followed
from aim_profile.exporter.prices import load_prices
from sysfs_tree import write_mi300x_cpx, write_sysfs_card

NODES = "sys/class/kfd/kfd/topology/nodes"
PCI = "sys/bus/pci/drivers/amdgpu"
BDFS = ("0000:05:00.0", "0000:16:00.0")
CPX = {
    "vendor": "0x1002",
    "class": "0x120000",
    "device": "0x74a1",
    "available_compute_partition": "SPX, DPX, QPX, CPX",
    "current_compute_partition": "CPX",
    "available_memory_partition": "NPS1, NPS4",
    "current_memory_partition": "NPS4",
    "mem_info_vram_total": "206141652992",
    "mem_info_vram_used": "1000000000",
}
Labels = frozenset[tuple[str, str]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two MI300X in CPX/NPS4."""
    root = tmp_path / "tree"
    write_mi300x_cpx(root / NODES, cards=2)
    for bdf in BDFS:
        write_sysfs_card(root / PCI, bdf, **CPX)
    (root / "etc").mkdir()
    (root / "etc/hostname").write_text("node-1\n")
    return root


def samples(text: str) -> dict[str, dict[Labels, float]]:
    """Family → labels that are not empty → value."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = frozenset((name, value) for name, value in sample.labels.items() if value)
            rows = found.setdefault(sample.name, {})
            assert labels not in rows, sample
            rows[labels] = sample.value
    return found


def scrape(*arguments: object) -> dict[str, dict[Labels, float]]:
    done = CliRunner().invoke(app, ["exporter", "--once", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return samples(done.stdout)


def labels(**named: str) -> Labels:
    return frozenset(named.items())


def plan_of(folder: Path, **node: object) -> Path:
    """The planner's own plan of a fleet with one node."""
    fleet, workloads, plan = folder / "fleet.yaml", folder / "workloads.yaml", folder / "plan.yaml"
    fleet.write_text(yaml.safe_dump({"version": 1, "nodes": [{"name": "node-1", "gpu": "MI300X", "cards": 2, **node}]}))
    load = {"name": "chat", "model": "Qwen/Qwen3-8B", "replicas": 16}
    workloads.write_text(yaml.safe_dump({"version": 1, "workloads": [load]}))
    made = CliRunner().invoke(app, ["plan", str(fleet), str(workloads), "--out", str(plan)])
    assert plan.is_file(), made.output
    return plan


def test_cards_and_partitions(tree: Path) -> None:
    found = scrape("--root", tree)
    card = {"node": "node-1", "card": "1"}
    modes = {"compute_mode": "CPX", "memory_mode": "NPS4", "allocation_mode": "CAPPING"}
    about = {"product": "MI300X", "gfx": "gfx942", "bdf": BDFS[1], **modes}
    assert found["aim_card_info"][labels(**card, **about)] == 1
    assert found["aim_card_memory_used_bytes"][labels(**card)] == 1_000_000_000
    assert found["aim_card_memory_total_bytes"][labels(**card)] == 206_141_652_992
    assert len(found["aim_partition_info"]) == 16
    last = {**card, "partition": "7"}
    assert found["aim_partition_info"][labels(**last, resource="amd.com/cpx_nps4")] == 1
    assert found["aim_partition_compute_units"][labels(**last)] == 38
    assert found["aim_partition_memory_total_bytes"][labels(**last, source="measured")] == 24560 * 2**20
    # What one of eight uses is written nowhere; without a plan and prices nothing is said of them.
    unknown = {"aim_partition_memory_used_bytes", "aim_plan_differences", "aim_price_per_gpu_hour"}
    assert unknown.isdisjoint(found)
    assert found["aim_node_source_ok"] == {labels(node="node-1", source="kernel"): 1}


def test_a_whole_card_is_its_own_partition(tmp_path: Path) -> None:
    spx = {**CPX, "current_compute_partition": "SPX", "current_memory_partition": "NPS1"}
    write_sysfs_card(tmp_path / PCI, **spx)
    found = scrape("--root", tmp_path, "--name", "n")
    assert found["aim_partition_memory_used_bytes"] == {labels(node="n", card="0", partition="0"): 1_000_000_000}
    assert labels(node="n", card="0", partition="0", resource="amd.com/spx_nps1") in found["aim_partition_info"]
    single = scrape("--root", tmp_path, "--name", "n", "--strategy", "single")
    assert labels(node="n", card="0", partition="0", resource="amd.com/gpu") in single["aim_partition_info"]


def test_without_sysfs_mode_and_use_are_absent(tree: Path) -> None:
    found = scrape("--root", tree / NODES)
    assert {name for row in found["aim_card_info"] for name, _ in row} == {
        "card",
        "product",
        "gfx",
        "bdf",
        "compute_mode",
    }
    assert {name for row in found["aim_partition_info"] for name, _ in row} == {"card", "partition"}
    assert "aim_card_memory_used_bytes" not in found


def test_a_file_of_the_kernel_that_is_wrong_leaves_the_card_out_and_is_told(tree: Path) -> None:
    (tree / PCI / BDFS[0] / "mem_info_vram_used").write_text("much\n")
    done = CliRunner().invoke(app, ["exporter", "--once", "--root", str(tree)])
    found = samples(done.stdout)
    assert found["aim_node_source_ok"] == {labels(node="node-1", source="kernel"): 0}
    assert found["aim_card_memory_used_bytes"] == {labels(node="node-1", card="1"): 1_000_000_000}
    assert done.stderr.count("mem_info_vram_used") == 1
    (tree / PCI / BDFS[0] / "current_compute_partition").write_text("WHOLE\n")
    found = scrape("--root", tree, "--name", "node-1")
    assert set(found) == {"aim_node_source_ok"}


def test_gpus_that_this_process_may_not_see_are_no_machine_without_gpus(tree: Path) -> None:
    shutil.rmtree(tree / "sys/bus")
    (tree / "proc").mkdir()
    (tree / "proc/cpuinfo").write_text("processor : 0\n")
    (tree / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 7000000 kB\n")
    for node in (tree / NODES).iterdir():
        if int((node / "gpu_id").read_text()):
            for name in ("properties", "gpu_id"):  # as a recording keeps what is refused
                (node / name).write_text("")
    found = scrape("--root", tree)
    assert "aim_card_info" not in found
    assert "aim_node_info" in found


def test_what_is_not_as_planned(tree: Path, tmp_path: Path) -> None:
    planned = {"compute_partition": "CPX", "memory_partition": "NPS4"}
    found = scrape("--root", tree, "--plan", plan_of(tmp_path, **planned))
    assert found["aim_plan_differences"] == {labels(node="node-1"): 0}
    assert "aim_plan_drift" not in found
    (tree / PCI / BDFS[1] / "current_memory_partition").write_text("NPS1\n")
    found = scrape("--root", tree, "--plan", tmp_path / "plan.yaml")
    assert found["aim_plan_differences"] == {labels(node="node-1"): 1}
    assert found["aim_plan_drift"] == {labels(node="node-1", card="1", what="mode"): 1}
    found = scrape("--root", tree, "--plan", tmp_path / "plan.yaml", "--name", "another")
    assert labels(node="another", source="plan") in found["aim_node_source_ok"]
    assert found["aim_node_source_ok"][labels(node="another", source="plan")] == 0
    assert "aim_plan_differences" not in found


PAGE = Path(__file__).parents[2] / "docs/metrics.md"


def test_the_page_names_every_family_with_its_labels(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(PRICES))
    write_sysfs_card(tree / PCI, BDFS[1], current_compute_partition="SPX")
    told = ["--plan", str(plan_of(tmp_path)), "--prices", str(tmp_path / "prices.yaml")]
    done = CliRunner().invoke(app, ["exporter", "--once", "--root", str(tree), *told])
    write_sysfs_card(tmp_path / "whole" / PCI, **CPX | {"current_compute_partition": "SPX"})
    whole = CliRunner().invoke(app, ["exporter", "--once", "--root", str(tmp_path / "whole")])
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(done.stdout):
        found[family.name] = {name for sample in family.samples for name in sample.labels}
    for family in text_string_to_metric_families(whole.stdout):
        found.setdefault(family.name, {name for sample in family.samples for name in sample.labels})
    (section,) = re.findall(r"### A node's partitions\n(.*?)\n### ", PAGE.read_text(), re.DOTALL)
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    named = {name: set(re.findall(r"`(\w+)`", row[1])) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named == found


PRICES = {
    "version": 1,
    "currency": "EUR",
    "gpu_hour": {"mi300x": 2.4},
    "million_tokens": {"chat": {"prompt": 0.1, "generation": 0.5}},
}


def test_prices(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(yaml.safe_dump(PRICES))
    found = scrape("--root", tree, "--prices", file)
    one = {"node": "node-1", "product": "MI300X", "currency": "EUR"}
    assert found["aim_price_per_gpu_hour"] == {labels(**one, card="0"): 2.4, labels(**one, card="1"): 2.4}
    chat = {"model_name": "chat", "currency": "EUR"}
    assert found["aim_price_per_million_tokens"] == {
        labels(**chat, kind="prompt"): 0.1,
        labels(**chat, kind="generation"): 0.5,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpu_hour": {"MI300Y": 1}}, ["gpu_hour.MI300Y", "MI300X"]),
        ({"gpu_hour": {"MI300X": -1}}, ["gpu_hour.MI300X", "-1"]),
        ({"gpu_hour": {"MI300X": True}}, ["gpu_hour.MI300X"]),
        ({"gpu_hour": {"MI300X": 1, "mi300x": 2}}, ["gpu_hour.mi300x", "twice"]),
        ({"currency": "euros"}, ["currency", "euros"]),
        ({"gpu_hours": {}}, ["gpu_hours", "did you mean gpu_hour"]),
        ({"million_tokens": {"chat": {"promt": 1}}}, ["promt", "did you mean prompt"]),
    ],
)
def test_a_price_table_that_is_none(tree: Path, tmp_path: Path, change: dict[str, object], said: list[str]) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(yaml.safe_dump({**PRICES, **change}))
    done = CliRunner().invoke(app, ["exporter", "--once", "--root", str(tree), "--prices", str(file)])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert [word for word in ("prices.yaml", *said) if word not in done.stderr] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--root", "/nowhere/at/all"], "no such directory"),
        (["--node", "/nowhere.yaml"], "nowhere.yaml"),
        (["--plan", "/nowhere.yaml"], "nowhere.yaml"),
        (["--node", "a.yaml", "--root", "/"], "leave one of them out"),
        (["--config", "/nowhere"], "no such folder"),
        (["--config", "/", "--plan", "plan.yaml"], "leave one of them out"),
    ],
)
def test_what_is_not_there_is_refused_at_the_start(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["exporter", "--once", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_folder_where_files_may_come_and_go(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    sources = {labels(node="node-1", source="kernel"): 1.0}
    assert scrape("--root", tree, "--config", folder)["aim_node_source_ok"] == sources
    (folder / "prices.yaml").write_text(yaml.safe_dump(PRICES))
    (folder / "plan.yaml").write_text("{")
    found = scrape("--root", tree, "--config", folder)
    told = {labels(node="node-1", source="prices"): 1.0, labels(node="node-1", source="plan"): 0.0}
    assert found["aim_node_source_ok"] == sources | told
    assert len(found["aim_price_per_gpu_hour"]) == 2
    followed = Followed(folder / "prices.yaml", load_prices, may_lack=True)
    assert followed.now() is not None
    (folder / "prices.yaml").unlink()
    assert (followed.now(), followed.problem) == (None, None)


@pytest.fixture
def served(tree: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The verb as a process, and its address."""
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(PRICES))
    told = ["--root", str(tree), "--prices", str(tmp_path / "prices.yaml"), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "aim_profile", "exporter", *told], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            yield process, process.stderr.readline().strip()
        finally:
            process.kill()


def test_served_until_it_is_told_to_end(served: tuple[subprocess.Popen[str], str], tree: Path, tmp_path: Path) -> None:
    process, url = served
    for _ in range(2):
        found = samples(httpx.get(url).text)
        assert {value for value in found["aim_price_per_gpu_hour"].values()} == {2.4}
    (tree / PCI / BDFS[0] / "mem_info_vram_used").write_text("5\n")
    # As Kubernetes does: another file in its place. What cannot be read leaves what was good before.
    for text, price, ok in ((yaml.safe_dump({**PRICES, "gpu_hour": {"MI300X": 3}}), 3, 1), ("{", 3, 0)):
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", tmp_path / "prices.yaml")
        found = samples(httpx.get(url).text)
        assert set(found["aim_price_per_gpu_hour"].values()) == {price}
        assert found["aim_node_source_ok"][labels(node="node-1", source="prices")] == ok
    assert found["aim_card_memory_used_bytes"][labels(node="node-1", card="0")] == 5
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_a_port_that_is_taken(served: tuple[subprocess.Popen[str], str], tree: Path) -> None:
    port = served[1].rpartition(":")[2].removesuffix("/metrics")
    done = CliRunner().invoke(app, ["exporter", "--root", str(tree), "--host", "127.0.0.1", "--port", port])
    assert done.exit_code == 2
    assert f"--port {port}" in done.stderr
