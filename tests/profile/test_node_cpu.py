"""A machine without a GPU: what is read of it from /proc and /sys, and how one is drawn up in a file."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.errors import NodeError
from aim_profile.nodes.cpu import cpu_list, read_cpu
from aim_profile.nodes.devices import devices_of, refuse_larger
from aim_profile.nodes.emulated import export_node, load_emulated, parse_emulated
from aim_profile.nodes.facts import Node, Partition
from aim_profile.nodes.read import emulate, read_node
from sysfs_tree import write_mi300x_cpx

UNSET_V1 = "9223372036854771712\n"
RUNNER = CliRunner()


def write(root: Path, **files: str) -> Path:
    """Files by path, `/` written as `__`."""
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def machine(root: Path, total_mib: int = 8192, available_mib: int = 6000, allowed: str = "0-3", **more: str) -> Path:
    meminfo = f"MemTotal:       {total_mib * 1024} kB\nMemFree: 1 kB\nMemAvailable:   {available_mib * 1024} kB\n"
    return write(
        root,
        proc__meminfo=meminfo,
        proc__self__status=f"Name:\tpython\nCpus_allowed:\tf\nCpus_allowed_list:\t{allowed}\n",
        sys__devices__system__cpu__online="0-3\n",
        **more,
    )


def the_device(node: Node) -> Partition:
    (card,) = node.cards
    (device,) = card.partitions
    return device


def test_a_machine_without_a_gpu_is_one_device_of_its_cores_and_memory(tmp_path: Path):
    node = read_node(machine(tmp_path))
    assert (node.backend, node.cards[0].product, node.cards[0].mode_text, node.devices) == ("proc", "cpu", "CPU", 1)
    device = the_device(node)
    assert (device.cpus, device.compute_units, device.memory_mib, device.memory_source) == (
        *((0, 1, 2, 3), 4, 6000, "measured"),
    )
    assert "no AMD GPU" in node.notes[0]
    assert node.cards[0].notes == ("memory: the least of MemTotal 8192 MiB, MemAvailable 6000 MiB",)


def test_this_machine_says_what_its_own_process_may_use():
    """The test's machine has no AMD GPU; where it had, its cards would be what is read."""
    card = read_cpu(Path("/"))
    assert card is not None
    assert card.partitions[0].cpus == tuple(sorted(os.sched_getaffinity(0)))
    assert (
        1 <= (card.partitions[0].memory_mib or 0) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    )


def test_a_machine_with_a_gpu_is_what_it_was(tmp_path: Path):
    write_mi300x_cpx(tmp_path / "sys/class/kfd/kfd/topology/nodes")
    node = read_node(machine(tmp_path))
    assert [card.product for card in node.cards] == ["MI300X"]
    assert "cpus" not in json.dumps(node.model_dump(mode="json"))


def test_affinity_counts_only_cpus_that_are_online(tmp_path: Path):
    """The mask of a virtual machine often names every CPU that it could ever have."""
    assert the_device(read_node(machine(tmp_path, allowed="1,3-255"))).cpus == (1, 3)


def test_without_a_status_file_the_cpus_are_those_online_or_listed(tmp_path: Path):
    (machine(tmp_path) / "proc/self/status").unlink()
    assert the_device(read_node(tmp_path)).cpus == (0, 1, 2, 3)
    (tmp_path / "sys/devices/system/cpu/online").unlink()
    unknown = read_node(tmp_path)
    assert (the_device(unknown).cpus, the_device(unknown).compute_units) == ((), None)
    assert "which CPUs may be used is not readable here" in unknown.cards[0].notes
    write(tmp_path, proc__cpuinfo="processor\t: 0\nflags\t: fpu\n\nprocessor\t: 1\n")
    assert the_device(read_node(tmp_path)).cpus == (0, 1)


