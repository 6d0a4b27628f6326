"""amd-smi's JSON in every shape its releases print, the library behind its guard, and their join with a tree."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_profile.errors import NodeError
from aim_profile.nodes import amdsmi
from aim_profile.nodes import read as node_module
from aim_profile.nodes.amdsmi import library_rows
from aim_profile.nodes.read import Card, Node, read_node
from sysfs_tree import write_mi300x_cpx

BLANK_PROFILE = {
    "gpu_id": "",
    "profile_index": "",
    "memory_partition_caps": "",
    "accelerator_type": "",
    "partition_id": "",
    "num_partitions": "",
    "resource_index": 1,
    "resource_type": "DMA",
}


def listed(count: int = 8, bus: str = "05") -> list[dict[str, Any]]:
    """`amd-smi list --json` of one MI300X showing `count` devices."""
    return [
        {
            "gpu": gpu,
            "bdf": f"0000:{bus}:00.{gpu}",
            "uuid": f"{gpu:02x}ff74a1-0000-1000-80aa-000000000000",
            "kfd_id": 40000 + gpu,
            "node_id": gpu + 2,
            "partition_id": gpu,
        }
        for gpu in range(count)
    ]


def static(count: int = 8, *, secondaries: str = "CPX", **more: Any) -> list[dict[str, Any]]:
    """`amd-smi static --partition --json`; secondaries may read N/A."""
    modes = [("CPX", "NPS4")] + [(secondaries, "NPS4" if secondaries != "N/A" else "N/A")] * (count - 1)
    return [
        {"gpu": gpu, "partition": {"compute_partition": c, "memory_partition": m, "partition_id": gpu, **more}}
        for gpu, (c, m) in enumerate(modes)
    ]


def profile(gpu: int | str, index: int, name: str, caps: str, count: int) -> dict[str, Any]:
    return {
        "gpu_id": gpu,
        "profile_index": index,
        "memory_partition_caps": caps,
        "accelerator_type": name,
        "partition_id": "0" if name.endswith("*") else "N/A",
        "num_partitions": count,
        "resource_index": 0,
        "resource_type": "XCC",
    }


def read(tmp_path: Path, *outputs: Any) -> Node:
    files = []
    for number, output in enumerate(outputs):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(output))
    return read_node(None, files)


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"gpu_data": rows}], ids=["list", "gpu_data"])
@pytest.mark.parametrize("secondaries", ["CPX", "N/A"])
def test_both_top_level_shapes_give_one_card_of_eight(tmp_path: Path, wrap: Any, secondaries: str):
    node = read(tmp_path, listed(), wrap(static(secondaries=secondaries, compute_partition_mem_alloc_mode="CAPPING")))
    (card,) = node.cards
    assert (node.backend, card.bdf, card.pci_id, card.product) == ("amd-smi", "0000:05:00.0", "0x74a1", "MI300X")
    assert (card.mode_label, card.alloc_mode) == ("CPX/NPS4", "CAPPING")
    assert [(p.index, p.compute_units, p.memory_mib, p.kfd_node) for p in card.partitions] == [
        (n, 38, 24574, n + 2) for n in range(8)
    ]
    assert {p.memory_source for p in card.partitions} == {"derived"}


def test_two_cards_without_addresses_part_at_partition_zero(tmp_path: Path):
    rows = static() + [{**row, "gpu": row["gpu"] + 8} for row in static()]
    node = read(tmp_path, rows)
    assert [len(card.partitions) for card in node.cards] == [8, 8]
    assert [card.product for card in node.cards] == ["unknown", "unknown"]
    assert "no device id" in node.cards[0].notes[0]


def test_asic_and_memory_sections_are_measured_facts(tmp_path: Path):
    rows = [
        {
            "gpu": 0,
            "asic": {
                "market_name": "MI308X",
                "device_id": "0x74a2",
                "num_compute_units": 80,
                "target_graphics_version": "gfx942",
            },
            "bus": {"bdf": "0001:C1:00.0"},
            "numa": {"node": 1},
            "partition": {"accelerator_partition": "SPX", "memory_partition": "NPS1", "partition_id": 0},
            "mem_usage": {"total_vram": {"value": 196592, "unit": "MB"}},
        }
    ]
    (card,) = read(tmp_path, rows).cards
    assert (card.product, card.bdf, card.numa_node, card.mode_label) == ("MI308X", "0001:c1:00.0", 1, "SPX/NPS1")
    (device,) = card.partitions
    assert (device.compute_units, device.memory_mib, device.memory_source) == (80, 196592, "measured")


def test_profiles_with_continuation_rows_and_a_star(tmp_path: Path):
    rows = [
        profile(0, 0, "SPX", "NPS1", 1),
        BLANK_PROFILE,
        BLANK_PROFILE,
        profile(0, 1, "DPX*", "NPS1", 2),
        BLANK_PROFILE,
        profile(0, 2, "QPX", "NPS1,NPS4", 4),
        profile(0, 3, "CPX", "NPS1, NPS4", 8),
    ]
    (card,) = read(tmp_path, {"partition_profiles": rows}, listed(2)).cards
    assert card.compute_partition == "DPX"
    assert card.caps is not None
    assert card.caps.combinations == ("SPX/NPS1", "DPX/NPS1", "QPX/NPS1", "QPX/NPS4", "CPX/NPS1", "CPX/NPS4")
    modes = {mode.label: mode.tier for mode in card.modes()}
    assert "DPX/NPS2" not in modes
    assert (modes["SPX/NPS1"], modes["DPX/NPS1"]) == ("validated", "driver-legal")
    in_a_vm = {mode.label: (mode.tier, mode.source) for mode in card.modes("passthrough")}
    assert in_a_vm["CPX/NPS4"] == ("driver-legal", "this card's driver")


def test_profiles_without_root_are_all_blank_and_say_so(tmp_path: Path):
    row = {key: "N/A" for key in profile(0, 0, "SPX", "NPS1", 1)} | {"gpu_id": 0}
    (card,) = read(tmp_path, {"partition_profiles": [row]}).cards
    assert (card.compute_partition, card.caps) == (None, None)
    assert any("to root only" in note for note in card.notes)


def test_the_current_partition_shape(tmp_path: Path):
    row = {
        "gpu_id": 0,
        "memory": "NPS1",
        "accelerator_type": "SPX",
        "accelerator_profile_index": 0,
        "partition_id": "0",
    }
    (card,) = read(tmp_path, {"current_partition": [row]}, listed(1)).cards
    assert (card.mode_label, card.partitions[0].memory_mib) == ("SPX/NPS1", 196592)


def test_as_many_devices_as_xcds_can_only_be_cpx(tmp_path: Path):
    assert read(tmp_path, listed(8)).cards[0].compute_partition == "CPX"
    assert read(tmp_path, listed(2)).cards[0].compute_partition is None


def test_a_trees_blanks_are_filled_and_its_readings_kept(tmp_path: Path):
    write_mi300x_cpx(tmp_path / "nodes")
    for bank in (tmp_path / "nodes").glob("[3-9]/mem_banks/0/properties"):
        bank.unlink()
        bank.parent.rmdir()
        bank.parent.parent.rmdir()
    saved = tmp_path / "static.json"
    saved.write_text(json.dumps([*static(), {"gpu": 1, "mem_usage": {"total_vram": {"value": 24561, "unit": "MB"}}}]))
    (card,) = read_node(tmp_path, [saved]).cards
    assert card.mode_label == "CPX/NPS4"
    memory = [(p.memory_mib, p.memory_source) for p in card.partitions]
    assert memory == [(24576, "measured"), (24561, "measured")] + [(24574, "derived")] * 6


def test_output_of_another_node_is_refused(tmp_path: Path):
    write_mi300x_cpx(tmp_path / "nodes")
    saved = tmp_path / "static.json"
    saved.write_text(json.dumps(static() + [{**row, "gpu": row["gpu"] + 8} for row in static()]))
    with pytest.raises(NodeError, match="amd-smi names 2 cards, this node has 1"):
        read_node(tmp_path, [saved])


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (3, "neither a list nor an object"),
        ({"gpus": []}, "neither a list nor an object"),
        ({"gpu_data": 3}, "gpu_data must be a list"),
        ([3], "a row is int"),
        ([{"name": "x"}], "neither gpu nor gpu_id"),
        ([{"gpu": "first"}], "'first' is not a whole number"),
        ([{"gpu": 0, "partition": "CPX"}], "partition is 'CPX', not an object"),
        ([{"gpu": 0, "partition": {"compute_partition": "XPX"}}], "'XPX' is none of SPX"),
        ([{"gpu": 0, "partition": {"memory_partition": 4}}], "4 is none of NPS1"),
        ([{"gpu": 0, "bdf": "05:00"}], "is not a PCI address"),
        ([{"gpu": 0, "asic": {"device_id": 29857}}], "is not like 0x74a1"),
        ([{"gpu": 0, "mem_usage": {"total_vram": {"value": 24, "unit": "GB"}}}], "memory unit 'GB' is not MB"),
        ({"partition_profiles": [BLANK_PROFILE]}, "first profile row has no gpu_id"),
    ],
)
def test_garbled_output_names_the_file_and_the_value(tmp_path: Path, output: Any, says: str):
    with pytest.raises(NodeError) as refused:
        read(tmp_path, output)
    assert says in str(refused.value)
    assert "0.json" in str(refused.value)


def test_truncated_output_is_named(tmp_path: Path):
    file = tmp_path / "list.json"
    file.write_text(json.dumps(listed())[:-20])
    with pytest.raises(NodeError, match=r"list\.json: not readable as JSON"):
        read_node(None, [file])
    with pytest.raises(NodeError, match=r"gone\.json"):
        read_node(None, [tmp_path / "gone.json"])


SCALARS = st.none() | st.integers(-5, 2**64) | st.text(max_size=6) | st.sampled_from(["N/A", "", "CPX", "NPS4", "0"])
KEYS = ["gpu", "gpu_id", "bdf", "uuid", "node_id", "partition_id", "partition", "asic", "accelerator_type", "memory"]
ROWS = st.dictionaries(
    st.sampled_from([*KEYS, "mem_usage", "memory_partition_caps", "vram", "numa"]),
    SCALARS | st.dictionaries(st.sampled_from(["compute_partition", "memory_partition", "device_id", "size"]), SCALARS),
)
SHAPES = st.lists(ROWS) | st.dictionaries(
    st.sampled_from(["gpu_data", "current_partition", "partition_profiles"]), st.lists(ROWS) | SCALARS
)


@settings(max_examples=300)
@given(SHAPES | st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner)))
def test_any_json_is_cards_or_a_node_error(tmp_path_factory: pytest.TempPathFactory, output: Any):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(output))
    try:
        node = read_node(None, [file])
    except NodeError as refused:
        if str(file) not in str(refused):
            raise
        return
    assert all(isinstance(card, Card) for card in node.cards)


def test_a_library_that_prints_and_raises_is_absent(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    """amdsmi without libamd_smi.so prints and raises KeyError at import."""

    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            print("Unable to find libamd_smi.so")
            raise KeyError("libamd_smi.so")

    monkeypatch.setitem(sys.modules, "amdsmi", Broken("amdsmi"))
    assert library_rows() == []
    assert capfd.readouterr() == ("", "")


def a_library(**overrides: Any) -> types.ModuleType:
    """The calls of amdsmi that are used, answering as for the first partition of a MI300X."""
    answers: dict[str, Any] = {
        "amdsmi_init": None,
        "amdsmi_shut_down": None,
        "amdsmi_get_processor_handles": ["handle"],
        "amdsmi_get_gpu_asic_info": {"device_id": "0x74a1", "num_compute_units": 38, "market_name": "MI300X"},
        "amdsmi_get_gpu_kfd_info": {"node_id": 2, "current_partition_id": 0},
        "amdsmi_get_gpu_enumeration_info": {"drm_render": 128},
        "amdsmi_get_gpu_vram_usage": {"vram_total": 24574, "vram_used": 1},
        "amdsmi_get_gpu_compute_partition": "CPX",
        "amdsmi_get_gpu_memory_partition": "NPS4",
        "amdsmi_get_gpu_device_bdf": "0000:05:00.0",
        **overrides,
    }
    library = types.ModuleType("amdsmi")
    for name, answer in answers.items():
        setattr(library, name, (lambda value: lambda *_: value)(answer))
    return library


def test_the_library_answers_where_sysfs_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "sys").mkdir()
    monkeypatch.setattr(node_module, "_LIVE", tmp_path)
    monkeypatch.setitem(sys.modules, "amdsmi", a_library())
    node = read_node()
    (card,) = node.cards
    assert (node.backend, card.product, card.mode_label) == ("amdsmi", "MI300X", "CPX/NPS4")
    (device,) = card.partitions
    assert (device.compute_units, device.memory_mib, device.render_minor) == (38, 24574, 128)


def test_the_tool_answers_where_the_library_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tool = tmp_path / "amd-smi"
    answers = {"list": listed(), "static": {"gpu_data": static()}, "metric": [], "partition": "not JSON"}
    cases = "\n".join(f"{word}) echo '{json.dumps(answer)}';;" for word, answer in answers.items())
    tool.write_text(f"#!/bin/sh\ncase $1 in\n{cases}\nesac\n".replace("'\"not JSON\"'", "oops"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    monkeypatch.setattr(node_module, "_LIVE", tmp_path)
    (tmp_path / "sys").mkdir()
    node = read_node()
    assert (node.backend, node.cards[0].mode_label, node.devices) == ("amd-smi", "CPX/NPS4", 8)


def test_no_library_and_no_tool_is_a_node_without_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    backend, cards = amdsmi.ask_amdsmi()
    assert (backend, cards) == ("amd-smi", ())


GROUPS = "WARNING: User is missing the following required groups: render, video. Please add user to these groups."
FRAMED = "***********************\n** WARNING:          **\n** run it with sudo  **\n***********************"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("\ufeff", "", []),
        ("\x1b[33mold driver\x1b[0m\n\x1b[1m", "\x1b[0m", ["old driver"]),
        (GROUPS + "\n", "", ["User is missing the following required groups"]),
        ("[AMDSMI_STATUS_NO_PERM] Command requires elevation\n\n", "", ["[AMDSMI_STATUS_NO_PERM]"]),
        ("{'not': json}\n", "", ["{'not': json}"]),
        (FRAMED + "\n", "", ["WARNING:", "run it with sudo"]),
        ("", "\nDone [1 of 1]\n", ["Done [1 of 1]"]),
        ("\r\n" + GROUPS + "\r\n", "\r\n", ["User is missing"]),
    ],
)
@pytest.mark.parametrize("indent", [None, 4])
def test_what_stands_beside_the_json_is_passed_on(
    tmp_path: Path, before: str, after: str, said: list[str], indent: int | None
):
    file = tmp_path / "static.json"
    file.write_text(before + json.dumps(static(), indent=indent) + after)
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps(listed()))
    node = read_node(None, [listing, file])
    assert node.cards[0].mode_label == "CPX/NPS4"
    assert len(node.notes) == len(said)
    for note, words in zip(node.notes, said, strict=True):
        assert words in note
        assert str(file) in note


def test_many_words_are_cut_and_repetitions_said_once(tmp_path: Path):
    file = tmp_path / "list.json"
    file.write_text("".join(f"warning {n} {'x' * 1000}\n" for n in range(1000)) + json.dumps(listed()))
    notes = read_node(None, [file, file]).notes
    assert len(notes) == 9
    assert max(map(len, notes)) < 400
    assert "992 lines more" in notes[-1]


def test_json_that_breaks_off_behind_a_warning_is_refused(tmp_path: Path):
    file = tmp_path / "list.json"
    file.write_text(GROUPS + "\n" + json.dumps(listed(), indent=4)[:-30])
    with pytest.raises(NodeError, match=r"list\.json: not readable as JSON"):
        read_node(None, [file])
    file.write_text(GROUPS)
    with pytest.raises(NodeError, match=r"list\.json: not readable as JSON"):
        read_node(None, [file])


def test_one_output_may_hold_several_lists(tmp_path: Path):
    """`amd-smi partition --json` of ROCm 6.3: current, memory and accelerator partitions, one list behind the other."""
    current = [{"gpu_id": 0, "memory": "NPS1", "accelerator_type": "SPX", "partition_id": [0]}]
    memory = [{"gpu": 0, "memory_partition": {"caps": "'NPS1'", "current": "NPS1"}}]
    file = tmp_path / "partition.json"
    file.write_text("\n".join(json.dumps(part, indent=4) for part in (current, memory)))
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps(listed(1)))
    (card,) = read_node(None, [file, listing]).cards
    assert (card.mode_label, card.caps) == ("SPX/NPS1", None)


def test_the_memory_partition_alone(tmp_path: Path):
    """`amd-smi partition --memory --json` of ROCm 7 and of 6.3."""
    row = {"gpu_id": 0, "memory_partition_caps": "NPS1,NPS4", "current_memory_partition": "NPS4"}
    (card,) = read(tmp_path, {"memory_partition": [row]}).cards
    assert (card.mode_text, card.memory_partition) == ("?/NPS4", "NPS4")
    assert card.caps is not None
    assert card.caps.memory == ("NPS1", "NPS4")
    old = {"gpu": 0, "memory_partition": {"caps": "'NPS1', 'NPS4'", "current": "NPS4"}}
    (card,) = read(tmp_path, [old]).cards
    assert (card.memory_partition, card.caps) == ("NPS4", None)
    blank = {**row, "memory_partition_caps": "N/A", "current_memory_partition": "N/A"}
    (card,) = read(tmp_path, {"memory_partition": [blank]}).cards
    assert card.memory_partition is None


def test_the_memory_partition_of_every_device_completes_a_tree(tmp_path: Path):
    write_mi300x_cpx(tmp_path / "nodes")
    rows = [
        {"gpu_id": n, "memory_partition_caps": "NPS1,NPS4" if n == 0 else "N/A", "current_memory_partition": "NPS4"}
        for n in range(8)
    ]
    saved = tmp_path / "memory.json"
    saved.write_text(GROUPS + "\n" + json.dumps({"memory_partition": rows}))
    node = read_node(tmp_path, [saved])
    (card,) = node.cards
    assert (card.mode_label, len(card.partitions)) == ("CPX/NPS4", 8)
    assert any("required groups" in note for note in node.notes)


def metric(count: int, mib: int) -> list[dict[str, Any]]:
    """`amd-smi metric --mem-usage --json`."""
    return [{"gpu": n, "mem_usage": {"total_vram": {"value": mib, "unit": "MB"}}} for n in range(count)]


@pytest.mark.parametrize(
    ("devices", "mib", "mode"),
    [
        (1, 196592, "SPX/NPS?"),
        (2, 98296, "DPX/NPS?"),
        (2, 98280, "DPX/NPS?"),
        (4, 49148, "QPX/NPS?"),
        (8, 24574, "CPX/NPS?"),
        # Two of the four devices of QPX, or of the eight of CPX: not all are shown here.
        (2, 49148, "unknown"),
        (2, 24574, "unknown"),
        (3, 65530, "unknown"),
    ],
)
def test_as_many_devices_as_hold_the_whole_memory_tell_the_compute_mode(
    tmp_path: Path, devices: int, mib: int, mode: str
):
    (card,) = read(tmp_path, listed(devices), metric(devices, mib)).cards
    assert card.mode_text == mode
    assert [part.memory_mib for part in card.partitions] == [mib] * devices


def test_under_allocation_mode_all_memory_tells_no_compute_mode(tmp_path: Path):
    alloc = [{"gpu": n, "partition": {"compute_partition_mem_alloc_mode": "ALL"}} for n in range(2)]
    (card,) = read(tmp_path, listed(2), metric(2, 98296), alloc).cards
    assert (card.compute_partition, card.alloc_mode) == (None, "ALL")


def test_a_warning_does_not_hide_the_live_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tool = tmp_path / "amd-smi"
    answers = {"list": listed(2), "metric": metric(2, 98296)}
    cases = "\n".join(f"{word}) echo '{GROUPS}'; echo '{json.dumps(answer)}';;" for word, answer in answers.items())
    tool.write_text(f"#!/bin/sh\ncase $1 in\n{cases}\n*) echo 'not supported on this system';;\nesac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    monkeypatch.setattr(node_module, "_LIVE", tmp_path)
    (tmp_path / "sys").mkdir()
    node = read_node()
    assert (node.backend, node.cards[0].product, node.cards[0].mode_text) == ("amd-smi", "MI300X", "DPX/NPS?")
    assert [note for note in node.notes if "amd-smi said" in note] == [
        f"amd-smi said: {GROUPS}",
        "amd-smi said: not supported on this system",
    ]
