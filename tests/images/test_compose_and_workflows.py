"""compose.yaml and the workflows: valid, in step with the images, and nothing in them that `make` does not do.

compose-spec.json is the Compose Specification's own schema (github.com/compose-spec/compose-spec, schema/, 170098b,
Apache-2.0).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import image_build
from aim_guardrail.settings import GuardrailSettings
from aim_profile.kubernetes.compose import project_of
from aim_profile.nodes.read import emulate
from aim_profile.plans.fleet import fleet_of
from aim_profile.plans.make import make_plan
from aim_profile.plans.workload import parse_workloads
from aim_runtime.settings import RuntimeSettings

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(Path(__file__).with_name("compose-spec.json").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def wrong(document: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(document)]


def test_compose_yaml_is_a_compose_file() -> None:
    assert wrong(COMPOSE) == []


def test_a_rendered_project_is_one() -> None:
    made = emulate("MI300X", 1, "CPX/NPS4", name="n")
    (card,) = made.cards
    parts = tuple(part.model_copy(update={"render_minor": 128 + part.index}) for part in card.partitions)
    node = made.model_copy(update={"cards": (card.model_copy(update={"partitions": parts}),)})
    text = (
        "version: 1\nworkloads:\n  - {name: chat, model: Qwen/Qwen3-8B, context: 8192, concurrency: 1, replicas: 2}\n"
    )
    document = project_of(make_plan(fleet_of([node]), parse_workloads(text)), node).document
    assert wrong(document) == []
    document["services"]["chat-0"]["device"] = []
    assert len(wrong(document)) == 1


@pytest.mark.parametrize(("name", "settings"), [("guardrail", GuardrailSettings), ("runtime", RuntimeSettings)])
def test_each_command_is_understood(name: str, settings: Any) -> None:
    found = settings.load(COMPOSE["services"][name]["command"], {}, prog="p", description="d")
    assert (found.model_name, found.http_port, found.grpc_port) == ("smollm2", 8080, 8081)


def test_our_images_are_this_release_s_and_the_others_pinned() -> None:
    images = [service["image"] for service in COMPOSE["services"].values()]
    ours = [image for image in images if image.startswith("aim-")]
    assert ours == [f"aim-guardrail:{VERSION}", f"aim-runtime-cpu:{VERSION}"]
    assert {image.partition(":")[0] for image in ours} <= image_build.IMAGES.keys()
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image in images)


def test_only_the_guardrail_and_prometheus_listen_on_this_machine() -> None:
    ports = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    assert {name for name, given in ports.items() if given} == {"guardrail", "prometheus"}
    assert all(port.startswith("127.0.0.1:") for given in ports.values() for port in given)


@pytest.mark.system
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: make system-deps")
    file = tmp_path / "prometheus.yml"
    file.write_text(COMPOSE["configs"]["prometheus"]["content"])
    shutil.copy(ROOT / COMPOSE["configs"]["rules"]["file"], tmp_path / "aim.rules")
    done = subprocess.run([promtool, "check", "config", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def steps() -> list[dict[str, Any]]:
    return [step for flow in WORKFLOWS.values() for job in flow["jobs"].values() for step in job["steps"]]


def test_workflows_run_make_and_targets_that_are_there() -> None:
    assert sorted(WORKFLOWS) == ["ci", "images"]
    runs = [step["run"] for step in steps() if "run" in step]
    assert len(runs) == 2
    for run in runs:
        assert re.fullmatch(r"make ([a-z-]+)( [A-Z_]+=\S+| [A-Z_]+=\"[^\"]*\")*", run), run
        assert run.split()[1] in TARGETS


def test_actions_are_pinned_by_commit() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert len(used) == 6
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)


def test_workflows_may_no_more_than_they_need() -> None:
    for flow in WORKFLOWS.values():
        assert flow["permissions"] == {"contents": "read"}
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / ".github/workflows").glob("*.yml")]
    # What others wrote (a branch's name, a title) never stands in a command.
    assert not any("${{" in str(step.get("run")) for step in steps())
    assert "secrets." not in "".join(texts)


def test_zizmor_finds_nothing_in_the_workflows() -> None:
    """By what it brings: no network."""
    zizmor = [
        Path(sys.executable).with_name("zizmor"),
        "--offline",
        "--no-progress",
        "--quiet",
        "--persona",
        "pedantic",
    ]
    done = subprocess.run([*zizmor, ".github/workflows"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_image_is_released() -> None:
    assert WORKFLOWS["images"]["jobs"]["image"]["strategy"]["matrix"]["image"] == list(image_build.IMAGES)
