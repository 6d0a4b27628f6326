"""The file of ``--qos_policy``: classes, tenants, limits, and what is done when promises are at risk.

version: 1
classes:
  high: {reserve_slots: 0, max_waiting: 256, slo: {ttft_ms: 500, target: 0.99}}
  low: {reserve_slots: 2, kv_ceiling: 0.8}
tenants: {acme: {weight: 3}}
limits:
- {tenant: acme, class: low, tokens_per_minute: 600000, burst_s: 30}
ageing_s: 30
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from aim_kserve.identity.caller import QosClass
from aim_profile.errors import AimProfileError
from aim_profile.files.place import MisplacedError
from aim_profile.files.read import check_as, parsed, read_text

from .request import CLASSES

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Positive = Annotated[float, Field(gt=0, lt=math.inf, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Weight = Annotated[float, Field(ge=0.001, le=1000, strict=True)]
Count = Annotated[int, Field(ge=0, le=1_000_000, strict=True)]


_CEILINGS: Mapping[QosClass, float] = {"high": 1.0, "medium": 0.95, "low": 0.9}


class QosPolicyError(AimProfileError):
    """A policy file that cannot be used. ``field`` is the path of the key: ``classes.low.kv_ceiling``."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)


class SloPolicy(_Part):
    """What a class is promised: the first token within ``ttft_ms`` of the arrival for ``target`` of its requests."""

    ttft_ms: Positive
    target: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.99


class ClassPolicy(_Part):
    """What one class may take.

    reserve_slots: slots that it leaves free for the classes above; None: a share of the slots (``ledger.reserves``).
    kv_ceiling: the share of the KV tokens up to which it is dispatched; None: 1.0 for high, 0.95, 0.9 for
    low. max_waiting: more are ``queue_full``.
    slo: requests that name no deadline of their own have this one.
    """

    reserve_slots: Count | None = None
    kv_ceiling: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    max_waiting: Count = 256
    slo: SloPolicy | None = None


_UNLISTED = ClassPolicy()


class TenantPolicy(_Part):
    """weight: of two tenants who both wait, one of weight 2 is served twice the tokens of one of weight 1."""

    weight: Weight = 1.0


class Limit(_Part):
    """A rate. It holds for each model, class and tenant apart, or for those alone that it names; of several that match
    all hold. burst_s: so many seconds' worth can be saved up and spent at once.
    """

    model: Name | None = None
    qos_class: QosClass | None = Field(None, alias="class")
    tenant: Name | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    burst_s: Positive = 60.0

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.requests_per_minute is None and self.tokens_per_minute is None:
            raise ValueError("limits nothing: give requests_per_minute or tokens_per_minute")
        return self


class Enforcement(_Part):
    """While high burns its error budget ``burn_rate`` times faster than it may (over 5 min and 1 h), the class
    ``throttle`` is dispatched to ``share`` of the slots only. The default rate is the SRE workbook's for a page.
    """

    burn_rate: Positive = 14.4
    throttle: Literal["medium", "low"] = "low"
    share: Share = 0.0


def _number(value: Any) -> Any:
    """Python takes True and 1.0 for 1."""
    return value if type(value) is int else str(value)


