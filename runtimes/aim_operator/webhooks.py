"""The webhooks, each with its handler in kopf's registry."""

from __future__ import annotations

import kopf

from .operator import Operator


def register(registry: kopf.OperatorRegistry, operator: Operator) -> None:
    """All of them."""
