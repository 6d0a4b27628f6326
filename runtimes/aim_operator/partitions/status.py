"""What a PartitionPlan's status keeps: all that the walk must know after a crash, and what people read."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

#: In the order a node goes through them; those between the first and the last two are under way.
Phase = Literal[
    "Pending",
    "Draining",
    "Tainting",
    "Applying",
    "WaitingOperator",
    "Verifying",
    "Refreshing",
    "WaitingAllocatable",
    "Uncordoning",
    "Succeeded",
    "Failed",
]
PlanPhase = Literal["Pending", "Refused", "Running", "Suspended", "Succeeded", "Failed"]
RESTING: frozenset[Phase] = frozenset({"Pending", "Succeeded", "Failed"})


class _Kept(BaseModel):
    """What stands in an API server; keys of a later release are read past."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    def as_object(self) -> dict[str, Any]:
        """As the status holds it; what is empty is left out."""
        shown = self.model_dump(by_alias=True, mode="json", exclude_none=True)
        return {key: value for key, value in shown.items() if value not in ("", [], False)}


class NodeStatus(_Kept):
    """One node's way. generation, modes, devices: the plan's, when its way began: a plan that is edited meanwhile waits
    for its end. since: when the phase began; touched: the Device Config Manager was asked, now or in an earlier
    attempt; cleared: its old answer is gone; operands: uids of pods that must start anew.
    """

    name: str
    phase: Phase = "Pending"
    reason: str = Field(default="", description="one word, of a failure or of what is waited for")
    message: str = ""
    was: str = Field(default="", alias="from", description="the modes before: CPX/NPS4")
    to: str = ""
    profile: str = Field(default="", description="of the Device Config Manager")
    generation: int = 0
    modes: tuple[str, ...] = ()
    devices: tuple[int, ...] = ()
    attempts: int = 0
    since: datetime | None = None
    next_try_at: datetime | None = None
    touched: bool = False
    cleared: bool = False
    operands: tuple[str, ...] = ()
    drift: str = Field(default="", description="what is no longer as it was verified")


class PlaceStatus(_Kept):
    """Where a replica is. card, partition: in the node's order, `0` or `0,1`; source: claim (the DRA driver said so),
    or plan (the device plugin tells nobody which of equal devices it gave).
    """

    namespace: str = ""
    service: str = Field(description="the InferenceService")
    replica: str
    pod: str = ""
    node: str = ""
    card: str = ""
    partition: str = ""
    mode: str = ""
    source: str = ""
    drift: str = ""
