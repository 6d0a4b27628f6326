"""A real API server takes every object: `kubectl apply --dry-run=server`, with everybody's definitions installed.

Kubernetes' own validation and that of the definitions, their CEL rules with Kubernetes' functions and cost limits, and
no field that a schema does not know. KServe's webhooks are not there: test_manifests_check.py has their rules.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from crd_schemas import CRDS, FOLDERS
from helm_render import rendered
from kube_double.cluster import Cluster, KubectlFailed, cluster
from manifest_files import MANIFESTS, Object, everything, name_of, others

pytestmark = pytest.mark.cluster

RUNTIMES, TENANT = MANIFESTS / "charts/aim-runtimes", MANIFESTS / "charts/aim-tenant"
#: The External Secrets Operator's definitions are not among those at hand.
NOT_AT_HAND = {"ExternalSecret", "SecretStore"}


def charts() -> list[Object]:
    """What Helm installs by the values that are shipped, and of another tenant."""
    shipped = [(RUNTIMES, yaml.safe_load(file.read_text("utf-8"))) for file in sorted(RUNTIMES.glob("values-*.yaml"))]
    answers = rendered([*shipped, (TENANT, {}), (TENANT, {"namespace": "second", "clusterQueue": ""})])
    return [each for answer in answers for each in answer.objects]


def dry_run(kubernetes: Cluster, objects: list[Object]) -> list[str]:
    """A line for each, as kubectl says it. Raises KubectlFailed."""
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    flags = ["--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-"]
    return kubernetes.kubectl("apply", *flags, stdin=listed).splitlines()


# The double knows no rules of Kubernetes' own; where there is no real server there is nothing to collect.
if CRDS and os.environ.get("KUBEBUILDER_ASSETS"):

    def test_a_server_takes_every_object(tmp_path: Path) -> None:
        objects = [*everything(), *others(), *charts()]
        left_out = [name_of(each) for each in objects if each["kind"] in NOT_AT_HAND]
        wanted = [each for each in objects if each["kind"] not in NOT_AT_HAND]
        assert sorted(left_out) == ["aim-keys", "vault"]
        with cluster(tmp_path) as kubernetes:
            for file in (file for folder in FOLDERS for file in sorted(folder.glob("*.json"))):
                kubernetes.define(json.loads(file.read_text(encoding="utf-8")))
            for each in others():
                if each["kind"] == "CustomResourceDefinition":
                    kubernetes.define(each)
            for namespace in {each["metadata"].get("namespace", "default") for each in wanted} - {"default"}:
                kubernetes.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
            kubernetes.read("/openapi/v2")  # a server makes it at its first reader's cost, for whom kubectl waits 32 s
            lines = dry_run(kubernetes, wanted)
            assert [line for line in lines if not line.endswith(" serverside-applied (server dry run)")] == []
            assert len(lines) == len(wanted) >= 300
            print(f"\n{len(lines)} objects taken by a real API server")
            service = next(each for each in wanted if each["kind"] == "InferenceService")
            with pytest.raises(KubectlFailed, match=r'unknown field "(spec\.predictor\.)?modell"'):
                dry_run(kubernetes, [service | {"spec": {"predictor": {"modell": {}}}}])
