"""What every part of the operator is given."""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client import CollectorRegistry

from .audit import Audit
from .cluster import Cluster
from .settings import Settings


class Operator(NamedTuple):
    """cluster: of the event loop that the part runs on; metrics: where its families are registered."""

    settings: Settings
    cluster: Cluster
    audit: Audit
    metrics: CollectorRegistry
