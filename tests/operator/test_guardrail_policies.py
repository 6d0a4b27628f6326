"""GuardrailPolicies under the real operator: kept as ConfigMaps, and true about what a real guardrail runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aim_guardrail.policy import parse_policy, shipped_names, shipped_policy
from aim_operator.policies.crd import custom_resource_definition
from kube_double.cluster import Cluster, KubectlFailed, cluster
from operator_process import Operator, operator
from ports import free_ports

POLICIES = "/apis/aim.amd.com/v1alpha1/namespaces/default/guardrailpolicies"
MAPS = "/api/v1/namespaces/default/configmaps"
EVENTS = "/api/v1/namespaces/default/events"
PODS = "/api/v1/namespaces/default/pods"
PII = {"prompt": [{"type": "pii", "action": "block"}]}


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as found:
        found.define(custom_resource_definition())
        yield found


@pytest.fixture(scope="module")
def running(kubernetes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("operator")
    with operator(kubernetes, folder, "--policy-poll", "0.2", webhooks=False) as found:
        yield found


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "aim.amd.com/v1alpha1",
        "kind": "GuardrailPolicy",
        "metadata": {"name": name},
        "spec": spec or PII,
    }


def valid(found: dict[str, Any]) -> str | None:
    """Of the spec as it is now."""
    status = found.get("status", {})
    if status.get("observedGeneration") != found["metadata"]["generation"]:
        return None
    return str(status["conditions"][0]["status"])


@pytest.mark.cluster
@pytest.mark.usefixtures("running")
def test_a_policy_is_a_config_map_that_the_guardrail_reads(kubernetes: Cluster) -> None:
    kubernetes.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(policy("mine")))
    found = kubernetes.wait_for(POLICIES, "mine", lambda it: valid(it) == "True")
    text = kubernetes.read(f"{MAPS}/mine-guardrail-policy")["data"]["policy.yaml"]
    read = parse_policy(text, origin="test")
    assert (read.name, read.rules("prompt")[0].type) == ("mine", "pii")
    assert found["status"]["version"] == read.version_hash
    shown = kubernetes.kubectl("get", "guardrailpolicies", "mine").splitlines()
    assert shown[0].split() == ["NAME", "VERSION", "VALID", "PODS", "AGE"]
    assert shown[1].split()[:4] == ["mine", read.version_hash, "True", "0/0"]


@pytest.mark.cluster
@pytest.mark.usefixtures("running")
def test_an_invalid_change_leaves_the_last_valid_one_in_force(kubernetes: Cluster) -> None:
    kubernetes.create(POLICIES, policy("changed"))
    before = kubernetes.wait_for(POLICIES, "changed", lambda it: valid(it) == "True")
    wrong = {"prompt": [{"type": "pii", "action": {"PHONE": "block"}}]}
    kubernetes.patch(f"{POLICIES}/changed", {"spec": wrong})
    found = kubernetes.wait_for(POLICIES, "changed", lambda it: valid(it) == "False")
    assert found["status"]["version"] == before["status"]["version"]
    assert "unknown entity 'PHONE'" in found["status"]["conditions"][0]["message"]
    assert "action: block" in kubernetes.read(f"{MAPS}/changed-guardrail-policy")["data"]["policy.yaml"]
    kubernetes.patch(f"{POLICIES}/changed", {"spec": {"prompt": [{"type": "pii", "action": "flag"}]}})
    (told,) = [each for each in kubernetes.items(EVENTS) if each["reason"] == "Invalid"]
    assert "unknown entity 'PHONE'" in told["message"]
    mended = kubernetes.wait_for(POLICIES, "changed", lambda it: valid(it) == "True")
    assert mended["status"]["version"] != before["status"]["version"]


@pytest.mark.cluster
@pytest.mark.usefixtures("running")
def test_an_edited_config_map_is_mended_and_anothers_is_left_alone(kubernetes: Cluster) -> None:
    kubernetes.create(POLICIES, policy("kept"))
    kubernetes.wait_for(POLICIES, "kept", lambda it: valid(it) == "True")
    kubernetes.patch(f"{MAPS}/kept-guardrail-policy", {"data": {"policy.yaml": "version: 2", "other.yaml": "x"}})
    kubernetes.wait_for(MAPS, "kept-guardrail-policy", lambda it: "pii" in it["data"].get("policy.yaml", ""))
    assert list(kubernetes.read(f"{MAPS}/kept-guardrail-policy")["data"]) == ["policy.yaml"]
    kubernetes.create(MAPS, {"metadata": {"name": "taken-guardrail-policy"}, "data": {"a": "b"}})
    kubernetes.create(POLICIES, policy("taken"))
    found = kubernetes.wait_for(POLICIES, "taken", lambda it: valid(it) == "False")
    assert "not of this policy" in found["status"]["conditions"][0]["message"]
    assert kubernetes.read(f"{MAPS}/taken-guardrail-policy")["data"] == {"a": "b"}


@pytest.mark.usefixtures("running")
def test_what_is_deleted_takes_its_config_map_with_it(kubernetes: Cluster) -> None:
    kubernetes.create(POLICIES, policy("gone"))
    found = kubernetes.wait_for(POLICIES, "gone", lambda it: valid(it) == "True")
    assert "finalizers" not in found["metadata"]
    kubernetes.kubectl("delete", "guardrailpolicy", "gone")
    kubernetes.wait_gone(MAPS, "gone-guardrail-policy")


@pytest.mark.usefixtures("running")
def test_status_tells_which_pods_run_which_version(kubernetes: Cluster, tmp_path: Path) -> None:
    """A real guardrail on this machine is the pod's; the test is its kubelet."""
    kubernetes.create(POLICIES, policy("run"))
    first = kubernetes.wait_for(POLICIES, "run", lambda it: valid(it) == "True")["status"]["version"]
    mounted = tmp_path / "policy.yaml"
    mounted.write_text(kubernetes.read(f"{MAPS}/run-guardrail-policy")["data"]["policy.yaml"], encoding="utf-8")
    (port,) = free_ports(1)
    flags = ["--policy", str(tmp_path), "--http_port", str(port), "--enable_grpc", "false", "--host", "127.0.0.1"]
    guardrail = subprocess.Popen([sys.executable, "-m", "aim_guardrail", *flags], stdout=subprocess.DEVNULL)
    try:
        for name, address in (("asked", "127.0.0.1"), ("silent", None)):
            volumes = [{"name": "p", "configMap": {"name": "run-guardrail-policy"}}]
            container = {"name": "transformer-container", "image": "x", "ports": [{"containerPort": port}]}
            labels = {"serving.kserve.io/inferenceservice": "chat"}
            body = {
                "metadata": {"name": name, "labels": labels},
                "spec": {"volumes": volumes, "containers": [container]},
            }
            kubernetes.create(PODS, body)
            kubernetes.patch(f"{PODS}/{name}/status", {"status": {"phase": "Running", "podIP": address}})
        found = kubernetes.wait_for(POLICIES, "run", lambda it: it["status"].get("current") == "1/2")
        silent, asked = found["status"]["pods"]
        assert asked == {"name": "asked", "service": "chat", "version": first, "state": "current"}
        assert (silent["state"], silent["message"]) == ("unknown", "it has no address yet")
        kubernetes.patch(f"{POLICIES}/run", {"spec": {"prompt": [{"type": "pii", "action": "flag"}]}})
        stale = kubernetes.wait_for(POLICIES, "run", lambda it: it["status"].get("current") == "0/2")
        assert stale["status"]["pods"][0] == {**asked, "state": "stale"}
        mounted.write_text(kubernetes.read(f"{MAPS}/run-guardrail-policy")["data"]["policy.yaml"], encoding="utf-8")
        kubernetes.wait_for(POLICIES, "run", lambda it: it["status"].get("current") == "1/2")
    finally:
        guardrail.kill()
        guardrail.wait()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"prompt": [{"type": "piii", "action": "block"}]}, r"spec.prompt\[0\].type: Unsupported value: .piii"),
        ({"prompt": [{"type": "pii"}]}, r"spec.prompt\[0\].action: Required value"),
        ({"prompt": [{"action": "block"}]}, "give a rule .*, or a stage"),
        ({"budget_ms": 0, **PII}, "budget_ms"),
        ({"on_error": "ajar", **PII}, "on_error"),
    ],
)
def test_the_definition_itself_refuses_what_it_can(kubernetes: Cluster, spec: dict[str, Any], told: str) -> None:
    with pytest.raises(KubectlFailed, match=told):
        kubernetes.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(policy("refused", **spec)))


@pytest.mark.cluster
@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_policy_can_be_an_object(kubernetes: Cluster, name: str) -> None:
    """And comes out of it as it went in: nothing of it is pruned."""
    shipped = shipped_policy(name)
    spec = shipped.model_dump(mode="json", exclude={"version", "name"}, exclude_defaults=True)
    stored = kubernetes.create(POLICIES, policy(f"shipped-{name}", **spec))["spec"]
    text = yaml.safe_dump({"version": 2, "name": name, **stored})
    assert parse_policy(text, origin="test").version_hash == shipped.model_copy(update={"version": 2}).version_hash
