"""Memory that runs out: told at 90 %, refused at the limit, read from trees as the kernel writes them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from aim_profile.nodes.read import read_node
from aim_runtime.memory_pools import Pool, Use, card_pools, cgroup_pool, machine_pool, process_pool
from aim_runtime.memory_watch import STALE_S, Level, MemoryWatch, next_level
from sysfs_tree import write_sysfs_card

GIB = 2**30
CARDS = ("0000:05:00.0", "0000:26:00.0")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def watch(registry: CollectorRegistry) -> MemoryWatch:
    return MemoryWatch(registry)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """Two MI300X in CPX/NPS4, idle."""
    for bdf in CARDS:
        write_card(tmp_path, bdf, 1 * GIB)
    return tmp_path


def write_card(root: Path, bdf: str, used_bytes: int | str, total_bytes: int = 192 * GIB) -> None:
    write_sysfs_card(
        root,
        bdf,
        device="0x74a1",
        vendor="0x1002",
        current_compute_partition="CPX",
        current_memory_partition="NPS4",
        available_compute_partition="SPX, DPX, QPX, CPX",
        mem_info_vram_used=str(used_bytes),
        mem_info_vram_total=str(total_bytes),
    )


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said since the last look."""
    said = [f"{record.levelname} {record.getMessage()}" for record in caplog.records if record.name == "aim.memory"]
    caplog.clear()
    return said


