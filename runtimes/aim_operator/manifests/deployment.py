"""The operator's pods: two, of which one leads and both answer webhooks."""

from __future__ import annotations

from typing import Any

from aim_profile.kubernetes.serving_runtime import RESTRICTED, image_of

from .access import NAME

Object = dict[str, Any]

NAMESPACE, IMAGE, CERTIFICATE_SECRET = "aim-system", "aim-operator", "aim-operator-certificate"
_LABELS = {"app.kubernetes.io/name": NAME}
_CERTIFICATES = "/etc/aim/certificates"


def deployment() -> list[Object]:
    """Namespace, Deployment, Service, disruption budget and network policy."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": NAME, "labels": dict(_LABELS)},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": dict(_LABELS)},
                "template": {"metadata": {"labels": dict(_LABELS)}, "spec": _pod()},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": NAME, "labels": dict(_LABELS)},
            "spec": {
                "selector": dict(_LABELS),
                "ports": [
                    {"name": "webhooks", "port": 443, "targetPort": "webhooks", "protocol": "TCP"},
                    {"name": "reports", "port": 9444, "targetPort": "reports", "protocol": "TCP"},
                    {"name": "metrics", "port": 8080, "targetPort": "metrics", "protocol": "TCP"},
                ],
            },
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": NAME},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": dict(_LABELS)}},
        },
        _only_webhooks_and_metrics(),
    ]


def _pod() -> Object:
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": dict(_LABELS)},
    }
    return {
        "serviceAccountName": NAME,
        "priorityClassName": "system-cluster-critical",
        # A handler under way may end.
        "terminationGracePeriodSeconds": 60,
        "topologySpreadConstraints": [spread],
        "containers": [_container()],
        "volumes": [
            {"name": "certificates", "secret": {"secretName": CERTIFICATE_SECRET}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
        ],
    }


def _container() -> Object:
    return {
        "name": "operator",
        "image": image_of(IMAGE),
        "args": [f"--certificates={_CERTIFICATES}"],
        "env": [{"name": "AIM_OPERATOR_IDENTITY", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        "ports": [
            {"name": "webhooks", "containerPort": 9443, "protocol": "TCP"},
            {"name": "reports", "containerPort": 9444, "protocol": "TCP"},
            {"name": "metrics", "containerPort": 8080, "protocol": "TCP"},
        ],
        "startupProbe": _probe("/healthz", period_s=2, failures=60),
        "readinessProbe": _probe("/readyz", period_s=5, failures=2),
        "livenessProbe": _probe("/healthz", period_s=10, failures=3),
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": {**RESTRICTED, "readOnlyRootFilesystem": True},
        "volumeMounts": [
            {"name": "certificates", "mountPath": _CERTIFICATES, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _probe(path: str, period_s: int, failures: int) -> Object:
    return {
        "httpGet": {"path": path, "port": "metrics"},
        "periodSeconds": period_s,
        "failureThreshold": failures,
        "timeoutSeconds": 5,
    }


def _only_webhooks_and_metrics() -> Object:
    """Out it goes to the API server, which is no pod, and to the guardrails that it asks: that is left open."""
    ports = [{"port": port, "protocol": "TCP"} for port in (9443, 9444, 8080)]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": NAME},
        "spec": {
            "podSelector": {"matchLabels": dict(_LABELS)},
            "policyTypes": ["Ingress"],
            "ingress": [{"ports": ports}],
        },
    }
