"""The samples and overlays, each held to what it promises."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from aim_guardrail.policy.policy import parse_policy
from aim_guardrail.settings import GuardrailSettings
from aim_profile.gpus.catalog import by_name
from aim_profile.kubernetes.overlays import affinity_of
from aim_profile.plans.dcm import PARTITION_LABEL
from aim_runtime.settings import RuntimeSettings
from certificates import certificate
from manifest_files import MANIFESTS, ROOT, Object, built, name_of, objects

#: Of restricted-v2, without claims.
SCC_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "projected", "secret"}


def sample(name: str, kind: str = "InferenceService") -> list[Object]:
    return [document for document in objects(f"samples/{name}") if document["kind"] == kind]


def loaded(settings: type[Any], arguments: list[str]) -> Any:
    return settings.load(arguments, {}, prog="p", description="d")


def runtimes_flags(service: Object) -> Any:
    """What the runtime makes of the service's flags behind its own."""
    own = [f"--model_name={name_of(service)}", "--model_dir=/mnt/models", "--engine=vllm"]
    return loaded(RuntimeSettings, [*own, *service["spec"]["predictor"]["model"]["args"]])


def test_a_sidecar_has_the_pods_ports_and_the_runtime_listens_behind_it() -> None:
    (service,) = sample("guarded-sidecar")
    predictor = service["spec"]["predictor"]
    (container,) = predictor["containers"]
    guardrail = loaded(GuardrailSettings, container["args"])
    runtime = runtimes_flags(service)
    assert container["name"] == "transformer-container"
    assert [port["containerPort"] for port in container["ports"]] == [guardrail.http_port, guardrail.grpc_port]
    assert guardrail.predictor_host == f"127.0.0.1:{runtime.http_port}"
    assert guardrail.model_name == runtime.model_name == name_of(service)
    assert not {runtime.http_port, runtime.grpc_port} & {guardrail.http_port, guardrail.grpc_port}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert predictor["model"][probe]["httpGet"]["port"] == runtime.http_port
        assert container[probe]["httpGet"]["port"] == guardrail.http_port


