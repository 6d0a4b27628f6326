"""GuardrailPolicies before they are stored or deleted: read as the guardrail does, and not taken from under one."""

from __future__ import annotations

from typing import Any

import kopf

from aim_guardrail.policy import PolicyError
from aim_kserve.settings import ANNOTATION_PREFIX
from aim_operator.cluster import INFERENCE_SERVICES, TROUBLE
from aim_operator.operator import Operator
from aim_profile.kubernetes.definition import GROUP, VERSION

from .crd import KIND, PLURAL
from .text import policy_of

ANNOTATION = f"{ANNOTATION_PREFIX}guardrail-policy"


def register(registry: kopf.OperatorRegistry, operator: Operator) -> None:
    """One handler for all operations."""

    async def validate(*, body: kopf.Body, userinfo: kopf.UserInfo, **more: Any) -> None:
        if "deletionTimestamp" in body["metadata"] and more["operation"] != "DELETE":
            return  # its finalizers are taken away
        name, namespace = str(body["metadata"]["name"]), str(body["metadata"]["namespace"])
        try:
            problem = await _problem(operator, body, name, namespace, is_deleted=more["operation"] == "DELETE")
        except TROUBLE as error:
            raise kopf.AdmissionError(f"aim-operator could not ask the cluster ({error}); try again", 503) from None
        if problem is not None:
            by = str(userinfo.get("username", ""))
            operator.audit("validate", KIND, f"{namespace}/{name}", outcome="refused", by=by, reason=problem)
            raise kopf.AdmissionError(problem, code=422)

    kopf.on.validate(GROUP, VERSION, PLURAL, id="validate-guardrailpolicy", registry=registry)(validate)


async def _problem(operator: Operator, body: kopf.Body, name: str, namespace: str, *, is_deleted: bool) -> str | None:
    """What is wrong with it, field, value and remedy; None: nothing is."""
    if not is_deleted:
        try:
            policy_of(body)
        except PolicyError as error:
            return str(error)
        return None
    users = [
        each["metadata"]["name"]
        for each in await operator.cluster.list(INFERENCE_SERVICES, namespace)
        if (each["metadata"].get("annotations") or {}).get(ANNOTATION) == name
    ]
    if not users:
        return None
    told = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
    return f"metadata.name: {name!r}: guards InferenceService {told}; name another policy there first ({ANNOTATION})"
