"""What every ClusterServingRuntime of ours is: the runtime's container as KServe and Kubernetes' restricted profile
want it, the pod's annotations by the Downward API, and memory for /dev/shm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

#: Which of our programs a pod runs: what monitors select by.
NAME_LABEL = "app.kubernetes.io/name"
PODINFO = "/etc/podinfo"
_SHM = "8Gi"
#: Kubernetes' restricted pod security standard, of one container.
RESTRICTED: Mapping[str, Any] = {
    "runAsNonRoot": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
PORTS: Sequence[Mapping[str, Any]] = (
    {"name": "http1", "containerPort": 8080, "protocol": "TCP"},
    {"name": "grpc", "containerPort": 8081, "protocol": "TCP"},
)
PODINFO_MOUNT: Mapping[str, Any] = {"name": "podinfo", "mountPath": PODINFO, "readOnly": True}
PODINFO_VOLUME: Mapping[str, Any] = {
    "name": "podinfo",
    "downwardAPI": {"items": [{"path": "annotations", "fieldRef": {"fieldPath": "metadata.annotations"}}]},
}


class ModelFormat(NamedTuple):
    """A model format that a runtime takes. priority: of the runtimes that KServe may choose by itself the highest is
    chosen; None: only an InferenceService that names the runtime gets it."""

    name: str
    priority: int | None = None
    version: str = "1"


def serving_runtime(
    name: str,
    engine: str,
    formats: Sequence[ModelFormat],
    image: str | None = None,
    variables: Mapping[str, str] | None = None,
    resources: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A ClusterServingRuntime. engine: as --engine says it; image: None: our own by version; variables: the
    container's environment; resources: what it asks for where its InferenceService does not say."""
    container = {
        "name": "kserve-container",
        "image": image or image_of("aim-runtime"),
        "command": ["python", "-m", "aim_runtime"],
        "args": ["--model_name={{.Name}}", "--model_dir=/mnt/models", f"--engine={engine}"],
        "env": environment_variables(variables or {}),
        "ports": [dict(port) for port in PORTS],
        **probes("{{.Name}}"),
        **({"resources": dict(resources)} if resources else {}),
        "securityContext": dict(RESTRICTED),
        "volumeMounts": [dict(PODINFO_MOUNT), {"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ClusterServingRuntime",
        "metadata": {"name": name},
        "spec": {
            "supportedModelFormats": [_format(each) for each in formats],
            "protocolVersions": ["v1", "v2", "grpc-v2"],
            "labels": {NAME_LABEL: "aim-runtime"},
            "containers": [container],
            "volumes": [
                dict(PODINFO_VOLUME),
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _SHM}},
            ],
        },
    }


def _format(chosen: ModelFormat) -> dict[str, Any]:
    by_itself = {} if chosen.priority is None else {"autoSelect": True, "priority": chosen.priority}
    return {"name": chosen.name, "version": chosen.version, **by_itself}


def environment_variables(variables: Mapping[str, str]) -> list[dict[str, str]]:
    """As a container lists them."""
    return [{"name": name, "value": value} for name, value in variables.items()]


def probes(model_name: str) -> dict[str, Any]:
    """Probes of a process of ours that serves that model. It listens within seconds and loads behind that, so the
    first only waits for the process; ready is what the model says of itself."""
    return {
        "startupProbe": _probe("/v2/health/live", period_s=5, failures=24),
        "readinessProbe": _probe(f"/v2/models/{model_name}/ready", period_s=10, failures=3),
        "livenessProbe": _probe("/v2/health/live", period_s=30, failures=3),
    }


def _probe(path: str, period_s: int, failures: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": 8080}, "periodSeconds": period_s, "failureThreshold": failures}


def image_of(name: str) -> str:
    """Our image of that name, by this version."""
    return f"{name}:{release()}"


def release() -> str:
    """The version of what is installed here; `dev`: nothing is."""
    try:
        return version("aim-kserve")
    except PackageNotFoundError:
        return "dev"
