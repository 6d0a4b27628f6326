"""A job's conditions, from what KubeRay says of its RayJob. The one that holds stands last, as the column shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

from aim_operator.condition import condition

State = Literal["Created", "Running", "Suspended", "Failed", "Complete"]
_STATES: tuple[State, ...] = ("Created", "Running", "Suspended", "Failed", "Complete")
#: KubeRay 1.7, JobDeploymentStatus.
_OF_RAY: Mapping[str, State] = {
    "Running": "Running",
    "Retrying": "Running",
    "Suspending": "Suspended",
    "Suspended": "Suspended",
    "Failed": "Failed",
    "Complete": "Complete",
}


class Now(NamedTuple):
    """What holds, why in one word, and in a sentence."""

    state: State
    reason: str
    message: str


def state_of(ray_job: Mapping[str, Any]) -> Now:
    """Of a RayJob; one that KubeRay has not looked at yet is Created."""
    status = ray_job.get("status") or {}
    deployed, job = status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""
    failed = int(status.get("failed") or 0)
    said = str(status.get("message") or "")
    if deployed == "Complete" and job != "SUCCEEDED":
        deployed = "Failed"
    state = _OF_RAY.get(deployed, "Created")
    if state == "Failed":
        return Now(state, str(status.get("reason") or "AppFailed"), said or "the run failed; its report says why")
    if deployed == "Retrying" or (state in ("Created", "Running") and failed):
        return Now(state, "Retrying", f"try {failed + 1}: goes on from the newest checkpoint{said and f': {said}'}")
    return Now(state, deployed or "RayJobCreated", said or _SAID[state])


_SAID: Mapping[State, str] = {
    "Created": "waits for its pods",
    "Running": "its pods run",
    "Suspended": "its devices are given back, its checkpoints kept",
    "Complete": "trained, judged and published",
    "Failed": "",
}


def conditions(now: Now, before: Sequence[Mapping[str, Any]], generation: int, at: datetime) -> list[dict[str, Any]]:
    """Those that ever held, the one that does last; the time of one that is as before stays."""
    known = {each["type"]: each for each in before}
    held = [
        {
            **condition(kind, "False", was.get("reason") or kind, was.get("message") or "", before, at),
            "observedGeneration": was.get("observedGeneration", generation),
        }
        for kind in _STATES
        if kind != now.state and (was := known.get(kind)) is not None
    ]
    holds = condition(now.state, "True", now.reason, now.message[:1024], before, at)
    return [*held, {**holds, "observedGeneration": generation}]
