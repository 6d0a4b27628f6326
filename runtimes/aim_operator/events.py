"""Events of our objects, as `kubectl describe` shows them: each told once, however often the operator starts anew."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from .cluster import EVENTS, Cluster

_LONGEST = 1024


async def tell(
    cluster: Cluster, about: Mapping[str, Any], kind: Literal["Normal", "Warning"], reason: str, message: str, once: str
) -> None:
    """once: what makes it another event than one of the same words before: a generation, an attempt.

    Raises ApiError.
    """
    metadata = about["metadata"]
    # An Event stands in a namespace; those of objects without one in `default`, as Kubernetes' own.
    namespace = metadata.get("namespace") or "default"
    told = hashlib.sha256(f"{metadata['uid']}\0{reason}\0{message}\0{once}".encode()).hexdigest()[:16]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    body = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{told}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": about["apiVersion"],
            "kind": about["kind"],
            "name": metadata["name"],
            "namespace": metadata.get("namespace", ""),
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        },
        "type": kind,
        "reason": reason,
        "message": message[:_LONGEST],
        "source": {"component": "aim-operator"},
        "reportingComponent": "aim-operator",
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    await cluster.create(EVENTS, body)
