"""AMD's GPU operator: the names its Device Config Manager listens to, the ConfigMap that holds its profiles, and what
its device plugin advertises.

Sources: ROCm/device-config-manager docs/configuration/configmap.md and configmanager.go (fe98bda): the taint, the
labels, and what it checks: cards of a profile add up to the node's, one memory type a profile. It does not check
whether a compute and a memory mode go together; the planner does. Its taint must not be tolerated by the operands
(gpu-operator docs/dcm/applying-partition-profiles.rst, 04ab1da): they start anew once it is gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Literal

from .plan import PlanError

# The device plugin's resource naming strategy (k8s-device-plugin ed76468): single, `amd.com/gpu` for every partition;
# mixed, a resource for each mode.
Strategy = Literal["mixed", "single"]

TAINT_KEY, TAINT_VALUE, TAINT_EFFECT = "amd-dcm", "up", "NoExecute"
TAINT = f"{TAINT_KEY}={TAINT_VALUE}:{TAINT_EFFECT}"
PROFILE_LABEL = "dcm.amd.com/gpu-config-profile"
STATE_LABEL = "dcm.amd.com/gpu-config-profile-state"
# The node labeller's, of a node whose cards are in one mode (`cpx_nps4`).
PARTITION_LABEL = "amd.com/gpu.compute-memory-partition"
# Operands that look at a node's devices only when they start.
OPERANDS = ("device-plugin", "node-labeller")
# Services that hold /dev/kfd or /dev/dri: a switch fails with `Device busy` while they run.
GPU_SERVICES = ("amd-metrics-exporter", "gpuagent")


def profile_name(modes: Sequence[str]) -> str:
    """The profile of a node whose cards are in these modes, in card order.

    `cpx-nps4-x8`; with mixed compute modes `cpx-nps1-x2-dpx-nps1-x6`.
    """
    return "-".join(f"{mode.lower().replace('/', '-')}-x{count}" for mode, count in _runs(modes))


def profile(modes: Sequence[str]) -> dict[str, Any]:
    """That profile's body: runs of equal modes in card order."""
    parts = []
    for mode, count in _runs(modes):
        compute, _, memory = mode.partition("/")
        parts.append({"computePartition": compute, "memoryPartition": memory, "numGPUsAssigned": count})
    return {"skippedGPUs": {"ids": []}, "profiles": parts}


def config_json(nodes: Iterable[Sequence[str]]) -> str:
    """The ConfigMap's `config.json` with the profile of each node; equal ones once."""
    profiles = {profile_name(modes): profile(modes) for modes in nodes}
    body = {
        "gpu-config-profiles": dict(sorted(profiles.items())),
        "gpuClientSystemdServices": {"names": list(GPU_SERVICES)},
    }
    return json.dumps(body, indent=2) + "\n"


def refuse_mixed(node: str, modes: Iterable[str], strategy: Strategy) -> None:
    """Raises PlanError where the device plugin's single strategy cannot advertise a node."""
    if strategy == "single" and len(found := sorted(set(modes))) > 1:
        raise PlanError(
            f"{node} has cards in {' and '.join(found)}: under the single strategy the device plugin refuses it",
            field="strategy",
            value="single",
            remedy="use the mixed strategy, or plan without --allow-mixed-compute",
        )


def mode_label(mode: str) -> str:
    """A mode as the device plugin and the node labeller write it: `CPX/NPS4` → `cpx_nps4`."""
    return mode.lower().replace("/", "_")


def allocatable(cards: Iterable[tuple[str, int]], strategy: Strategy) -> dict[str, int]:
    """What a node of partitionable cards advertises, by resource name. cards: mode and devices of each."""
    found: dict[str, int] = {}
    for mode, devices in cards:
        resource = f"amd.com/{mode_label(mode) if strategy == 'mixed' else 'gpu'}"
        found[resource] = found.get(resource, 0) + devices
    return dict(sorted(found.items()))


def _runs(modes: Sequence[str]) -> list[tuple[str, int]]:
    return [(mode, len(list(same))) for mode, same in groupby(modes)]
