"""PartitionPlans as a person would write them for a test."""

from __future__ import annotations

from typing import Any


def plan_object(name: str = "fleet", **nodes: str) -> dict[str, Any]:
    """nodes: the mode of each, for its one card."""
    partitions = {"CPX": 8, "SPX": 1, "DPX": 2, "QPX": 4}
    cards = [
        {
            "node": node.replace("_", "-"),
            "card": 0,
            "gpu": "MI300X",
            "deployment": "bare-metal",
            "mode": mode,
            "was": "SPX/NPS1",
            "tier": "validated",
            "partitions": partitions[mode[:3]],
            "device_memory_mib": 1024,
        }
        for node, mode in nodes.items()
    ]
    totals = {
        **{"asked": {}, "placed": {}, "cards": len(cards), "cards_used": 0, "nodes_drained": 0, "cards_switched": 0},
        **{"bound": 0, "gap": 0.0, "method": "heuristic"},
    }
    return {
        "apiVersion": "aim.amd.com/v1alpha1",
        "kind": "PartitionPlan",
        "metadata": {"name": name},
        "spec": {"plan": {"cards": cards, "placements": [], "totals": totals}},
    }


def placement(replica: int = 0, partition: int = 0, **more: Any) -> dict[str, Any]:
    """A replica of `chat` on n0's card 0 in CPX/NPS4."""
    return {
        **{"workload": "chat", "replica": replica, "context": 4096, "concurrency": 1, "model": "Qwen/Qwen3-8B"},
        **{"node": "n0", "cards": [0], "partitions": [partition], "mode": "CPX/NPS4", "tp": 1},
        **{"need_gib": 1, "budget_gib": 2, "headroom_gib": 1},
        **more,
    }
