"""What every model of a models file is started with. Needs no server: a dry run asks for it, too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aim_kserve.errors import StartupError
from aim_runtime.assignment import Assignment
from aim_runtime.models.file import ModelsFile
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import prepare_all

_REPLICA = " replica "  # no served name has a blank


def assigned(listed: ModelsFile, own: Sequence[RuntimeSettings], plan: Path | None) -> list[Assignment]:
    """What every model of the file is started with. Without a plan, those at the start get devices of their own, the
    others what they would get alone: they are loaded where it is free by then.

    own: the settings of ``listed.served``.

    Raises:
        StartupError: a model does not fit, the plan is not for this node, or both say how many replicas.
    """
    if plan is not None:
        if said := next((model for model in listed.served if "replicas" in model.model_fields_set), None):
            raise StartupError(f"model {said.name}: how many replicas, the plan says: leave replicas out")
        return prepare_all(own, plan, named=True)
    pairs = list(zip(listed.served, own, strict=True))
    at_start = [each for model, one in pairs if model.load == "at_start" for each in _replicas(one, model.replicas)]
    later = [_replicas(one, model.replicas) for model, one in pairs if model.load == "on_demand"]
    found = [each for group in (at_start, *later) if group for each in prepare_all(group, None, named=True)]
    return [_named(each) for each in found]


def _replicas(settings: RuntimeSettings, count: int) -> list[RuntimeSettings]:
    """Without a plan, a replica is assigned its devices like a model of its own."""
    if count == 1:
        return [settings]
    names = [f"{settings.model_name}{_REPLICA}{number}" for number in range(count)]
    return [settings.model_copy(update={"model_name": name}) for name in names]


def _named(assignment: Assignment) -> Assignment:
    name, replica, number = assignment.model.rpartition(_REPLICA)
    if not replica:
        return assignment
    return assignment.model_copy(update={"model": name, "replica": int(number)})