class QosPolicy(_Part):
    """All of it; every key but ``version`` may be left out.

    default_weight: of tenants that are not listed. ageing_s: a low request that has waited so long is served as medium,
    and any below high then has part in ``floor``, the share of the tokens served that they get even while high alone
    could fill the engine. preemption: whether an engine that can pause a running request does so for one of a higher
    class. replay: whether one that has sent nothing yet may be aborted for one of a higher class, and begun again later
    (engines that cannot pause). epsilon: by how much of a deadline a prediction may miss it before the request is
    refused. enforcement: None: nothing is done about a burning budget but to show it.
    """

    version: Annotated[Literal[1], BeforeValidator(_number)]
    classes: Mapping[QosClass, ClassPolicy] = Field(default_factory=dict)
    tenants: Mapping[Name, TenantPolicy] = Field(default_factory=dict)
    default_weight: Weight = 1.0
    limits: tuple[Limit, ...] = ()
    ageing_s: Positive = 30.0
    floor: Annotated[float, Field(ge=0, le=0.5, strict=True)] = 0.02
    preemption: Literal["pause", "off"] = "pause"
    replay: Annotated[bool, Field(strict=True)] = False
    epsilon: Annotated[float, Field(ge=0, le=10, strict=True)] = 0.2
    enforcement: Enforcement | None = None

    @classmethod
    def default(cls) -> QosPolicy:
        """What holds without a file."""
        return cls(version=1)

    @classmethod
    def read(cls, path: Path) -> QosPolicy:
        """The file.

        Raises:
            QosPolicyError: ``file:LINE: classes.low.kv_ceiling: …``, with what to do about it.
        """
        return cls.parse(read_text(path, QosPolicyError), str(path))

    @classmethod
    def parse(cls, text: str, named: str) -> QosPolicy:
        """The same from text; ``named`` stands in errors for the file."""
        return check_as(cls, parsed(text, named, QosPolicyError), QosPolicyError, "QoS policy")

    def of(self, qos_class: QosClass) -> ClassPolicy:
        """What holds for that class, listed or not."""
        return self.classes.get(qos_class, _UNLISTED)

    def ceiling(self, qos_class: QosClass) -> float:
        """Up to which share of the KV tokens it is dispatched."""
        listed = self.of(qos_class).kv_ceiling
        return _CEILINGS[qos_class] if listed is None else listed

    def weight(self, tenant: str) -> float:
        """That tenant's weight."""
        listed = self.tenants.get(tenant)
        return self.default_weight if listed is None else listed.weight

    def of_model(self, own: QosClass, latency_slo_ms: float | None) -> QosPolicy:
        """As a model keeps it that promises its own class a first token within ``latency_slo_ms``: the classes above
        are promised no less, those below what stands here. All classes are listed in it."""
        classes = {name: self.of(name) for name in CLASSES}
        if latency_slo_ms is None:
            return self.model_copy(update={"classes": classes})
        for name in CLASSES[: CLASSES.index(own) + 1]:
            slo = classes[name].slo or SloPolicy(ttft_ms=latency_slo_ms)
            ttft_ms = latency_slo_ms if name == own else min(slo.ttft_ms, latency_slo_ms)
            classes[name] = classes[name].model_copy(update={"slo": slo.model_copy(update={"ttft_ms": ttft_ms})})
        return self.model_copy(update={"classes": classes})

    @model_validator(mode="after")
    def _lower_classes_get_no_more(self) -> Self:
        for above, below in combinations(CLASSES, 2):
            most, more = self.ceiling(above), self.ceiling(below)
            if more > most:
                problem = f"{below} has {more}, {above} {most}: give {below} no more than {above}"
                raise MisplacedError(self._place(above, below, "kv_ceiling"), problem)
            least, less = self.of(above).reserve_slots, self.of(below).reserve_slots
            if least is not None and less is not None and less < least:
                problem = f"{below} leaves {less} free, {above} {least}: let {below} leave free at least as many"
                raise MisplacedError(self._place(above, below, "reserve_slots"), problem)
        return self

    def _place(self, above: QosClass, below: QosClass, key: str) -> tuple[str, ...]:
        """Where the file says it: of one of the two it may be the default."""
        listed = self.classes.get(below)
        return ("classes", below if listed is not None and key in listed.model_fields_set else above, key)


def policy_of(file: Path | None) -> QosPolicy:
    """What ``--qos_policy`` says, or what holds without it.

    Raises:
        QosPolicyError: the file cannot be used: its line, the key and the remedy.
    """
    return QosPolicy.default() if file is None else QosPolicy.read(file)
