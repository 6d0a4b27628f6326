"""The controllers, each with its handlers in kopf's registry. Those of a kind that the cluster lacks wait for it."""

from __future__ import annotations

import kopf

from .finetuning import controller as finetuning
from .operator import Operator
from .partitions import controller as partitions
from .policies import controller as policies


def register(registry: kopf.OperatorRegistry, operator: Operator) -> None:
    """All of them. One line each: what a controller does is its own file's to say."""
    policies.register(registry, operator)
    partitions.register(registry, operator)
    finetuning.register(registry, operator)