def test_the_guardrail_alone_is_started_with_its_policy_over_tls(tmp_path: Path) -> None:
    (deployment,) = sample("guardrail", "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    both = str(certificate(tmp_path / "tls.pem"))  # key and certificate
    tls = re.compile(r"(?<=file=)/etc/aim/tls/tls\.(crt|key)")
    settings = loaded(GuardrailSettings, [tls.sub(both, flag) for flag in container["args"]])
    assert str(settings.ssl_certfile) == str(settings.ssl_keyfile) == both
    policy = settings.policy
    (config,) = sample("guardrail", "ConfigMap")
    assert mounted[str(policy.parent)]["configMap"]["name"] == name_of(config)
    assert parse_policy(config["data"][policy.name], "policy.yaml").name == "ours"
    issued = {each["spec"]["secretName"]: each["spec"] for each in sample("guardrail", "Certificate")}
    secret = mounted["/etc/aim/tls"]["secret"]["secretName"]
    assert "aim-guardrail.llm.svc" in issued[secret]["dnsNames"]
    assert all(container[probe]["httpGet"]["scheme"] == "HTTPS" for probe in ("readinessProbe", "livenessProbe"))
    issuers = {name_of(each): each["spec"] for each in sample("guardrail", "Issuer")}
    for each in issued.values():
        issuer = issuers[each["issuerRef"]["name"]]
        assert "selfSigned" in issuer or issuer["ca"]["secretName"] in issued


def test_budgets_and_services_select_the_pods_they_are_for() -> None:
    (deployment,) = sample("guardrail", "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (service,) = sample("guardrail", "Service")
    (budget,) = sample("guardrail", "PodDisruptionBudget")
    assert service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"] == labels
    for name in ("one-model", "scaled"):
        (budget,), (served,) = sample(name, "PodDisruptionBudget"), sample(name)
        assert budget["spec"]["selector"]["matchLabels"] == {
            "serving.kserve.io/inferenceservice": name_of(served),
            "component": "predictor",
        }
        # One replica may go: a drain for another partition mode must not wait for ever.
        assert budget["spec"]["maxUnavailable"] == 1


def test_replicas_follow_the_queue_by_a_metric_that_the_runtime_has() -> None:
    (service,) = sample("scaled")
    predictor = service["spec"]["predictor"]
    (metric,) = predictor["autoScaling"]["metrics"]
    family, _, selector = metric["external"]["metric"]["query"].removeprefix("sum(").partition("{")
    assert f"`{family}`" in (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert selector == f'model_name="{name_of(service)}"}})'
    assert predictor["maxReplicas"] > predictor["minReplicas"]
    assert predictor["deploymentStrategy"]["rollingUpdate"]["maxSurge"] == 0


def test_routes_lead_to_services_that_kserve_makes() -> None:
    made = {
        f"{name_of(each)}-{part}"
        for each in objects("samples")
        if each["kind"] == "InferenceService"
        for part in each["spec"]
    }
    (pool,) = sample("gateway", "InferencePool")
    backends = [
        backend
        for name in ("gateway", "adapters-canary")
        for route in sample(name, "HTTPRoute")
        for rule in route["spec"]["rules"]
        for backend in rule["backendRefs"]
    ]
    assert len(backends) == 4
    for backend in backends:
        if backend.get("kind") == "InferencePool":
            assert backend["name"] == name_of(pool)
        else:
            assert backend["name"] in made
    # A guarded model's predictor is on no route.
    assert not [backend for backend in backends if backend["name"].endswith("guarded-predictor")]
    selected = pool["spec"]["selector"]["matchLabels"]["serving.kserve.io/inferenceservice"]
    assert f"{selected}-predictor" in made


def test_four_models_ask_for_a_partition_each() -> None:
    services = sample("four-models")
    models = [service["spec"]["predictor"]["model"] for service in services]
    assert len({model["storageUri"] for model in models}) == 4
    assert [model["resources"]["limits"]["amd.com/cpx_nps4"] for model in models] == ["1"] * 4


@pytest.mark.parametrize("name", ["adapters-canary", "tuned-model"])
def test_an_adapter_lies_where_the_runtime_looks_for_it(name: str) -> None:
    for service in sample(name):
        mounts = {each["mountPath"]: each["uri"] for each in service["spec"]["predictor"]["storageUris"]}
        settings = runtimes_flags(service)
        assert {str(path) for path in settings.adapters.values()} <= mounts.keys()
        assert mounts["/mnt/models"] == "hf://Qwen/Qwen3-8B"
        arguments = json.loads(settings.engine_args) if isinstance(settings.engine_args, str) else settings.engine_args
        assert "max-loras" in json.dumps(arguments)


def test_the_gpu_operator_gives_what_services_select_by() -> None:
    configs = [each["spec"] for way in ("plugin", "dra") for each in objects(f"gpu-operator/{way}")]
    counted, claimed = configs
    assert counted["devicePlugin"]["devicePluginArguments"] == {"resource_naming_strategy": "mixed"}
    term = affinity_of(by_name("MI300X"))["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    label = term["nodeSelectorTerms"][0]["matchExpressions"][0]["key"]
    for wanted in (label, PARTITION_LABEL):
        assert wanted.removeprefix("amd.com/gpu.") in counted["devicePlugin"]["nodeLabellerArguments"]
    # Only one of them may hand devices out.
    assert (counted.get("draDriver"), claimed["devicePlugin"]["enableDevicePlugin"]) == (None, False)
    assert claimed["draDriver"]["enable"] is True


# --- overlays -----------------------------------------------------------------------------------------------------


def test_openshifts_restricted_profile_takes_every_runtime() -> None:
    found = built(MANIFESTS / "overlays/openshift")
    assert len(found) == 5
    for runtime in found:
        (container,) = runtime["spec"]["containers"]
        context = container["securityContext"]
        assert "runAsUser" not in context  # of the namespace's range
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert (context["allowPrivilegeEscalation"], context["runAsNonRoot"]) == (False, True)
        assert {key for volume in runtime["spec"]["volumes"] for key in volume} - {"name"} <= SCC_VOLUMES
        variables = {each["name"]: each["value"] for each in container["env"]}
        assert variables["HOME"] in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_an_overlay_of_claims_counts_nothing_and_leaves_the_node_to_the_claim() -> None:
    found = {name_of(runtime): runtime["spec"] for runtime in built(MANIFESTS / "overlays/mi300x-cpx-dra")}
    claimed = {name for name, spec in found.items() if "resourceClaims" in spec}
    assert claimed == {"aim-vllm-cpx-nps1-dra", "aim-vllm-cpx-nps4-dra"}
    assert not [spec for spec in found.values() if "affinity" in spec]
    assert "amd.com/" not in yaml.safe_dump([spec["containers"] for spec in found.values()])
    assert affinity_of(by_name("MI300X"))  # what the other overlay has in its place
