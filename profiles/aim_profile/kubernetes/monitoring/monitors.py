"""Who is scraped: PodMonitors, and the exporter on every node with GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aim_profile.kubernetes.serving_runtime import NAME_LABEL, RESTRICTED, image_of

Object = dict[str, Any]

_OPERATOR = "aim-operator"
EXPORTER_IMAGE = _OPERATOR
#: What the serving monitor sends where identity is on: the key, of scope `metrics`, of a Secret beside it.
AUTHORIZATION: Object = {"type": "Bearer", "credentials": {"name": "aim-metrics-key", "key": "key"}}
_EXPORTER = "aim-exporter"
_EXPORTER_PORT = 9402
#: amdgpu's directories: readable without any device, so that a switch of modes never waits for the exporter.
_CARDS = "/sys/bus/pci/drivers/amdgpu"
_MOUNT = "/etc/aim"


def serving_monitor() -> Object:
    """Runtimes and guardrails, by their containers' HTTP port."""
    return _monitor(
        "aim-serving",
        ["aim-runtime", "aim-guardrail"],
        {"port": "http1", "relabelings": [_NODE, _from_pod_label("serving_kserve_io_inferenceservice"), _COMPONENT]},
    )


def trainer_monitor() -> Object:
    """Fine-tuning runs; only the pod of rank 0 answers."""
    return _monitor("aim-trainer", ["aim-trainer"], {"port": "metrics", "relabelings": [_NODE]})


def exporter_monitor() -> Object:
    """The exporters, whose own label `node` stays."""
    return _monitor("aim-exporter", [_EXPORTER], {"port": "metrics", "honorLabels": True})


def operator_monitor() -> Object:
    """The operator, by its Service."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": {"name": _OPERATOR, "labels": {NAME_LABEL: _OPERATOR}},
        "spec": {
            "namespaceSelector": {"any": True},
            "selector": {"matchLabels": {NAME_LABEL: _OPERATOR}},
            # It tells of other namespaces than its own.
            "endpoints": [{"port": "metrics", "path": "/metrics", "interval": "15s", "honorLabels": True}],
        },
    }


def _monitor(name: str, pods: Sequence[str], endpoint: Mapping[str, Any]) -> Object:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": name, "labels": {NAME_LABEL: name}},
        "spec": {
            "namespaceSelector": {"any": True},
            "selector": {"matchExpressions": [{"key": NAME_LABEL, "operator": "In", "values": list(pods)}]},
            "podMetricsEndpoints": [{"path": "/metrics", "interval": "15s", **endpoint}],
        },
    }


_NODE = {"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "node"}
_COMPONENT = {"sourceLabels": ["__meta_kubernetes_pod_label_component"], "targetLabel": "component"}


def _from_pod_label(label: str) -> Object:
    return {"sourceLabels": [f"__meta_kubernetes_pod_label_{label}"], "targetLabel": "inferenceservice"}


def exporter() -> Object:
    """The exporter on every node that the node labeller found GPUs on. Its ConfigMap
    `aim-exporter` may hold plan.yaml and prices.yaml."""
    labels = {NAME_LABEL: _EXPORTER}
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": _EXPORTER, "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": _exporter_pod()},
        },
    }


def _exporter_pod() -> Object:
    return {
        "automountServiceAccountToken": False,
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": _ON_GPUS}},
        # Also while a node is drained for a switch: then it is watched most.
        "tolerations": [{"operator": "Exists"}],
        "containers": [
            {
                "name": "exporter",
                "image": image_of(EXPORTER_IMAGE),
                "command": ["python", "-m", "aim_profile", "exporter"],
                "args": [
                    f"--root={_CARDS}",
                    "--name=$(NODE_NAME)",
                    f"--port={_EXPORTER_PORT}",
                    f"--config={_MOUNT}",
                ],
                "env": [{"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
                "ports": [{"name": "metrics", "containerPort": _EXPORTER_PORT, "protocol": "TCP"}],
                "readinessProbe": {"tcpSocket": {"port": "metrics"}, "periodSeconds": 10},
                "livenessProbe": {"tcpSocket": {"port": "metrics"}, "periodSeconds": 30},
                "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
                "securityContext": {**RESTRICTED, "readOnlyRootFilesystem": True},
                "volumeMounts": [{"name": "config", "mountPath": _MOUNT, "readOnly": True}],
            }
        ],
        "volumes": [{"name": "config", "configMap": {"name": _EXPORTER, "optional": True}}],
    }


_ON_GPUS = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "amd.com/gpu.device-id", "operator": "Exists"}]}]}
