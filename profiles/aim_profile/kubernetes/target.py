"""Where rendered objects go and what they are made of: names that Kubernetes takes, and the way to devices."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from aim_profile.errors import AimProfileError
from aim_profile.plans.dcm import Strategy

#: How a pod gets its devices: counted by AMD's device plugin, or claimed of its DRA driver.
Allocation = Literal["plugin", "dra"]

# An RFC 1123 label; labels with dots between, an object's name; of an image's name what no shell or YAML could have
# meant otherwise.
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_OBJECT = re.compile(rf"(?=.{{1,253}}$){_NAMESPACE.pattern}(\.{_NAMESPACE.pattern})*")
_IMAGE = re.compile(r"[a-zA-Z0-9][\w.:/@+-]*", re.ASCII)


class RenderError(AimProfileError):
    """Something that Kubernetes objects cannot say, or an object's name that is no name."""


class Target(NamedTuple):
    """Where objects go and what they are made of.

    strategy: the device plugin's resource naming strategy; image: of the runtime, None: our own by version;
    operator_namespace: where the GPU operator and its Device Config Manager run; runtime: a ClusterServingRuntime
    that is there already (`manifests/`), None: one for each gfx target is rendered; auto_partition: claims that have
    AMD's DRA driver put cards into their mode; cluster_queue: Kueue's, rendered from a plan; partition_plan: what
    aim-operator switches nodes by, in the place of commands for a person.
    """

    namespace: str | None = None
    strategy: Strategy = "mixed"
    image: str | None = None
    operator_namespace: str = "kube-amd-gpu"
    runtime: str | None = None
    allocation: Allocation = "plugin"
    auto_partition: bool = False
    cluster_queue: str | None = None
    partition_plan: str | None = None


def target_of(
    namespace: str | None,
    strategy: Strategy,
    image: str | None,
    operator_namespace: str,
    runtime: str | None = None,
    *,
    allocation: Allocation = "plugin",
    auto_partition: bool = False,
    cluster_queue: str | None = None,
    partition_plan: str | None = None,
) -> Target:
    """A Target whose names Kubernetes takes. Raises RenderError."""
    _check_allocation(allocation, strategy, auto_partition)
    for field, name in (("namespace", namespace), ("operator-namespace", operator_namespace)):
        if name is not None and not _NAMESPACE.fullmatch(name):
            raise RenderError(
                f"{field}: {name!r} is no name of a namespace",
                field=field,
                value=name,
                remedy="lower case, digits and - only, at most 63 characters",
            )
    if image is not None and not _IMAGE.fullmatch(image):
        raise RenderError(
            f"image: {image!r} is no image", field="image", value=image, remedy="write [REGISTRY/]NAME[:TAG][@DIGEST]"
        )
    for field, name in (("runtime", runtime), ("cluster-queue", cluster_queue), ("partition-plan", partition_plan)):
        if name is not None:
            _check_object(field, name)
    if runtime is not None and image is not None:
        raise RenderError(
            f"image: {runtime} is there already, with an image of its own",
            field="image",
            value=image,
            remedy="leave out --image, or --runtime to have one rendered",
        )
    return Target(
        namespace,
        strategy,
        image,
        operator_namespace,
        runtime,
        allocation,
        auto_partition,
        cluster_queue,
        partition_plan,
    )


def _check_allocation(allocation: Allocation, strategy: Strategy, auto_partition: bool) -> None:
    if allocation == "dra" and strategy == "single":
        raise RenderError(
            "strategy: single is the device plugin's, and with --allocation dra there is none",
            field="strategy",
            value=strategy,
            remedy="leave out --strategy, or --allocation dra",
        )
    if auto_partition and allocation != "dra":
        raise RenderError(
            "auto-partition: the device plugin partitions nothing",
            field="auto-partition",
            value=True,
            remedy="add --allocation dra",
        )


def _check_object(field: str, name: str) -> None:
    if not _OBJECT.fullmatch(name):
        kinds = {"runtime": "ClusterServingRuntime", "cluster-queue": "ClusterQueue", "partition-plan": "PartitionPlan"}
        kind = kinds[field]
        raise RenderError(
            f"{field}: {name!r} is no name of a {kind}",
            field=field,
            value=name,
            remedy=f"lower case, digits, - and . only, as `kubectl get {kind.lower()}s` shows it",
        )
