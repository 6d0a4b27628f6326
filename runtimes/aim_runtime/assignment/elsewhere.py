"""A model on an engine whose memory this runtime cannot sum up: somebody else's server, SGLang, an installed engine."""

from __future__ import annotations

from .arguments import Flags
from .facts import Assignment, Basis, Case, Refused

#: What would name devices, or memory on them: only an engine that is given its devices can keep to it.
_OF_DEVICES = (
    "card",
    "compute_partition",
    "evidence",
    "gpu_model",
    "gpu_sharing",
    "memory_limit",
    "memory_partition",
    "partition_count",
    "partition_id",
    "profile",
)


def assign_elsewhere(case: Case) -> Assignment:
    """No devices, no sum: the engine takes what it sees, and its own settings say how much.

    Raises:
        Refused: the settings ask for devices, which nobody would see to.
    """
    settings = case.settings
    for name in _OF_DEVICES:
        if (value := getattr(settings, name)) is not None:
            field = name.replace("_", "-")
            raise Refused(
                f"{field} {value}: this runtime neither sizes the {case.engine} engine nor gives it devices",
                field=field,
                value=str(value),
                remedy="leave it out: the engine's own settings say what it uses",
            )
    said = {"max-model-len": settings.max_model_len, "max-concurrency": settings.max_concurrency}
    flags: Flags = {name: value for name, value in said.items() if value is not None}
    return Assignment(
        engine=case.engine,
        model=settings.model_name,
        model_dir=settings.model_dir,
        engine_args=flags,
        evidence=Basis(node=case.node.backend, notes=(f"not sized: the memory of {case.engine} is its own to know",)),
    )
