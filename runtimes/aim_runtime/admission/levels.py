"""Which class, tenant and deadline a request has: from its caller and its model. Headers may only ask for less."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from aim_kserve.errors import BadRequest
from aim_kserve.identity import QosClass, current_caller
from aim_runtime.engines.base import Json
from aim_runtime.fields import shown
from aim_runtime.qos.policy import QosPolicy
from aim_runtime.qos.request import CLASSES

CLASS_HEADER = "x-qos-priority"
DEADLINE_HEADER = "x-slo-ttft-ms"
_OURS = frozenset({CLASS_HEADER.encode(), DEADLINE_HEADER.encode()})
#: What the engine is told (``RequestContext.priority``): lower is served first.
PRIORITY: Mapping[QosClass, int] = {"high": -1, "medium": 0, "low": 1}
#: https://platform.openai.com/docs/api-reference/chat/create#chat-create-service_tier: ``flex`` is cheaper and slower.
_TIERS = frozenset({"auto", "default", "flex", "priority", "scale"})
_RANK = {name: rank for rank, name in enumerate(CLASSES)}
#: Of callers that are not told apart.
EVERYBODY = "default"


class Level(NamedTuple):
    """``ttft_slo_s``: the first token is wanted within so many seconds; None: whenever."""

    tenant: str
    qos_class: QosClass
    ttft_slo_s: float | None


class Levels:
    """Of one model.

    Args:
        policy: what each class is promised.
        own: the class of callers that have none.
    """

    def __init__(self, policy: QosPolicy, own: QosClass) -> None:
        self._own = own
        slos = {name: policy.of(name).slo for name in CLASSES}
        self._slo_s = {name: None if slo is None else slo.ttft_ms / 1e3 for name, slo in slos.items()}

    def of(self, body: Json, headers: Mapping[str, str]) -> Level:
        """Raises BadRequest: a header or ``service_tier`` that says nothing known."""
        caller = current_caller()
        tenant, qos_class = (EVERYBODY, None) if caller is None else (caller.tenant, caller.qos_class)
        qos_class = qos_class or self._own
        asked, wanted = _given(headers)
        if asked is None and wanted is None and "service_tier" not in body:
            return Level(tenant, qos_class, self._slo_s[qos_class])
        qos_class = _lower(_lower(qos_class, _asked(asked)), _tier(body.get("service_tier")))
        slo_s, wanted_s = self._slo_s[qos_class], _deadline_s(wanted)
        if wanted_s is not None and (slo_s is None or wanted_s < slo_s):
            slo_s = wanted_s
        return Level(tenant, qos_class, slo_s)


def _given(headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Both headers. Those of ASGI are a list, in which each look-up of one that is not there is a search of its own."""
    raw: Iterable[tuple[bytes, bytes]] | None = getattr(headers, "raw", None)
    if raw is not None:
        for name, _ in raw:
            if name in _OURS:
                break
        else:
            return None, None
    return headers.get(CLASS_HEADER), headers.get(DEADLINE_HEADER)


def _lower(one: QosClass, other: QosClass | None) -> QosClass:
    return one if other is None or _RANK[other] <= _RANK[one] else other


def _asked(value: str | None) -> QosClass | None:
    if value is None:
        return None
    found = next((name for name in CLASSES if name == value.strip().lower()), None)
    if found is None:
        raise BadRequest(f"{CLASS_HEADER}: {shown(value)!r} is no class: give high, medium or low", param=CLASS_HEADER)
    return found


def _tier(value: object) -> QosClass | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value not in _TIERS:
        raise BadRequest(
            f"service_tier: {shown(str(value))!r} is no tier: give auto, default or flex", param="service_tier"
        )
    return "low" if value == "flex" else None


def _deadline_s(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise BadRequest(
            f"{DEADLINE_HEADER}: {shown(value)!r} is no time: give milliseconds > 0", param=DEADLINE_HEADER
        )
    return milliseconds / 1e3
