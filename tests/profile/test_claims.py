"""Devices by claim: what AMD's DRA driver publishes is allocated as the profile wants it, by a real CEL engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.files.write import dump_all
from aim_profile.gpus.catalog import by_name, catalog
from aim_profile.kubernetes.claims import claim_template
from aim_profile.kubernetes.kserve import Service, render_services
from aim_profile.kubernetes.target import RenderError, Target, target_of
from aim_profile.models.known import by_id
from aim_profile.plans.fleet import parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import dump_plan
from aim_profile.plans.workload import parse_workloads
from aim_profile.serving.derive import Wanted, derive
from aim_profile.serving.profile import Profile
from crd_schemas import CRDS, violations
from kserve_webhook import denied
from resource_slices import allocated, resource_slice

ROOT = Path(__file__).parent.parent.parent
MI300X = by_name("MI300X")
CPX = MI300X.mode("CPX/NPS4")


def template(devices: int, mode: str = "CPX/NPS4", gpu: str = "MI300X", **more: Any) -> dict[str, Any]:
    return claim_template("t", by_name(gpu).mode(mode), by_name(gpu), devices, **more)


def test_what_the_driver_is_said_to_publish_is_what_kubernetes_takes() -> None:
    assert violations(resource_slice("node-a", 2, 8)) == []


def test_the_partitions_of_one_pod_are_siblings() -> None:
    node = resource_slice("node-a", cards=2, partitions=8)
    names = [device["name"] for device in node["spec"]["devices"]]
    assert allocated(template(4), [node]) == names[:4]
    # Five of card 0 and one of card 1 are taken: card 0 has three left, card 1 has seven.
    taken = frozenset(("node-a", name) for name in [*names[:5], names[8]])
    assert allocated(template(4), [node], taken) == names[9:13]
    # Nine are free, but no card has eight of them.
    taken = frozenset(("node-a", name) for name in [*names[:4], *names[8:11]])
    assert allocated(template(8), [node], taken) is None
    unbound = template(8)
    del unbound["spec"]["spec"]["devices"]["constraints"]
    assert allocated(unbound, [node], taken) == [*names[4:8], *names[11:15]]


def test_a_claim_takes_no_other_mode_and_no_other_product() -> None:
    others = [
        resource_slice("dpx", 8, 2, "dpx_nps1"),
        resource_slice("nps1", 8, 8, "cpx_nps1"),
        resource_slice("mi325x", 8, 8, product="AMD_Instinct_MI325X"),
        resource_slice("whole", 8, 1, "spx_nps1"),
        resource_slice("mi210", 4, 1, None, "AMD_Instinct_MI210"),
    ]
    assert allocated(template(1), others) is None
    assert allocated(template(1), [*others, resource_slice("cpx", 1, 8)]) == ["gpu-0-128"]
    assert allocated(template(2, "DPX/NPS1"), others) == ["gpu-0-128", "gpu-1-129"]
    assert allocated(template(2, "SPX/NPS1"), others) == ["gpu-0-128", "gpu-8-136"]
    assert allocated(template(1, "SPX/NPS1", "MI210"), others) == ["gpu-0-128"]


@pytest.mark.parametrize("gpu", [*catalog()])
def test_every_product_and_mode_has_a_claim_that_its_devices_meet(gpu: str) -> None:
    accelerator = by_name(gpu)
    name = accelerator.marketing_names[0].replace(" ", "_")
    for mode in accelerator.modes():
        made = template(mode.partitions, mode.label, gpu)
        assert violations(made) == []
        profile = mode.resource_label if accelerator.partitionable else None
        assert allocated(made, [resource_slice("n", 1, mode.partitions, profile, name)]) is not None
        assert allocated(made, [resource_slice("n", 1, mode.partitions, profile, "AMD_Instinct_Other")]) is None


def test_a_claim_for_the_coming_driver_is_for_whole_cards_in_a_mode() -> None:
    nodes = [resource_slice("mi210", 4, 1, None, "AMD_Instinct_MI210"), resource_slice("n", 2, 1, "cpx_nps4")]
    assert allocated(template(1, auto_partition=True), nodes) == ["gpu-0-128"]
    made = template(16, auto_partition=True)["spec"]["spec"]["devices"]
    assert made["requests"][0]["exactly"]["count"] == 2
    assert "constraints" not in made


# --- what is rendered ---------------------------------------------------------------------------------------------


def service(model: str = "Qwen/Qwen3-32B", **more: Any) -> Service:
    found = derive(by_id(model), CPX, Wanted())
    assert isinstance(found, Profile)
    return Service("chat", found, **more)


def rendered(target: Target, **more: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(dump_all(render_services([service(**more)], target))))


def test_a_service_gets_its_devices_by_claim_and_counts_none() -> None:
    claim, served = rendered(Target(namespace="llm", runtime="aim-vllm", allocation="dra"))
    predictor = served["spec"]["predictor"]
    assert predictor["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": claim["metadata"]["name"]}]
    assert claim["metadata"]["namespace"] == "llm"
    resources = predictor["model"]["resources"]
    assert resources["claims"] == [{"name": "gpus"}]
    assert not [name for name in (*resources["limits"], *resources["requests"]) if "amd.com" in name]
    # The product is the claim's to say: without the device plugin there may be no node labeller.
    assert "affinity" not in predictor
    asked = claim["spec"]["spec"]["devices"]
    assert asked["requests"][0]["exactly"]["count"] == 4
    assert asked["constraints"] == [{"requests": ["gpus"], "matchAttribute": "gpu.amd.com/parentDeviceID"}]
    if CRDS:
        assert [line for each in (claim, served) for line in [*violations(each), *denied(each)]] == []


def test_a_plans_nodes_hold_for_claims_too() -> None:
    _, served = rendered(Target(runtime="aim-vllm", allocation="dra"), nodes=("a", "b"), spread=True)
    terms = served["spec"]["predictor"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = terms["nodeSelectorTerms"][0]["matchExpressions"]
    assert expression == {"key": "kubernetes.io/hostname", "operator": "In", "values": ["a", "b"]}


@pytest.mark.parametrize(
    ("runtime", "allocation", "says"),
    [
        ("aim-vllm-cpx-nps4", "dra", "asks for amd.com/cpx_nps4, and chat is for amd.com/cpx_nps4 by claim"),
        ("aim-vllm-cpx-nps4-dra", "plugin", "claims amd.com/cpx_nps4, and chat is for amd.com/cpx_nps4"),
        ("aim-vllm-dpx-nps1-dra", "dra", "claims amd.com/dpx_nps1"),
    ],
)
def test_a_runtime_of_the_other_way_to_devices_is_refused(runtime: str, allocation: Any, says: str) -> None:
    with pytest.raises(RenderError, match=says):
        rendered(Target(runtime=runtime, allocation=allocation))
    assert rendered(Target(runtime="aim-vllm-cpx-nps4-dra", allocation="dra"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"strategy": "single", "allocation": "dra"}, "single is the device plugin's.*leave out --strategy"),
        ({"auto_partition": True}, "the device plugin partitions nothing.*add --allocation dra"),
        ({"cluster_queue": "GPUs"}, "'GPUs' is no name of a ClusterQueue"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RenderError, match=says):
        target_of(**{"namespace": None, "strategy": "mixed", "image": None, "operator_namespace": "gpu", **given})


# --- a plan -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fleet = parse_fleet((ROOT / "docs/samples/fleet.yaml").read_text(encoding="utf-8"))
    workloads = parse_workloads((ROOT / "docs/samples/workloads.yaml").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(dump_plan(make_plan(fleet, workloads)), encoding="utf-8")
    return path


def of_plan(plan_file: Path, *options: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, ["render", str(plan_file), "-n", "llm", "--runtime", "aim-vllm", *options])
    assert done.exit_code == 0, done.output
    documents = list(yaml.safe_load_all(done.stdout))
    if CRDS:
        assert [line for each in documents for line in [*violations(each), *denied(each)]] == []
    return documents


def test_a_plan_as_claims_has_a_template_for_each_service(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = of_plan(plan_file, "--allocation", "dra")
    kinds = [each["kind"] for each in documents]
    assert kinds.count("ResourceClaimTemplate") == kinds.count("InferenceService") == 4
    assert kinds.count("ConfigMap") == 1
    # The driver that partitions by claim is the only one that may.
    kinds = [each["kind"] for each in of_plan(plan_file, "--allocation", "dra", "--auto-partition")]
    assert "ConfigMap" not in kinds


@pytest.mark.parametrize(
    ("options", "quotas", "labels"),
    [
        ((), {"amd.com/spx_nps1": {"mi300x-spx-nps1": "0"}, "amd.com/cpx_nps4": {"mi300x-cpx-nps4": "6"}}, 1),
        (("--strategy", "single"), {"amd.com/gpu": {"mi300x-spx-nps1": "0", "mi300x-cpx-nps4": "6"}}, 2),
        (("--allocation", "dra"), {"amd.com/gpu": {"amd-gpus": "6"}}, 0),
    ],
)
def test_jobs_may_queue_for_what_services_leave(
    options: tuple[str, ...], quotas: dict[str, dict[str, str]], labels: int, plan_file: Path
) -> None:
    documents = of_plan(plan_file, "--cluster-queue", "gpus", *options)
    (queue,) = [each for each in documents if each["kind"] == "ClusterQueue"]
    flavors = {each["metadata"]["name"]: each["spec"] for each in documents if each["kind"] == "ResourceFlavor"}
    hosts, *groups = queue["spec"]["resourceGroups"]
    assert hosts["coveredResources"] == ["cpu", "memory"]
    found = {
        group["coveredResources"][0]: {
            flavor["name"]: flavor["resources"][0]["nominalQuota"] for flavor in group["flavors"]
        }
        for group in groups
    }
    assert found == quotas
    assert flavors.keys() == {"aim-hosts", *(name for group in quotas.values() for name in group)}
    assert all(len(spec.get("nodeLabels", {})) == labels for name, spec in flavors.items() if name != "aim-hosts")
