"""GuardrailPolicies kept as ConfigMaps, and what their pods run told in their status.

An invalid spec changes nothing that is mounted: the last valid one stays in force, and `Valid` says what is wrong.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import kopf
from prometheus_client import Gauge

from aim_guardrail.policy import PolicyError
from aim_operator.cluster import CONFIG_MAPS, GUARDRAIL_POLICIES, PODS, TROUBLE, Object
from aim_operator.condition import condition
from aim_operator.events import tell
from aim_operator.operator import Operator
from aim_profile.kubernetes.definition import GROUP, VERSION

from .crd import KIND, PLURAL
from .pods import Running, State, mounting, running
from .text import FILE, config_map_of, policy_of, text_of

logger = logging.getLogger("aim.operator.policies")

_MOST_PODS = 50
_ORDER: Mapping[State, int] = {"stale": 0, "unknown": 1, "current": 2}


class Foreign(Exception):
    """A ConfigMap of that name is another's."""


class _Controller:
    def __init__(self, operator: Operator) -> None:
        self._cluster, self._audit = operator.cluster, operator.audit
        self._pods = Gauge(
            "aim_operator_guardrail_policy_pods",
            "Pods that mount a policy, by whether they run its newest version: current, stale, unknown",
            ["namespace", "policy", "state"],
            registry=operator.metrics,
        )

    async def changed(self, *, event: kopf.RawEvent, name: str | None, namespace: str | None, **_: Any) -> None:
        if event["type"] == "DELETED":
            # Its ConfigMap goes with it (ownerReferences); so do its figures.
            for state in _ORDER:
                self._pods.labels(namespace, name, state).set(0)
        else:
            await self._looked_at(str(name), str(namespace))

    async def watch(self, every_s: float) -> None:
        """Looks at every policy now and then: pods change, ConfigMaps are edited, and a write may have failed."""
        while True:
            await asyncio.sleep(every_s)
            try:
                listed = await self._cluster.list(GUARDRAIL_POLICIES)
            except TROUBLE as error:
                logger.warning("policies were not looked at: %s", error)
                continue
            for found in listed:
                await self._looked_at(_name(found), found["metadata"]["namespace"])

    async def _looked_at(self, name: str, namespace: str) -> None:
        try:
            await self.reconcile(name, namespace)
        except TROUBLE as error:
            logger.warning("policy %s/%s is looked at again later: %s", namespace, name, error)

    async def reconcile(self, name: str, namespace: str) -> None:
        """ConfigMap and status as the spec says. Idempotent: nothing is written that is so already."""
        found = await self._cluster.get(GUARDRAIL_POLICIES, name, namespace)
        if found is None or "deletionTimestamp" in found["metadata"]:
            return
        status = dict(found.get("status", {}))
        try:
            version = policy_of(found).version_hash
            if await self._kept(found):
                self._audit("apply_policy", KIND, _named(found), outcome="ok", version=version)
                await self._tell(found, "Normal", "Applied", f"version {version} is in {config_map_of(_name(found))}")
            status |= {"version": version, "configMap": config_map_of(_name(found))}
            valid = _condition(found, "True", "Valid", "")
        except (PolicyError, Foreign) as error:
            reason = "Invalid" if isinstance(error, PolicyError) else "NameTaken"
            valid = _condition(found, "False", reason, str(error))
            if valid not in status.get("conditions", ()):
                self._audit("apply_policy", KIND, _named(found), outcome="refused", reason=str(error))
                await self._tell(found, "Warning", reason, str(error))
        status |= {"conditions": [valid], "observedGeneration": found["metadata"]["generation"]}
        status |= await self._who_runs_it(found, status.get("version", ""))
        if status != found.get("status"):
            await self._cluster.patch(
                GUARDRAIL_POLICIES, _name(found), {"status": status}, found["metadata"]["namespace"], status=True
            )

    async def _tell(self, found: Object, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        about = found | {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND}
        await tell(self._cluster, about, kind, reason, message, once=str(found["metadata"]["generation"]))

    async def _kept(self, found: Object) -> bool:
        """Whether the ConfigMap had to be written. Raises Foreign."""
        name, namespace = config_map_of(_name(found)), found["metadata"]["namespace"]
        wanted = text_of(found)
        stored = await self._cluster.get(CONFIG_MAPS, name, namespace)
        if stored and not _owns(found, stored):
            raise Foreign(f"ConfigMap {name} is there and not of this policy: delete it, or name the policy otherwise")
        if stored and stored.get("data") == {FILE: wanted}:
            return False
        if stored:
            gone = {key: None for key in stored.get("data", {}) if key != FILE}
            await self._cluster.patch(CONFIG_MAPS, name, {"data": {**gone, FILE: wanted}}, namespace)
        else:
            await self._cluster.create(CONFIG_MAPS, _config_map(found, name, wanted))
        return True

    async def _who_runs_it(self, found: Object, version: str) -> Object:
        name, namespace = _name(found), found["metadata"]["namespace"]
        pods = mounting(await self._cluster.list(PODS, namespace), config_map_of(name))
        told = await running(pods, name)
        states = [each.state(version) for each in told]
        for state in _ORDER:
            self._pods.labels(namespace, name, state).set(states.count(state))
        return {"current": f"{states.count('current')}/{len(states)}", "pods": _listed(told, version)}


def _listed(told: Sequence[Running], version: str) -> list[Object]:
    ordered = sorted(told, key=lambda each: (_ORDER[each.state(version)], each.name))
    shown = [{**each._asdict(), "state": each.state(version)} for each in ordered[:_MOST_PODS]]
    return [{key: value for key, value in each.items() if value} for each in shown]


def _condition(found: Object, status: str, reason: str, message: str) -> Object:
    told = found.get("status", {}).get("conditions", ())
    valid = condition("Valid", status, reason, message, told, datetime.datetime.now(datetime.UTC))
    return valid | {"observedGeneration": found["metadata"]["generation"]}


def _config_map(found: Object, name: str, text: str) -> Object:
    owner = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "name": _name(found),
        "uid": found["metadata"]["uid"],
        "controller": True,
    }
    metadata = {"name": name, "namespace": found["metadata"]["namespace"], "ownerReferences": [owner]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {FILE: text}}


def _owns(found: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    return any(each["uid"] == found["metadata"]["uid"] for each in stored["metadata"].get("ownerReferences") or ())


def _name(found: Mapping[str, Any]) -> str:
    return str(found["metadata"]["name"])


def _named(found: Mapping[str, Any]) -> str:
    return f"{found['metadata']['namespace']}/{_name(found)}"


def register(registry: kopf.OperatorRegistry, operator: Operator) -> None:
    """No finalizer is left on a policy, nor a note of kopf's: who uninstalls the operator need clear up nothing."""
    controller = _Controller(operator)
    kopf.on.event(GROUP, VERSION, PLURAL, id="policy-changed", registry=registry)(controller.changed)

    async def start(memo: kopf.Memo, **_: Any) -> None:
        memo.policies = asyncio.create_task(controller.watch(operator.settings.policy_poll_s))

    async def stop(memo: kopf.Memo, **_: Any) -> None:
        memo.policies.cancel()

    kopf.on.startup(id="policies-watched", registry=registry)(start)
    kopf.on.cleanup(id="policies-left", registry=registry)(stop)
