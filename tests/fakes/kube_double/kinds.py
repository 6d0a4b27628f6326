"""Which kinds there are: those every server has, and those that CustomResourceDefinitions add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .refusal import NoSuchPath, Refusal
from .structural import problems

#: group/version: plural:Kind, with * where it belongs to no namespace, / where its status is a resource of its own.
_BUILT_IN = {
    "v1": "namespaces:Namespace*/ nodes:Node*/ pods:Pod/ events:Event configmaps:ConfigMap secrets:Secret "
    "services:Service/ serviceaccounts:ServiceAccount persistentvolumeclaims:PersistentVolumeClaim/ "
    "resourcequotas:ResourceQuota/ limitranges:LimitRange",
    "apps/v1": "deployments:Deployment/ daemonsets:DaemonSet/ statefulsets:StatefulSet/ replicasets:ReplicaSet/",
    "batch/v1": "jobs:Job/",
    "coordination.k8s.io/v1": "leases:Lease",
    "policy/v1": "poddisruptionbudgets:PodDisruptionBudget/",
    "networking.k8s.io/v1": "networkpolicies:NetworkPolicy",
    "events.k8s.io/v1": "events:Event",
    "resource.k8s.io/v1": "resourceslices:ResourceSlice* resourceclaims:ResourceClaim/ "
    "resourceclaimtemplates:ResourceClaimTemplate deviceclasses:DeviceClass*",
    "rbac.authorization.k8s.io/v1": "clusterroles:ClusterRole* clusterrolebindings:ClusterRoleBinding* roles:Role "
    "rolebindings:RoleBinding",
    "admissionregistration.k8s.io/v1": "validatingwebhookconfigurations:ValidatingWebhookConfiguration* "
    "mutatingwebhookconfigurations:MutatingWebhookConfiguration*",
    "apiextensions.k8s.io/v1": "customresourcedefinitions:CustomResourceDefinition*/",
}


@dataclass(frozen=True)
class Kind:
    """A kind as one version serves it. schema: None: a built-in, stored as it comes."""

    group_version: str
    plural: str
    name: str
    namespaced: bool = True
    has_status: bool = False
    schema: dict[str, Any] | None = None
    short_names: tuple[str, ...] = ()
    columns: tuple[dict[str, Any], ...] = field(default=(), hash=False)

    @property
    def group(self) -> str:
        return self.group_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        return self.group_version.rpartition("/")[2]


class Kinds:
    """The table of them, by group/version and plural."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], Kind] = {}
        for group_version, words in _BUILT_IN.items():
            for word in words.split():
                plural, _, name = word.partition(":")
                kind = Kind(group_version, plural, name.rstrip("*/"), "*" not in name, "/" in name)
                self._kinds[group_version, plural] = kind

    def __iter__(self) -> Iterator[Kind]:
        return iter(self._kinds.values())

    def get(self, group_version: str, plural: str) -> Kind:
        found = self._kinds.get((group_version, plural))
        if found is None:
            raise NoSuchPath
        return found

    def define(self, crd: dict[str, Any]) -> None:
        """Serves a CustomResourceDefinition's versions. Raises Refusal 422 where a schema is not structural."""
        spec = crd["spec"]
        wanted = f"{spec['names']['plural']}.{spec['group']}"
        if crd["metadata"]["name"] != wanted:
            raise Refusal(422, "Invalid", f"metadata.name: Invalid value: must be {wanted}")
        kinds = [_of_version(spec, version) for version in spec["versions"] if version.get("served", True)]
        for kind in kinds:
            if found := problems(kind.schema or {}):
                message = f'CustomResourceDefinition "{wanted}" is invalid: {"; ".join(found)}'
                raise Refusal(422, "Invalid", message)
        self._kinds.update({(kind.group_version, kind.plural): kind for kind in kinds})

    def forget(self, crd: dict[str, Any]) -> None:
        spec = crd["spec"]
        for version in spec["versions"]:
            self._kinds.pop((f"{spec['group']}/{version['name']}", spec["names"]["plural"]), None)


def _of_version(spec: dict[str, Any], version: dict[str, Any]) -> Kind:
    return Kind(
        f"{spec['group']}/{version['name']}",
        spec["names"]["plural"],
        spec["names"]["kind"],
        spec["scope"] == "Namespaced",
        "status" in version.get("subresources", {}),
        version["schema"]["openAPIV3Schema"],
        tuple(spec["names"].get("shortNames", ())),
        tuple(version.get("additionalPrinterColumns", ())),
    )
