"""manifests/crds and manifests/operator, as the operator is. That they are as they are made, `make check` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kopf
import pytest
import yaml
from prometheus_client import CollectorRegistry

from aim_operator import webhooks
from aim_operator.audit import Audit
from aim_operator.cluster import Cluster as Api
from aim_operator.operator import Operator
from aim_operator.settings import Settings
from kube_double.cluster import Cluster

MANIFESTS = Path(__file__).parent.parent.parent / "manifests"


def objects(kind: str) -> list[dict[str, Any]]:
    files = [*(MANIFESTS / "operator").glob("*.yaml"), *(MANIFESTS / "crds").glob("*.yaml")]
    return [each for file in files for each in yaml.safe_load_all(file.read_text("utf-8")) if each["kind"] == kind]


@pytest.mark.cluster
def test_a_server_takes_the_definitions(kubernetes: Cluster) -> None:
    found = objects("CustomResourceDefinition")
    assert {each["spec"]["names"]["kind"] for each in found} >= {"GuardrailPolicy", "PartitionPlan", "FineTuningJob"}
    for each in found:
        kubernetes.define(each)


def test_every_webhook_is_configured_and_every_configuration_has_its_webhook(
    monkeypatch: Any, kubernetes: Cluster
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubernetes.kubeconfig))
    registry, metrics = kopf.OperatorRegistry(), CollectorRegistry()
    webhooks.register(registry, Operator(Settings(), Api(), Audit(None, metrics), metrics))
    served = {(str(each.reason.value), each.id) for each in registry._webhooks.get_all_handlers()}
    configured = {
        (kind.lower(), hook["clientConfig"]["service"]["path"].removeprefix("/"))
        for kind in ("Mutating", "Validating")
        for found in objects(f"{kind}WebhookConfiguration")
        for hook in found["webhooks"]
    }
    assert configured == served


def test_it_may_do_nothing_to_everything() -> None:
    rules = [rule for role in (*objects("ClusterRole"), *objects("Role")) for rule in role["rules"]]
    assert len(rules) > 10
    assert not [rule for rule in rules if "*" in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])]
    assert not [rule for rule in rules if {"secrets", "pods/exec", "clusterroles"} & set(rule["resources"])]
