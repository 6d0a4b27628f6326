"""The webhooks' configurations and certificate: cert-manager signs it, and writes its authority into both."""

from __future__ import annotations

from typing import Any

from .access import NAME
from .deployment import CERTIFICATE_SECRET, NAMESPACE

Object = dict[str, Any]

_INJECTED = {"cert-manager.io/inject-ca-from": f"{NAMESPACE}/{NAME}"}
#: Longer than the operator's own look at the cluster takes; kubectl waits for it.
_TIMEOUT_S = 15
_SERVICES = ("serving.kserve.io", "v1beta1", "inferenceservices")


def admission() -> list[Object]:
    """What is not looked at is not let in (Fail): but for namespaces of the system, which must start without us."""
    names = [f"{NAME}.{NAMESPACE}.svc", f"{NAME}.{NAMESPACE}.svc.cluster.local"]
    return [
        {
            "apiVersion": "cert-manager.io/v1",
            "kind": "Issuer",
            "metadata": {"name": NAME},
            "spec": {"selfSigned": {}},
        },
        {
            "apiVersion": "cert-manager.io/v1",
            "kind": "Certificate",
            "metadata": {"name": NAME},
            "spec": {
                "secretName": CERTIFICATE_SECRET,
                "dnsNames": names,
                "issuerRef": {"name": NAME, "kind": "Issuer"},
                "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
            },
        },
        _configuration(
            "Mutating", [_hook("mutate-inferenceservice", "serving.kserve.io", "v1beta1", "inferenceservices")]
        ),
        _configuration(
            "Validating",
            [
                _hook("validate-inferenceservice", *_SERVICES),
                _hook("validate-guardrailpolicy", "aim.amd.com", "v1alpha1", "guardrailpolicies", delete=True),
            ],
        ),
    ]


def _configuration(which: str, webhooks: list[Object]) -> Object:
    if which == "Mutating":
        for hook in webhooks:
            # KServe's own defaults come after ours, or before: either way both have been at it.
            hook["reinvocationPolicy"] = "IfNeeded"
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": f"{which}WebhookConfiguration",
        "metadata": {"name": NAME, "annotations": dict(_INJECTED)},
        "webhooks": webhooks,
    }


def _hook(handler: str, group: str, version: str, plural: str, *, delete: bool = False) -> Object:
    operations = ["CREATE", "UPDATE", *(["DELETE"] if delete else ())]
    rule = {"apiGroups": [group], "apiVersions": [version], "resources": [plural], "operations": operations}
    outside = {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system", NAMESPACE]}
    return {
        "name": f"{handler}.aim.amd.com",
        "clientConfig": {"service": {"name": NAME, "namespace": NAMESPACE, "path": f"/{handler}"}},
        "rules": [rule],
        "namespaceSelector": {"matchExpressions": [outside]},
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Fail",
        "timeoutSeconds": _TIMEOUT_S,
    }
