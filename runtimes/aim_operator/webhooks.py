"""The webhooks, each with its handler in kopf's registry.

What cannot be asked of the cluster is refused for the time being (503): an InferenceService that nobody looked at is
not let in. Those of other runtimes are let in unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import kopf
from prometheus_client import Counter

from aim_kserve.settings import ANNOTATION_PREFIX, SettingsError
from aim_profile.errors import AimProfileError

from .admission import annotated, defaults, fit, guardrail
from .admission.denied import Denied
from .admission.nodes import Devices
from .admission.service import Service, named_runtime
from .cluster import (
    CLUSTER_SERVING_RUNTIMES,
    GUARDRAIL_POLICIES,
    INFERENCE_SERVICES,
    NODES,
    SERVING_RUNTIMES,
    TROUBLE,
    Cluster,
    Object,
)
from .finetuning.controller import register_reports
from .notes import DEFAULTS, GUARDRAIL
from .operator import Operator
from .policies import webhook as policies

logger = logging.getLogger("aim.operator.webhooks")

#: What the webhooks note; other notes under status.aim.amd.com/ are none of their business.
_OWN = (DEFAULTS, GUARDRAIL)

_KIND = (INFERENCE_SERVICES.api_version.partition("/")[0], "v1beta1", INFERENCE_SERVICES.plural)


class _Webhooks:
    def __init__(self, operator: Operator) -> None:
        self._cluster, self._audit = operator.cluster, operator.audit
        self._image = operator.settings.guardrail_image
        self._reviews = Counter(
            "aim_operator_admission_reviews",
            "InferenceServices looked at, by webhook and outcome: allowed, denied, failed, foreign",
            ["webhook", "outcome"],
            registry=operator.metrics,
        )

    async def validate(self, *, body: kopf.Body, userinfo: kopf.UserInfo, warnings: list[str], **more: Any) -> None:
        """Raises kopf.AdmissionError."""
        service = await self._read("validate", body, more)
        if service is None:
            return
        try:
            warnings += await self._checked(service)
        except (Denied, AimProfileError) as error:
            raise self._denied("validate", body, userinfo, error) from None
        except TROUBLE as error:
            raise self._failed("validate", error) from None
        self._reviews.labels("validate", "allowed").inc()

    async def mutate(self, *, body: kopf.Body, userinfo: kopf.UserInfo, patch: kopf.Patch, **more: Any) -> None:
        """Raises kopf.AdmissionError."""
        service = await self._read("mutate", body, more)
        if service is None:
            return
        try:
            done = await self._completed(service)
        except SettingsError:
            return  # said by the validating webhook, with what stands there
        except (Denied, AimProfileError) as error:
            raise self._denied("mutate", body, userinfo, error) from None
        except TROUBLE as error:
            raise self._failed("mutate", error) from None
        _patch(patch, service.body, done)
        self._reviews.labels("mutate", "allowed").inc()

    async def _completed(self, service: Service) -> Object:
        bare = Service(defaults.taken_out(guardrail.taken_out(service.body)), service.runtime)
        done = defaults.fill(bare, Devices(await self._cluster.list(NODES)))
        policies = await self._policies(service.body["metadata"].get("namespace"))
        return guardrail.place(done, policies, self._image)

    async def _checked(self, service: Service) -> Sequence[str]:
        namespace = service.body["metadata"].get("namespace")
        policies = await self._policies(namespace)
        annotated.check(service, policies)
        return fit.check(service, Devices(await self._cluster.list(NODES)))

    async def _policies(self, namespace: str) -> Mapping[str, Object]:
        found = await self._cluster.list(GUARDRAIL_POLICIES, namespace)
        return {each["metadata"]["name"]: each["spec"] for each in found}

    async def _read(self, webhook: str, body: Mapping[str, Any], review: Mapping[str, Any]) -> Service | None:
        """None: it is nothing of ours, or has been looked at. Raises kopf.AdmissionError."""
        if review["operation"] == "DELETE" or _is_settled(body, review["old"]):
            return None
        try:
            service = Service(_plain(body), await runtime_of(self._cluster, body))
        except TROUBLE as error:
            raise self._failed(webhook, error) from None
        if service.is_ours:
            return service
        self._reviews.labels(webhook, "foreign").inc()
        return None

    def _denied(
        self, webhook: str, body: kopf.Body, user: kopf.UserInfo, error: Denied | AimProfileError
    ) -> kopf.AdmissionError:
        self._reviews.labels(webhook, "denied").inc()
        name = f"{body['metadata'].get('namespace')}/{body['metadata'].get('name')}"
        by = str(user.get("username", ""))
        self._audit(webhook, INFERENCE_SERVICES.kind, name, outcome="refused", by=by, reason=str(error))
        return kopf.AdmissionError(str(error), code=422)

    def _failed(self, webhook: str, error: Exception) -> kopf.AdmissionError:
        self._reviews.labels(webhook, "failed").inc()
        logger.warning("%s: the cluster could not be asked: %s", webhook, error)
        return kopf.AdmissionError(f"aim-operator could not ask the cluster ({error}); try again", code=503)


def _is_settled(body: Mapping[str, Any], old: Mapping[str, Any] | None) -> bool:
    """Whether it goes, or says nothing new to us: a node that is away keeps nobody from a finalizer or a label."""
    if "deletionTimestamp" in body["metadata"]:
        return True
    return old is not None and _said(body) == _said(old)


def _said(body: Mapping[str, Any]) -> tuple[Any, Any]:
    annotations = body["metadata"].get("annotations") or {}
    ours = {key: value for key, value in annotations.items() if key.startswith(ANNOTATION_PREFIX) or key in _OWN}
    return _plain(body.get("spec")), ours


async def runtime_of(cluster: Cluster, body: Mapping[str, Any]) -> Object | None:
    """The runtime that an InferenceService names: its namespace's own, else the cluster's; None: it is not there."""
    name = named_runtime(body)
    if name is None:
        return None
    own = await cluster.get(SERVING_RUNTIMES, name, body["metadata"].get("namespace"))
    return own or await cluster.get(CLUSTER_SERVING_RUNTIMES, name)


def _patch(patch: kopf.Patch, before: Object, after: Object) -> None:
    """The fields that differ, as kopf's merge patch: it writes the JSON patch of it."""
    for key in ("metadata", "spec"):
        if changed := _difference(before.get(key, {}), after.get(key, {})):
            patch[key] = changed


def _difference(before: Object, after: Object) -> Object:
    found: Object = {key: None for key in before if key not in after}
    for key, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            if inner := _difference(before[key], value):
                found[key] = inner
        elif key not in before or before[key] != value:
            found[key] = value
    return found


def _plain(value: Any) -> Any:
    """kopf's read-only views as dictionaries of our own."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def register(registry: kopf.OperatorRegistry, operator: Operator) -> None:
    """All of them."""
    webhooks = _Webhooks(operator)
    policies.register(registry, operator)
    kopf.on.mutate(*_KIND, id="mutate-inferenceservice", registry=registry)(webhooks.mutate)
    kopf.on.validate(*_KIND, id="validate-inferenceservice", registry=registry)(webhooks.validate)
    register_reports(registry, operator)
