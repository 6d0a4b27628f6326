"""Nodes read from KFD and sysfs trees, written in the kernel's format here and recorded elsewhere."""

import contextlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_profile.errors import NodeError
from aim_profile.nodes import kfd
from aim_profile.nodes.emulated import parse_emulated
from aim_profile.nodes.read import Card, Node, emulate, export_node, load_emulated, read_node
from sysfs_tree import MI300X, write_kfd_node, write_mi300x_cpx, write_sysfs_card

NODES = "sys/class/kfd/kfd/topology/nodes"
PCI = "sys/bus/pci/drivers/amdgpu"
SPX = {
    "vendor": "0x1002",
    "class": "0x120000",
    "device": "0x74a1",
    "available_compute_partition": "SPX, DPX, QPX, CPX",
    "current_compute_partition": "SPX",
    "available_memory_partition": "NPS1, NPS4",
    "current_memory_partition": "NPS1",
    "mem_info_vram_total": "206141652992",
    "numa_node": "1",
}
CPX = {**SPX, "current_compute_partition": "CPX", "current_memory_partition": "NPS4"}


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A mirror of / with two MI300X in CPX/NPS4."""
    write_mi300x_cpx(tmp_path / NODES, cards=2)
    write_sysfs_card(tmp_path / PCI, "0000:05:00.0", **CPX)
    write_sysfs_card(tmp_path / PCI, "0000:16:00.0", **CPX)
    (tmp_path / PCI / "bind").write_text("")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hostname").write_text("node-1\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nflags\t\t: fpu vme de\n")
    return tmp_path


def test_a_mirror_of_the_root_tells_everything(mirror: Path):
    node = read_node(mirror)
    assert (node.name, node.deployment, node.backend, node.notes) == ("node-1", "bare-metal", "sysfs+kfd", ())
    assert [card.bdf for card in node.cards] == ["0000:05:00.0", "0000:16:00.0"]
    card = node.cards[0]
    assert (card.pci_id, card.product, card.gfx, card.mode_label) == ("0x74a1", "MI300X", "gfx942", "CPX/NPS4")
    assert (card.alloc_mode, card.hive_id, card.numa_node, card.vram_mib) == ("CAPPING", 99, 1, 196592)
    assert [p.memory_mib for p in card.partitions] == [24576] * 7 + [24560]
    assert [p.render_minor for p in card.partitions] == list(range(128, 136))
    assert {(p.compute_units, p.xcds, p.memory_source) for p in card.partitions} == {(38, 1, "measured")}
    assert card.notes == ()


def test_a_mirror_of_sys_and_its_nodes_alone_agree(mirror: Path):
    whole = read_node(mirror)
    assert read_node(mirror / "sys").cards == whole.cards
    alone = read_node(mirror / NODES)
    assert alone == read_node(mirror / NODES / "..")
    assert [card.partitions for card in alone.cards] == [card.partitions for card in whole.cards]
    assert [card.compute_partition for card in alone.cards] == ["CPX", "CPX"]
    assert [card.memory_partition for card in alone.cards] == [None, None]
    assert [card.numa_node for card in alone.cards] == [0, 1]


def test_a_virtual_machine_and_a_virtual_function(mirror: Path):
    (mirror / "proc/cpuinfo").write_text("flags : fpu hypervisor\n")
    assert read_node(mirror).deployment == "passthrough"
    (mirror / "proc/cpuinfo").unlink()
    assert read_node(mirror).deployment == "unknown"


def test_sr_iov_is_told_by_the_virtual_functions_id(tmp_path: Path):
    write_sysfs_card(tmp_path, **{**SPX, "device": "0x74b5"})
    assert read_node(tmp_path).deployment == "sr-iov"


@pytest.mark.parametrize(
    ("xcds", "cus", "count", "mode"), [(8, 304, 1, "SPX"), (4, 152, 2, "DPX"), (2, 76, 4, "QPX"), (1, 38, 8, "CPX")]
)
def test_the_compute_mode_follows_from_the_xcds(tmp_path: Path, xcds: int, cus: int, count: int, mode: str):
    for place in range(count):
        write_kfd_node(
            tmp_path / "nodes",
            place,
            location_id=1280 + place,
            render_minor=128,
            compute_units=cus,
            xcds=xcds,
            **MI300X,
        )
    (card,) = read_node(tmp_path).cards
    assert (card.compute_partition, len(card.partitions)) == (mode, count)
    assert {p.memory_mib for p in card.partitions} == {196592 // count}
    assert {p.memory_source for p in card.partitions} == {"derived"}


def test_in_a_pod_only_the_pods_devices_count(mirror: Path, monkeypatch: pytest.MonkeyPatch):
    """KFD refuses the files of other devices; sysfs still shows every card."""
    real = kfd._read

    def refuse_all_but_node_5(file: Path) -> str:
        if file.parent.name.isdecimal() and int(file.parent.name) not in (0, 1, 5):
            raise PermissionError(file)
        return real(file)

    monkeypatch.setattr(kfd, "_read", refuse_all_but_node_5)
    node = read_node(mirror)
    (card,) = node.cards
    assert [(p.index, p.kfd_node, p.render_minor) for p in card.partitions] == [(3, 5, 131)]
    assert "1 of the card's 8 partitions are visible here" in card.notes
    assert node.notes[0].startswith("15 KFD nodes are not readable")
    assert "0000:16:00.0" in node.notes[1]


def test_a_recording_made_in_a_pod_keeps_the_refusals_as_empty_files(mirror: Path):
    for number in range(3, 18):
        (mirror / NODES / str(number) / "properties").write_text("")
        (mirror / NODES / str(number) / "gpu_id").write_text("")
    (card,) = read_node(mirror).cards
    assert [p.kfd_node for p in card.partitions] == [2]


def test_what_the_driver_lists_overrides_the_catalogue(mirror: Path):
    card = read_node(mirror).cards[0]
    assert "DPX/NPS2" not in [m.label for m in card.modes()]  # the driver lists NPS1 and NPS4
    assert [m.label for m in card.modes(at_least="validated")] == ["SPX/NPS1", "CPX/NPS4"]
    assert card.modes("passthrough", "validated")[0].label == "SPX/NPS1"


def test_compute_modes_are_listed_for_the_present_memory_mode_only(tmp_path: Path):
    write_sysfs_card(tmp_path, **{**CPX, "available_compute_partition": "CPX"})
    (card,) = read_node(tmp_path).cards
    assert "QPX/NPS4" not in [m.label for m in card.modes()]
    assert "SPX/NPS1" in [m.label for m in card.modes()]


def test_sysfs_alone_derives_partitions_from_the_mode(tmp_path: Path):
    write_sysfs_card(tmp_path, **CPX)
    (card,) = read_node(tmp_path).cards
    assert [(p.compute_units, p.memory_mib, p.memory_source) for p in card.partitions] == [(38, 24574, "derived")] * 8


def test_allocation_mode_all_shares_the_memory_partition(tmp_path: Path):
    write_sysfs_card(tmp_path, **CPX, compute_partition_mem_alloc_mode="ALL")
    (card,) = read_node(tmp_path).cards
    assert card.alloc_mode == "ALL"
    assert {p.memory_mib for p in card.partitions} == {196592 // 4}
    assert any("siblings share" in note for note in card.notes)


def test_a_consumer_card_is_unknown_with_what_to_report(tmp_path: Path):
    write_kfd_node(
        tmp_path / "nodes",
        1,
        location_id=0x0300,
        render_minor=128,
        compute_units=96,
        device_id=0x744C,
        gfx_target_version=110000,
        memory_bytes=24 * 2**30,
    )
    (card,) = read_node(tmp_path).cards
    assert (card.product, card.gfx, card.compute_partition) == ("unknown", "gfx1100", None)
    assert (card.partitions[0].compute_units, card.partitions[0].memory_mib) == (96, 24576)
    assert card.report is not None
    assert "0x744c" in card.report
    assert card.modes() == ()


def test_two_dies_of_a_mi250_are_two_devices(tmp_path: Path):
    for place, bus in enumerate((0x29, 0x2C)):
        write_kfd_node(
            tmp_path / "nodes",
            place,
            location_id=bus << 8,
            render_minor=128 + place,
            compute_units=104,
            device_id=0x740C,
            gfx_target_version=90010,
            unique_id=77,
        )
    node = read_node(tmp_path)
    assert [(c.product, c.gfx, c.compute_partition, len(c.partitions)) for c in node.cards] == [
        ("MI250", "gfx90a", None, 1),
        ("MI250", "gfx90a", None, 1),
    ]
    assert {p.memory_mib for card in node.cards for p in card.partitions} == {65520}


def test_a_machine_without_an_amd_gpu_is_a_node_without_cards(tmp_path: Path):
    (tmp_path / "sys/bus/pci/drivers/nvidia").mkdir(parents=True)
    node = read_node(tmp_path)
    assert (node.cards, node.backend) == ((), "none")
    assert "no AMD GPU" in node.notes[0]


@pytest.mark.parametrize("place", ["bus/pci/devices/0000:05:00.0", "class/drm/card1/device"])
def test_a_mirror_with_the_cards_elsewhere_in_sysfs(tmp_path: Path, place: str):
    """Recordings of /sys/bus/pci/devices or /sys/class/drm alone; other vendors' cards are left out."""
    write_mi300x_cpx(tmp_path / NODES)
    folder = tmp_path / "sys" / place
    write_sysfs_card(folder.parent, folder.name, **CPX, uevent="DRIVER=amdgpu\nPCI_SLOT_NAME=0000:05:00.0")
    other = {"vendor": "0x10de", "device": "0x2330", "class": "0x030200"}
    write_sysfs_card(tmp_path / "sys/bus/pci/devices", "0000:07:00.0", **other)
    write_sysfs_card(tmp_path / "sys/class/drm", "card0/device", **other)
    node = read_node(tmp_path)
    assert node.backend == "sysfs+kfd"
    assert [(card.bdf, card.mode_label, len(card.partitions)) for card in node.cards] == [
        ("0000:05:00.0", "CPX/NPS4", 8)
    ]


