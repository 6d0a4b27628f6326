"""Sharing a served name's requests out among variants, the same caller always to the same one. Pure.

Weighted rendezvous hashing: each variant draws a number from the key, the highest wins. A variant that comes, goes or
changes its weight moves only the callers that it wins or loses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b

from aim_runtime.engines.base import Json, RequestContext

USER_HEADER = "x-user-id"


def sticky_key(body: Json, context: RequestContext) -> str:
    """Who asks: the body's ``user``, else the header ``x-user-id``, else this request only."""
    user = body.get("user")
    if isinstance(user, str) and user:
        return user
    return context.headers.get(USER_HEADER) or context.request_id


def choose(weights: Mapping[str, float], key: str) -> str:
    """One of ``weights`` (variant → weight > 0), by ``key``.

    Each wins with probability weight / sum (Efraimidis and Spirakis, 2006: ln(u) / weight, u uniform in (0, 1)).
    """
    return max(weights, key=lambda name: math.log(_uniform(name, key)) / weights[name])


def _uniform(name: str, key: str) -> float:
    digest = blake2b(f"{name}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) + 0.5) / 2**64
