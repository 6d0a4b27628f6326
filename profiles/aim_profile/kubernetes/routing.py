"""What stands in front of services: Gateway API routes, an InferencePool, certificates, keys out of a vault.

Services' names are KServe's (Standard mode): NAME-predictor, NAME-transformer, each on port 80.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .isolation import COMPONENT, SERVICE
from .kserve import Document

_ROUTE = "gateway.networking.k8s.io/v1"
_GATEWAY = {"name": "llm", "namespace": "gateway"}
_STORE = "vault"
_POOL = (
    "The pool's endpoint picker (Gateway API Inference Extension, its chart `inferencepool`) sends each request to\n"
    "the replica with the shortest queue. It looks for vLLM's metrics; name it ours in their place:\n"
    "aim_requests_waiting, aim_kv_cache_usage_ratio."
)
_TO_THE_POOL = "No limit of the request's time: an answer may take minutes."
_TO_THE_GUARDRAIL = "A guarded model is reached by its transformer alone."
_KEYS = (
    "API keys out of Vault by the External Secrets Operator: the key file of `aim-runtime keys`, hashes only. Mount\n"
    "the Secret aim-keys as docs/identity.md says; a change is in force a minute or so after the refresh."
)
_VAULT = "Reads one path, with the namespace's own service account: no token is kept anywhere."


def gateway(model: str, guarded: str) -> list[Document]:
    """Routes to a model through an InferencePool, and to a guarded one through its transformer."""
    picker = {"name": f"{model}-epp", "port": {"number": 9002}}
    pool = {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": model},
        "spec": {
            "selector": {"matchLabels": {SERVICE: model, COMPONENT: "predictor"}},
            "targetPorts": [{"number": 8080}],
            "endpointPickerRef": picker,
        },
    }
    to_pool = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": model}
    return [
        (_POOL, pool),
        (_TO_THE_POOL, _route(model, [to_pool])),
        (_TO_THE_GUARDRAIL, _route(guarded, [{"name": f"{guarded}-transformer", "port": 80}])),
    ]


def weighted(name: str, shares: Mapping[str, int]) -> dict[str, Any]:
    """A route that divides requests between services' predictors. shares: parts of their sum."""
    return _route(name, [{"name": f"{to}-predictor", "port": 80, "weight": share} for to, share in shares.items()])


def _route(name: str, backends: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": _ROUTE,
        "kind": "HTTPRoute",
        "metadata": {"name": name},
        "spec": {
            "parentRefs": [dict(_GATEWAY)],
            "hostnames": [f"{name}.llm.example.com"],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": path}} for path in ("/v1", "/openai/v1")],
                    "backendRefs": [dict(backend) for backend in backends],
                    # 0s: none.
                    "timeouts": {"request": "0s"},
                }
            ],
        },
    }


def certificate(service: str) -> list[dict[str, Any]]:
    """A certificate for a Service, by an issuer of the namespace's own authority (cert-manager)."""
    authority = f"{service}-ca"
    names = [service, f"{service}.llm", f"{service}.llm.svc", f"{service}.llm.svc.cluster.local"]
    return [
        _certs("Issuer", f"{service}-self-signed", {"selfSigned": {}}),
        _certs(
            "Certificate",
            authority,
            {
                "isCA": True,
                "commonName": authority,
                "secretName": authority,
                "privateKey": {"algorithm": "ECDSA", "size": 256},
                "issuerRef": {"name": f"{service}-self-signed", "kind": "Issuer"},
            },
        ),
        _certs("Issuer", service, {"ca": {"secretName": authority}}),
        _certs(
            "Certificate",
            service,
            {
                "secretName": f"{service}-tls",
                "dnsNames": names,
                "duration": "2160h",
                "renewBefore": "720h",
                "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
                "usages": ["server auth"],
                "issuerRef": {"name": service, "kind": "Issuer"},
            },
        ),
    ]


def _certs(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "cert-manager.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def external_secrets() -> list[Document]:
    """Keys out of HashiCorp Vault (External Secrets Operator, external-secrets.io/v1)."""
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "aim-secrets"},
        "automountServiceAccountToken": False,
    }
    provider = {
        "server": "https://vault.vault.svc:8200",
        "path": "secret",
        "version": "v2",
        "caProvider": {"type": "ConfigMap", "name": "vault-ca", "key": "ca.crt"},
        "auth": {
            "kubernetes": {"mountPath": "kubernetes", "role": "aim-llm", "serviceAccountRef": {"name": "aim-secrets"}}
        },
    }
    secret = {
        "refreshInterval": "5m",
        "secretStoreRef": {"kind": "SecretStore", "name": _STORE},
        "target": {"name": "aim-keys", "creationPolicy": "Owner"},
        "data": [{"secretKey": "keys.yaml", "remoteRef": {"key": "llm/aim-keys", "property": "keys.yaml"}}],
    }
    return [
        ("", account),
        (_VAULT, _external("SecretStore", _STORE, {"provider": {"vault": provider}})),
        (_KEYS, _external("ExternalSecret", "aim-keys", secret)),
    ]


def _external(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "external-secrets.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
