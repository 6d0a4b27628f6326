"""The guardrail beside the runtime, in its pod: KServe's transformer-container, to which the service's port leads.

The guardrail takes the pod's 8080 and 8081, the runtime goes to 8090 and 8091. KServe's Service leads to the first port
of a `transformer-container` where there is one (its service reconciler; kserve/kserve@f3e8891), so that nobody reaches
the model round the guardrail by it.

What is injected is taken out and put in anew at every admission, so that a changed or removed annotation takes hold,
and a second admission changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from aim_operator.notes import GUARDRAIL
from aim_operator.policies.text import config_map_of
from aim_profile.kubernetes.serving_runtime import PODINFO_MOUNT, PODINFO_VOLUME, RESTRICTED, image_of, probes

from .annotated import POLICY, RULES
from .denied import Denied
from .service import PREDICTOR, TRANSFORMER, Object, Service

_HTTP, _GRPC = 8090, 8091
_FLAGS = (f"--http_port={_HTTP}", f"--grpc_port={_GRPC}")
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_POLICY_VOLUME, _POLICY_PATH = "aim-guardrail-policy", "/etc/aim/guardrail-policy"
# Without a limit of its own KServe gives a transformer one: 1 CPU.
_RESOURCES = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "2Gi"}}


def place(body: Object, policies: Collection[str], image: str = "") -> Object:
    """The service with the guardrail that its annotations ask for. Raises Denied.

    image: empty, this release's, without a registry.
    A transformer of its own, or a transformer-container that it wrote itself, stays, and nothing is injected.
    """
    done = copy.deepcopy(body)
    service = Service(done)
    told = service.seen_by("predictor")
    if not {POLICY, RULES} & told.keys() or _has_its_own(service):
        return done
    predictor = done["spec"]["predictor"]
    _move(service)
    predictor.setdefault("containers", []).append(_container(done, told, policies, image))
    volumes = predictor.setdefault("volumes", [])
    volumes += [each for each in _volumes(told, policies) if each["name"] not in {own["name"] for own in volumes}]
    done["metadata"].setdefault("annotations", {})[GUARDRAIL] = "injected"
    return done


def _has_its_own(service: Service) -> bool:
    containers = service.predictor.get("containers", ())
    return "transformer" in service.body["spec"] or any(each.get("name") == TRANSFORMER for each in containers)


def _container(body: Object, told: Mapping[str, str], policies: Collection[str], image: str) -> Object:
    # `{{.Name}}` is KServe's, for who has no name yet (generateName).
    name = body["metadata"].get("name") or "{{.Name}}"
    mounts = [dict(PODINFO_MOUNT)]
    args = [f"--model_name={name}", f"--predictor_host=localhost:{_HTTP}"]
    if told.get(POLICY) in policies:
        args.append(f"--policy={_POLICY_PATH}")
        mounts.append({"name": _POLICY_VOLUME, "mountPath": _POLICY_PATH, "readOnly": True})
    return {
        "name": TRANSFORMER,
        "image": image or image_of("aim-guardrail"),
        "command": ["python", "-m", "aim_guardrail"],
        "args": args,
        "ports": [
            {"name": "guardrail", "containerPort": 8080, "protocol": "TCP"},
            {"name": "guardrail-grpc", "containerPort": 8081, "protocol": "TCP"},
        ],
        **probes(name),
        "resources": copy.deepcopy(_RESOURCES),
        "securityContext": copy.deepcopy(dict(RESTRICTED)),
        "volumeMounts": mounts,
    }


def _volumes(told: Mapping[str, str], policies: Collection[str]) -> list[Object]:
    volumes: list[Object] = [copy.deepcopy(dict(PODINFO_VOLUME))]
    if (policy := told.get(POLICY)) in policies:
        volumes.append({"name": _POLICY_VOLUME, "configMap": {"name": config_map_of(str(policy))}})
    return volumes


def _move(service: Service) -> None:
    """The runtime goes to the other ports, and its probes with it. Raises Denied where its flags say another port."""
    path, container = _runtime_container(service)
    for flag in container.get("args", ()):
        if str(flag).partition("=")[0].replace("-", "_") in ("__http_port", "__grpc_port"):
            remedy = f"leave it out: beside a guardrail the runtime listens on {_HTTP} and {_GRPC}"
            raise Denied(f"{path}.args", flag, "the guardrail takes the pod's ports", remedy)
    container["args"] = [*container.get("args", ()), *_FLAGS]
    own = service.body["metadata"].get("name") or "{{.Name}}"
    for name, probe in probes(own).items():
        container[name] = _on_port(container.get(name) or probe)
    if "ports" in container:
        moved = {8080: _HTTP, 8081: _GRPC}
        for port in container["ports"]:
            port["containerPort"] = moved.get(port["containerPort"], port["containerPort"])


def _runtime_container(service: Service) -> tuple[str, Object]:
    if "model" in service.predictor:
        return "spec.predictor.model", service.model
    for container in service.predictor.get("containers", ()):
        if container.get("name") == PREDICTOR:
            return f"spec.predictor.containers[{PREDICTOR}]", container
    raise Denied("spec.predictor", None, "no model and no kserve-container to guard", "give spec.predictor.model")


def _on_port(probe: Mapping[str, Any]) -> Object:
    done = copy.deepcopy(dict(probe))
    if "httpGet" in done:
        done["httpGet"] = {**done["httpGet"], "port": _HTTP}
    return done


def taken_out(body: Object) -> Object:
    """The service without the guardrail that was injected before."""
    body = copy.deepcopy(body)
    if (body["metadata"].get("annotations") or {}).pop(GUARDRAIL, None) is None:
        return body
    predictor = body["spec"]["predictor"]
    predictor["containers"] = [each for each in predictor.get("containers", ()) if each.get("name") != TRANSFORMER]
    predictor["volumes"] = [each for each in predictor.get("volumes", ()) if each.get("name") != _POLICY_VOLUME]
    for key in ("containers", "volumes"):
        if not predictor[key]:
            del predictor[key]
    _, container = _runtime_container(Service(body))
    container["args"] = [each for each in container.get("args", ()) if each not in _FLAGS]
    for name in _PROBES:
        if container.get(name, {}).get("httpGet", {}).get("port") == _HTTP:
            container[name]["httpGet"]["port"] = 8080
    back = {_HTTP: 8080, _GRPC: 8081}
    for port in container.get("ports", ()):
        port["containerPort"] = back.get(port["containerPort"], port["containerPort"])
    return body
