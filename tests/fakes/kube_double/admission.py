"""Admission webhooks, called as an API server calls them: mutating ones in turn, then validating ones."""

from __future__ import annotations

import base64
import copy
import json
import ssl
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import aiohttp

from .kinds import Kind
from .patches import edited
from .refusal import Refusal
from .selectors import by_labels
from .store import Key, Object, Store


class Asked(NamedTuple):
    """What is about to be done to an object. new: None: it is deleted; old: None: it is created."""

    kind: Kind
    new: Object | None
    old: Object | None
    subresource: str = ""
    dry_run: bool = False

    @property
    def operation(self) -> str:
        return "DELETE" if self.new is None else "UPDATE" if self.old else "CREATE"

    @property
    def object(self) -> Object:
        return self.new or self.old or {}


async def admitted(store: Store, asked: Asked) -> Object | None:
    """The object as mutating webhooks leave it. Raises Refusal where a webhook denies, or fails and must not."""
    for plural in ("mutatingwebhookconfigurations", "validatingwebhookconfigurations"):
        for hook in _hooks(store, plural):
            if _concerns(store, hook, asked):
                answer = await _answered(hook, _review(asked))
                if answer and plural.startswith("mutating") and answer.get("patch") and asked.new is not None:
                    asked = asked._replace(new=edited(asked.new, json.loads(base64.b64decode(answer["patch"]))))
    return asked.new


def _hooks(store: Store, plural: str) -> Iterator[dict[str, Any]]:
    for configuration in list(store.of_kind(store.kinds.get("admissionregistration.k8s.io/v1", plural), "")):
        yield from configuration.get("webhooks") or ()


def _concerns(store: Store, hook: dict[str, Any], asked: Asked) -> bool:
    namespace = store.objects.get(Key("v1", "namespaces", "", asked.object["metadata"].get("namespace", "")))
    return (
        any(_matches(rule, asked) for rule in hook.get("rules") or ())
        and by_labels(asked.object, hook.get("objectSelector") or {})
        and (namespace is None or by_labels(namespace, hook.get("namespaceSelector") or {}))
    )


def _matches(rule: dict[str, Any], asked: Asked) -> bool:
    kind, subresource = asked.kind, asked.subresource
    resource = f"{kind.plural}/{subresource}" if subresource else kind.plural
    any_resource = {"*/*", f"{kind.plural}/*"} if subresource else {"*", "*/*", f"{kind.plural}/*"}
    return (
        bool({asked.operation, "*"} & set(rule["operations"]))
        and bool({kind.group, "*"} & set(rule["apiGroups"]))
        and bool({kind.version, "*"} & set(rule["apiVersions"]))
        and bool({resource, *any_resource} & set(rule["resources"]))
    )


def _review(asked: Asked) -> dict[str, Any]:
    kind, metadata = asked.kind, asked.object["metadata"]
    request = {
        "uid": str(uuid.uuid4()),
        "kind": {"group": kind.group, "version": kind.version, "kind": kind.name},
        "resource": {"group": kind.group, "version": kind.version, "resource": kind.plural},
        **({"subResource": asked.subresource} if asked.subresource else {}),
        "name": metadata.get("name", ""),
        "namespace": metadata.get("namespace", ""),
        "operation": asked.operation,
        "userInfo": {"username": "kubernetes-admin", "uid": "1", "groups": ["system:masters"]},
        "object": copy.deepcopy(asked.new),
        "oldObject": copy.deepcopy(asked.old),
        "dryRun": asked.dry_run,
        "options": {},
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


async def _answered(hook: dict[str, Any], review: dict[str, Any]) -> dict[str, Any] | None:
    """The webhook's response; None: it failed, and its failurePolicy ignores that."""
    try:
        answer = await _call(hook, review)
    except (aiohttp.ClientError, TimeoutError, ssl.SSLError, KeyError, ValueError) as error:
        if hook.get("failurePolicy", "Fail") == "Ignore":
            return None
        told = f'failed calling webhook "{hook["name"]}": {type(error).__name__}: {error}'
        raise Refusal(500, "InternalError", f"Internal error occurred: {told}") from None
    if not answer["allowed"]:
        status = answer.get("status") or {}
        told = f'admission webhook "{hook["name"]}" denied the request: {status.get("message", "")}'
        raise Refusal(status.get("code") or 403, status.get("reason") or "Forbidden", told)
    return answer


async def _call(hook: dict[str, Any], review: dict[str, Any]) -> dict[str, Any]:
    """A service is looked for nowhere: only a webhook's url can be called here."""
    config = hook["clientConfig"]
    trusted = ssl.create_default_context(cadata=base64.b64decode(config["caBundle"]).decode())
    limit = aiohttp.ClientTimeout(hook.get("timeoutSeconds", 10))
    async with (
        aiohttp.ClientSession(timeout=limit) as session,
        session.post(config["url"], json=review, ssl=trusted) as response,
    ):
        response.raise_for_status()
        answer: dict[str, Any] = (await response.json())["response"]
        if answer["uid"] != review["request"]["uid"]:
            raise ValueError(f"expected response.uid {review['request']['uid']}, got {answer['uid']}")
        return answer
