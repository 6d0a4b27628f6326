"""The labels of the code family. Pure data: a policy is read without loading what finds them."""

from __future__ import annotations

from collections.abc import Mapping

from aim_guardrail.detectors.base import Label

# Scores: 0.9 where nothing else is written so, 0.6 where it now and then is. All count by default.
CODE_LABELS: Mapping[str, Label] = {
    "LICENSE_COPYLEFT": Label(threshold=0.5, top_score=0.9),
    "LICENSE_WEAK_COPYLEFT": Label(threshold=0.5, top_score=0.9),
    "LICENSE_PERMISSIVE": Label(threshold=0.5, top_score=0.9),
    "LICENSE_RESTRICTED": Label(threshold=0.5, top_score=0.9),
    "COPYRIGHT_NOTICE": Label(threshold=0.5, top_score=0.9),
    "CONFIDENTIAL": Label(threshold=0.5, top_score=0.9),
    "DANGEROUS_CODE": Label(threshold=0.5, top_score=0.9),
}
