"""InferenceServices through kubectl and the real operator's webhooks over TLS: completed, guarded, or refused."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aim_guardrail.settings import GuardrailSettings
from aim_operator.policies.crd import custom_resource_definition
from aim_runtime.settings import RuntimeSettings
from crd_schemas import FOLDERS
from kube_double.cluster import Cluster, KubectlFailed, cluster
from operator_process import Operator, operator

ROOT = Path(__file__).parent.parent.parent
SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/default/inferenceservices"
POLICIES = "/apis/aim.amd.com/v1alpha1/namespaces/default/guardrailpolicies"
IMAGE = "registry.example.com/llm/aim-guardrail:1"
pytestmark = pytest.mark.cluster


def definition(name: str) -> dict[str, Any]:
    """One of KServe's own."""
    files = [file for folder in FOLDERS for file in folder.glob(f"serving.kserve.io_{name}.json")]
    if not files:
        pytest.skip("KServe's definitions are not at hand: KSERVE_CRDS")
    found: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With KServe's kinds, our runtimes, and one node of 64 CPX/NPS4 partitions of MI300X."""
    with cluster(tmp_path_factory.mktemp("cluster")) as found:
        for name in ("inferenceservices", "servingruntimes", "clusterservingruntimes"):
            found.define(definition(name))
        found.define(custom_resource_definition())
        found.create("/api/v1/nodes", {"metadata": {"name": "n1", "labels": {"amd.com/gpu.device-id": "74a1"}}})
        found.patch("/api/v1/nodes/n1/status", {"status": {"allocatable": {"amd.com/cpx_nps4": "64"}}})
        for file in ("base/aim-vllm.yaml", "partitions/cpx-nps4/aim-vllm-cpx-nps4.yaml"):
            runtime = yaml.safe_load((ROOT / "manifests" / file).read_text(encoding="utf-8"))
            found.create("/apis/serving.kserve.io/v1alpha1/clusterservingruntimes", runtime)
        yield found