def test_pci_devices_without_the_amdgpu_driver_are_not_cards(tmp_path: Path):
    """A GPU given to vfio, or another vendor's, is in /sys/bus/pci/devices too."""
    write_sysfs_card(tmp_path / "sys/bus/pci/devices", vendor="0x1002", device="0x74a1", **{"class": "0x120000"})
    node = read_node(tmp_path)
    assert (node.cards, node.backend) == ((), "none")


@pytest.mark.parametrize("above", ["nodes", "topology/nodes", "kfd/topology/nodes", "kfd/kfd/topology/nodes"])
def test_any_folder_above_the_nodes_will_do(tmp_path: Path, above: str):
    write_mi300x_cpx(tmp_path / above)
    assert [len(card.partitions) for card in read_node(tmp_path).cards] == [8]


def test_the_mode_is_written_as_far_as_it_is_known(mirror: Path):
    assert [card.mode_text for card in read_node(mirror).cards] == ["CPX/NPS4"] * 2
    assert [card.mode_text for card in read_node(mirror / NODES).cards] == ["CPX/NPS?"] * 2
    assert emulate("MI210", 1).cards[0].mode_text == "not partitionable"
    assert Card(index=0).mode_text == "unknown"


def test_a_driver_directory_with_other_vendors_devices_counts_ours(tmp_path: Path):
    write_sysfs_card(tmp_path, "0000:01:00.0", vendor="0x10de", device="0x2330")
    write_sysfs_card(tmp_path, "0000:02:00.0", vendor="0x1002", device="0x1478", **{"class": "0x060400"})
    write_sysfs_card(tmp_path, **SPX)
    assert [card.bdf for card in read_node(tmp_path).cards] == ["0000:05:00.0"]


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("absent", "no such directory"),
        ("empty", "holds neither KFD's nodes/ nor"),
        ("file", "a file, not a directory"),
    ],
)
def test_a_folder_that_is_no_tree_is_refused(tmp_path: Path, folder: str, says: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(NodeError, match=says):
        read_node(tmp_path / folder)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("nodes/2/properties", "", "truncated: no simd_count"),
        ("nodes/2/properties", "simd_count 152\nsimd_per_cu 4\n", "truncated: no vendor_id, device_id"),
        ("nodes/2/properties", "simd_count 152\nsimd_per_c", "is not `key number`"),
        ("nodes/2/properties", "simd_count many\n", "is not `key number`"),
        ("nodes/2/properties", "simd_count \udc80\n", "not plain text"),
        ("nodes/2/properties", "simd_count 99999999999999999999\n", "is not `key number`"),
        ("nodes/2/mem_banks/0/properties", "heap_type 1\n", "no heap_type or size_in_bytes"),
    ],
)
def test_a_truncated_or_garbled_file_is_named(tmp_path: Path, file: str, text: str, says: str):
    write_mi300x_cpx(tmp_path / "nodes")
    (tmp_path / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(NodeError) as refused:
        read_node(tmp_path)
    assert says in str(refused.value)
    assert refused.value.field.endswith(file)


def test_missing_pieces_are_named(tmp_path: Path):
    write_mi300x_cpx(tmp_path / "nodes")
    (tmp_path / "nodes/3/properties").unlink()
    with pytest.raises(NodeError, match="nodes/3/properties"):
        read_node(tmp_path)
    shutil.rmtree(tmp_path / "nodes")
    (tmp_path / "nodes").mkdir()
    with pytest.raises(NodeError, match="no numbered KFD nodes"):
        read_node(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("device", "74a1"),
        ("device", ""),
        ("current_compute_partition", "CP"),
        ("current_memory_partition", "NPS"),
        ("available_compute_partition", "SPX, DP"),
        ("mem_info_vram_total", "lots"),
        ("numa_node", "x"),
        ("compute_partition_mem_alloc_mode", "SOME"),
    ],
)
def test_a_garbled_sysfs_file_is_named(tmp_path: Path, name: str, text: str):
    write_sysfs_card(tmp_path, **{**SPX, name: text})
    with pytest.raises(NodeError) as refused:
        read_node(tmp_path)
    assert refused.value.field.endswith(f"0000:05:00.0/{name}")