def test_a_card_is_told_of_at_90_percent_and_admits_nothing_at_its_limit(
    node: Path, watch: MemoryWatch, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pools = card_pools(read_node(node), node)
    assert sorted(pools) == [0, 1]
    for pool in pools.values():
        watch.add(pool)
    mine, other = watch.gate([pools[0]]), watch.gate([pools[1]])

    def at(share: float) -> list[str]:
        write_card(node, CARDS[0], int(share * 192 * GIB))
        watch.read()
        assert other.refusal() is None
        return lines(caplog)

    assert at(0.89) == []
    (warned,) = at(0.91)
    assert warned == (
        "WARNING memory of card 0 (0000:05:00.0, all of its partitions): 174.72 of 192.00 GiB used (91%); "
        "new requests are refused from 98% on"
    )
    assert at(0.895) == at(0.91) == []  # no flapping
    assert mine.refusal() is None
    (stopped,) = at(0.985)
    assert stopped.startswith("ERROR memory of card 0")
    assert "until less than 186.24 GiB is" in stopped
    refusal = mine.refusal()
    assert refusal is not None
    full = registry.get_sample_value("aim_memory_admission_stopped", {"scope": "card", "card": "0", "partition": ""})
    assert full == 1
    assert (refusal.status, refusal.code, refusal.headers()) == (503, "memory_full", {"retry-after": "5"})
    assert "card 0 (0000:05:00.0, all of its partitions) is full: 189.12 of 192.00 GiB" in refusal.message
    assert at(0.975) == []
    assert mine.refusal() is not None
    assert at(0.96) == [
        "WARNING memory of card 0 (0000:05:00.0, all of its partitions): 184.32 of 192.00 GiB used (96%): "
        "requests are admitted again"
    ]
    assert mine.refusal() is None
    labels = {"scope": "card", "card": "0", "partition": ""}
    assert registry.get_sample_value("aim_memory_used_bytes", labels) == int(0.96 * 192 * GIB)
    assert registry.get_sample_value("aim_memory_total_bytes", labels) == 192 * GIB
    assert registry.get_sample_value("aim_memory_limit_bytes", labels) == 0.98 * 192 * GIB
    assert registry.get_sample_value("aim_memory_admission_stopped", labels) == 0
    assert at(0.5) == [
        "INFO memory of card 0 (0000:05:00.0, all of its partitions): 96.00 of 192.00 GiB used (50%): below 89 % again"
    ]
    watch.discard(pools[0])
    assert registry.get_sample_value("aim_memory_used_bytes", labels) is None


@pytest.mark.parametrize(
    ("now", "share", "then"),
    [
        (Level.FINE, 0.899, Level.FINE),
        (Level.FINE, 0.90, Level.HIGH),
        (Level.FINE, 0.95, Level.FULL),
        (Level.HIGH, 0.88, Level.HIGH),
        (Level.HIGH, 0.869, Level.FINE),
        (Level.HIGH, 0.949, Level.HIGH),
        (Level.FULL, 0.93, Level.FULL),
        (Level.FULL, 0.919, Level.HIGH),
        (Level.FULL, 0.5, Level.FINE),
        (Level.HIGH, 1.5, Level.FULL),
    ],
)
def test_levels_have_hysteresis(now: Level, share: float, then: Level) -> None:
    assert next_level(now, share, Pool("p", "machine", lambda: None)) is then
    unstoppable = Pool("p", "machine", lambda: None, stop_at=None)
    assert next_level(now, share, unstoppable) is min(then, Level.HIGH)


def test_what_all_share_stops_every_model(watch: MemoryWatch) -> None:
    watch.add(Pool("this machine", "machine", lambda: Use(99, 100), shared=True))
    own = Pool("p", "partition", lambda: Use(1, 100), partition="1")
    watch.add(own)
    refusal = watch.gate([own]).refusal()
    assert refusal is not None
    assert "this machine" in refusal.message


def test_a_pool_is_known_before_the_first_pass(watch: MemoryWatch) -> None:
    full = Pool("p", "partition", lambda: Use(100, 100))
    watch.add(full)
    assert watch.gate([full]).refusal() is not None


def test_a_driver_that_hangs_stops_neither_requests_nor_the_end(registry: CollectorRegistry) -> None:
    now, hang, hung = 0.0, threading.Event(), threading.Event()
    reads = iter([Use(99, 100)])

    def read() -> Use | None:
        if (use := next(reads, None)) is not None:
            return use
        hung.set()
        hang.wait(30)
        return None

    watch = MemoryWatch(registry, clock=lambda: now)
    pool = Pool("p", "card", read)
    watch.add(pool)
    gate = watch.gate([pool])
    watch.start(interval_s=0.01)
    try:
        assert hung.wait(10)
        assert gate.refusal() is not None
        now = STALE_S + 1  # what is not read any more is unknown
        assert gate.refusal() is None
        assert (
            registry.get_sample_value("aim_memory_used_bytes", {"scope": "card", "card": "", "partition": ""}) is None
        )
    finally:
        watch.stop()
        hang.set()


def test_nonsense_in_a_file_is_told_once_and_the_watch_goes_on(
    node: Path, watch: MemoryWatch, caplog: pytest.LogCaptureFixture
) -> None:
    pools = card_pools(read_node(node), node)
    watch.add(pools[0])
    write_card(node, CARDS[0], "lots")
    watch.read()
    watch.read()
    (said,) = lines(caplog)
    assert said.startswith("ERROR memory of card 0")
    assert "cannot be read" in said
    write_card(node, CARDS[0], 189 * GIB)
    watch.read()
    assert watch.gate([pools[0]]).refusal() is not None


def test_cards_without_memory_files_have_unknown_use(node: Path, watch: MemoryWatch) -> None:
    pools = card_pools(read_node(node), node)
    (node / CARDS[0] / "mem_info_vram_used").unlink()
    watch.add(pools[0])
    assert watch.known() == []
    assert watch.gate([pools[0]]).refusal() is None


# --- the container and the machine -----------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")
    return folder


def test_cgroup_v2_the_tightest_limit_counts_and_dropped_pages_do_not(tmp_path: Path) -> None:
    root = write(tmp_path / "sys/fs/cgroup", cgroup__controllers="memory")
    write(tmp_path / "proc/self", cgroup="0::/kubepods/pod1/main")
    stat = "anon 10\nfile 20\ninactive_file 1000\nactive_file 7"
    write(root / "kubepods", memory__max="max", memory__current="9", memory__stat=stat)
    write(root / "kubepods/pod1", memory__max="8000", memory__current="5000", memory__stat=stat)
    write(root / "kubepods/pod1/main", memory__max="9000", memory__current="4000", memory__stat=stat)
    pool = cgroup_pool(tmp_path)
    assert pool is not None
    assert pool.shared
    assert pool.read() == Use(4000, 8000)
    (root / "kubepods/pod1/memory.max").write_text("max\n")  # raised while we run
    assert pool.read() is None


def test_cgroup_v2_in_a_namespace_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="0::/")
    files = {
        "cgroup__controllers": "",
        "memory__max": "100",
        "memory__current": "60",
        "memory__stat": "inactive_file 70",
    }
    write(tmp_path / "sys/fs/cgroup", **files)
    pool = cgroup_pool(tmp_path)
    assert pool is not None
    assert pool.read() == Use(0, 100)


