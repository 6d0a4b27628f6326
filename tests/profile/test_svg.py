"""The fleet's picture: well-formed, complete, and true to sizes."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_profile.cli.overview import overview
from aim_profile.cli.picture import draw, summary
from aim_profile.cli.svg import CardBox, Device, NodeBox, Tenant, picture
from aim_profile.plans.fleet import parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan
from aim_profile.plans.workload import parse_workloads

SAMPLES = Path(__file__).parent.parent.parent / "docs/samples"
NS = "{http://www.w3.org/2000/svg}"


def sample(*changes: tuple[str, str]) -> Plan:
    fleet = parse_fleet((SAMPLES / "fleet.yaml").read_text(encoding="utf-8"))
    text = (SAMPLES / "workloads.yaml").read_text(encoding="utf-8")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return make_plan(fleet, parse_workloads(text))


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{NS}text")]


def test_every_card_replica_and_free_device_is_drawn() -> None:
    plan = sample()
    svg = draw(plan)
    words = texts(svg)
    assert sum(word.startswith("card ") for word in words) == len(plan.cards) == 4
    titles = ["".join(e.itertext()) for e in ET.fromstring(svg).iter(f"{NS}title")]
    for placement in plan.placements:
        drawn = [title for title in titles if title.startswith(placement.id)]
        assert len(drawn) == len(placement.devices)
        assert all(f"{placement.priority} priority" in title for title in drawn)
    used = {(p.node, card, part) for p in plan.placements for card, part in p.devices}
    assert sum(word.endswith(": free") for word in words) == sum(card.partitions for card in plan.cards) - len(used)
    assert summary(plan) in words
    assert {"high priority", "medium priority", "low priority", "needed", "headroom"} <= set(words)


def test_a_switched_card_says_what_it_was() -> None:
    fleet = parse_fleet("version: 1\nnodes: [{name: a, gpu: MI300X, cards: 1}]")
    workloads = parse_workloads(
        "version: 1\nworkloads: [{name: c, model: meta-llama/Llama-3.1-8B-Instruct, replicas: 8}]"
    )
    plan = make_plan(fleet, workloads)
    assert "switched from SPX/NPS1" in texts(draw(plan))
    assert "1 of 1 cards used" in summary(plan)


def test_devices_of_one_replica_are_counted_through() -> None:
    words = texts(draw(sample(("model: Qwen/Qwen3-32B", "model: Qwen/Qwen3-32B\n    tp: 4"))))
    for place in range(1, 5):
        assert sum(f"coder/0 ({place} of 4)" in word for word in words) == 1


def test_what_is_free_is_never_read_as_nothing_free() -> None:
    words = texts(draw(sample()))
    assert not any(word.split()[1:] == ["free"] for word in words)
    assert "device 7: free" in words
    assert "5.6 GiB free" in words  # two tenants of 8 GiB, of the 21.6 GiB that engines may take of 24


def test_bars_are_to_scale() -> None:
    tenant = Tenant("t", (), "high", need_gib=12, budget_gib=18)
    svg = picture("t", "f", [NodeBox("n", "", (CardBox(0, "SPX/NPS1", (Device(0, 24, (tenant,)),)),))])
    bars = [e for e in ET.fromstring(svg).iter(f"{NS}rect") if e.get("rx") == "2" and e.get("height") == "14.0"]
    reserve, budget, need, _ = (float(e.get("width", "0")) for e in bars)
    assert round(need / reserve, 2) == 0.5
    assert round(budget / reserve, 2) == 0.75


names = st.text(min_size=1, max_size=80)
tenants = st.builds(
    Tenant,
    names,
    st.tuples(names),
    st.sampled_from(["high", "medium", "low"]),
    st.floats(0, 500),
    st.floats(0, 500),
    st.none() | st.floats(0, 50),
)
devices = st.builds(Device, st.integers(0, 7), st.floats(1, 300), st.lists(tenants, max_size=3).map(tuple))
cards = st.builds(CardBox, st.integers(0, 7), names, st.lists(devices, max_size=8).map(tuple), st.none() | names)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.builds(NodeBox, names, names, st.lists(cards, max_size=3).map(tuple)), max_size=3))
def test_any_fleet_is_well_formed(nodes: list[NodeBox]) -> None:
    root = ET.fromstring(picture("<title> & more", "facts", nodes))
    assert root.tag == f"{NS}svg"
    assert all(float(e.get("width", "0").rstrip("%")) >= 0 for e in root.iter(f"{NS}rect"))


def test_figures_say_need_budget_and_device_and_free_is_what_may_be_taken() -> None:
    words = texts(draw(sample()))
    assert sum("21.6 / 21.6 of 24.0 GiB" in word for word in words) == 6  # chat: nothing is free beside it
    assert "156.3 / 172.8 of 192.0 GiB" in words
    assert words.count("21.6 of 24.0 GiB") == sum(word.endswith(": free") for word in words)


def test_a_shared_device_keeps_its_number_and_each_sharer_its_figures() -> None:
    plan = sample()
    shared = {part for p in plan.placements if p.workload == "guard" for _, part in p.devices}
    words = texts(draw(plan))
    assert all(str(number) in words for number in shared)
    assert words.count("6.0 / 8.0") == 2


def size(svg: str) -> tuple[float, float]:
    root = ET.fromstring(svg)
    return float(root.get("width", "0")), float(root.get("height", "0"))


def whole_cards(count: int) -> tuple[CardBox, ...]:
    return tuple(CardBox(at, "SPX/NPS1", (Device(0, 192, (), 172.8),)) for at in range(count))


@pytest.mark.parametrize(("nodes", "cards"), [(1, 64), (8, 8), (64, 1), (16, 8), (3, 5)])
def test_nodes_and_cards_wrap_so_that_no_page_is_a_column(nodes: int, cards: int) -> None:
    svg = picture("t", "f", [NodeBox(f"n{at}", "", whole_cards(cards)) for at in range(nodes)])
    width, height = size(svg)
    assert 0.4 < height / width < 1.2
    assert sum(word.startswith("card ") for word in texts(svg)) == nodes * cards
    # Nothing lies outside the page, and no card on another.
    boxes = [e for e in ET.fromstring(svg).iter(f"{NS}rect") if e.get("fill") == "#f4f6f8"]
    places = {(float(e.get("x", "0")), float(e.get("y", "0"))) for e in boxes}
    assert len(places) == nodes * cards
    assert all(0 <= x < width - 300 and 0 <= y < height - 300 for x, y in places)


def test_a_large_fleet_is_an_overview_that_leaves_no_card_out() -> None:
    fleet = parse_fleet("nodes: [{name: n, count: 300, gpu: MI300X, cards: 8}]")
    asked = (
        "workloads: [{name: a, memory: 10GiB, replicas: 3000}, {name: b, memory: 90GiB, replicas: 900, priority: low}]"
    )
    plan = make_plan(fleet, parse_workloads(asked))
    svg = draw(plan)
    assert len(svg) < 150 * len(plan.cards) + 200 * 300
    words, (width, height) = texts(svg), size(svg)
    assert width > height
    assert all(f"n-{at:03d}" in words for at in range(300))
    used = Counter((p.node, p.mode) for p in plan.placements)
    for mode, name in (("CPX/NPS4", "a"), ("SPX/NPS1", "b")):
        cards = [card for card in plan.cards if card.mode == mode]
        busy = sum(count for (_, its), count in used.items() if its == mode)
        line = f"MI300X {mode}: {len(cards)} cards, {busy} of {sum(c.partitions for c in cards)} devices in use"
        assert line in words, name
    paths = [e for e in ET.fromstring(svg).iter(f"{NS}path") if e.get("stroke")]
    tiles = [part for e in paths for part in (e.get("d") or "").split("M")[1:]]
    assert len(tiles) == len(set(tiles)) == len(plan.cards)
    assert (
        sum((e.get("d") or "").count("M") for e in paths if e.get("stroke") == "#1c2733") == plan.totals.cards_switched
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.builds(NodeBox, names, names, st.lists(cards, max_size=20).map(tuple)), max_size=5))
def test_any_overview_is_well_formed(nodes: list[NodeBox]) -> None:
    root = ET.fromstring(overview("<title> & more", "facts", nodes))
    tiles = [e.get("d") or "" for e in root.iter(f"{NS}path") if e.get("stroke")]
    assert sum(d.count("M") for d in tiles) == sum(len(node.cards) for node in nodes)


def test_names_that_are_cut_can_still_be_told_apart() -> None:
    names = [f"a-workload-with-a-very-long-name-in-front-of-its-number/{number}" for number in range(3)]
    cards = [
        CardBox(0, "SPX/NPS1", (Device(0, 192.0, (Tenant(name, ("model",), "high", 100.0, 172.8),)),)) for name in names
    ]
    drawn = picture("Fleet", "", [NodeBox("n", "", tuple(cards))])
    assert [f"ber/{number}</text>" in drawn for number in range(3)] == [True] * 3
    nodes = [NodeBox(f"{'long-' * 12}node-{number:03d}", "", tuple(cards[:1] * 8)) for number in range(3)]
    assert [f"-{number:03d}</text>" in overview("Fleet", "", nodes) for number in range(3)] == [True] * 3
    assert [f"-{number:03d}</text>" in picture("Fleet", "", nodes) for number in range(3)] == [True] * 3


def test_a_small_gap_is_not_said_to_be_none() -> None:
    plan = sample()
    totals = plan.totals.model_copy(update={"gap": 0.002})
    assert "at most 1% more cards" in summary(plan.model_copy(update={"totals": totals}))
