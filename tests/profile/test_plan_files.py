"""Fleet, workload and plan files: what they mean, and that what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from time import process_time

import pytest
import yaml

from aim_profile.nodes.read import emulate, export_node
from aim_profile.plans.fleet import FleetError, fleet_of, load_fleet, parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import PlanError, PlanOptions, dump_plan, parse_plan
from aim_profile.plans.search.intake import make_problem
from aim_profile.plans.workload import WorkloadError, Workloads, parse_workloads

FLEET = """
version: 1
nodes:
- {name: gpu, count: 12, gpu: MI300X, cards: 8, compute_partition: CPX, memory_partition: NPS4, labels: {zone: a}}
- {name: edge, gpu: MI308X, cards: 4}
"""


def test_count_numbers_the_nodes_and_modes_are_resolved():
    fleet = parse_fleet(FLEET)
    assert [node.name for node in fleet.nodes][:3] == ["edge", "gpu-00", "gpu-01"]
    assert fleet.cards == 12 * 8 + 4
    assert {card.current for node in fleet.nodes for card in node.cards} == {"CPX/NPS4", "SPX/NPS1"}
    assert fleet.nodes[1].labels == (("zone", "a"),)


def test_a_fleet_of_node_files_is_the_fleet_of_those_nodes(tmp_path: Path):
    node = emulate("MI300X", 4, "CPX/NPS4", name="seen")
    (tmp_path / "seen.yaml").write_text(export_node(node))
    (tmp_path / "fleet.yaml").write_text("version: 1\nnodes: [{file: seen.yaml, labels: {zone: b}}]")
    (loaded,) = load_fleet(tmp_path / "fleet.yaml").nodes
    (live,) = fleet_of([node]).nodes
    assert loaded.cards == live.cards
    assert loaded.labels == (("zone", "b"),)
    assert load_fleet(tmp_path / "seen.yaml") == fleet_of([node])


def test_a_node_of_unknown_deployment_is_used_as_found():
    node = emulate("MI300X", 2, "CPX/NPS4", name="vm").model_copy(update={"deployment": "unknown"})
    small = parse_workloads("workloads: [{name: a, model: Qwen/Qwen3-4B, context: 2048}]")
    large = parse_workloads("workloads: [{name: a, memory: 100GiB}]")
    assert make_plan(fleet_of([node]), small).complete
    plan = make_plan(fleet_of([node]), large)
    assert not plan.complete
    assert plan.totals.nodes_drained == 0
    assert "deployment unknown" in plan.notes[0]


def test_a_node_of_an_unknown_product_is_set_aside_and_named(tmp_path: Path):
    node = emulate("MI300X", 1, "SPX/NPS1", name="odd")
    odd = node.cards[0].model_copy(update={"product": "unknown", "pci_id": "0x75a2", "report": "report it"})
    (tmp_path / "odd.yaml").write_text(export_node(node.model_copy(update={"cards": (odd,)})))
    (tmp_path / "bare.yaml").write_text(export_node(node.model_copy(update={"name": "bare", "cards": ()})))
    odd_ones = "{name: new, count: 3, gpu: MI301X}, {file: odd.yaml}, {file: bare.yaml}"
    file = tmp_path / "fleet.yaml"
    file.write_text(f"nodes: [{odd_ones}, {{name: a, gpu: MI300X, cards: 2}}]")
    fleet = load_fleet(file)
    assert [node.name for node in fleet.nodes] == ["a"]
    assert [name for name, _ in fleet.set_aside] == ["bare", "new", "odd"]
    plan = make_plan(fleet, parse_workloads("workloads: [{name: w, memory: 5GiB}]"))
    assert plan.complete
    assert plan.notes[0].startswith("set aside: bare: node bare holds no AMD GPU; new: no accelerator named 'MI301X'")
    with pytest.raises(WorkloadError, match=r"no node 'odd'; it was set aside: node odd holds unknown"):
        make_plan(fleet, parse_workloads("workloads: [{name: w, memory: 5GiB, pinned: {node: odd}}]"))
    with pytest.raises(FleetError, match=r"nodes\[0\]\.gpu: no accelerator named 'MI301X'"):
        load_fleet(file, strict=True)
    file.write_text(f"nodes: [{odd_ones}]")
    with pytest.raises(FleetError, match=r"nodes\[0\]\.gpu"):
        load_fleet(file)


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("nodes: [{name: a, gpu: MI301X}]", "nodes[0].gpu", "MI300X"),
        ("nodes: [{name: a, gpu: MI300X, cads: 2}]", "nodes[0].cads", "did you mean cards?"),
        ("nodes: [{name: a, gpu: MI300X, cards: true}]", "nodes[0].cards", "integer"),
        ("nodes: [{name: a, gpu: MI300X, compute_partition: TPX}]", "nodes[0].partition", "SPX, DPX, QPX, CPX"),
        ("nodes: [{name: a, gpu: MI300X}, {name: a, gpu: MI300X}]", "nodes[1].name", "a node of nodes[0] too"),
        ("nodes: [{file: gone.yaml}]", "nodes[0].file", "gone.yaml"),
        ("nodes: [{file: gone.yaml, cards: 4}]", "nodes[0]", "cards"),
        ("nodes: []", "nodes", "at least 1"),
        ("version: 2\nnodes: [{name: a, gpu: MI300X}]", "version", "got 2"),
        ("nodes: [", "f.yaml", "not YAML"),
    ],
)
def test_a_wrong_fleet_file_names_the_key(text: str, field: str, words: str):
    with pytest.raises(FleetError, match=r"^f\.yaml") as problem:
        parse_fleet(text, "f.yaml")
    assert problem.value.field == field
    assert words in str(problem.value)


@pytest.mark.parametrize(
    ("entry", "field", "words"),
    [
        ("{name: a}", "workloads[0]", "give model"),
        ("{name: A_b, model: x}", "workloads[0].name", "A_b"),
        ("{name: a, model: x, replicas: 0}", "workloads[0].replicas", "greater than or equal to 1"),
        ("{name: a, model: x, precision: fp9}", "workloads[0].precision", "fp9"),
        ("{name: a, model: x, memory: 5}", "workloads[0].memory", "string"),
        ("{name: a, memory: 5Gx}", "workloads[0].memory", "5Gx"),
        ("{name: a, kind: finetune, model: x}", "workloads[0]", "finetune"),
        ("{name: a, training: {model: x}}", "workloads[0]", "training is of kind finetune (kind is serve)"),
        ("{name: a, kind: finetune, training: {model: x}, memory: 1GiB}", "workloads[0]", "leave memory out"),
        ("{name: a, kind: finetune, training: {model: x, workers: 2}, replicas: 3}", "workloads[0]", "leave replicas"),
        ("{name: a, kind: finetune, training: {model: x, metod: full}}", "workloads[0].training.metod", "mean method?"),
        ("{name: a, model: x, affinity: [b]}", "workloads[0].affinity", "no workload is named 'b'"),
        ("{name: a, model: x, affinity: [a]}", "workloads[0]", "itself"),
        ("{name: a, memory: 9GiB, memory_limit: 8GiB}", "workloads[0]", "more than memory_limit"),
        ("{name: a, model: x, pinned: {node: n, partition: 1}}", "workloads[0].pinned", "give card too"),
        ("{name: a, model: x}, {name: a, model: x}", "workloads[1].name", "unique"),
        ("{name: a, model: x, affinity: [b]}, {name: b, model: x, affinity: [a]}", "workloads[0].affinity", "circle"),
    ],
)
def test_a_wrong_workloads_file_names_the_key(entry: str, field: str, words: str):
    with pytest.raises(WorkloadError, match=r"^w\.yaml") as problem:
        parse_workloads(f"workloads: [{entry}]", "w.yaml")
    assert problem.value.field == field
    assert words in str(problem.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: a, model: meta-llama/Llama-3.1-8b-Instruct}", "meta-llama/Llama-3.1-8B-Instruct"),
        ("{name: a, memory: 5GiB, pinned: {node: nowhere}}", "nowhere"),
        ("{name: a, memory: 5GiB, pinned: {node: edge, card: 4}}", "0 to 3"),
        ("{name: a, model: Qwen/Qwen3-4B, tp: 3}", "tensor parallel 3"),
    ],
)
def test_what_only_planning_can_refuse_names_the_workload(entry: str, words: str):
    with pytest.raises(WorkloadError, match="workload a") as problem:
        make_plan(parse_fleet(FLEET), parse_workloads(f"workloads: [{entry}]"))
    assert words in str(problem.value)


def test_a_file_costs_no_more_than_its_size():
    """Four times the workloads, names in a chain of affinities among them: four times the work, not sixteen."""

    def cpu_seconds(count: int) -> float:
        entries = [{"name": f"w{at}", "memory": "5GiB", "affinity": [f"w{at + 1}"]} for at in range(count)]
        raw = {"workloads": [*entries, {"name": f"w{count}", "memory": "5GiB"}]}
        fleet = parse_fleet(FLEET)

        def once() -> float:
            started = process_time()
            make_problem(fleet, Workloads.model_validate(raw), PlanOptions())
            return process_time() - started

        return min(once() for _ in range(3))

    assert cpu_seconds(8_000) < 9 * cpu_seconds(2_000)


def test_a_chain_of_affinities_is_as_urgent_as_its_end():
    entries = [f"{{name: w{at}, memory: 5GiB, affinity: [w{at + 1}, w{min(at + 2, 9)}]}}" for at in range(8)]
    asked = "workloads: [" + ", ".join([*entries, "{name: w8, memory: 5GiB}", "{name: w9, memory: 5GiB}"]) + "]"
    text = asked.replace("{name: w0,", "{name: w0, priority: high,")
    jobs = make_problem(parse_fleet(FLEET), parse_workloads(text), PlanOptions()).jobs
    assert {job.level for job in jobs} == {0}
    assert [job.rank for job in jobs] == [-at for at in range(9)] + [-8]


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_plan_file_gives_back_the_same_plan(form: str):
    work = "workloads: [{name: a, model: Qwen/Qwen3-4B, replicas: 9}, {name: b, memory: 900GiB, priority: high}]"
    plan = make_plan(parse_fleet(FLEET), parse_workloads(work))
    text = dump_plan(plan, form)  # type: ignore[arg-type]
    assert parse_plan(text) == plan
    assert "&id" not in text
    with pytest.raises(PlanError, match="cards"):
        parse_plan(text.replace("cards", "kards", 1), "p.yaml")


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("placements", 0, "context"), 0, "context: Input should be greater than or equal to 1"),
        (("placements", 0, "context"), 10**30, "context: Input should be less than or equal to"),
        (("placements", 0, "memory_limit_gib"), float("inf"), "memory_limit_gib: Input should be a finite number"),
        (("placements", 0, "need_gib"), float("nan"), "need_gib: Input should be"),
        (("placements", 0, "cards"), [0, 0], "placements[0]: cards (0, 0), partitions (0,) are not 1 devices"),
        (("placements", 0, "tp"), 2, "placements[0]: cards (0,), partitions (0,) are not 2 devices"),
        (("placements", 0, "cards"), [7], "placements[0]: chat/0: stands on a card 7, which the plan does not list"),
        (("placements", 0, "partitions"), [8], "placements[0]: chat/0: a card 0 is in CPX/NPS4, with 8 devices"),
        (("placements", 0, "mode"), "SPX/NPS1", "placements[0]: chat/0: a card 0 is in CPX/NPS4, with 8 devices"),
        (("placements", 1, "partitions"), [0], "placements[1]: chat/1: a card 0 partition 0 is chat/0's"),
        (("placements", 1, "replica"), 0, "placements[1]: chat/0: is placed twice"),
        (("cards", 1, "card"), 0, "cards[1]: a card 0 is listed twice"),
    ],
)
def test_a_plan_that_contradicts_itself_is_not_read(place: tuple[str | int, ...], value: object, says: str):
    fleet = parse_fleet("nodes: [{name: a, gpu: MI300X, cards: 2, compute_partition: CPX, memory_partition: NPS4}]")
    plan = make_plan(fleet, parse_workloads("workloads: [{name: chat, model: Qwen/Qwen3-8B, replicas: 2}]"))
    body = json.loads(dump_plan(plan, "json"))
    held = body
    for key in place[:-1]:
        held = held[key]
    held[place[-1]] = value
    with pytest.raises(PlanError) as problem:
        parse_plan(yaml.safe_dump(body, sort_keys=False), "p.yaml")
    line = str(problem.value).split(":")[1]
    assert int(line) > 1
    assert says in str(problem.value)
