"""The Kubernetes API, as the controllers ask it: plain dictionaries in and out, one client for each event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Self

import httpx2
from lightkube import ApiError as ApiError
from lightkube import AsyncClient
from lightkube.generic_resource import create_global_resource, create_namespaced_resource
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Pod
from lightkube.types import CascadeType, PatchType

Object = dict[str, Any]

#: Whose fields these are, in `metadata.managedFields`.
MANAGER = "aim-operator"
#: How often a change is tried anew where others write, too; the last waits come to some seconds.
_TRIES, _FIRST_WAIT_S, _LONGEST_WAIT_S = 12, 0.02, 1.0


class Resource(NamedTuple):
    """A kind as the API names it. api_version: `v1`, `apps/v1`, …"""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True


NODES = Resource("v1", "Node", "nodes", namespaced=False)
PODS = Resource("v1", "Pod", "pods")
CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps")
NAMESPACES = Resource("v1", "Namespace", "namespaces", namespaced=False)
EVENTS = Resource("v1", "Event", "events")
RESOURCE_CLAIMS = Resource("resource.k8s.io/v1", "ResourceClaim", "resourceclaims")
RESOURCE_SLICES = Resource("resource.k8s.io/v1", "ResourceSlice", "resourceslices", namespaced=False)
LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")
INFERENCE_SERVICES = Resource("serving.kserve.io/v1beta1", "InferenceService", "inferenceservices")
SERVING_RUNTIMES = Resource("serving.kserve.io/v1alpha1", "ServingRuntime", "servingruntimes")
CLUSTER_SERVING_RUNTIMES = Resource(
    "serving.kserve.io/v1alpha1", "ClusterServingRuntime", "clusterservingruntimes", namespaced=False
)
PARTITION_PLANS = Resource("aim.amd.com/v1alpha1", "PartitionPlan", "partitionplans", namespaced=False)
RAY_JOBS = Resource("ray.io/v1", "RayJob", "rayjobs")
TOKEN_REVIEWS = Resource("authentication.k8s.io/v1", "TokenReview", "tokenreviews", namespaced=False)
FINE_TUNING_JOBS = Resource("aim.amd.com/v1alpha1", "FineTuningJob", "finetuningjobs")
GUARDRAIL_POLICIES = Resource("aim.amd.com/v1alpha1", "GuardrailPolicy", "guardrailpolicies")


#: What asking the cluster may raise: its refusals (ApiError among them), and that it is not reached.
TROUBLE = (httpx2.HTTPError, OSError)


class Contended(Exception):
    """Somebody else wrote between each of our reads and writes. The message names the object."""


class Cluster:
    """Asks the cluster that KUBECONFIG, ~/.kube/config or the pod's service account names.

    Every call may raise ``ApiError``: the server's refusal, `error.status.code` and `.reason`.
    """

    def __init__(self) -> None:
        # Its overloads tell namespaced kinds from others by their class; ours are made at run time.
        self._client: Any = AsyncClient(field_manager=MANAGER)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object | None:
        """None: there is none."""
        return await _or_none(self._client.get(_class(resource), name, **_in(namespace)))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> Sequence[Object]:
        """Of a namespace, or (None) of all; none where the server does not know the kind."""
        where = {"namespace": namespace or "*"} if resource.namespaced else {}
        try:
            found = self._client.list(_class(resource), labels=labels, fields=fields, **where)
            return [dict(each) async for each in found]
        except httpx2.HTTPStatusError as error:
            if error.response.status_code == 404:
                return []
            raise

    async def apply(self, resource: Resource, body: Object) -> Object:
        """Server-side apply; fields that others hold are taken from them."""
        return dict(await self._client.apply(_class(resource)(body), **_of(body), force=True))

    async def create(self, resource: Resource, body: Object) -> Object | None:
        """None: one of that name is there already."""
        try:
            return dict(await self._client.create(_class(resource)(body), **_of(body)))
        except ApiError as error:
            if error.status.reason == "AlreadyExists":
                return None
            raise

    async def replace(self, resource: Resource, body: Object) -> Object:
        """Raises ApiError 409 where it is no longer what `body` was read as (its resourceVersion)."""
        return dict(await self._client.replace(_class(resource)(body), **_of(body)))

    async def patch(
        self,
        resource: Resource,
        name: str,
        body: Mapping[str, Any],
        namespace: str | None = None,
        *,
        status: bool = False,
    ) -> Object | None:
        """A merge patch, of the object or of its status. None: there is none any more."""
        kind = _class(resource).Status if status else _class(resource)
        return await _or_none(self._client.patch(kind, name, dict(body), patch_type=PatchType.MERGE, **_in(namespace)))

    async def change(
        self, resource: Resource, name: str, change: Callable[[Object], Object | None], namespace: str | None = None
    ) -> Object | None:
        """Reads, changes and writes, until nobody wrote between. `change` gets the object and gives it back as it
        shall be, or None to leave it. None: there is none. Raises Contended."""
        wait_s = _FIRST_WAIT_S
        for _ in range(_TRIES):
            found = await self.get(resource, name, namespace)
            if found is None or (wanted := change(found)) is None:
                return found
            try:
                return await self.replace(resource, wanted)
            except ApiError as error:
                if error.status.code != 409:
                    raise
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.5))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        raise Contended(f"{resource.kind} {name}: written by others {_TRIES} times while it was to be changed")

    async def evict(self, name: str, namespace: str) -> bool:
        """A pod is asked to go, as far as disruption budgets let it. Whether it does, or is gone already."""
        eviction = Pod.Eviction(metadata=ObjectMeta(name=name, namespace=namespace))
        try:
            await self._client.create(eviction, name=name, namespace=namespace)
        except ApiError as error:
            if error.status.code == 429:
                return False
            if error.status.code != 404:
                raise
        return True

    async def delete(self, resource: Resource, name: str, namespace: str | None = None) -> None:
        """It goes, and what it owns behind it; that it is gone already is well."""
        await _or_none(self._client.delete(_class(resource), name, cascade=CascadeType.BACKGROUND, **_in(namespace)))


@cache
def _class(resource: Resource) -> Any:
    group, _, version = resource.api_version.rpartition("/")
    create = create_namespaced_resource if resource.namespaced else create_global_resource
    return create(group, version, resource.kind, resource.plural)


def _in(namespace: str | None) -> dict[str, str]:
    return {} if namespace is None else {"namespace": namespace}


def _of(body: Object) -> dict[str, str]:
    return _in(body["metadata"].get("namespace"))


async def _or_none(asked: Awaitable[Any]) -> Object | None:
    """A kind that the server does not know is a page it does not have: that is no ApiError."""
    try:
        found = await asked
    except httpx2.HTTPStatusError as error:
        if error.response.status_code == 404:
            return None
        raise
    return None if found is None else dict(found)
