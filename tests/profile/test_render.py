"""Rendered objects: valid where the real schemas are at hand, strict about devices everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aim_kserve.settings import ANNOTATION_PREFIX, KNOWN_ANNOTATIONS
from aim_profile.files.write import dump_all
from aim_profile.gpus.catalog import by_name, catalog
from aim_profile.kubernetes.kserve import Service, render_services, service_name
from aim_profile.kubernetes.plan_objects import services_of
from aim_profile.kubernetes.target import RenderError, Target
from aim_profile.models.known import by_id
from aim_profile.plans.fleet import parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import Plan
from aim_profile.plans.workload import parse_workloads
from aim_profile.serving.derive import Wanted, derive
from aim_profile.serving.files import read
from aim_profile.serving.profile import Guardrail, Profile
from aim_runtime.engines.vllm.engine import command_line
from aim_runtime.settings import RuntimeSettings
from crd_schemas import CRDS, violations

ROOT = Path(__file__).parent.parent.parent
LLAMA = by_id("meta-llama/Llama-3.1-8B-Instruct")


def profile(label: str = "CPX/NPS4", gpu: str = "MI300X", model: str = LLAMA.id, **wanted: object) -> Profile:
    found = derive(by_id(model), by_name(gpu).mode(label), Wanted.model_validate(wanted))
    assert isinstance(found, Profile)
    return found


def rendered(service: Service, **target: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ClusterServingRuntime and the InferenceService, read back from the text that is written."""
    runtime, served = yaml.safe_load_all(dump_all(render_services([service], Target(**target))))
    return runtime, served


def sample_plan() -> Plan:
    fleet = parse_fleet((ROOT / "docs/samples/fleet.yaml").read_text(encoding="utf-8"))
    workloads = parse_workloads((ROOT / "docs/samples/workloads.yaml").read_text(encoding="utf-8"))
    return make_plan(fleet, workloads)


# Where there are no schemas there is nothing to collect: an empty parameter set would count as a skip.
if CRDS:

    @pytest.mark.parametrize("gpu", [*catalog()])
    def test_objects_are_valid_against_the_real_schemas(gpu: str) -> None:
        for mode in by_name(gpu).modes():
            service = Service("m", profile(mode.label, gpu), 3, ("a", "b", "c"), spread=True)
            for strategy in ("mixed", "single"):
                for document in rendered(service, namespace="llm", strategy=strategy):
                    assert violations(document) == []

    def test_the_schema_check_can_fail() -> None:
        runtime, served = rendered(Service("m", profile()))
        served["spec"]["predictor"]["model"]["runtimee"] = "x"
        runtime["spec"]["containers"][0]["ports"][0]["containerPort"] = "http"
        assert len(violations(served)) == len(violations(runtime)) == 1


@pytest.mark.parametrize(
    ("label", "gpu", "strategy", "resource", "selector"),
    [
        ("CPX/NPS4", "MI300X", "mixed", "amd.com/cpx_nps4", None),
        ("SPX/NPS1", "MI300X", "mixed", "amd.com/spx_nps1", None),
        ("CPX/NPS4", "MI300X", "single", "amd.com/gpu", "cpx_nps4"),
        ("SPX/NPS1", "MI210", "mixed", "amd.com/gpu", None),
        ("SPX/NPS1", "MI210", "single", "amd.com/gpu", None),
    ],
)
def test_a_pod_asks_the_device_plugin_for_its_devices(
    label: str, gpu: str, strategy: str, resource: str, selector: str | None
) -> None:
    _, served = rendered(Service("m", profile(label, gpu)), strategy=strategy)
    predictor = served["spec"]["predictor"]
    limits = predictor["model"]["resources"]["limits"]
    assert limits[resource] == predictor["model"]["resources"]["requests"][resource] == "1"
    assert sum(key.startswith("amd.com/") for key in limits) == 1
    assert predictor.get("nodeSelector", {}).get("amd.com/gpu.compute-memory-partition") == selector


@pytest.mark.parametrize(
    ("runtime", "strategy", "asks"),
    [("aim-vllm-cpx-nps1", "mixed", "amd.com/cpx_nps4"), ("aim-vllm-cpx-nps4", "single", "amd.com/gpu")],
)
def test_a_runtime_of_another_resource_is_refused(runtime: str, strategy: Any, asks: str) -> None:
    with pytest.raises(RenderError, match=rf"{runtime} asks for .* m is for {asks}; name aim-vllm"):
        render_services([Service("m", profile())], Target(strategy=strategy, runtime=runtime))
    for other in ("aim-vllm", "mine", "aim-vllm-cpx-nps4"):
        (served,) = render_services([Service("m", profile())], Target(runtime=other))
        assert served[1]["spec"]["predictor"]["model"]["runtime"] == other


