"""Fleets that more is asked of than they hold: half MI300X, half MI355X, all SPX, five workloads a card."""

from __future__ import annotations

import json
from random import Random

from aim_profile.plans.fleet import Fleet, parse_fleet
from aim_profile.plans.workload import Workloads, parse_workloads

MODELS = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "google/gemma-3-4b-it",
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.3-70B-Instruct",
)


def loaded(count: int, cards: int, seed: int) -> tuple[Fleet, Workloads]:
    """So many workloads on so many cards (eight a node), a third of them guardrails; the same for the same seed."""
    fleet, workloads = loaded_texts(count, cards, seed)
    return parse_fleet(fleet), parse_workloads(workloads)


def loaded_texts(count: int, cards: int, seed: int) -> tuple[str, str]:
    """The same as files: fleet and workloads, as JSON."""
    chance = Random(f"loaded {seed}")
    asked = [_workload(number, chance) for number in range(count)]
    nodes = [
        {"name": name, "count": cards // 16, "gpu": gpu, "cards": 8} for name, gpu in (("a", "MI300X"), ("b", "MI355X"))
    ]
    return json.dumps({"version": 1, "nodes": nodes}), json.dumps({"version": 1, "workloads": asked})


def _workload(number: int, chance: Random) -> dict[str, object]:
    kind = chance.choices(["serve", "guardrail", "finetune"], [0.65, 0.30, 0.05])[0]
    asked: dict[str, object] = {"name": f"w{number:06d}", "priority": chance.choice(["high", "medium", "low"])}
    if kind == "guardrail":
        asked |= {"kind": kind, "memory": "4GiB", "memory_limit": "5GiB"}
    elif kind == "finetune":
        asked |= {"kind": kind, "memory": f"{chance.choice([18, 60, 100])}GiB"}
    else:
        asked |= {"model": chance.choice(MODELS), "context": chance.choice([4096, 8192, 16384])}
        asked["concurrency"] = chance.choice([1, 2, 4])
    if chance.random() < 0.05:
        asked["spread"] = "node"
    return asked
