"""A plan as a Compose project: each container has its own partitions' devices and is told what it was sized for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.kubernetes.compose import Project, project_of
from aim_profile.kubernetes.target import RenderError
from aim_profile.nodes.read import Node, emulate, export_node
from aim_profile.plans.fleet import fleet_of
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan, PlanError, dump_plan
from aim_profile.plans.workload import Workloads, parse_workloads
from aim_runtime.settings import RuntimeSettings

WORKLOADS = """
version: 1
workloads:
  - {name: chat, model: meta-llama/Llama-3.1-8B-Instruct, precision: bf16, context: 8192, concurrency: 2, replicas: 2}
  - {name: coder, model: Qwen/Qwen3-8B, context: 8192, concurrency: 1}
  - {name: tune, kind: finetune, memory: 18GiB, priority: low}
"""


def node(partition: str = "CPX/NPS4", first_minor: int | None = 128) -> Node:
    """Two MI300X whose render nodes are numbered from there, as the kernel does; None: not readable."""
    made = emulate("MI300X", 2, partition, name="gpu-1")
    cards, minor = [], first_minor
    for card in made.cards:
        parts = []
        for part in card.partitions:
            parts.append(part.model_copy(update={"render_minor": minor}))
            minor = None if minor is None else minor + 1
        cards.append(card.model_copy(update={"partitions": tuple(parts)}))
    return made.model_copy(update={"cards": tuple(cards)})


def workloads(text: str = WORKLOADS) -> Workloads:
    return parse_workloads(text)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(fleet_of([node()]), workloads())


@pytest.fixture(scope="module")
def project(plan: Plan) -> Project:
    return project_of(plan, node())


def test_each_service_has_its_own_partitions_and_no_other(plan: Plan, project: Project) -> None:
    services = project.document["services"]
    assert sorted(services) == ["chat-0", "chat-1", "coder-0"]
    for placement in plan.placements:
        if placement.kind == "serve":
            (card, partition) = placement.devices[0]
            minor = 128 + card * 8 + partition
            assert services[placement.id.replace("/", "-")]["devices"] == [
                "/dev/kfd:/dev/kfd",
                f"/dev/dri/renderD{minor}:/dev/dri/renderD{minor}",
            ]
    every = [device for service in services.values() for device in service["devices"] if "kfd" not in device]
    assert len(every) == len(set(every))
    assert "VISIBLE_DEVICES" not in str(project.document)


def test_what_is_no_service_is_named(project: Project) -> None:
    assert project.skipped == ("tune: a finetune workload is none of the runtime's",)


def test_the_runtime_understands_each_command(project: Project) -> None:
    for name, service in project.document["services"].items():
        settings = RuntimeSettings.load(service["command"], {}, prog="p", description="d")
        assert settings.model_name == name.rpartition("-")[0]
        assert (settings.binding, settings.engine, settings.fetch) == ("pod", "vllm", True)
        assert (settings.compute_partition, settings.memory_partition) == ("CPX", "NPS4")
        assert settings.partition_count == 1
        assert settings.model_uri in {"hf://meta-llama/Llama-3.1-8B-Instruct", "hf://Qwen/Qwen3-8B"}


def test_replicas_answer_under_one_name_and_listen_on_this_machine_alone(project: Project) -> None:
    services = project.document["services"].values()
    aliases = [service["networks"]["default"]["aliases"] for service in services]
    assert sorted(aliases) == [["chat"], ["chat"], ["coder"]]
    ports = [port for service in services for port in service["ports"]]
    assert len(set(ports)) == 3
    assert all(port.startswith("127.0.0.1:81") for port in ports)


def test_a_container_may_no_more_than_a_restricted_pod(project: Project) -> None:
    for service in project.document["services"].values():
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])
        assert not {"privileged", "user", "ipc", "network_mode", "pid"} & service.keys()
        assert service["mem_limit"] == "20gb"


def test_siblings_are_all_there() -> None:
    text = """
version: 1
workloads:
  - {name: big, model: Qwen/Qwen3-32B, precision: bf16, context: 8192, concurrency: 1}
"""
    whole = make_plan(fleet_of([node("SPX/NPS1")]), workloads(text))
    document = project_of(whole, node("SPX/NPS1"), storage_uris={"big": "/models/$new"}).document
    service = document["services"]["big-0"]
    assert [device.partition(":")[0] for device in service["devices"]] == ["/dev/kfd", "/dev/dri/renderD128"]
    assert "--model_uri=/models/$$new" in service["command"]


def test_a_node_that_is_not_as_planned_is_refused(plan: Plan) -> None:
    with pytest.raises(RenderError, match=r"gpu-1 is not as planned: mode is SPX/NPS1, planned CPX/NPS4"):
        project_of(plan, node("SPX/NPS1"))
    with pytest.raises(PlanError, match="the plan has no node 'gpu-2'"):
        project_of(plan, node(), "gpu-2")


def test_unknown_render_nodes_are_refused(plan: Plan) -> None:
    with pytest.raises(RenderError, match=r"\w+/0: the render node of card \d partition \d is not known"):
        project_of(plan, node(first_minor=None))


def test_a_plan_that_serves_nothing_there_is_refused() -> None:
    text = "version: 1\nworkloads:\n  - {name: tune, kind: finetune, memory: 18GiB}\n"
    with pytest.raises(RenderError, match="gpu-1: the plan serves nothing there"):
        project_of(make_plan(fleet_of([node()]), workloads(text)), node())


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["render", *words])


def test_the_verb_writes_what_compose_reads(plan: Plan, project: Project, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(dump_plan(plan))
    (tmp_path / "node.yaml").write_text(export_node(node()))
    printed = invoke(str(tmp_path / "plan.yaml"), "--compose", "--node", str(tmp_path / "node.yaml"))
    assert printed.exit_code == 0, printed.output
    assert yaml.safe_load(printed.stdout) == project.document
    assert re.match(r"# Partitions without Kubernetes.*\n#   RENDER_GID=\$\(stat", printed.stdout)


def test_options_that_have_no_use_are_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(dump_plan(plan))
    beside = invoke(str(tmp_path / "plan.yaml"), "--compose", "-n", "llm")
    alone = invoke(str(tmp_path / "plan.yaml"), "--node-name", "gpu-1")
    assert (beside.exit_code, alone.exit_code) == (2, 2)
    assert "--namespace llm" in beside.stderr
    assert "--node-name gpu-1: " in alone.stderr