def node_expressions(served: dict[str, Any]) -> dict[str, list[str]]:
    affinity = served["spec"]["predictor"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {expression["operator"] for expression in term["matchExpressions"]} == {"In"}
    return {expression["key"]: expression["values"] for expression in term["matchExpressions"]}


@pytest.mark.parametrize("strategy", ["mixed", "single"])
def test_a_pod_lands_only_on_the_product_it_was_sized_for(strategy: str) -> None:
    model = "meta-llama/Llama-3.3-70B-Instruct"
    seen: dict[str, set[str]] = {}
    for gpu in catalog():
        _, served = rendered(Service("m", profile("SPX/NPS1", gpu, model, precision="int4")), strategy=strategy)
        seen[gpu] = set(node_expressions(served)["amd.com/gpu.device-id"])
    assert seen["MI355X"] == {"75a3", "75b3"}  # as the node labeller writes sysfs' `device`: no 0x, lower case
    assert {"74a1", "74b5"} <= seen["MI300X"]
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))


def test_tensor_parallelism_asks_for_siblings() -> None:
    _, served = rendered(Service("m", profile(model="Qwen/Qwen3-32B")))
    model = served["spec"]["predictor"]["model"]
    assert model["resources"]["limits"]["amd.com/cpx_nps4"] == "4"
    assert "--tensor_parallel_size=4" in model["args"]
    assert served["metadata"]["annotations"]["aim.amd.com/partition-count"] == "4"


def test_pods_have_no_privileges_no_host_paths_and_no_device_filters() -> None:
    runtime, served = rendered(Service("m", profile()))
    text = json.dumps([runtime, served])
    assert "hostPath" not in text
    assert "VISIBLE_DEVICES" not in text
    assert "null" not in text
    context = runtime["spec"]["containers"][0]["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"] for mount in runtime["spec"]["containers"][0]["volumeMounts"]}
    assert mounts == {"/dev/shm", "/etc/podinfo"}


def test_the_runtime_takes_every_flag_and_annotation_rendered(tmp_path: Path) -> None:
    wanted = profile(guardrails=(Guardrail(type="pii", action="redact"),), qos_priority="high", precision="fp8")
    runtime, served = rendered(Service("m", wanted))
    annotations = served["metadata"]["annotations"]
    ours = {key: value for key, value in annotations.items() if key.startswith(ANNOTATION_PREFIX)}
    assert {key.removeprefix(ANNOTATION_PREFIX) for key in ours} <= KNOWN_ANNOTATIONS
    assert yaml.safe_load(ours["aim.amd.com/guardrails"]) == [{"type": "pii", "action": "redact"}]
    file = tmp_path / "annotations"
    file.write_text("".join(f"{key}={json.dumps(value)}\n" for key, value in annotations.items()), encoding="utf-8")
    args = [*runtime["spec"]["containers"][0]["args"], *served["spec"]["predictor"]["model"]["args"]]
    flags = [arg.replace("{{.Name}}", served["metadata"]["name"]) for arg in args]
    settings = RuntimeSettings.load([*flags, f"--annotations_file={file}"], {}, prog="p", description="d")
    assert settings.max_model_len == wanted.engine_args["max-model-len"]
    assert settings.max_concurrency == wanted.engine_args["max-num-seqs"]
    words = command_line(settings.engine_args)
    assert "--quantization=fp8" in words
    assert "--gpu-memory-utilization=0.9" in words
    assert not any(word.startswith(("--max-model-len", "--max-num-seqs", "--tensor-parallel")) for word in words)


def test_aims_flags_without_a_value_become_flags() -> None:
    found = read(
        "{aim_id: o/m, model_id: o/m, env_vars: {A_B: '1'}, "
        "engine_args: {no-enable-prefix-caching: null, dtype: float16}, "
        "metadata: {engine: vllm, gpu: MI300X, precision: fp16, gpu_count: 1, metric: latency, "
        "manual_selection_only: false, type: optimized}}"
    )
    _, served = rendered(Service("m", found))
    (flag,) = served["spec"]["predictor"]["model"]["args"]
    assert command_line(json.loads(flag.removeprefix("--engine_args="))) == [
        "--no-enable-prefix-caching",
        "--dtype=float16",
    ]
    assert served["spec"]["predictor"]["model"]["env"] == [{"name": "A_B", "value": "1"}]