@pytest.mark.parametrize(
    ("files", "memory_mib", "cores"),
    [
        ({}, 6000, 4),
        ({"memory.max": "max\n", "cpu.max": "max 100000\n"}, 6000, 4),
        ({"memory.max": str(2**31), "cpu.max": "200000 100000\n"}, 2048, 2),
        ({"memory.max": str(2**40), "cpu.max": "900000 100000"}, 6000, 4),
        ({"cpu.max": "50000 100000"}, 6000, 1),
        ({"cpu.max": "150000 100000"}, 6000, 1),
        # A limit above ours binds us too; the least counts.
        ({"pod/memory.max": str(3 * 2**30), "memory.max": str(2**32)}, 3072, 4),
        ({"pod/memory.max": "max", "memory.max": str(2**31)}, 2048, 4),
    ],
)
def test_limits_of_cgroup_version_2(tmp_path: Path, files: dict[str, str], memory_mib: int, cores: int):
    machine(tmp_path, proc__self__cgroup="0::/pod\n")
    base = tmp_path / "sys/fs/cgroup"
    (base / "pod").mkdir(parents=True)
    (base / "cgroup.controllers").write_text("cpu memory\n")
    for name, text in files.items():
        (base / name).write_text(text)
    device = the_device(read_node(tmp_path))
    assert (device.memory_mib, device.compute_units, device.cpus) == (memory_mib, cores, (0, 1, 2, 3))


@pytest.mark.parametrize("where", ["kubepods/pod1", "."])
def test_limits_of_cgroup_version_1(tmp_path: Path, where: str):
    """In a container the path may be the host's, while the limit lies in the mount's root."""
    groups = "5:cpu,cpuacct:/kubepods/pod1\n4:memory:/kubepods/pod1\n1:name=systemd:/\n"
    machine(tmp_path, proc__self__cgroup=groups)
    for controller, files in (
        ("memory", {"memory.limit_in_bytes": f"{2**30}\n"}),
        ("cpu,cpuacct", {"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"}),
    ):
        folder = tmp_path / "sys/fs/cgroup" / controller / where
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    device = the_device(read_node(tmp_path))
    assert (device.memory_mib, device.compute_units) == (1024, 2)


def test_an_unset_limit_of_version_1_is_none(tmp_path: Path):
    machine(
        tmp_path,
        sys__fs__cgroup__memory__memory_limit="",
        proc__self__cgroup="4:memory:/\n3:cpu:/\n",
    )
    write(tmp_path, **{"sys__fs__cgroup__memory__memory.limit_in_bytes": UNSET_V1})
    write(
        tmp_path,
        **{"sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1", "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000"},
    )
    device = the_device(read_node(tmp_path))
    assert (device.memory_mib, device.compute_units) == (6000, 4)


def test_a_cgroup_above_the_namespace_stays_inside_the_mount(tmp_path: Path):
    """`/../..` is how a process outside its namespace's root is shown."""
    machine(tmp_path, proc__self__cgroup="0::/../../etc\n")
    base = tmp_path / "sys/fs/cgroup"
    base.mkdir(parents=True)
    (base / "cgroup.controllers").write_text("memory\n")
    write(tmp_path, **{"sys__fs__cgroup__memory.max": str(2**30), "sys__etc__memory.max": "1"})
    assert the_device(read_node(tmp_path)).memory_mib == 1024


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("proc/meminfo", "", "no MemTotal"),
        ("proc/meminfo", "MemTotal: -5 kB\n", "'-5 kB' is not a size in kB"),
        ("proc/meminfo", "MemTotal: 5 GB\n", "is not a size in kB"),
        ("proc/meminfo", "MemTotal: 99999999999999999 kB\n", "is not a size in kB"),
        ("proc/meminfo", "MemTotal: 0 kB\n", "less than 1 MiB of memory, by MemTotal"),
        ("proc/meminfo", "MemTotal: 9 kB\n" + "x" * 5_000_000, "too large"),
        ("proc/meminfo", "\0" * 99, "not plain text"),
        ("proc/self/status", "Cpus_allowed_list:\t3-1\n", "'3-1' is not the next CPU or range"),
        ("proc/self/status", "Cpus_allowed_list:\t0-999999\n", "below 8192"),
        ("proc/self/status", "Cpus_allowed_list:\t0-8191" + ",0-8191" * 99_999, "'0-8191' is not the next CPU"),
        ("proc/self/status", "Cpus_allowed_list:\t\n", "is not the next CPU"),
        ("sys/devices/system/cpu/online", "a,b", "is not the next CPU"),
        ("sys/fs/cgroup/memory.max", "lots", "'lots' is not a whole number"),
        ("sys/fs/cgroup/memory.max", "0", "less than 1 MiB of memory, by cgroup memory.max"),
        ("sys/fs/cgroup/memory.max", "-1", "is not a whole number"),
        ("sys/fs/cgroup/cpu.max", "100000", "is not `quota period`"),
        ("sys/fs/cgroup/cpu.max", "100000 0", "a period of 0"),
        ("sys/fs/cgroup/cpu.max", "-1 100000", "is not a whole number"),
    ],
)
def test_odd_contents_are_one_error_that_names_the_file(tmp_path: Path, file: str, text: str, says: str):
    machine(tmp_path)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / file).write_text(text)
    with pytest.raises(NodeError) as refused:
        read_node(tmp_path)
    assert says in str(refused.value)
    assert refused.value.field == str(tmp_path / file)


