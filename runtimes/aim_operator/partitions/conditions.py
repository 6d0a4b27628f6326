"""A PartitionPlan's conditions, as Kubernetes' API conventions want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from aim_operator.condition import condition

_READY = {"Succeeded": ("True", "AsPlanned", "every node is as planned")}
_MOVES = {"Running": ("True", "Switching", "a node is under way")}


def conditions(
    phase: str,
    reason: str,
    message: str,
    drift: Sequence[str],
    before: Sequence[Mapping[str, Any]],
    now: datetime,
) -> list[dict[str, Any]]:
    """Ready, Progressing and Drifted; the time of one that is as before stays."""
    said = message or f"the plan is {phase.lower()}"
    ready, progressing = _READY.get(phase), _MOVES.get(phase)
    wanted = [
        ("Ready", *(ready or ("False", reason or phase, said))),
        ("Progressing", *(progressing or ("False", reason or phase, said))),
        ("Drifted", *(("True", "Drift", "; ".join(drift)) if drift else ("False", "AsPlanned", "as verified"))),
    ]
    return [condition(*each, before, now) for each in wanted]
