"""Who may speak to whom in a namespace: nobody, but for what is listed here, each a NetworkPolicy of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: KServe's labels of a pod, and ours of those that answer clients.
SERVICE, COMPONENT = "serving.kserve.io/inferenceservice", "component"
ENTRY: Mapping[str, str] = {"aim.amd.com/entry": "true"}
_RAY = "ray.io/cluster"
#: Of the pod that gives a RayJob's entrypoint to Ray.
SUBMITTER: Mapping[str, str] = {"app.kubernetes.io/component": "submitter"}
#: Of a run: where rank 0 answers scrapes. Of the operator: where runs tell how far they are.
_TRAINER_METRICS, _REPORTS, _DASHBOARD = 9400, 9444, 8265
_OPERATOR = "aim-system"
_NAMESPACE = "kubernetes.io/metadata.name"
_SERVING = (8080, 8081)


def isolation(gateway: str, monitoring: str, ray_operator: str, sources: Any) -> list[dict[str, Any]]:
    """The NetworkPolicies of a namespace.

    gateway, monitoring, ray_operator: namespaces of the Gateway's pods, of Prometheus, of KubeRay. sources: where
    models and data come from over TCP 443, a list of NetworkPolicyPeers.
    """
    services = {"matchExpressions": [{"key": SERVICE, "operator": "Exists"}]}
    ray = {"matchExpressions": [{"key": _RAY, "operator": "Exists"}]}
    among, submitters = {"podSelector": ray}, _labelled(SUBMITTER)
    return [
        _policy("default-deny", {}, ingress=[], egress=[]),
        _policy("dns", {}, egress=[{"to": [_of("kube-system", {"k8s-app": "kube-dns"})], "ports": _dns()}]),
        _policy(
            "clients-through-the-gateway", _labelled(ENTRY), ingress=[{"from": [_of(gateway)], **_ports(_SERVING)}]
        ),
        _policy("metrics", services, ingress=[{"from": [_of(monitoring)], **_ports(_SERVING[:1])}]),
        _policy(
            "guardrails-to-predictors",
            _labelled({COMPONENT: "transformer"}),
            egress=[{"to": [{"podSelector": _labelled({COMPONENT: "predictor"})}], **_ports(_SERVING)}],
        ),
        # Storage initializers run in the predictors' pods.
        _policy(
            "models-from-outside",
            _labelled({COMPONENT: "predictor"}),
            egress=[{"to": sources, **_ports((443,))}],
        ),
        _policy(
            "ray",
            ray,
            ingress=[
                {"from": [among]},
                {"from": [_of(ray_operator), {"podSelector": submitters}], **_ports((_DASHBOARD,))},
                {"from": [_of(monitoring)], **_ports((_TRAINER_METRICS,))},
            ],
            egress=[
                {"to": [among]},
                {"to": sources, **_ports((443,))},
                {"to": [_of(_OPERATOR)], **_ports((_REPORTS,))},
            ],
        ),
        _policy("ray-submitters", submitters, egress=[{"to": [among], **_ports((_DASHBOARD,))}]),
    ]


def _policy(name: str, pods: Mapping[str, Any], **rules: Sequence[Any]) -> dict[str, Any]:
    """rules: ingress and egress; one that is left out is not this policy's matter, an empty one forbids all."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {
            "podSelector": dict(pods),
            "policyTypes": [kind.capitalize() for kind in rules],
            **{kind: list(allowed) for kind, allowed in rules.items() if allowed},
        },
    }


def _of(namespace: str, pods: Mapping[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"namespaceSelector": _labelled({_NAMESPACE: namespace})}
    return {**found, "podSelector": _labelled(pods)} if pods else found


def _labelled(labels: Mapping[str, str]) -> dict[str, Any]:
    return {"matchLabels": dict(labels)}


def _ports(numbers: Sequence[int]) -> dict[str, Any]:
    return {"ports": [{"port": number, "protocol": "TCP"} for number in numbers]}


def _dns() -> list[dict[str, Any]]:
    return [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