@given(st.sets(st.integers(0, 8191), min_size=1, max_size=64))
def test_a_cpu_list_gives_back_the_ids_it_was_written_from(ids: set[int]):
    assert cpu_list(",".join(map(str, sorted(ids))), "list") == tuple(sorted(ids))


@given(st.text(max_size=200))
def test_any_text_is_cpus_or_one_error(text: str):
    with contextlib.suppress(NodeError):
        assert cpu_list(text, "list")


def test_a_cgroup_of_a_name_that_no_folder_can_have_is_no_crash(tmp_path: Path):
    machine(tmp_path, proc__self__cgroup=f"0::/{'x' * 5000}/y\n")
    write(tmp_path, **{"sys__fs__cgroup__cgroup.controllers": "", "sys__fs__cgroup__memory.max": str(2**30)})
    assert the_device(read_node(tmp_path)).memory_mib == 1024


# --- files ------------------------------------------------------------------------------------------------------------


def sets(text: str) -> list[tuple[tuple[int, ...], int | None]]:
    return [(device.cpus, device.memory_mib) for device in devices_of(parse_emulated(text))]


@pytest.mark.parametrize(
    ("cores", "partitions", "cpus"),
    [
        (4, 4, [(0,), (1,), (2,), (3,)]),
        (5, 2, [(0, 1, 2), (3, 4)]),
        (8, 3, [(0, 1, 2), (3, 4, 5), (6, 7)]),
        (2, 1, [(0, 1)]),
    ],
)
def test_equal_partitions_divide_cores_and_memory(cores: int, partitions: int, cpus: list[tuple[int, ...]]):
    text = f"version: 1\nkind: cpu\ncores: {cores}\nmemory: 8GiB\npartitions: {partitions}\n"
    assert sets(text) == [(each, 8192 // partitions) for each in cpus]


def test_four_partitions_of_two_cores_share_them_in_turns_once_that_is_said():
    text = "version: 1\nkind: cpu\ncores: 2\nmemory: 4GiB\npartitions: 4\n"
    with pytest.raises(
        NodeError, match=r"node:5: partitions: 4 partitions of 2 cores share them: say share_cpus: true"
    ):
        parse_emulated(text)
    assert sets(text + "share_cpus: true\n") == [((0,), 1024), ((1,), 1024), ((0,), 1024), ((1,), 1024)]


def test_described_partitions_are_devices_of_one_card():
    text = (
        "version: 1\nkind: cpu\nname: edge\npartitions:\n- {cpus: [0], memory: 2GiB}\n- {cpus: [2, 1], memory: 1GB}\n"
    )
    node = parse_emulated(text)
    assert (node.name, node.backend) == ("edge", "emulated")
    found = devices_of(node)
    assert [(d.kind, d.card, d.partition, d.memory_mib, d.compute_units, d.cpus) for d in found] == [
        ("cpu", 0, 0, 2048, 1, (0,)),
        ("cpu", 0, 1, 953, 2, (1, 2)),
    ]
    assert {(d.render_minor, d.compute_partition, d.memory_partition, d.mode) for d in found} == {(None,) * 4}


HEAD = "version: 1\nkind: cpu\n"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "partitions: [{cpus: [0], memory: 1GiB}, {cpus: [0], memory: 1GiB}]",
            "partitions[1].cpus: CPU 0 is in partit",
        ),
        ("partitions: [{cpus: [3, 3], memory: 1GiB}]", "partitions[0].cpus: CPU 3 is there twice"),
        ("partitions: [{cpus: [0, 0], memory: 1GiB}]", "partitions[0].cpus: CPU 0 is there twice"),
        ("partitions: [{cpus: [-1], memory: 1GiB}]", "partitions[0].cpus: -1 is no CPU"),
        ("partitions: [{cpus: [9000], memory: 1GiB}]", "partitions[0].cpus: 9000 is no CPU"),
        ("partitions: [{cpus: [], memory: 1GiB}]", "partitions[0].cpus"),
        ("partitions: [{cpus: ['0'], memory: 1GiB}]", "partitions[0].cpus[0]"),
        ("partitions: [{cpus: [0], memory: 1}]", "partitions[0].memory"),
        ("partitions: [{cpus: [0], memory: 0GiB}]", "less than a byte"),
        ("partitions: [{cpus: [0], memory: 1KiB}]", "less than 1 MiB"),
        ("partitions: [{cpus: [0], memory: -1GiB}]", "is not a memory size"),
        ("partitions: [{cpus: [0], memory: 999999TiB}]", "more than 1 PiB"),
        ("partitions: [{cpus: [0]}]", "partitions[0].memory: Field required"),
        ("partitions: [{cpu: [0], memory: 1GiB}]", "unknown key; did you mean cpus?"),
        ("partitions: []", "partitions: "),
        ("cores: 4\nmemory: 1GiB\npartitions: 0", "partitions: "),
        ("partitions: 3", "cores: Field required"),
        ("{}", ": Field required"),
        ("cores: 4\nmemory: 1GiB\npartitions: 2.5", "partitions: "),
        ("cores: 0\nmemory: 1GiB\npartitions: 1", "cores: "),
        ("cores: 2\nmemory: 1MiB\npartitions: 2", "less than 1 MiB each"),
        ("cores: 2\npartitions: [{cpus: [2], memory: 1GiB}]", "CPU 2 is not one of the machine's 2 (0 to 1)"),
        ("memory: 1GiB\npartitions: [{cpus: [0], memory: 2GiB}]", "take 2048 MiB, 1024 more than 1GiB"),
        ("gpu: MI300X\npartitions: 2", "gpu: unknown key"),
        ("partitions: 100000\ncores: 4\nmemory: 1GiB\nshare_cpus: true", "partitions: "),
    ],
)
def test_a_wrong_file_is_refused_by_key(body: str, says: str):
    text = HEAD.rstrip() + "\n" + ("" if body == "{}" else body + "\n")
    with pytest.raises(NodeError) as refused:
        parse_emulated(text)
    assert says in str(refused.value)
    assert str(refused.value).startswith("node:")


