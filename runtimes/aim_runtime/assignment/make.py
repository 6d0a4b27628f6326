"""One model's assignment."""

from __future__ import annotations

from collections.abc import Sequence

from .devices import gpus
from .elsewhere import assign_elsewhere
from .facts import Assignment, Case
from .on_cpus import assign_cpus
from .on_gpus import assign_gpus

#: Engines that compute on GPUs where there are any. The embedded one is built for processors.
ON_GPUS = frozenset({"vllm", "sglang"})
#: Engines that processors and their memory are shared out to.
ON_CPUS = frozenset({"vllm", "llama_cpp"})


def assign(case: Case, notes: Sequence[str] = ()) -> Assignment:
    """What the engine gets of the node for the model. Pure: the same facts give the same answer. notes: what else must
    be said of it.

    Raises:
        Refused: it does not fit, or the node is not as the settings say: one line with field, value and remedy.
    """
    found = _assigned(case)
    if not notes:
        return found
    basis = found.evidence.model_copy(update={"notes": (*notes, *found.evidence.notes)})
    return found.model_copy(update={"evidence": basis})


def _assigned(case: Case) -> Assignment:
    if case.engine in ON_GPUS and gpus(case.node):
        return assign_gpus(case)
    return assign_cpus(case) if case.engine in ON_CPUS else assign_elsewhere(case)
