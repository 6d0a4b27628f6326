"""Prompt injection and jailbreaks: the embedded model `fast`, n-grams and a linear model in numpy."""

from __future__ import annotations

from aim_guardrail.detectors.injection.model import Card, Injection, ModelError, Thresholds, embedded

__all__ = ["Card", "Injection", "ModelError", "Thresholds", "embedded"]