def test_another_kind_is_refused():
    with pytest.raises(NodeError, match=r"kind: Input should be 'cpu'"):
        parse_emulated("version: 1\nkind: tpu\npartitions: 1\n")


def test_a_cpu_node_survives_its_export(tmp_path: Path):
    shared = parse_emulated(HEAD + "cores: 2\nmemory: 4GiB\npartitions: 4\nshare_cpus: true\n")
    live = read_node(machine(tmp_path / "tree"))
    for node in (shared, live):
        file = tmp_path / "node.yaml"
        file.write_text(export_node(node))
        assert load_emulated(file) == node


def test_a_set_larger_than_the_machine_is_refused(tmp_path: Path):
    here = read_node(machine(tmp_path, available_mib=2048))
    refuse_larger(parse_emulated(HEAD + "cores: 2\nmemory: 2GiB\npartitions: 4\nshare_cpus: true\n"), here)
    refuse_larger(emulate("MI300X", 1), here)
    refuse_larger(parse_emulated(HEAD + "partitions: [{cpus: [77], memory: 9GiB}]\n"), Node())
    with pytest.raises(
        NodeError, match=r"card 0 partition 1 .*CPU 4 is none that this process may use; name some of 0, 1"
    ):
        refuse_larger(
            parse_emulated(HEAD + "partitions: [{cpus: [3], memory: 1GiB}, {cpus: [4], memory: 1GiB}]\n"), here
        )
    with pytest.raises(NodeError, match="take 4096 MiB of memory, 2048 more than the 2048 MiB"):
        refuse_larger(parse_emulated(HEAD + "cores: 2\nmemory: 4GiB\npartitions: 2\n"), here)


