"""docs/metrics.md names the operator's families with their labels, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from operator_metrics import OperatorMetrics

PAGE = Path(__file__).parents[2] / "docs/metrics.md"


def test_the_page_names_every_family_with_its_labels() -> None:
    (section,) = re.findall(r"### The operator\n(.*?)\n### ", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    assert {re.findall(r"`(\w+)`", name)[0]: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows} == (
        OperatorMetrics().labels()
    )
