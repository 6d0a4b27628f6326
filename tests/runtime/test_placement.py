"""The planner's own file decides which device each replica of which model gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aim_profile.nodes.emulated import emulate, export_node
from aim_profile.nodes.facts import Node
from aim_profile.plans.fleet import parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan, dump_plan
from aim_profile.plans.workload import parse_workloads
from aim_runtime.assignment import Assignment, Refused
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import prepare_all
from model_directory import write_model

FLEET = "{name: n0, gpu: MI300X, cards: 2, compute_partition: CPX, memory_partition: NPS4}"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def planned(workloads: str, node: str = FLEET, folder: Path | None = None) -> Plan:
    fleet = parse_fleet(f"version: 1\nnodes:\n- {node}\n", folder=folder)
    return make_plan(fleet, parse_workloads(f"version: 1\nworkloads:\n{workloads}"))


class Place:
    """A node in a file, models by name, and a plan in a file."""

    def __init__(self, folder: Path, node: Node | None = None) -> None:
        self.folder = folder
        self.node = folder / "node.yaml"
        self.node.write_text(export_node(node or emulate("MI300X", cards=2, partition="CPX/NPS4", name="n0")))
        self.model = write_model(folder / "llama")

    def settings(self, name: str, *argv: str, pod: bool = False) -> RuntimeSettings:
        binding = "pod" if pod else "bare-metal"
        flags = ["--model_name", name, "--model_dir", str(self.model), "--node", str(self.node), "--binding", binding]
        return RuntimeSettings.load([*flags, *argv], {}, prog="p", description="")

    def assign(self, plan: Plan | None, *names: str, pod: bool = False, argv: tuple[str, ...] = ()) -> list[Assignment]:
        file = None
        if plan is not None:
            file = self.folder / "plan.yaml"
            file.write_text(dump_plan(plan))
        return prepare_all([self.settings(name, *argv, pod=pod) for name in names], file, {})

    def refusal(self, *given: Any, **more: Any) -> Refused:
        with pytest.raises(Refused) as caught:
            self.assign(*given, **more)
        return caught.value


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


TWO = f"""- {{name: chat, model: {LLAMA}, context: 4096, concurrency: 2, replicas: 2}}
- {{name: code, model: {LLAMA}, context: 8192, concurrency: 8, tp: 2}}
"""


def test_each_replica_gets_the_devices_of_its_placement(place: Place) -> None:
    plan = planned(TWO)
    found = place.assign(plan, "chat", "code")
    assert [(each.model, each.replica) for each in found] == [(run.workload, run.replica) for run in plan.placements]
    for each, run in zip(found, plan.placements, strict=True):
        assert [device.at for device in each.devices] == list(run.devices)
        assert each.engine_args["tensor-parallel-size"] == run.tp
        assert each.engine_args["max-model-len"] == run.context
        assert each.engine_args["max-num-seqs"] == run.concurrency
        numbers = [str(card * 8 + partition) for card, partition in run.devices]
        assert each.env["ROCR_VISIBLE_DEVICES"] == ",".join(numbers)
    taken = [device.at for each in found for device in each.devices]
    assert len(taken) == len(set(taken)) == 4


def test_whole_cards_together(tmp_path: Path) -> None:
    place = Place(tmp_path, emulate("MI300X", cards=4, partition="SPX/NPS1", name="n0"))
    fleet = "{name: n0, gpu: MI300X, cards: 4, compute_partition: SPX, memory_partition: NPS1}"
    big = f"- {{name: big, model: {LLAMA}, context: 131072, concurrency: 20, tp: 2}}\n"
    (found,) = place.assign(planned(big, fleet), "big")
    assert len({device.card for device in found.devices}) == 2


def test_a_placement_of_a_model_that_is_not_served(place: Place) -> None:
    refused = place.refusal(planned(TWO), "chat")
    assert (refused.field, refused.value) == ("placement", "code")
    assert "no model 'code' is served here" in str(refused)
    assert "chat" in refused.remedy


def test_a_model_without_a_placement_is_not_started(place: Place) -> None:
    found = place.assign(planned(TWO), "chat", "code", "spare")
    assert {each.model for each in found} == {"chat", "code"}


def test_a_plan_of_another_node(tmp_path: Path) -> None:
    other = Place(tmp_path, emulate("MI300X", cards=2, partition="CPX/NPS4", name="n7"))
    refused = other.refusal(planned(TWO), "chat", "code")
    assert (refused.field, refused.value) == ("node-name", "n7")
    assert "it has n0, this is n7" in str(refused)
    assert other.assign(planned(TWO), "chat", "code", argv=("--node_name", "n0"))


@pytest.mark.parametrize(
    ("node", "field", "says"),
    [
        (emulate("MI300X", cards=2, partition="SPX/NPS1", name="n0"), "mode", "should be CPX/NPS4, is SPX/NPS1"),
        (emulate("MI300X", cards=1, partition="CPX/NPS4", name="n0"), "cards", "should be 2 cards, is 1 cards"),
        (emulate("MI325X", cards=2, partition="CPX/NPS4", name="n0"), "product", "should be MI300X, is MI325X"),
    ],
)
def test_a_node_that_is_not_as_planned(node: Node, field: str, says: str, tmp_path: Path) -> None:
    refused = Place(tmp_path, node).refusal(planned(TWO), "chat", "code")
    assert refused.field == field
    assert says in str(refused)
    assert "aim-profile steps" in refused.remedy


def test_a_device_twice_is_no_plan(place: Place) -> None:
    plan = planned(TWO)
    file = place.folder / "twice.yaml"
    first, *rest = plan.placements
    second = rest[0].model_copy(update={"cards": first.cards, "partitions": first.partitions})
    broken = plan.model_copy(update={"placements": (first, second, *rest[1:])})
    file.write_text(dump_plan(broken))
    with pytest.raises(Refused, match="is chat/0's"):
        prepare_all([place.settings("chat"), place.settings("code")], file, {})


def test_settings_that_contradict_their_placement(place: Place) -> None:
    refused = place.refusal(planned(TWO), "chat", "code", argv=("--max_model_len", "1024"))
    assert "placement chat/0 says max-model-len 4096, the settings say 1024" in str(refused)


@pytest.mark.parametrize(
    ("said", "field", "says"),
    [
        ({"precision": "CPU"}, "precision", "placement chat/0 says precision CPU: Input should be 'int4', "),
        ({"memory_limit_gib": 24.5}, "memory-limit", "memory-limit 24.500 GiB: one MI300X CPX/NPS4 has 23.998 GiB"),
    ],
)
def test_a_plan_that_somebody_wrote_into(said: dict[str, object], field: str, says: str, place: Place) -> None:
    plan = planned(TWO)
    first, *rest = plan.placements
    refused = place.refusal(
        plan.model_copy(update={"placements": (first.model_copy(update=said), *rest)}), "chat", "code"
    )
    assert refused.field == field
    assert says in str(refused)


def test_a_device_that_is_shared_beyond_its_memory(place: Place) -> None:
    plan = planned(TWO)
    chat, other, code = plan.placements
    shared = [run.model_copy(update={"cards": chat.cards, "partitions": chat.partitions}) for run in (chat, other)]
    twenty = [run.model_copy(update={"memory_limit_gib": 20.0}) for run in shared]
    refused = place.refusal(plan.model_copy(update={"placements": (*twenty, code)}), "chat", "code")
    assert (refused.field, refused.shortfall_gib) == ("memory-limit", 16.002)
    assert "placement chat/1: card 0 partition 2 is shared up to 40 GiB, 16.002 GiB more than it has" in str(refused)


def test_a_refusal_says_which_of_several_models_it_is_of(place: Place, tmp_path: Path) -> None:
    models = tmp_path / "models.yaml"
    listed = [f"- {{name: good, path: {place.model}}}", f"- {{name: bad, path: {tmp_path / 'nothing'}}}"]
    long = f"- {{name: long, path: /{'x' * 5000}}}"
    for lines, says in (
        (listed, f"model bad: --model_dir {tmp_path / 'nothing'}: no such file or directory"),
        ([listed[0], long], "model long: /xxxx"),
        ([listed[0], f"{listed[1][:-1]}, load: on_demand}}"], "model bad: --model_dir"),
        ([f"{listed[0][:-1]}, profile: none}}"], "model good: profile: 'none' is not a profile id"),
    ):
        models.write_text("\n".join(["version: 1", "models:", *lines]))
        done = subprocess.run(
            [sys.executable, "-m", "aim_runtime", "--dry_run", "--models", str(models), "--node", str(place.node)],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {says}")
        assert len(line) < 1000


def test_a_model_larger_than_planned_for_is_refused(place: Place) -> None:
    place.model = write_model(place.folder / "larger", 30 * 10**9)
    refused = place.refusal(planned(TWO), "chat", "code")
    assert str(refused).startswith("placement chat/0: ")
    assert refused.shortfall_gib


def test_without_a_plan_each_model_takes_the_next_device(place: Place) -> None:
    found = place.assign(None, "a", "b", "c")
    assert [each.devices[0].at for each in found] == [(0, 0), (0, 1), (0, 2)]


def in_pod(*devices: tuple[int, int]) -> Node:
    node = emulate("MI300X", cards=2, partition="CPX/NPS4", name="pod-xyz")
    cards = [
        card.model_copy(update={"partitions": tuple(p for p in card.partitions if (card.index, p.index) in devices)})
        for card in node.cards
    ]
    return node.model_copy(update={"cards": tuple(card for card in cards if card.partitions)})


def test_in_a_pod_each_model_takes_what_is_here_by_mode_size_and_count(tmp_path: Path) -> None:
    pod = Place(tmp_path, in_pod((0, 3), (1, 5), (1, 6)))
    found = pod.assign(planned(TWO), "chat", "code", pod=True)
    by_model = {each.model: [device.at for device in each.devices] for each in found}
    assert by_model == {"chat": [(0, 3)], "code": [(1, 5), (1, 6)]}
    assert [each.env["ROCR_VISIBLE_DEVICES"] for each in found] == ["0", "1,2"]


def test_a_pod_whose_node_is_known_serves_that_nodes_replicas(tmp_path: Path) -> None:
    pod = Place(tmp_path, in_pod((0, 3), (0, 4), (1, 5), (1, 6)))
    found = pod.assign(planned(TWO), "chat", "code", pod=True, argv=("--node_name", "n0"))
    assert sorted((each.model, each.replica) for each in found) == [("chat", 0), ("chat", 1), ("code", 0)]
    assert pod.refusal(planned(TWO), "chat", "code", pod=True, argv=("--node_name", "n1")).field == "node-name"


def test_a_pod_with_too_few_devices(tmp_path: Path) -> None:
    pod = Place(tmp_path, in_pod((0, 3)))
    refused = pod.refusal(planned(TWO), "chat", "code", pod=True)
    assert "placement code/0: every device of this pod is taken" in str(refused)
    other = Place(tmp_path, in_pod((0, 3), (1, 5)))
    assert "placement code/0: partition-count 2" in str(other.refusal(planned(TWO), "chat", "code", pod=True))


def test_a_dry_run_of_several_models_prints_them_all_and_imports_no_server(place: Place) -> None:
    models, plan = place.folder / "models.yaml", place.folder / "plan.yaml"
    rows = "".join(f"- {{name: {name}, path: {place.model}}}\n" for name in ("chat", "code"))
    models.write_text(f"version: 1\nmodels:\n{rows}")
    plan.write_text(dump_plan(planned(TWO)))
    flags = ["--models", str(models), "--placement", str(plan), "--node", str(place.node), "--dry_run", "-o", "json"]
    command = [sys.executable, "-X", "importtime", "-m", "aim_runtime", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert [(each["model"], each["replica"]) for each in json.loads(done.stdout)] == [
        ("chat", 0),
        ("chat", 1),
        ("code", 0),
    ]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"kserve", "vllm", "torch", "llama_cpp", "uvicorn", "starlette", "fastapi"}
    models.write_text(f"version: 1\nmodels:\n- {{name: chat, path: {place.model}}}\n")
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (refused.returncode, json.loads(refused.stdout)["refused"]["value"]) == (1, "code")


@pytest.mark.model
def test_four_models_on_four_cpu_sets(tmp_path: Path, embedded_model: Path) -> None:
    place = Place(tmp_path)
    place.node.write_text("version: 1\nkind: cpu\nname: box\ncores: 4\nmemory: 8GiB\npartitions: 4\n")
    place.model = embedded_model
    names = ("a", "b", "c", "d")
    rows = "".join(f"- {{name: {name}, model: {embedded_model}, context: 1024, concurrency: 2}}\n" for name in names)
    found = place.assign(planned(rows, "{file: node.yaml}", tmp_path), *names)
    assert sorted(each.devices[0].partition for each in found) == [0, 1, 2, 3]
    assert sorted(each.cpus or () for each in found) == [(0,), (1,), (2,), (3,)]
    assert {each.memory_bytes for each in found} == {2 * 2**30}