@pytest.fixture(scope="module", autouse=True)
def running(kubernetes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    with operator(kubernetes, tmp_path_factory.mktemp("operator"), "--guardrail-image", IMAGE) as found:
        yield found


def service(name: str, annotations: dict[str, str] | None = None, **model: Any) -> dict[str, Any]:
    """As a person writes it."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": annotations or {}},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "huggingface"},
                    "runtime": "aim-vllm-cpx-nps4",
                    "storageUri": "hf://Qwen/Qwen3-8B",
                    **model,
                }
            }
        },
    }


def apply(kubernetes: Cluster, document: dict[str, Any]) -> dict[str, Any]:
    kubernetes.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(document))
    return kubernetes.read(f"{SERVICES}/{document['metadata']['name']}")


REFUSED = [
    ({"aim.amd.com/max-model-len": "lots"}, {}, "aim.amd.com/max-model-len]: 'lots': Input should be a valid integer"),
    ({"aim.amd.com/metrik": "latency"}, {}, "aim.amd.com/metrik]: 'latency': unknown; known under aim.amd.com/: comp"),
    ({"aim.amd.com/max-model-len": "999999"}, {}, "max-model-len]: '999999'.*ask for at most 40960"),
    ({"aim.amd.com/guardrail-policy": "chatt"}, {}, "'chatt': no GuardrailPolicy of this namespace.*batch, chat"),
    ({"aim.amd.com/guardrails": "- {type: pii, action: blok}"}, {}, "aim.amd.com/guardrails].*blok"),
    (
        {"aim.amd.com/guardrails": "- {type: pii, action: block}", "aim.amd.com/guardrail-policy": "chat"},
        {},
        "policy and guardrails are both given: give one",
    ),
    ({"aim.amd.com/compute-partition": "SPX"}, {}, "compute-partition]: 'SPX'.*asks for amd.com/cpx_nps4; write CPX"),
    (
        {},
        {"storageUri": "hf://meta-llama/Llama-3.1-70B-Instruct"},
        "storageUri: 'hf://meta-llama/Llama-3.1-70B-Instruct': bf16 at 8192.*short by .* GiB.*; bf16 on one MI300X",
    ),
    (
        {},
        {"runtime": "aim-vllm", "resources": {"limits": {"amd.com/cpx_nps8": "1"}}},
        "no resource of that name; did you mean amd.com/cpx_nps4",
    ),
    (
        {},
        {"runtime": "aim-vllm", "resources": {"limits": {"amd.com/qpx_nps4": "1"}}},
        r"'amd.com/qpx_nps4': no node has it; the nodes have amd.com/cpx_nps4 \(64 on a node\)",
    ),
    (
        {},
        {"resources": {"limits": {"amd.com/cpx_nps4": "65"}}},
        "'65': no node has so many of amd.com/cpx_nps4; ask for at most 64",
    ),
    (
        {"aim.amd.com/guardrail-policy": "chat"},
        {"args": ["--http_port=9000"]},
        r"model.args: '--http_port=9000': the guardrail takes the pod's ports; leave it out",
    ),
]


@pytest.mark.parametrize(("annotations", "model", "told"), REFUSED)
def test_what_would_not_run_is_refused_with_field_value_and_remedy(
    kubernetes: Cluster, running: Operator, annotations: dict[str, str], model: dict[str, Any], told: str
) -> None:
    with pytest.raises(KubectlFailed, match=rf"(?s)denied the request: .*{told.replace(']', chr(92) + ']')}"):
        apply(kubernetes, service("refused", annotations, **model))
    assert not kubernetes.exists(f"{SERVICES}/refused")
    line = json.loads(running.audit.read_text(encoding="utf-8").splitlines()[-1])
    assert (line["outcome"], line["name"], line["by"]) == ("refused", "default/refused", "kubernetes-admin")


def test_what_is_left_out_comes_from_the_profile(kubernetes: Cluster) -> None:
    own = service("filled", {"aim.amd.com/metric": "throughput"}, env=[{"name": "GPU_ARCHS", "value": "mine"}])
    done = apply(kubernetes, own)
    annotations, predictor = done["metadata"]["annotations"], done["spec"]["predictor"]
    assert annotations["aim.amd.com/profile"] == "vllm-mi300x-cpx-nps4-bf16-tp1-throughput"
    assert annotations["aim.amd.com/compute-partition"] == "CPX"
    assert predictor["model"]["resources"]["limits"]["amd.com/cpx_nps4"] == "1"
    assert predictor["model"]["env"][0] == {"name": "GPU_ARCHS", "value": "mine"}
    assert [each["name"] for each in predictor["model"]["env"]].count("GPU_ARCHS") == 1
    (term,) = predictor["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert predictor["labels"] == {"aim.amd.com/entry": "true"}
    assert "74a1" in term["matchExpressions"][0]["values"]
    assert apply(kubernetes, own)["metadata"]["generation"] == 1  # a second admission changes nothing


def test_another_model_gets_its_own_defaults(kubernetes: Cluster) -> None:
    first = apply(kubernetes, service("changed"))["metadata"]["annotations"]
    then = apply(kubernetes, service("changed", storageUri="hf://Qwen/Qwen3-4B"))["metadata"]["annotations"]
    assert first["aim.amd.com/max-concurrency"] != then["aim.amd.com/max-concurrency"]
    own = apply(kubernetes, service("changed", {"aim.amd.com/max-concurrency": "2"}))["metadata"]["annotations"]
    assert own["aim.amd.com/max-concurrency"] == "2"


def test_the_guardrail_is_put_before_the_model_and_taken_away_again(kubernetes: Cluster) -> None:
    done = apply(kubernetes, service("guarded", {"aim.amd.com/guardrail-policy": "chat"}))
    predictor = done["spec"]["predictor"]
    (guardrail,) = predictor["containers"]
    assert (guardrail["name"], guardrail["image"]) == ("transformer-container", IMAGE)
    assert "--predictor_host=localhost:8090" in guardrail["args"]
    assert guardrail["ports"][0]["containerPort"] == 8080
    assert guardrail["securityContext"]["runAsNonRoot"] is True
    assert "--http_port=8090" in predictor["model"]["args"]
    assert predictor["model"]["readinessProbe"]["httpGet"] == {"path": "/v2/models/guarded/ready", "port": 8090}
    assert predictor["volumes"][0]["name"] == "podinfo"
    again = apply(kubernetes, service("guarded", {"aim.amd.com/guardrail-policy": "chat"}))
    assert again["spec"] == done["spec"]
    bare = apply(kubernetes, service("guarded"))
    assert "containers" not in bare["spec"]["predictor"]
    assert not [each for each in bare["spec"]["predictor"]["model"]["args"] if "port" in each]
    assert "status.aim.amd.com/guardrail" not in bare["metadata"]["annotations"]


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "aim.amd.com/v1alpha1",
        "kind": "GuardrailPolicy",
        "metadata": {"name": name},
        "spec": {"prompt": [{"type": "pii", "action": "block"}], **spec},
    }


def test_a_policy_of_the_cluster_is_mounted_and_not_taken_from_under_a_service(kubernetes: Cluster) -> None:
    kubernetes.create(POLICIES, policy("ours"))
    annotations = {"aim.amd.com/guardrail-policy": "ours"}
    predictor = apply(kubernetes, service("by-policy", annotations))["spec"]["predictor"]
    (guardrail,) = predictor["containers"]
    (path,) = [each["mountPath"] for each in guardrail["volumeMounts"] if each["name"] == "aim-guardrail-policy"]
    assert f"--policy={path}" in guardrail["args"]
    assert {"name": "ours-guardrail-policy"} in [each.get("configMap") for each in predictor["volumes"]]
    with pytest.raises(KubectlFailed, match="guards InferenceService by-policy; name another policy there first"):
        kubernetes.kubectl("delete", "guardrailpolicy", "ours")
    apply(kubernetes, service("by-policy"))
    kubernetes.kubectl("delete", "guardrailpolicy", "ours")


def test_the_service_of_the_install_page_is_completed_and_guarded(kubernetes: Cluster) -> None:
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    predictor = apply(kubernetes, yaml.safe_load(shown))["spec"]["predictor"]
    assert [each["name"] for each in predictor["containers"]] == ["transformer-container"]
    assert predictor["model"]["resources"]["limits"]["amd.com/cpx_nps4"] == "1"
    (columns,) = re.findall(r"custom-columns=\S+", page)
    nodes = kubernetes.kubectl("get", "nodes", "-o", *shlex.split(columns))
    assert nodes.split() == ["NAME", "CPX", "n1", "64"]


def test_a_policy_that_no_guardrail_could_read_is_refused(kubernetes: Cluster) -> None:
    wrong = policy("wrong", prompt=[{"type": "pii", "action": {"PHONE": "block"}}])
    with pytest.raises(KubectlFailed, match=r"denied the request: spec, line.*unknown entity 'PHONE': use some of"):
        kubernetes.kubectl("apply", "-f", "-", stdin=json.dumps(wrong))
    kubernetes.create(POLICIES, policy("tenants", tenant="acme"))
    with pytest.raises(KubectlFailed, match="'tenants': the policy is one tenant's"):
        apply(kubernetes, service("refused", {"aim.amd.com/guardrail-policy": "tenants"}))


def test_a_transformer_of_its_own_stays(kubernetes: Cluster) -> None:
    (own, _) = yaml.safe_load_all(
        (ROOT / "manifests/samples/guarded-model/guarded-model.yaml").read_text(encoding="utf-8")
    )
    done = apply(kubernetes, own)
    assert "containers" not in done["spec"]["predictor"]
    assert done["spec"]["transformer"]["containers"] == own["spec"]["transformer"]["containers"]


def test_others_runtimes_are_let_in_unseen(kubernetes: Cluster) -> None:
    theirs = service("theirs", runtime="kserve-huggingfaceserver", storageUri="hf://foo/bar")
    assert apply(kubernetes, theirs)["spec"]["predictor"]["model"] == theirs["spec"]["predictor"]["model"]


def test_what_cannot_be_judged_is_taken_with_a_warning(kubernetes: Cluster) -> None:
    apply(kubernetes, service("unknown", storageUri="hf://foo/bar"))
    apply(kubernetes, service("claimed", storageUri="pvc://claim/model"))


def test_a_node_that_is_away_keeps_nobody_from_labels_and_finalizers(kubernetes: Cluster) -> None:
    apply(kubernetes, service("settled"))
    node = "/api/v1/nodes/n1/status"
    kubernetes.patch(node, {"status": {"allocatable": {"amd.com/cpx_nps4": "0"}}})
    try:
        kubernetes.patch(
            f"{SERVICES}/settled",
            {
                "metadata": {
                    "finalizers": ["test.example/hold"],
                    "labels": {"a": "b"},
                    "annotations": {"status.aim.amd.com/partition": "n1"},
                }
            },
        )
        with pytest.raises(KubectlFailed, match="no node has it"):
            kubernetes.kubectl(
                "annotate", "inferenceservice", "settled", "aim.amd.com/metric=throughput", "--overwrite"
            )
        kubernetes.delete(f"{SERVICES}/settled")
        kubernetes.patch(f"{SERVICES}/settled", {"metadata": {"finalizers": None}})
        kubernetes.wait_gone(SERVICES, "settled")
    finally:
        kubernetes.patch(node, {"status": {"allocatable": {"amd.com/cpx_nps4": "64"}}})


def test_reviews_are_counted(kubernetes: Cluster, running: Operator) -> None:
    apply(kubernetes, service("counted"))
    metrics = running.get("/metrics").text
    assert 'aim_operator_admission_reviews_total{outcome="allowed",webhook="validate"}' in metrics
    assert running.get("/readyz").status_code == 200
    assert running.get("/healthz").text == "ok\n"


def test_both_containers_of_a_guarded_pod_take_their_flags(kubernetes: Cluster) -> None:
    """As the processes read them; and the ports that one leaves are those that the other takes."""
    predictor = apply(kubernetes, service("flags", {"aim.amd.com/guardrail-policy": "chat"}))["spec"]["predictor"]
    (container,) = predictor["containers"]
    guardrail = GuardrailSettings.load(container["args"], {}, prog="test", description="")
    runtime = RuntimeSettings.load(predictor["model"]["args"], {}, prog="test", description="")
    assert guardrail.predictor_host == f"localhost:{runtime.http_port}"
    assert [each["containerPort"] for each in container["ports"]] == [guardrail.http_port, guardrail.grpc_port]
    assert not {guardrail.http_port, guardrail.grpc_port} & {runtime.http_port, runtime.grpc_port}
    assert runtime.engine_options("vllm")["engine_args"]


def test_nobody_is_let_in_while_nobody_looks(kubernetes: Cluster, running: Operator) -> None:
    """The last of the file: it ends the operator, which leaves its configuration behind when it is killed."""
    running.kill()
    with pytest.raises(KubectlFailed, match="failed calling webhook"):
        apply(kubernetes, service("unseen"))
    assert not kubernetes.exists(f"{SERVICES}/unseen")
