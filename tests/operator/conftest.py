"""A Kubernetes API for each test of the operator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kube_double.cluster import Cluster, cluster


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[Cluster]:
    """The double, empty; a real API server where one is named (kube_double/cluster.py)."""
    with cluster(tmp_path) as found:
        yield found