@pytest.mark.parametrize("mode", ["SPX/NPS1", "CPX/NPS4"])
def test_export_and_load_give_the_same_node(mirror: Path, tmp_path: Path, mode: str):
    for node in (read_node(mirror), emulate("MI300X", 4, mode, name="drawn")):
        file = tmp_path / "node.yaml"
        file.write_text(export_node(node))
        assert load_emulated(file) == node


def test_the_short_form_draws_a_node():
    node = parse_emulated("version: 1\nname: a\ngpu: MI355X\ncards: 2\npartition: CPX\n")
    assert [card.mode_label for card in node.cards] == ["CPX/NPS2"] * 2
    assert node.devices == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "version: 1"),
        ("version: 2\ngpu: MI300X\n", "file.yaml:1: version: Input should be 1"),
        ("version: 1\nnode: {colour: red}\n", "node.colour"),
        ("version: 1\nnode: {cards: [{index: -1}]}\n", "file.yaml:2: node.cards[0].index"),
        ("version: 1\nnode: {}\nmore: 1\n", "file.yaml:3: more: unknown key"),
        ("version: 1\ngpu: MI300X\ncolour: red\n", "file.yaml:3: colour: unknown key"),
        ("version: 1\ngpu: H100\n", "the known ones are"),
        ("version: 1\ngpu: MI300X\npartition: QPX/NPS8\n", "cannot be QPX/NPS8"),
        ("version: 1\ngpu: MI300X\ncards: 0\n", "cards: Input should be greater than or equal to 1"),
        ("version: 1\ngpu: MI300X\ndeployment: cloud\n", "should be 'bare-metal'"),
        ("{", "not YAML"),
        ("version: 1\nnode: 3\n", "node"),
    ],
)
def test_a_bad_emulation_file_is_refused(text: str, says: str):
    with pytest.raises(NodeError) as refused:
        parse_emulated(text, "file.yaml")
    assert says in str(refused.value)
    assert "file.yaml" in str(refused.value)


