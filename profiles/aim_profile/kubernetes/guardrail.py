"""The guardrail in a cluster: KServe's transformer, a container beside the predictor's, or a Deployment of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .isolation import COMPONENT, ENTRY, SERVICE
from .serving_runtime import NAME_LABEL, PODINFO_MOUNT, PODINFO_VOLUME, PORTS, RESTRICTED, image_of, probes

GUARDRAIL_IMAGE = "aim-guardrail"
STANDALONE = "aim-guardrail"
POLICY_MAP = "guardrail-policy"
#: One to begin with.
POLICY = """\
version: 2
name: ours
budget_ms: 1000
prompt:
- {type: secrets, action: block}
- {type: pii, action: redact}
- {type: injection, action: block}
answer:
- {type: secrets, action: redact}
- {type: pii, action: redact}
"""
_POLICIES = "/etc/aim/policy"
_CERTIFICATE = "/etc/aim/tls"
# Where the runtime listens when the guardrail has the pod's ports.
BEHIND = {"http": 8085, "grpc": 8086}


def container(model_name: str, name: str = "kserve-container", args: Sequence[str] = ()) -> dict[str, Any]:
    """The guardrail's container. args: beyond what KServe gives a transformer."""
    return {
        "name": name,
        "image": image_of(GUARDRAIL_IMAGE),
        "command": ["python", "-m", "aim_guardrail"],
        **({"args": list(args)} if args else {}),
        "ports": [dict(port) for port in PORTS],
        **probes(model_name),
        # Without a limit of its own KServe gives a transformer one: 1 CPU.
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "2Gi"}},
        "securityContext": dict(RESTRICTED),
        "volumeMounts": [dict(PODINFO_MOUNT)],
    }


def as_transformer(service: dict[str, Any], policy: str) -> None:
    """Puts the guardrail before the service's predictor as its transformer."""
    name = service["metadata"]["name"]
    service["metadata"]["annotations"]["aim.amd.com/guardrail-policy"] = policy
    del service["spec"]["predictor"]["labels"]  # clients come to the guardrail
    service["spec"]["transformer"] = {
        "minReplicas": 1,
        "labels": {NAME_LABEL: GUARDRAIL_IMAGE, **ENTRY},
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 60,
        "containers": [container(name)],
        "volumes": [dict(PODINFO_VOLUME)],
    }


def as_sidecar(service: dict[str, Any], policy: str) -> None:
    """Puts the guardrail into the predictor's pod: it has the pod's ports, and the runtime moves behind it.

    KServe gives a collocated transformer nothing: its flags stand here. Probes are each process's own.
    """
    name, predictor = service["metadata"]["name"], service["spec"]["predictor"]
    service["metadata"]["annotations"]["aim.amd.com/guardrail-policy"] = policy
    behind = f"127.0.0.1:{BEHIND['http']}"
    flags = [f"--model_name={name}", f"--predictor_host={behind}", "--enable_predictor_health_check=true"]
    predictor["containers"] = [container(name, "transformer-container", flags)]
    model = predictor["model"]
    model["args"] = [f"--http_port={BEHIND['http']}", f"--grpc_port={BEHIND['grpc']}", *model.get("args", [])]
    for probe in probes(name):
        # Merged into the runtime's own.
        model[probe] = {"httpGet": {**probes(name)[probe]["httpGet"], "port": BEHIND["http"]}}


def only_from_the_guardrail(name: str) -> dict[str, Any]:
    """The NetworkPolicy that closes the predictor to everybody but its transformer."""

    def pods(component: str) -> dict[str, Any]:
        return {"matchLabels": {SERVICE: name, COMPONENT: component}}

    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{name}-predictor"},
        "spec": {
            "podSelector": pods("predictor"),
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [{"podSelector": pods("transformer")}],
                    "ports": [{"port": port["containerPort"], "protocol": port["protocol"]} for port in PORTS],
                }
            ],
        },
    }


def standalone(policy: str) -> list[dict[str, Any]]:
    """The guardrail alone, for gateways and applications that ask it (`POST /filter`): its policy, two replicas over
    TLS, a Service, and no two of them away at once. policy: YAML text."""
    labels = {NAME_LABEL: STANDALONE}
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": POLICY_MAP},
            "data": {"policy.yaml": policy},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": STANDALONE, "labels": labels},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": _standalone_pod(labels)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": STANDALONE, "labels": labels},
            "spec": {
                "selector": labels,
                "ports": [{"name": "https", "port": 443, "targetPort": PORTS[0]["containerPort"], "protocol": "TCP"}],
            },
        },
        disruption_budget(STANDALONE, labels),
    ]


def _standalone_pod(labels: dict[str, str]) -> dict[str, Any]:
    flags = [f"--model_name={STANDALONE}", f"--policy={_POLICIES}/policy.yaml", "--enable_grpc=false"]
    flags += [f"--ssl_certfile={_CERTIFICATE}/tls.crt", f"--ssl_keyfile={_CERTIFICATE}/tls.key"]
    made = container(STANDALONE, "guardrail", flags)
    made["ports"] = made["ports"][:1]
    for probe in probes(STANDALONE):
        made[probe] = {**made[probe], "httpGet": {**made[probe]["httpGet"], "scheme": "HTTPS"}}
    made["volumeMounts"] = [
        {"name": "policy", "mountPath": _POLICIES, "readOnly": True},
        {"name": "tls", "mountPath": _CERTIFICATE, "readOnly": True},
    ]
    return {
        "automountServiceAccountToken": False,
        # A Service named aim-… would put AIM_… variables into every pod.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 60,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, "fsGroup": 65532},
        "containers": [made],
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels},
            }
        ],
        "volumes": [
            {"name": "policy", "configMap": {"name": POLICY_MAP}},
            {"name": "tls", "secret": {"secretName": f"{STANDALONE}-tls", "defaultMode": 0o440}},
        ],
    }


def disruption_budget(name: str, labels: dict[str, str]) -> dict[str, Any]:
    """One pod at a time may be moved: with a single one a drain goes on, which a switch of partitions needs."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name},
        "spec": {
            "maxUnavailable": 1,
            # Pods that are not ready are in nobody's way.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": labels},
        },
    }
