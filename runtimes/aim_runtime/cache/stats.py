"""What a cache has been good for since it was made: counted by all processes that share the volume."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from aim_runtime.cache.durable import write_in_place
from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.index import Cache
from aim_runtime.cache.locks import exclusive

_WAIT_S = 5.0


class Stats(BaseModel):
    """hits: a model was asked for and here; misses: it had to be fetched, or the start was refused. Bytes: fetched over
    a network, and saved: what hits did not fetch, and what resumed attempts did not fetch again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    saved_bytes: int = 0

    @property
    def hit_rate(self) -> float | None:
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


def read_stats(cache: Cache) -> Stats:
    """Zeros where nothing was counted yet, or the file is no good: figures are never a reason to fail."""
    try:
        return Stats.model_validate_json((cache.own / "stats.json").read_bytes())
    except (OSError, ValidationError):
        return Stats()


def count(cache: Cache, *, hits: int = 0, misses: int = 0, fetched_bytes: int = 0, saved_bytes: int = 0) -> bool:
    """Add to the counters; False on a volume that cannot be written to, or whose counters somebody holds."""
    try:
        with exclusive(cache.own / "locks" / ".stats", _WAIT_S):
            known = read_stats(cache)
            more = {
                "hits": known.hits + hits,
                "misses": known.misses + misses,
                "fetched_bytes": known.fetched_bytes + fetched_bytes,
                "saved_bytes": known.saved_bytes + saved_bytes,
            }
            write_in_place(cache.own / "stats.json", known.model_copy(update=more).model_dump_json().encode())
    except (CacheError, OSError):
        return False
    return True
