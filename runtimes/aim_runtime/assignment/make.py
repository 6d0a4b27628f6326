"""One model's assignment."""

from __future__ import annotations

from collections.abc import Sequence

from .devices import gpus
from .elsewhere import assign_elsewhere
from .facts import Assignment, Case
from .on_cpus import assign_cpus
from .on_gpus import assign_gpus

#: Engines that compute on GPUs where there are any. The embedded one is built for processors.
ON_GPUS = frozenset({"vllm"})
#: Engines whose memory is summed up before they start.
SIZED = ON_GPUS | {"llama_cpp"}


def assign(case: Case, notes: Sequence[str] = ()) -> Assignment:
    """What the engine gets of the node for the model. Pure: the same facts give the same answer. notes: what else must
    be said of it.

    Raises:
        Refused: it does not fit, or the node is not as the settings say: one line with field, value and remedy.
    """
    if case.engine not in SIZED:
        found = assign_elsewhere(case)
    else:
        found = assign_gpus(case) if uses_gpus(case) else assign_cpus(case)
    if not notes:
        return found
    basis = found.evidence.model_copy(update={"notes": (*notes, *found.evidence.notes)})
    return found.model_copy(update={"evidence": basis})


def uses_gpus(case: Case) -> bool:
    """Whether the engine runs on the node's GPUs."""
    return case.engine in ON_GPUS and bool(gpus(case.node))