def test_an_exported_cpu_set_is_checked_too():
    text = "version: 1\nnode: {cards: [{index: 0, product: cpu, partitions: [{index: 0, cpus: [1, 1]}]}]}\n"
    with pytest.raises(NodeError, match=r"CPU 1 is there twice"):
        parse_emulated(text)


# --- the verbs --------------------------------------------------------------------------------------------------------


def run(*words: object) -> tuple[int, str]:
    result = RUNNER.invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_node_shows_the_processors_and_says_that_there_is_no_gpu(tmp_path: Path):
    code, output = run("node", "--root", machine(tmp_path))
    assert code == 0
    assert "no AMD GPU" in output
    assert output.splitlines()[8].split() == ["0", "-", "-", "cpu", "CPU", "-", "-", "-", "1", "4", "6000"]


def test_fit_sizes_a_gguf_on_a_cpu_set(tmp_path: Path, embedded_model: Path):
    file = tmp_path / "node.yaml"
    file.write_text(HEAD + "cores: 2\nmemory: 2GiB\npartitions: 2\n")
    code, output = run("fit", embedded_model, "--node", file, "--context", 2048)
    assert (code, "fits" in output, "llama.cpp" in output) == (0, True, True)
    assert "a CPU set of 1 core and 1024 MiB" in output
    file.write_text(HEAD + "cores: 2\nmemory: 600MiB\npartitions: 2\n")
    code, output = run("fit", embedded_model, "--node", file, "--context", 8192)
    assert (code, "does not fit, short by" in output, "MiB of memory" in output) == (1, True, True)
    code, output = run("fit", embedded_model, "--node", file, "--tp", 2)
    assert (code, "a model runs on one CPU set" in output) == (2, True)


def test_a_card_without_a_cpu_set_is_one_line(tmp_path: Path, embedded_model: Path):
    file = tmp_path / "node.yaml"
    file.write_text("version: 1\nnode: {name: n, cards: [{index: 0, product: cpu}]}\n")
    assert run("node", "--node", file)[0] == 0
    code, output = run("fit", embedded_model, "--node", file)
    assert (code, "card 0 has no CPU set" in output) == (2, True)
    (tmp_path / "w.yaml").write_text(f"version: 1\nworkloads: [{{name: a, model: {embedded_model}}}]\n")
    code, output = run("plan", file, tmp_path / "w.yaml")
    assert (code, "0 of 1 replicas placed" in output) == (1, True)


def test_select_says_that_profiles_are_for_gpus(tmp_path: Path):
    code, output = run("select", "Qwen/Qwen3-8B", "--root", machine(tmp_path))
    assert code == 2
    assert "no AMD GPU here" in output


def test_equal_nodes_print_equal_json_whatever_is_new():
    """A GPU's partition shows no `cpus`: what reads these files today knows no such key."""
    dumped = emulate("MI300X", 1).model_dump(mode="json")
    assert list(dumped["cards"][0]["partitions"][0]) == [
        *("index", "compute_units", "memory_mib", "memory_source", "xcds", "render_minor", "kfd_node"),
    ]
