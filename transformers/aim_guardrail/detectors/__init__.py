"""Detectors: one file per family, each finding what it knows and nothing else."""

from __future__ import annotations

from aim_guardrail.detectors.base import Detector


def build_detector(family: str, labels: frozenset[str], regions: frozenset[str] | None = None) -> Detector:
    """The detector of a family, its engine loaded. Blocking; safe to call from any thread. `regions`: whose telephone
    numbers, None: every region's.

    Engines are imported here, so that importing this package stays cheap and each third party is loaded only
    when a policy asks for it.
    """
    if family == "secrets":
        from aim_guardrail.detectors.secrets import SecretDetector

        return SecretDetector()
    if family == "pii":
        from aim_guardrail.detectors.pii import PiiDetector

        return PiiDetector(labels, regions)
    raise ValueError(f"there is no detector for {family!r}")
