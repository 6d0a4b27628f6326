"""One model's assignment."""

from __future__ import annotations

from collections.abc import Sequence

from aim_profile.models.facts import ModelFacts
from aim_profile.nodes.facts import Node
from aim_profile.serving.profile import Profile
from aim_profile.serving.selection import Candidate
from aim_runtime.settings import RuntimeSettings

from .arguments import named
from .devices import Taken, gpus
from .facts import Assignment, Basis, Refused
from .on_gpus import Case, assign_gpus

#: Settings that name a part of a GPU, by their annotations.
_OF_GPUS = (
    "compute_partition",
    "memory_partition",
    "partition_id",
    "partition_count",
    "gpu_sharing",
    "gpu_model",
    "card",
)


def assign(
    settings: RuntimeSettings,
    engine: str,
    node: Node,
    model: ModelFacts | None,
    profile: Profile | None = None,
    *,
    stored: Sequence[Candidate] = (),
    in_pod: bool = False,
    taken: Taken = frozenset(),
    notes: Sequence[str] = (),
) -> Assignment:
    """What `engine` gets of `node` for `model`. Pure: the same facts give the same answer.

    model None: its facts could not be read, and nothing is sized. stored: profiles to select from where none is given.
    taken: (card, partition) that others have. notes: what else must be said of it.

    Raises:
        Refused: it does not fit, or the node is not as the settings say: one line with field, value and remedy.
    """
    if engine == "vllm" and gpus(node):
        found = assign_gpus(Case(settings, engine, node, model, profile, stored, in_pod, taken))
    else:
        found = _without_gpu(settings, engine, node)
    if not notes:
        return found
    basis = found.evidence.model_copy(update={"notes": (*notes, *found.evidence.notes)})
    return found.model_copy(update={"evidence": basis})


def _without_gpu(settings: RuntimeSettings, engine: str, node: Node) -> Assignment:
    for name in _OF_GPUS:
        if (value := getattr(settings, name)) is not None:
            field = name.replace("_", "-")
            why = f"the {engine} engine computes on the CPU" if gpus(node) else "no AMD GPU is here"
            raise Refused(f"{field} {value}: {why}", field=field, value=value, remedy="leave it out")
    return Assignment(
        engine=engine,
        model=settings.model_name,
        model_dir=settings.model_dir,
        engine_args=named(settings.engine_options("vllm").get("engine_args", ())) if engine == "vllm" else {},
        evidence=Basis(node=node.backend),
    )
