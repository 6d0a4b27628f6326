"""A tenant's namespace: what its members may take, do and reach, its queue, its guardrail policy and its API keys.

The values are those of the chart aim-tenant, whose schema and templates are made of what stands here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .guardrail import POLICY, POLICY_MAP
from .isolation import isolation

_NAME = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
QUEUE = "jobs"
KEYS = "aim-keys"
_MAY = "aim-tenant"
_PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")


class Tenant(BaseModel):
    """The values of the chart aim-tenant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespace: str = Field(default="team-a", pattern=_NAME, description="The namespace, made by the chart.")
    group: str = Field(default="team-a", min_length=1, description="Kubernetes' group of the members.")
    podSecurity: Literal["restricted", "baseline"] = Field(
        default="restricted",
        description="Pod security standard that is enforced. KubeRay's submitter needs baseline where jobs train here.",
    )
    clusterQueue: str = Field(
        default="gpus", description="Kueue's ClusterQueue behind the namespace's queue; empty: no queue."
    )
    quota: dict[str, str] = Field(
        default={
            "requests.amd.com/cpx_nps4": "8",
            "gpu.amd.com.deviceclass.resource.k8s.io/devices": "8",
            "requests.cpu": "32",
            "requests.memory": "256Gi",
            "pods": "40",
        },
        description="Most that all pods ask for together: partitions by the device plugin's names, claimed devices.\n"
        "null removes one of these.",
    )
    defaultLimits: dict[str, str] = Field(default={"memory": "2Gi"}, description="Of a container that names none.")
    defaultRequests: dict[str, str] = Field(
        default={"cpu": "100m", "memory": "256Mi"}, description="Of a container that names none."
    )
    gatewayNamespace: str = Field(default="gateway", pattern=_NAME, description="Where the Gateway's pods run.")
    monitoringNamespace: str = Field(default="monitoring", pattern=_NAME, description="Where Prometheus runs.")
    rayOperatorNamespace: str = Field(default="kuberay-system", pattern=_NAME, description="Where KubeRay runs.")
    sources: list[dict[str, Any]] = Field(
        default=[{"ipBlock": {"cidr": "0.0.0.0/0", "except": list(_PRIVATE)}}],
        description="Where models and data come from over TCP 443, as a NetworkPolicy's peers.",
    )
    policy: str = Field(default=POLICY, description="The guardrail policy, YAML, in the ConfigMap guardrail-policy.")
    apiKeys: str = Field(
        default="",
        description="Key file of `aim-runtime keys` (hashes only) in the Secret aim-keys; empty: there is none.",
    )


#: Objects that are there only where a value is not empty.
OPTIONAL = {"LocalQueue": "clusterQueue", "Secret": "apiKeys"}


def tenant(values: Tenant) -> list[dict[str, Any]]:
    """The tenant's objects, the namespace first."""
    within = {"namespace": values.namespace}
    made = [
        _namespace(values),
        _object("v1", "ResourceQuota", "quota", spec={"hard": values.quota}),
        _object("v1", "LimitRange", "defaults", spec={"limits": [_defaults(values)]}),
        *isolation(values.gatewayNamespace, values.monitoringNamespace, values.rayOperatorNamespace, values.sources),
        *_access(values.group),
        _object("v1", "ConfigMap", POLICY_MAP, data={"policy.yaml": values.policy}),
    ]
    if values.clusterQueue:
        made.append(_object("kueue.x-k8s.io/v1beta2", "LocalQueue", QUEUE, spec={"clusterQueue": values.clusterQueue}))
    if values.apiKeys:
        made.append(_object("v1", "Secret", KEYS, type="Opaque", stringData={"keys.yaml": values.apiKeys}))
    return [
        each if each["kind"] == "Namespace" else {**each, "metadata": {**each["metadata"], **within}} for each in made
    ]


def _object(api_version: str, kind: str, name: str, **rest: Any) -> dict[str, Any]:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name}, **rest}


def _namespace(values: Tenant) -> dict[str, Any]:
    enforced = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("audit", "warn")}
    made = _object("v1", "Namespace", values.namespace)
    made["metadata"]["labels"] = {"pod-security.kubernetes.io/enforce": values.podSecurity, **enforced}
    return made


def _defaults(values: Tenant) -> dict[str, Any]:
    return {"type": "Container", "default": values.defaultLimits, "defaultRequest": values.defaultRequests}


def _access(group: str) -> list[dict[str, Any]]:
    """Members serve, train and look; they read no Secret, enter no pod, and change neither quota nor rules."""
    changes = ["create", "delete", "patch", "update"]
    looks = ["get", "list", "watch"]
    rules = [
        {"apiGroups": ["serving.kserve.io"], "resources": ["inferenceservices"], "verbs": [*looks, *changes]},
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": [*looks, *changes]},
        {"apiGroups": ["resource.k8s.io"], "resources": ["resourceclaimtemplates"], "verbs": [*looks, *changes]},
        {"apiGroups": ["gateway.networking.k8s.io"], "resources": ["httproutes"], "verbs": [*looks, *changes]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": [*looks, *changes]},
        {
            "apiGroups": ["", "apps", "kueue.x-k8s.io", "resource.k8s.io", "events.k8s.io"],
            "resources": [
                *("deployments", "events", "localqueues", "persistentvolumeclaims", "pods", "pods/log"),
                *("replicasets", "resourceclaims", "resourcequotas", "services", "workloads"),
            ],
            "verbs": looks,
        },
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": _MAY}
    member = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": group}
    api = "rbac.authorization.k8s.io/v1"
    return [
        _object(api, "Role", _MAY, rules=rules),
        _object(api, "RoleBinding", _MAY, roleRef=role, subjects=[member]),
    ]
