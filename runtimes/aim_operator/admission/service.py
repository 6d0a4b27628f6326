"""An InferenceService as the webhooks look at it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aim_kserve.settings import ANNOTATION_PREFIX

from .denied import Denied

Object = dict[str, Any]

#: What KServe calls the containers of a predictor.
PREDICTOR, TRANSFORMER = "kserve-container", "transformer-container"
_DEVICE = re.compile(r"amd\.com/[a-z0-9_]+")


class Service:
    """The object, and the runtime that it names (None: it names none, or none that is there)."""

    def __init__(self, body: Object, runtime: Mapping[str, Any] | None = None) -> None:
        self.body, self.runtime = body, runtime

    @property
    def runtime_name(self) -> str | None:
        """Of `spec.predictor.model`; None: KServe chooses one by the model's format."""
        return named_runtime(self.body)

    @property
    def is_ours(self) -> bool:
        """Whether a process of ours reads what it is told."""
        containers = [
            *self.predictor.get("containers", ()),
            *(self.runtime or {}).get("spec", {}).get("containers", ()),
        ]
        return any(_runs(each, "aim_runtime") for each in containers) or any(
            key.startswith(ANNOTATION_PREFIX) for key in (*self.annotations, *self.predictor.get("annotations", {}))
        )

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.body["metadata"].get("annotations") or {}

    def annotation(self, short: str) -> str | None:
        """One of ours, by what stands behind `aim.amd.com/`."""
        return self.seen_by("predictor").get(f"{ANNOTATION_PREFIX}{short}")

    def seen_by(self, component: str) -> Mapping[str, str]:
        """Annotations of a component's pods: its own win over the service's, as KServe has it."""
        own = self.body.get("spec", {}).get(component, {}).get("annotations") or {}
        return {**self.annotations, **own}

    @property
    def predictor(self) -> Object:
        found: Object = self.body.get("spec", {}).get("predictor", {})
        return found

    @property
    def model(self) -> Object:
        found: Object = self.predictor.get("model", {})
        return found

    @property
    def storage_uri(self) -> str | None:
        uri = self.model.get("storageUri")
        return None if uri is None else str(uri)

    @property
    def model_id(self) -> str | None:
        """`org/name` of a model on the Hugging Face hub; None: it is elsewhere, and what it needs is not known here."""
        found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)(?:[:@].*)?", self.storage_uri or "")
        return found[1] if found else None

    def flag(self, name: str) -> str | None:
        """What the service's own arguments say of a runtime's setting, which wins over its annotation."""
        args = [str(each) for each in self.model.get("args", ())]
        for at, word in enumerate(args):
            key, _, value = word.partition("=")
            if key.removeprefix("--").replace("-", "_") == name and key.startswith("--"):
                return value or next(iter(args[at + 1 :]), None)
        return None

    def devices(self) -> Sequence[tuple[str, str, int]]:
        """What the predictor asks for of `amd.com/…`: path, resource, how many. The service wins over its runtime."""
        return list(self._devices())

    def _devices(self) -> Iterator[tuple[str, str, int]]:
        named: set[str] = set()
        for path, container in self._containers():
            for kind in ("limits", "requests"):
                for resource, count in (container.get("resources") or {}).get(kind, {}).items():
                    if _DEVICE.fullmatch(resource) and resource not in named:
                        named.add(resource)
                        yield f"{path}.resources.{kind}[{resource}]", resource, _count(path, resource, count)

    def _containers(self) -> Iterator[tuple[str, Object]]:
        yield "spec.predictor.model", self.model
        for container in self.predictor.get("containers", ()):
            yield f"spec.predictor.containers[{container.get('name')}]", container
        for container in (self.runtime or {}).get("spec", {}).get("containers", ()):
            yield f"ClusterServingRuntime {self.runtime_name}: containers[{container.get('name')}]", container


def named_runtime(body: Mapping[str, Any]) -> str | None:
    """The runtime that an InferenceService names."""
    name = body.get("spec", {}).get("predictor", {}).get("model", {}).get("runtime")
    return None if name is None else str(name)


def _runs(container: Mapping[str, Any], package: str) -> bool:
    told = [*container.get("command", ()), *container.get("args", ())]
    return package in told or any(word.endswith(package.replace("_", "-")) for word in told)


def _count(path: str, resource: str, count: object) -> int:
    try:
        return int(str(count))
    except ValueError:
        raise Denied(
            f"{path}.resources[{resource}]", count, "devices are counted in whole numbers", 'write "1"'
        ) from None