@given(st.text(max_size=200) | st.text(max_size=60).map(lambda t: "version: 1\nnode:\n  cards: [" + t))
def test_any_text_is_a_node_or_a_node_error(text: str):
    with contextlib.suppress(NodeError):
        assert isinstance(parse_emulated(text), Node)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("healthy")
    write_mi300x_cpx(root / NODES, xcds_per_card=2)
    write_sysfs_card(root / PCI, **CPX)
    return root


@st.composite
def damages(draw: st.DrawFn, files: list[Path]) -> tuple[Path, bytes | None]:
    """A file and what it becomes: cut short, patched, or (None) a directory."""
    file = draw(st.sampled_from(files))
    raw = file.read_bytes()
    kind = draw(st.sampled_from(["cut", "patch", "number", "folder"]))
    if kind == "folder":
        return file, None
    at = draw(st.integers(0, len(raw)))
    if kind == "cut":
        return file, raw[:at]
    number = st.sampled_from([b"0", b"-1", b"8", b"18446744073709551616", b"0x74a2"])
    return file, raw[:at] + draw(number if kind == "number" else st.binary(max_size=6)) + raw[at + 2 :]


@settings(max_examples=200)
@given(data=st.data())
def test_a_mutated_tree_is_a_node_or_a_node_error(healthy: Path, data: st.DataObject):
    files = sorted(path for path in healthy.rglob("*") if path.is_file())
    before = {file: file.read_bytes() for file in files}
    damaged = dict(data.draw(st.lists(damages(files), min_size=1, max_size=3)))
    try:
        for file, content in damaged.items():
            file.unlink()
            file.mkdir() if content is None else file.write_bytes(content)
        node = read_node(healthy)
        assert parse_emulated(export_node(node)) == node
    except NodeError as refused:
        named = refused.field
        if not named.startswith(str(healthy)):
            raise
    finally:
        for file in damaged:
            file.rmdir() if file.is_dir() else file.unlink()
            file.write_bytes(before[file])


# Real topologies, where they lie beside the checkout; a clone without them has no such tests.
RECORDED = Path(__file__).parents[3] / "shared" / "fixtures"
if RECORDED.is_dir():

    @pytest.mark.parametrize(
        ("tree", "devices", "expected"),
        [
            ("mi300x_cpx", [8, 1], ("MI300X", "CPX", 38, 24574)),
            ("mi210", [1] * 8, ("MI210", None, 104, 65520)),
        ],
    )
    def test_recorded_kfd_trees(tree: str, devices: list[int], expected: tuple[str, str | None, int, int]):
        node = read_node(RECORDED / "kfd" / tree)
        assert [len(card.partitions) for card in node.cards] == devices
        for card in node.cards:
            for device in card.partitions:
                assert (card.product, card.compute_partition, device.compute_units, device.memory_mib) == expected

    @pytest.mark.parametrize("tree", ["mi300x_spx_nps1", "mi300x_cpx_nps4", "mi210_unpartitionable"])
    def test_recorded_sysfs_trees(tree: str):
        (card,) = read_node(RECORDED / "sysfs" / tree).cards
        product, *mode = tree.split("_")
        assert card.product == product.upper()
        assert (card.mode_label or "unpartitionable").lower().split("/") == mode