def test_a_limit_of_nothing_is_unknown_and_the_watch_goes_on(tmp_path: Path, watch: MemoryWatch) -> None:
    write(tmp_path / "proc/self", cgroup="0::/")
    said = {"cgroup__controllers": "", "memory__current": "99", "memory__stat": ""}
    root = write(tmp_path / "sys/fs/cgroup", memory__max="100", **said)
    pool = cgroup_pool(tmp_path)
    assert pool is not None
    watch.add(pool)
    assert watch.full(frozenset()) is not None
    write(root, memory__max="0")  # its pod is being resized, or somebody mistyped
    watch.read()
    assert watch.full(frozenset()) is None
    write(root, memory__max="100")
    watch.read()
    assert watch.full(frozenset()) is not None


def test_cgroup_v1(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="5:devices:/\n4:memory:/docker/abc\n0::/")
    folder = tmp_path / "sys/fs/cgroup/memory"  # a container sees its own group as the root, by another path
    stat = "inactive_file 1\ntotal_inactive_file 100"
    write(folder, memory__limit_in_bytes="1000", memory__usage_in_bytes="950", memory__stat=stat)
    pool = cgroup_pool(tmp_path)
    assert pool is not None
    assert pool.read() == Use(850, 1000)


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_no_limit_no_pool(tmp_path: Path, limit: str) -> None:
    write(tmp_path / "proc/self", cgroup="4:memory:/\n0::/")
    if limit == "max":
        write(tmp_path / "sys/fs/cgroup", cgroup__controllers="memory", memory__max=limit)
    else:
        write(tmp_path / "sys/fs/cgroup/memory", memory__limit_in_bytes=limit)
    assert cgroup_pool(tmp_path) is None


def test_this_machine() -> None:
    use = machine_pool().read()
    assert use is not None
    assert use.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < use.used < use.total


# --- processes ------------------------------------------------------------------------------------------------------

HOG = """
import os, sys
if len(sys.argv) > 1:
    held = bytearray(os.urandom(1)) * (64 * 2**20)
    print("held", flush=True)
    sys.stdin.read()
else:
    import subprocess
    subprocess.run([sys.executable, __file__, "child"])
"""


@pytest.fixture
def hog(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process whose child holds 64 MiB until its stdin is closed."""
    file = tmp_path / "hog.py"
    file.write_text(HOG)
    command = [sys.executable, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.communicate()


def test_an_engines_children_count_and_an_engine_that_is_gone_holds_nothing(
    hog: subprocess.Popen[str], watch: MemoryWatch
) -> None:
    pid: int | None = hog.pid
    pool = process_pool(lambda: pid, 80 * 2**20, name="partition 1 of card 0", card="0", partition="1")
    watch.add(pool)
    refusal = watch.gate([pool]).refusal()
    assert refusal is not None
    assert "partition 1 of card 0" in refusal.message
    hog.communicate()
    assert pool.read() == Use(0, 80 * 2**20)
    watch.read()
    assert watch.gate([pool]).refusal() is None
    pid = None
    assert pool.read() is None
