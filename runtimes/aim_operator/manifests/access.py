"""Who the operator is, and what it may do: what its parts ask for, each by its reason, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Object = dict[str, Any]

NAME = "aim-operator"
_READ = ("get", "list", "watch")
_KEEP = (*_READ, "create", "update", "patch", "delete")
_GROUP = "aim.amd.com"
_OURS = ("guardrailpolicies", "partitionplans", "finetuningjobs")

#: API group, resources, verbs.
_CLUSTER: Sequence[tuple[str, Sequence[str], Sequence[str]]] = (
    # kopf looks which kinds and namespaces there are.
    ("apiextensions.k8s.io", ("customresourcedefinitions",), _READ),
    ("", ("namespaces",), _READ),
    # Webhooks: what an InferenceService names, and what the nodes have.
    ("serving.kserve.io", ("servingruntimes", "clusterservingruntimes"), ("get",)),
    ("serving.kserve.io", ("inferenceservices",), (*_READ, "create", "update", "patch")),
    # Policies: a ConfigMap each, and whose pods mount it.
    (_GROUP, _OURS, (*_READ, "update", "patch")),
    (
        _GROUP,
        ("guardrailpolicies/status", "partitionplans/status", "finetuningjobs/status"),
        ("get", "update", "patch"),
    ),
    # What they own cannot outlive them (blockOwnerDeletion), which OpenShift lets only those say who may do this.
    (_GROUP, ("guardrailpolicies/finalizers", "finetuningjobs/finalizers"), ("update",)),
    ("", ("configmaps",), ("get", "list", "create", "update", "patch")),
    ("", ("pods",), _KEEP),
    ("", ("events",), ("list", "create", "patch")),
    # Partition plans: taints and labels of nodes, pods that hold a device, claims of AMD's DRA driver.
    ("", ("nodes",), (*_READ, "update", "patch")),
    ("", ("pods/eviction",), ("create",)),
    ("", ("pods/log",), ("get",)),
    ("resource.k8s.io", ("resourceclaims", "resourceslices"), _READ),
    # Fine-tuning jobs; and whose the tokens are that their pods show.
    ("authentication.k8s.io", ("tokenreviews",), ("create",)),
    ("ray.io", ("rayjobs",), _KEEP),
)


def access() -> list[Object]:
    """The account, the cluster's role, and the lease's."""
    group = "rbac.authorization.k8s.io"
    subject = {"kind": "ServiceAccount", "name": NAME, "namespace": "aim-system"}
    lease = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME}},
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": NAME},
            "rules": [_rule(*each) for each in _CLUSTER],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": NAME},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": NAME},
            "subjects": [subject],
        },
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": {"name": NAME}, "rules": [lease]},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": NAME},
            "roleRef": {"apiGroup": group, "kind": "Role", "name": NAME},
            "subjects": [subject],
        },
    ]


def _rule(group: str, resources: Sequence[str], verbs: Sequence[str]) -> Object:
    return {"apiGroups": [group], "resources": list(resources), "verbs": list(verbs)}