def test_nodes_of_the_plan_bind_the_pods() -> None:
    _, one = rendered(Service("m", profile(), 2, ("node-a",)))
    assert one["spec"]["predictor"]["nodeSelector"] == {"kubernetes.io/hostname": "node-a"}
    _, two = rendered(Service("m", profile(), 2, ("node-a", "node-b"), spread=True))
    affinity = two["spec"]["predictor"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert affinity["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] == ["node-a", "node-b"]
    assert two["spec"]["predictor"]["topologySpreadConstraints"][0]["whenUnsatisfiable"] == "DoNotSchedule"


def test_a_plan_becomes_a_service_for_each_workload() -> None:
    plan = sample_plan()
    found = services_of(plan)
    replicas = {service.name: service.replicas for service in found.services}
    assert replicas == {"assistant": 1, "chat": 6, "coder": 1, "summaries": 3}
    assert [line.split(":")[0] for line in found.skipped] == ["guard", "tune"]
    asked: dict[str, int] = {}
    for _, document in render_services(found.services):
        if document["kind"] == "InferenceService":
            predictor = document["spec"]["predictor"]
            limits = predictor["model"]["resources"]["limits"]
            for key, value in limits.items():
                if key.startswith("amd.com/"):
                    asked[key] = asked.get(key, 0) + int(value) * predictor["minReplicas"]
    serving = [placement for placement in plan.placements if placement.kind == "serve"]
    assert sum(asked.values()) == sum(len(placement.devices) for placement in serving)
    for service in found.services:
        (first, *_) = [placement for placement in serving if placement.workload == service.name]
        admitted = service.profile.engine_args["max-num-seqs"]
        assert isinstance(admitted, int)
        assert admitted >= first.concurrency
        assert service.profile.engine_args["max-model-len"] == first.context


def test_services_that_share_a_device_are_refused() -> None:
    fleet = parse_fleet("version: 1\nnodes: [{name: a, gpu: MI300X, cards: 1}]")
    shared = "{name: %s, model: meta-llama/Llama-3.2-1B-Instruct, memory_limit: 20GiB}"
    workloads = parse_workloads(f"version: 1\nworkloads: [{shared % 'a'}, {shared % 'b'}]")
    with pytest.raises(RenderError, match="gives a device to one pod"):
        services_of(make_plan(fleet, workloads))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3-1-8b-instruct"),
        ("org/7b", "m-7b"),
        ("a/" + "x" * 90, "x" * 52),
        ("a/B_c.", "b-c"),
    ],
)
def test_names_are_made_of_model_ids(text: str, name: str) -> None:
    assert service_name(text) == name


def test_what_cannot_be_rendered_is_named() -> None:
    with pytest.raises(RenderError, match="name"):
        render_services([Service("Not_A_Name", profile())])
    with pytest.raises(RenderError, match="gives no name"):
        service_name("a/---")
    unknown = profile().model_copy(update={"metadata": profile().metadata.model_copy(update={"gpu": "NONE"})})
    with pytest.raises(RenderError, match=r"metadata\.gpu"):
        render_services([Service("m", unknown)])


def test_models_that_are_not_on_the_hub_need_an_address() -> None:
    for path in ("/models/llama", "./llama", "llama", "models/llama.gguf", None):
        local = profile().model_copy(update={"model_id": path})
        with pytest.raises(RenderError, match="storage-uri m="):
            rendered(Service("m", local))
        _, served = rendered(Service("m", local, storage_uri="pvc://models/llama"))
        assert served["spec"]["predictor"]["model"]["storageUri"] == "pvc://models/llama"


def test_a_plan_that_contradicts_itself_is_refused() -> None:
    plan = sample_plan()
    with pytest.raises(RenderError, match="does not list"):
        services_of(plan.model_copy(update={"cards": plan.cards[:1]}))


def test_yaml_is_written_as_a_person_would() -> None:
    text = dump_all(render_services([Service("m", profile(guardrails=(Guardrail(type="pii", action="redact"),)))]))
    assert "aim.amd.com/guardrails: |\n" in text
    assert "null" not in text
    assert "&id" not in text
    assert text.count("\n---\n") == 1
    kinds = [document["kind"] for document in yaml.safe_load_all(text)]
    assert kinds == ["ClusterServingRuntime", "InferenceService"]


def test_a_limit_too_small_for_a_plan_s_figures_is_a_refusal() -> None:
    plan = sample_plan()
    chat = next(placement for placement in plan.placements if placement.workload == "chat")
    tiny = chat.model_copy(update={"memory_limit_gib": 0.0})
    with pytest.raises(RenderError, match=r"chat/0: a memory limit of 1 bytes"):
        services_of(plan.model_copy(update={"placements": (tiny,)}))
