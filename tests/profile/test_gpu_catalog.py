"""The accelerator catalogue: every figure sourced, modes in their tiers, names and ids exact."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_profile.errors import GpuError, PartitionError
from aim_profile.gpus.catalog import (
    COMPUTE_MODES,
    DEPLOYMENTS,
    MEMORY_MODES,
    Accelerator,
    Unknown,
    by_name,
    by_pci_id,
    catalog,
    parse_partition,
    partition_count,
    structurally_legal,
)

NAMES = ["MI210", "MI250", "MI250X", "MI300A", "MI300X", "MI308X", "MI325X", "MI350P", "MI350X", "MI355X"]


def labels(name: str, deployment: str, tier: str) -> list[str]:
    return [m.label for m in by_name(name).modes(deployment) if m.tier == tier]  # type: ignore[arg-type]


def test_the_catalogue_holds_these_accelerators_and_no_others():
    assert sorted(catalog()) == NAMES


@pytest.mark.parametrize(
    ("pci_id", "product", "function"),
    [
        (0x740F, "MI210", "pf"),
        (0x7410, "MI210", "vf"),
        (0x740C, "MI250", "pf"),
        (0x7408, "MI250X", "pf"),
        (0x74A0, "MI300A", "pf"),
        (0x74A1, "MI300X", "pf"),
        (0x74A9, "MI300X HF", "pf"),
        (0x74B5, "MI300X", "vf"),
        (0x74BD, "MI300X HF", "vf"),
        (0x74A2, "MI308X", "pf"),
        (0x74A8, "MI308X HF", "pf"),
        (0x74B6, "MI308X", "vf"),
        (0x74BC, "MI308X HF", "vf"),
        (0x74A5, "MI325X", "pf"),
        (0x74B9, "MI325X", "vf"),
        (0x75A0, "MI350X", "pf"),
        (0x75B0, "MI350X", "vf"),
        (0x75A3, "MI355X", "pf"),
        (0x75B3, "MI355X", "vf"),
        (0x75A8, "MI350P", "pf"),
        (0x75B8, "MI350P", "vf"),
    ],
)
def test_a_pci_id_names_one_product_and_function(pci_id: int, product: str, function: str):
    found = by_pci_id(pci_id)
    assert isinstance(found, Accelerator)
    assert (found.product_of(pci_id), found.function_of(pci_id)) == (product, function)


def test_no_two_accelerators_share_a_pci_id():
    ids = [known.id for accelerator in catalog().values() for known in accelerator.pci_ids]
    assert len(ids) == len(set(ids)) == 21


@pytest.mark.parametrize("pci_id", [0x75A2, 0x744C, 0x6860, 0x0001])
def test_an_unknown_id_says_what_to_report_and_guesses_nothing(pci_id: int):
    found = by_pci_id(pci_id)
    assert isinstance(found, Unknown)
    assert f"{pci_id:#06x}" in found.report
    assert "properties" in found.report


@pytest.mark.parametrize(
    ("name", "mode", "partitions", "cus", "memory_mib"),
    [
        ("MI300X", "SPX/NPS1", 1, 304, 196592),
        ("MI300X", "DPX/NPS1", 2, 152, 98296),
        ("MI300X", "QPX/NPS1", 4, 76, 49148),
        ("MI300X", "CPX/NPS4", 8, 38, 24574),
        ("MI308X", "CPX/NPS4", 4, 20, 49136),
        ("MI308X", "DPX/NPS1", 2, 40, 98296),
        ("MI300A", "TPX/NPS1", 3, 76, 43690),
        ("MI300A", "CPX/NPS1", 6, 38, 21845),
        ("MI355X", "DPX/NPS2", 2, 128, 147448),
        ("MI355X", "CPX/NPS2", 8, 32, 36862),
        ("MI325X", "SPX/NPS1", 1, 304, 262128),
        ("MI350P", "CPX/NPS1", 4, 32, 36860),
        ("MI210", "SPX/NPS1", 1, 104, 65520),
        ("MI250X", "SPX/NPS1", 1, 110, 65520),
    ],
)
def test_a_mode_divides_the_card_by_its_xcds(name: str, mode: str, partitions: int, cus: int, memory_mib: int):
    found = by_name(name).mode(mode)
    assert (found.partitions, found.cus, found.memory_mib) == (partitions, cus, memory_mib)


@pytest.mark.parametrize(
    ("name", "deployment", "validated"),
    [
        ("MI355X", "bare-metal", ["SPX/NPS1", "DPX/NPS2", "QPX/NPS2", "CPX/NPS2"]),
        ("MI350X", "sr-iov", ["SPX/NPS1", "DPX/NPS2", "CPX/NPS2"]),
        ("MI350P", "bare-metal", ["SPX/NPS1", "DPX/NPS1", "CPX/NPS1"]),
        ("MI325X", "bare-metal", ["SPX/NPS1"]),
        ("MI300X", "bare-metal", ["SPX/NPS1", "DPX/NPS2", "CPX/NPS4"]),
        ("MI300X", "passthrough", ["SPX/NPS1"]),
        ("MI300X", "sr-iov", ["SPX/NPS1", "CPX/NPS4"]),
        ("MI300A", "bare-metal", ["SPX/NPS1", "TPX/NPS1", "CPX/NPS1"]),
        ("MI308X", "bare-metal", []),
    ],
)
def test_validated_is_exactly_amds_support_table(name: str, deployment: str, validated: list[str]):
    assert labels(name, deployment, "validated") == validated


def test_a_passthrough_vm_offers_nothing_but_the_whole_card():
    assert labels("MI300X", "passthrough", "driver-legal") == []
    assert by_name("MI300X").mode("CPX/NPS4", "passthrough").tier == "unsupported"


def test_every_driver_legal_combination_of_mi300x():
    assert labels("MI300X", "bare-metal", "driver-legal") == ["DPX/NPS1", "QPX/NPS1", "QPX/NPS4", "CPX/NPS1"]
    assert by_name("MI300X").mode("CPX/NPS2").tier == "unsupported"
    assert by_name("MI300X").mode("CPX/NPS8").tier == "unsupported"


def test_what_is_not_established_is_marked():
    assert by_name("MI350P").unverified == ("cus_per_xcd", "hbm_mib")
    assert by_name("MI300A").unverified == ("hbm_mib",)
    assert by_name("MI355X").mode("CPX/NPS4").confidence == "unverified"
    assert by_name("MI300X").unverified == ()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_every_figure_and_mode_has_a_source(name: str, deployment: str):
    accelerator = by_name(name)
    assert all(p.source for p in accelerator.provenance.values())
    for mode in accelerator.modes(deployment, "unsupported"):  # type: ignore[arg-type]
        assert mode.source
        assert structurally_legal(accelerator.xcds, mode.compute, mode.memory)
        assert mode.partitions * mode.memory_mib <= accelerator.hbm_mib
        assert mode.partitions * mode.cus == accelerator.compute_units


@pytest.mark.parametrize("spelling", ["CPX/NPS4", "cpx_nps4", "cpx/nps4", "CPX-NPS4", " CPX NPS4 "])
def test_spellings_of_a_mode(spelling: str):
    assert by_name("MI300X").mode(spelling).label == "CPX/NPS4"


@pytest.mark.parametrize(
    ("name", "compute", "label"),
    [
        ("MI300X", "CPX", "CPX/NPS4"),
        ("MI300X", "QPX", "QPX/NPS1"),
        ("MI355X", "cpx", "CPX/NPS2"),
        ("MI350P", "DPX", "DPX/NPS1"),
        ("MI308X", "CPX", "CPX/NPS1"),
    ],
)
def test_a_compute_mode_alone_takes_the_validated_memory_mode_else_the_lowest(name: str, compute: str, label: str):
    assert by_name(name).mode(compute).label == label


@pytest.mark.parametrize(
    ("name", "mode", "says"),
    [
        ("MI308X", "QPX", "has no QPX mode"),
        ("MI300A", "QPX/NPS1", "has no QPX mode"),
        ("MI300X", "TPX", "has no TPX mode"),
        ("MI210", "CPX", "has no CPX mode"),
        ("MI300X", "SPX/NPS4", "cannot be SPX/NPS4"),
        ("MI300X", "FOO", "'FOO' is not a partition mode"),
        ("MI300X", "CPX/NPS3", "'CPX/NPS3' is not a partition mode"),
        ("MI300X", "", "'' is not a partition mode"),
    ],
)
def test_an_impossible_mode_is_refused_with_the_possible_ones(name: str, mode: str, says: str):
    with pytest.raises(PartitionError, match="SPX") as refused:
        by_name(name).mode(mode)
    assert says in str(refused.value)


@pytest.mark.parametrize("spelling", ["MI300X", "mi300x", "AMD Instinct MI300X", "AMD_Instinct_MI300X_OAM"])
def test_names_seen_in_the_field(spelling: str):
    assert by_name(spelling).name == "MI300X"


@pytest.mark.parametrize("name", ["MI300", "H100", "", "MI400", "MI300XX"])
def test_any_other_name_is_refused_with_the_known_ones(name: str):
    with pytest.raises(GpuError, match="MI300X"):
        by_name(name)


@given(st.text(max_size=20))
def test_any_text_is_a_mode_or_a_partition_error(text: str):
    try:
        compute, memory = parse_partition(text)
    except PartitionError:
        return
    assert compute in COMPUTE_MODES
    assert memory is None or memory in MEMORY_MODES


@given(st.integers(1, 64), st.sampled_from(COMPUTE_MODES), st.sampled_from(MEMORY_MODES))
def test_structural_rules_never_make_more_memory_partitions_than_devices(xcds: int, compute: str, memory: str):
    if structurally_legal(xcds, compute, memory):  # type: ignore[arg-type]
        assert int(memory[3:]) <= partition_count(xcds, compute)  # type: ignore[arg-type]
        assert xcds % partition_count(xcds, compute) == 0  # type: ignore[arg-type]
