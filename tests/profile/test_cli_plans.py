"""The verbs about plans: plan, diff, assert, steps, render; files go from one to the next."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from aim_profile.cli import options as cli
from aim_profile.cli.app import app
from aim_profile.errors import AimProfileError
from aim_profile.files import read as files
from aim_profile.gpus import catalog
from aim_profile.kubernetes import target
from aim_profile.plans import dcm
from aim_profile.plans.plan import load_plan
from sysfs_tree import write_mi300x_cpx

SAMPLES = Path(__file__).parent.parent.parent / "docs/samples"
FLEET, WORKLOADS = SAMPLES / "fleet.yaml", SAMPLES / "workloads.yaml"


def run(*arguments: object, code: int = 0) -> Result:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def refusal(*arguments: object) -> str:
    found = run(*arguments, code=2)
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    return found.stderr


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.yaml"
    run("plan", FLEET, WORKLOADS, "--out", file)
    return file


def node_file(folder: Path, name: str, mode: str, cards: int = 2) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(f"version: 1\nname: {name}\ngpu: MI300X\ncards: {cards}\npartition: {mode}\n", encoding="utf-8")
    return file


def test_choices_are_those_of_their_sources() -> None:
    assert cli.Tier == catalog.Tier
    assert cli.Strategy == dcm.Strategy
    assert cli.Allocation == target.Allocation


def test_a_plan_is_printed_written_and_drawn(tmp_path: Path) -> None:
    out, svg = tmp_path / "plan.json", tmp_path / "plan.svg"
    found = run("plan", FLEET, WORKLOADS, "--out", out, "--svg", svg)
    assert "14 of 14 replicas placed" in found.stdout
    assert "coder/0" in found.stdout
    assert svg.read_text(encoding="utf-8").startswith("<svg")
    printed = json.loads(run("plan", FLEET, WORKLOADS, "-o", "json").stdout)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    assert load_plan(out).complete
    assert yaml.safe_load(run("plan", FLEET, WORKLOADS, "-o", "yaml").stdout) == printed


def test_exact_agrees_on_the_sample() -> None:
    heuristic = json.loads(run("plan", FLEET, WORKLOADS, "-o", "json").stdout)["totals"]
    exact = json.loads(run("plan", FLEET, WORKLOADS, "--exact", "-o", "json").stdout)["totals"]
    assert exact["proven"] is True
    assert exact["cards_used"] == heuristic["cards_used"]


def test_what_has_no_device_is_named_with_the_remedy(tmp_path: Path) -> None:
    one = node_file(tmp_path, "small", "CPX/NPS4", 1)
    found = run("plan", one, WORKLOADS, code=1)
    assert "Without a device" in found.stdout
    assert "what would help" in found.stdout


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "nodes" in refusal("plan", WORKLOADS, FLEET)
    assert "absent.yaml" in refusal("plan", FLEET, tmp_path / "absent.yaml")
    assert "absent" in refusal("plan", FLEET, WORKLOADS, "--svg", tmp_path / "absent" / "plan.svg")
    (tmp_path / "bad.yaml").write_text("placements: 1", encoding="utf-8")
    for verb in (("diff", tmp_path / "bad.yaml"), ("steps", FLEET), ("render",)):
        assert "bad.yaml" in refusal(*verb, tmp_path / "bad.yaml")


def test_a_node_as_planned_passes_and_a_changed_one_is_named(planned: Path, tmp_path: Path) -> None:
    good = node_file(tmp_path, "node-b", "CPX/NPS4")
    assert "as planned" in run("assert", planned, "--node", good).stdout
    assert json.loads(run("assert", planned, "--node", good, "-o", "json").stdout) == {"equal": True, "differences": []}
    wrong = node_file(tmp_path, "node-b", "SPX/NPS1")
    found = json.loads(run("assert", planned, "--node", wrong, "-o", "json", code=1).stdout)
    assert found["differences"][0]["message"] == "node-b card 0: mode should be CPX/NPS4, is SPX/NPS1"
    other = node_file(tmp_path, "elsewhere", "CPX/NPS4")
    assert "the plan has no node 'elsewhere'" in refusal("assert", planned, "--node", other)
    run("assert", planned, "--node", other, "--name", "node-b")


def test_diff_is_silent_about_equal_plans_and_names_what_moves(planned: Path, tmp_path: Path) -> None:
    assert run("diff", planned, planned).stdout == "No difference.\n"
    text = planned.read_text(encoding="utf-8")
    (tmp_path / "new.yaml").write_text(text.replace("replica: 5", "replica: 9"), encoding="utf-8")
    found = json.loads(run("diff", planned, tmp_path / "new.yaml", "-o", "json", code=1).stdout)
    assert [change["subject"] for change in found["changes"]] == ["chat/5", "chat/9"]


def test_steps_start_from_what_is_there_now(planned: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.yaml"
    ready.write_text(
        "version: 1\nnodes: [{name: node-a, gpu: MI300X, cards: 2},"
        " {name: node-b, gpu: MI300X, cards: 2, compute_partition: CPX, memory_partition: NPS4}]"
    )
    as_planned = json.loads(run("steps", ready, planned, "-o", "json").stdout)
    assert {step["action"] for step in as_planned["steps"]} == {"place"}
    switched = json.loads(run("steps", FLEET, planned, "-o", "json").stdout)
    actions = [step["action"] for step in switched["steps"] if step["node"] == "node-b"]
    assert actions == ["drain", "switch", "verify", "refresh", "await", "undrain", "place"]
    assert json.loads(switched["config_json"])["gpu-config-profiles"]["cpx-nps4-x2"]
    assert "Nothing to do." in run("steps", planned, planned).stdout


def test_a_plan_is_rendered_whole(planned: Path, tmp_path: Path) -> None:
    found = run("render", planned, "-n", "llm", "--image", "registry.example/runtime:1")
    kinds = [document["kind"] for document in yaml.safe_load_all(found.stdout)]
    assert kinds == ["ConfigMap", "ClusterServingRuntime", *["InferenceService"] * 4]
    config_map = next(iter(yaml.safe_load_all(found.stdout)))
    profiles = json.loads(config_map["data"]["config.json"])["gpu-config-profiles"]
    for name, body in profiles.items():
        assert body["profiles"] == [
            {
                "computePartition": name.split("-")[0].upper(),
                "memoryPartition": name.split("-")[1].upper(),
                "numGPUsAssigned": 2,
            }
        ]
    assert "config.json: |\n" in found.stdout
    assert "kubectl label node node-b dcm.amd.com/gpu-config-profile=cpx-nps4-x2" in found.stdout
    assert "not rendered: guard" in found.stderr
    out = tmp_path / "objects.yaml"
    run("render", planned, "-n", "llm", "--image", "registry.example/runtime:1", "--out", out)
    assert out.read_text(encoding="utf-8") == found.stdout


def test_a_profile_is_rendered_by_reference_file_or_device(tmp_path: Path) -> None:
    reference = "Qwen/Qwen3-8B/vllm-mi300x-cpx-nps4-bf16-tp1-latency"
    by_reference = run("render", reference).stdout
    file = tmp_path / "p.yaml"
    run("export", reference, "--out", file)
    assert run("render", file).stdout == by_reference
    assert run("render", "Qwen/Qwen3-8B", "--gpu", "MI300X", "--partition", "CPX").stdout == by_reference
    named = list(
        yaml.safe_load_all(run("render", file, "--name", "q", "--replicas", 2, "--storage-uri", "pvc://a/b").stdout)
    )
    assert named[1]["metadata"]["name"] == "q"
    assert named[1]["spec"]["predictor"]["model"]["storageUri"] == "pvc://a/b"
    assert "no address" in refusal("render", file, "--storage-uri", "models")


@pytest.mark.parametrize("verb", ["plan", "diff", "assert", "steps", "render"])
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    assert "Example:" in run(verb, "--help").stdout


def test_a_fleet_without_a_usable_card_says_why(tmp_path: Path) -> None:
    mi308x = tmp_path / "mi308x.yaml"
    mi308x.write_text("version: 1\nnodes: [{name: a, gpu: MI308X, cards: 8}]\n", encoding="utf-8")
    found = json.loads(run("plan", mi308x, WORKLOADS, "-o", "json", code=1).stdout)["unplaced"][0]
    assert found["reason"] == "no mode of MI308X is validated"
    assert found["remedies"] == ["allow its modes that are driver-legal: --tier driver-legal"]
    allowed = run("plan", mi308x, WORKLOADS, "--tier", "driver-legal", "-o", "json", code=1)
    assert len(json.loads(allowed.stdout)["placements"]) == 8  # the latency job needs whole cards, and so all are whole
    write_mi300x_cpx(tmp_path / "recorded/nodes")
    found = json.loads(run("plan", tmp_path / "recorded", WORKLOADS, "-o", "json", code=1).stdout)["unplaced"][0]
    assert (
        found["reason"] == "the mode of recorded's cards is not wholly readable, and how the node is run is not known"
    )
    assert "deployment, compute_partition and memory_partition" in found["remedies"][0]


def test_a_node_of_an_unknown_product_is_set_aside_unless_strict(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    text = FLEET.read_text(encoding="utf-8")
    fleet.write_text(f"{text.rstrip()}\n  - {{name: node-x, gpu: MI499X, cards: 8}}\n", encoding="utf-8")
    found = run("plan", fleet, WORKLOADS)
    assert "14 of 14 replicas placed" in found.stdout
    assert "set aside: node-x: no accelerator named 'MI499X'" in found.stdout
    assert "MI499X" in refusal("plan", fleet, WORKLOADS, "--strict")


def test_a_node_without_a_gpu_is_not_planned_for(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    assert "holds no AMD GPU" in refusal("plan", tmp_path, WORKLOADS)


def test_a_file_that_is_not_there_is_said_plainly() -> None:
    gone = "aim-profile: nope.yaml: No such file or directory; name a file that can be read\n"
    assert refusal("plan", "nope.yaml", WORKLOADS) == gone


@pytest.mark.parametrize("verb", [("steps",), ("render",)])
def test_a_plan_is_parsed_once(
    verb: tuple[str, ...], planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    parse = files.parse_yaml

    def counted(text: str, named: str, error: type[AimProfileError]) -> object:
        parsed.append(named)
        return parse(text, named, error)

    monkeypatch.setattr(files, "parse_yaml", counted)
    other = tmp_path / "now.yaml"
    other.write_text(planned.read_text(encoding="utf-8"), encoding="utf-8")
    run(*verb, other, *([planned] if verb == ("steps",) else []))
    assert Counter(parsed)[str(other)] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--gpu", "MI355X"), "--gpu MI355X: a plan already says that"),
        (("--replicas", "5"), "--replicas 5: a plan already says that"),
        (("--name", "x"), "--name x: a plan already says that"),
        (("--storage-uri", "chta=pvc://a/b"), "no service is named 'chta'; they are assistant, chat, coder, summaries"),
        (("--storage-uri", "pvc://a/b"), "storage-uri: pvc://a/b: of which of 4 services; write NAME=pvc://a/b"),
        (("-n", "Bad_NS"), "namespace: 'Bad_NS' is no name of a namespace"),
        (("-n", ""), "namespace: '' is no name of a namespace"),
        (("--operator-namespace", "x y"), "operator-namespace: 'x y'"),
        (("--image", "a b"), "image: 'a b' is no image"),
        (("--runtime", "A_b"), "runtime: 'A_b' is no name of a ClusterServingRuntime"),
        (("--runtime", "aim-vllm", "--image", "a:1"), "image: aim-vllm is there already, with an image of its own"),
    ],
)
def test_render_ignores_nothing_it_is_told(planned: Path, options: tuple[str, ...], says: str) -> None:
    assert says in refusal("render", planned, *options)


def test_a_runtime_that_is_there_is_named_and_not_rendered(planned: Path) -> None:
    text = run("render", planned, "--runtime", "aim-vllm").stdout
    assert "kind: ClusterServingRuntime" not in text
    assert text.count("runtime: aim-vllm\n") == text.count("kind: InferenceService") == 4
    # What a rendered runtime would have set is the service's.
    assert text.count("name: GPU_ARCHS") == 4


def test_an_address_alone_is_the_only_service_s(tmp_path: Path) -> None:
    workloads, plan = tmp_path / "w.yaml", tmp_path / "plan.yaml"
    workloads.write_text("workloads:\n- {name: chat, model: Qwen/Qwen3-8B}\n", encoding="utf-8")
    run("plan", FLEET, workloads, "--out", plan)
    assert "storageUri: pvc://models/chat" in run("render", plan, "--storage-uri", "pvc://models/chat").stdout


@pytest.mark.parametrize("option", ["--out", "--svg"])
def test_nothing_is_mixed_into_the_table_on_stdout(option: str) -> None:
    assert f"{option} -: the table on stdout" in refusal("plan", FLEET, WORKLOADS, option, "-")


def fleet_file(folder: Path, nodes: str) -> Path:
    file = folder / "fleet.yaml"
    file.write_text(f"version: 1\nnodes: [{nodes}]\n", encoding="utf-8")
    return file


def test_steps_are_for_the_cards_that_are_there_now(planned: Path, tmp_path: Path) -> None:
    elsewhere = fleet_file(tmp_path, "{name: other, gpu: MI300X}")
    assert "none of the plan's nodes is there, node-a first" in refusal("steps", elsewhere, planned)
    another = fleet_file(tmp_path, "{name: node-a, gpu: MI300X, cards: 2}, {name: node-b, gpu: MI355X, cards: 2}")
    assert "node-b card 0 is an MI355X, the plan is for an MI300X" in refusal("steps", another, planned)
    fewer = fleet_file(tmp_path, "{name: node-a, gpu: MI300X, cards: 2}, {name: node-b, gpu: MI300X, cards: 1}")
    assert "node-b card 1 is not there" in refusal("steps", fewer, planned)
    part = fleet_file(tmp_path, "{name: node-a, gpu: MI300X, cards: 2}")
    assert "taken as the plan found them: node-b" in run("steps", part, planned).stderr


def test_a_guest_is_a_guest_as_the_fleet_says_now(planned: Path, tmp_path: Path) -> None:
    guests = fleet_file(
        tmp_path, ", ".join(f"{{name: {n}, gpu: MI300X, cards: 2, deployment: sr-iov}}" for n in ("node-a", "node-b"))
    )
    assert "node-b is an SR-IOV guest" in refusal("steps", guests, planned)
    now = tmp_path / "now.yaml"
    run("plan", guests, WORKLOADS, "--out", now, code=1)
    assert "node-b is an SR-IOV guest" in refusal("steps", now, planned)


def test_what_a_tier_moves_is_said(tmp_path: Path) -> None:
    fleet = fleet_file(tmp_path, "{name: a, gpu: MI300X, cards: 1, compute_partition: QPX, memory_partition: NPS1}")
    workloads, now = tmp_path / "w.yaml", tmp_path / "now.yaml"
    workloads.write_text("workloads: [{name: chat, model: Qwen/Qwen3-8B, priority: high}]", encoding="utf-8")
    run("plan", fleet, workloads, "--tier", "driver-legal", "--out", now)
    moved = run("plan", fleet, workloads, "--current", now).stdout
    assert "running in modes below tier validated, so moved whatever their priority: chat/0 in QPX/NPS1" in moved
    assert "below tier" not in run("plan", fleet, workloads, "--current", now, "--tier", "driver-legal").stdout
