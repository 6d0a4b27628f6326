"""PartitionPlans in kopf's registry: a daemon for each, woken by what changes the plan or a node in its hands."""

from __future__ import annotations

import logging
from typing import Any

import kopf

from aim_operator.cluster import PARTITION_PLANS, TROUBLE, Contended
from aim_operator.loop import Bells, keep
from aim_operator.operator import Operator

from .hands import Place
from .metrics import Switches
from .reconcile import Reconciler
from .seen import HELD_BY

_LOG = logging.getLogger(__name__)
_KIND = (*PARTITION_PLANS.api_version.split("/"), PARTITION_PLANS.plural)
_TROUBLE_S = 5.0


def register(registry: kopf.OperatorRegistry, operator: Operator) -> None:
    """The daemon, what wakes it, and what is given back when a plan is deleted."""
    settings = operator.settings
    place = Place(
        settings.namespace, settings.image, settings.gpu_namespace, settings.dcm_config_map, settings.identity
    )
    reconciler = Reconciler(operator.cluster, place, Switches(operator.metrics), operator.audit)
    bells = Bells()

    @kopf.daemon(*_KIND, registry=registry, cancellation_timeout=10)
    async def partition_plan(name: str, **_: Any) -> None:
        await keep(f"PartitionPlan {name}", lambda: reconciler.once(name), bells.of(name))

    @kopf.on.event(*_KIND, registry=registry)
    async def edited(name: str, **_: Any) -> None:
        bells.ring(name)

    @kopf.on.event("", "v1", "nodes", annotations={HELD_BY: kopf.PRESENT}, registry=registry)
    async def node_moved(annotations: kopf.Annotations, **_: Any) -> None:
        bells.ring(annotations[HELD_BY])

    @kopf.on.delete(*_KIND, registry=registry)
    async def deleted(name: str, **_: Any) -> None:
        try:
            waits_s = await reconciler.release(name)
        except (*TROUBLE, Contended) as error:
            raise kopf.TemporaryError(f"its nodes cannot be given back yet: {error}", delay=_TROUBLE_S) from error
        if waits_s is not None:
            raise kopf.TemporaryError("the Device Config Manager is at one of its nodes", delay=waits_s)
