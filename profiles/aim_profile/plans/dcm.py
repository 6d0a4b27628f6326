"""AMD's Device Config Manager: the names it listens to, and the ConfigMap that holds its profiles.

Sources: ROCm/device-config-manager docs/configuration/configmap.md and configmanager.go (fe98bda): the taint, the
labels, and what it checks: cards of a profile add up to the node's, one memory type a profile. It does not check
whether a compute and a memory mode go together; the planner does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

TAINT_KEY, TAINT_VALUE, TAINT_EFFECT = "amd-dcm", "up", "NoExecute"
TAINT = f"{TAINT_KEY}={TAINT_VALUE}:{TAINT_EFFECT}"
PROFILE_LABEL = "dcm.amd.com/gpu-config-profile"
STATE_LABEL = "dcm.amd.com/gpu-config-profile-state"
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


def _runs(modes: Sequence[str]) -> list[tuple[str, int]]:
    return [(mode, len(list(same))) for mode, same in groupby(modes)]
