"""Objects of a cluster in a dictionary, for what is asked of it thousands of times: no server, no schemas, no watches.

Keeps what a controller leans on: resourceVersion and its 409, generation, uid, status apart from the rest, selectors,
eviction. Asked by path, as a test asks kube_double; `MemoryCluster` asks the same as the operator's client does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
from lightkube import ApiError

from aim_operator.cluster import Cluster, Resource

Object = dict[str, Any]
_STATUS = "/status"


class Memory:
    """evictions_refused: so many times a disruption budget says no."""

    def __init__(self) -> None:
        self._objects: dict[str, Object] = {}
        self._numbers = itertools.count(1)
        self.evictions_refused = 0
        self.conflicts = 0

    def read(self, path: str) -> Object:
        if path not in self._objects:
            raise _refused(404, "NotFound", path)
        return copy.deepcopy(self._objects[path])

    def exists(self, path: str) -> bool:
        return path in self._objects

    def items(self, path: str, **query: str) -> list[Object]:
        """Of a collection, or of the same in every namespace."""
        root, _, plural = path.rpartition("/")
        of_all = [
            each
            for name, each in self._objects.items()
            if (at := name.rpartition("/")[0]) == path
            or (at.startswith(f"{root}/namespaces/") and at.endswith(f"/{plural}"))
        ]
        return [copy.deepcopy(each) for each in of_all if _picked(each, query)]

    def create(self, path: str, body: Mapping[str, Any]) -> Object:
        made = copy.deepcopy(dict(body))
        name = f"{path}/{made['metadata']['name']}"
        if name in self._objects:
            raise _refused(409, "AlreadyExists", name)
        number = str(next(self._numbers))
        namespace = path.split("/namespaces/")[1].split("/")[0] if "/namespaces/" in path else None
        made["metadata"] |= {"uid": f"uid-{number}", "resourceVersion": number, "generation": 1}
        made["metadata"] |= {"namespace": namespace} if namespace else {}
        self._objects[name] = made
        return copy.deepcopy(made)

    def patch(self, path: str, body: Mapping[str, Any]) -> Object:
        name = path.removesuffix(_STATUS)
        was = self.read(name)
        version = body.get("metadata", {}).get("resourceVersion")
        if version is not None and (version != was["metadata"]["resourceVersion"] or self._storms()):
            raise _refused(409, "Conflict", name)
        part = {key: body[key] for key in body if (key == "status") == path.endswith(_STATUS) and key != "metadata"}
        now = _merged(was, part | ({} if path.endswith(_STATUS) else {"metadata": body.get("metadata", {})}))
        if now == was:
            return was
        now["metadata"]["resourceVersion"] = str(next(self._numbers))
        now["metadata"]["generation"] += now.get("spec") != was.get("spec")
        self._objects[name] = now
        return copy.deepcopy(now)

    def delete(self, path: str) -> None:
        """How long it may take (`?gracePeriodSeconds=`) is nothing here: it is gone."""
        name = path.partition("?")[0]
        self.read(name)
        del self._objects[name]

    def _storms(self) -> bool:
        self.conflicts -= self.conflicts > 0
        return self.conflicts > 0


class MemoryCluster(Cluster):
    """The operator's client over it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object | None:
        path = f"{_path(resource, namespace)}/{name}"
        return self._memory.read(path) if self._memory.exists(path) else None

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> Sequence[Object]:
        selectors = {
            name: ",".join(f"{key}={value}" for key, value in given.items())
            for name, given in (("labelSelector", labels), ("fieldSelector", fields))
            if given
        }
        return self._memory.items(_path(resource, namespace), **selectors)

    async def create(self, resource: Resource, body: Object) -> Object | None:
        path = _path(resource, body["metadata"].get("namespace"))
        return None if self._memory.exists(f"{path}/{body['metadata']['name']}") else self._memory.create(path, body)

    async def apply(self, resource: Resource, body: Object) -> Object:
        path = _path(resource, body["metadata"].get("namespace"))
        name = f"{path}/{body['metadata']['name']}"
        return self._memory.patch(name, body) if self._memory.exists(name) else self._memory.create(path, body)

    async def patch(
        self,
        resource: Resource,
        name: str,
        body: Mapping[str, Any],
        namespace: str | None = None,
        *,
        status: bool = False,
    ) -> Object | None:
        path = f"{_path(resource, namespace)}/{name}"
        if not self._memory.exists(path):
            return None
        return self._memory.patch(path + _STATUS * status, body)

    async def evict(self, name: str, namespace: str) -> bool:
        if self._memory.evictions_refused:
            self._memory.evictions_refused -= 1
            return False
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        if self._memory.exists(path):
            self._memory.delete(path)
        return True

    async def delete(self, resource: Resource, name: str, namespace: str | None = None) -> None:
        path = f"{_path(resource, namespace)}/{name}"
        if self._memory.exists(path):
            self._memory.delete(path)


def _path(resource: Resource, namespace: str | None) -> str:
    root = f"/apis/{resource.api_version}" if "/" in resource.api_version else f"/api/{resource.api_version}"
    return f"{root}/namespaces/{namespace}/{resource.plural}" if namespace else f"{root}/{resource.plural}"


def _in(collection: str, path: str) -> bool:
    root, _, plural = path.rpartition("/")
    return collection == path or (collection.startswith(f"{root}/namespaces/") and collection.endswith(f"/{plural}"))


def _picked(found: Object, query: Mapping[str, str]) -> bool:
    labels = found["metadata"].get("labels") or {}
    for key, _, value in (part.partition("=") for part in query.get("labelSelector", "").split(",") if part):
        if labels.get(key) != value:
            return False
    for key, _, value in (part.partition("=") for part in query.get("fieldSelector", "").split(",") if part):
        at: Any = found
        for step in key.split("."):
            at = (at or {}).get(step)
        if at != value:
            return False
    return True


def _merged(was: Any, patch: Any) -> Any:
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    now = dict(was) if isinstance(was, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            now.pop(key, None)
        elif key != "resourceVersion":
            now[key] = _merged(now.get(key), value)
    return now


def _refused(code: int, reason: str, path: str) -> ApiError:
    body = {"code": code, "reason": reason, "message": f"{path}: {reason}", "status": "Failure"}
    return ApiError(httpx2.Request("GET", "http://memory"), httpx2.Response(code, json=body))
