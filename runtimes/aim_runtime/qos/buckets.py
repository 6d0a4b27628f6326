"""Token buckets: how many requests and tokens a minute a tenant may have of a model in a class.

A bucket fills at its rate up to its burst. A request takes one of ``requests`` and, of ``tokens``, its prompt's and the
most its answers may have; it gets back what it did not use when it ends. Work per request is that of the limits which
hold for it; memory is bounded by ``most_tenants``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from .policy import Limit
from .request import Rejected

#: Rounding of the clock does not turn an exact wait into another one: so much may be missing.
_ROUNDING_S = 1e-6

Clock = Callable[[], float]


@dataclass(slots=True)
class _Bucket:
    """``level`` is below nothing where more was used than had been charged."""

    rate_per_s: float
    burst: float
    level: float
    filled_at: float

    def fill(self, now: float) -> None:
        """A clock that goes backwards fills nothing, and nobody waits for it to come back to where it was."""
        if now > self.filled_at:
            self.put((now - self.filled_at) * self.rate_per_s)
        self.filled_at = now

    def wait_s(self, amount: float) -> float:
        missing_s = (amount - self.level) / self.rate_per_s
        return missing_s if missing_s > _ROUNDING_S else 0.0

    def put(self, amount: float) -> None:
        self.level = min(self.burst, self.level + amount)


class _Pair:
    """The two buckets of one limit for one (model, class, tenant); None: unlimited."""

    def __init__(self, limit: Limit, now: float) -> None:
        self.limit = limit
        # Whatever the rate, one request is never larger than the burst.
        self.requests = _full(limit.requests_per_minute, limit.burst_s, 1.0, now)
        self.tokens = _full(limit.tokens_per_minute, limit.burst_s, 0.0, now)

    def fill(self, now: float) -> None:
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.fill(now)

    def is_full(self) -> bool:
        return all(each is None or each.level >= each.burst for each in (self.requests, self.tokens))

    def wait_s(self, tokens: int) -> float:
        return max(
            self.requests.wait_s(1) if self.requests else 0.0,
            self.tokens.wait_s(tokens) if self.tokens else 0.0,
        )

    def put(self, requests: int, tokens: int) -> None:
        if self.requests:
            self.requests.put(requests)
        if self.tokens:
            self.tokens.put(tokens)


def _full(per_minute: float | None, burst_s: float, least: float, now: float) -> _Bucket | None:
    if per_minute is None:
        return None
    burst = max(least, per_minute / 60 * burst_s)
    return _Bucket(per_minute / 60, burst, burst, now)


#: (model, class, tenant): of a limit, None where it names none.
_Scope = tuple[str | None, str | None, str | None]


class Buckets:
    """The buckets of one policy.

    Args:
        limits: of several that hold for a request each is charged, or none.
        clock: seconds.
        most_tenants: so many (model, class, tenant) have buckets of their own; while none of those is full again, a
            limit has one for all newcomers together.
    """

    def __init__(self, limits: Sequence[Limit], clock: Clock, *, most_tenants: int = 10_000) -> None:
        self._clock, self._most_tenants = clock, most_tenants
        self._limits: dict[_Scope, list[Limit]] = {}
        for limit in limits:
            self._limits.setdefault((limit.model, limit.qos_class, limit.tenant), []).append(limit)
        self._pairs: OrderedDict[_Scope, list[_Pair]] = OrderedDict()
        self._newcomers: dict[_Scope, list[_Pair]] = {}

    def __len__(self) -> int:
        """How many have buckets of their own."""
        return len(self._pairs)

    def take(self, model: str, qos_class: str, tenant: str, tokens: int) -> float:
        """Charge a request to all limits that hold for it, or to none.

        Args:
            tokens: its prompt's, and the most its answers may have.

        Returns:
            0.0: taken; else the seconds after which it may be, if nobody else takes meanwhile.

        Raises:
            Rejected: it is larger than a burst, and will never be taken.
        """
        pairs = self._holding(model, qos_class, tenant)
        if not pairs:
            return 0.0
        for pair in pairs:
            if pair.tokens and tokens > pair.tokens.burst:
                raise Rejected("too_large", _too_large(tokens, pair.limit, pair.tokens), None)
        wait_s = max(pair.wait_s(tokens) for pair in pairs)
        if not wait_s:
            for pair in pairs:
                pair.put(-1, -tokens)
        return wait_s

    def settle(self, model: str, qos_class: str, tenant: str, *, charged: int, used: int) -> None:
        """It has ended, however it did: leave charged what it has used, its prompt and the tokens delivered."""
        for pair in self._holding(model, qos_class, tenant):
            pair.put(0, charged - used)

    def give_back(self, model: str, qos_class: str, tenant: str, tokens: int) -> None:
        """All that ``take`` took, of a request that is refused for another reason."""
        for pair in self._holding(model, qos_class, tenant):
            pair.put(1, tokens)

    def _holding(self, model: str, qos_class: str, tenant: str) -> list[_Pair]:
        """The buckets of every limit that holds for it, filled up to now."""
        if not self._limits:
            return []
        now = self._clock()
        asked = (model, qos_class, tenant)
        pairs = self._pairs.get(asked)
        if pairs is not None:
            self._pairs.move_to_end(asked)
        else:
            pairs = self._new(asked, now)
        for pair in pairs:
            pair.fill(now)
        return pairs

    def _new(self, asked: tuple[str, str, str], now: float) -> list[_Pair]:
        scopes = [scope for scope in product(*((name, None) for name in asked)) if scope in self._limits]
        if not scopes:
            return []
        if len(self._pairs) < self._most_tenants or self._forget_one(now):
            pairs = self._pairs[asked] = [_Pair(limit, now) for scope in scopes for limit in self._limits[scope]]
            return pairs
        for scope in scopes:
            if scope not in self._newcomers:
                self._newcomers[scope] = [_Pair(limit, now) for limit in self._limits[scope]]
        return [pair for scope in scopes for pair in self._newcomers[scope]]

    def _forget_one(self, now: float) -> bool:
        """Who has not asked for longest, if nothing is lost by it: all is full."""
        asked, pairs = next(iter(self._pairs.items()))
        for pair in pairs:
            pair.fill(now)
        if all(pair.is_full() for pair in pairs):
            del self._pairs[asked]
            return True
        return False


def _too_large(tokens: int, limit: Limit, bucket: _Bucket) -> str:
    parts = (("model", limit.model), ("class", limit.qos_class), ("tenant", limit.tenant))
    of = ", ".join(f"{what} {name}" for what, name in parts if name is not None)
    return (
        f"the request may take {tokens} tokens (prompt and max_tokens), {tokens - bucket.burst:g} more than "
        f"{of or 'one tenant'} may have at once ({bucket.burst:g}): lower max_tokens or shorten the prompt"
    )
