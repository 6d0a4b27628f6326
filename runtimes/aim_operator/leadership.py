"""One replica leads: a coordination.k8s.io Lease, by client-go's rules.

A Lease and not kopf's peering: peering needs definitions of its own, stops every replica of one priority while two of
them see each other, and is not what `kubectl get leases` or a cluster's alerts look at.

Times are client-go's (LeaseDuration > RenewDeadline > RetryPeriod). A replica judges a lease by how long it has seen it
unchanged, never by the clock of whoever wrote it. A leader that could not renew for RenewDeadline stops at once: the
process ends, and its successor finds the cluster as it is.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Callable

from .cluster import LEASES, TROUBLE, Cluster, Contended, Object
from .settings import Settings

logger = logging.getLogger("aim.operator.leadership")

LEASE = "aim-operator"


class LeadershipLost(Exception):
    """This replica led and may lead no longer."""


class Leadership:
    """This replica's part in it. now: seconds, monotonic."""

    def __init__(self, cluster: Cluster, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self._cluster, self._settings, self._now = cluster, settings, now
        self._seen: Object | None = None
        self._seen_at = now()

    async def acquire(self) -> None:
        """Returns once this replica leads."""
        while not await self.attempt():  # noqa: ASYNC110  # nobody tells when a lease runs out
            await asyncio.sleep(self._settings.retry_period_s)
        logger.info("%s leads", self._settings.identity)

    async def hold(self) -> None:
        """Renews for as long as it can. Raises LeadershipLost."""
        renewed_at = self._now()
        while self._now() - renewed_at < self._settings.renew_deadline_s:
            await asyncio.sleep(self._settings.retry_period_s)
            if await self.attempt():
                renewed_at = self._now()
            elif self._holder not in (None, self._settings.identity):
                break
        raise LeadershipLost(f"{self._settings.identity} could not renew the lease {LEASE}; {self._holder} holds it")

    async def release(self) -> None:
        """The next replica need not wait. Best effort: who cannot say so is waited for."""
        try:
            await self._cluster.change(LEASES, LEASE, self._released, self._settings.namespace)
        except (*TROUBLE, Contended) as error:
            logger.warning("the lease %s was not released: %s", LEASE, error)

    @property
    def _holder(self) -> str | None:
        return (self._seen or {}).get("spec", {}).get("holderIdentity") or None

    async def attempt(self) -> bool:
        """Takes or renews the lease, once; whether it leads now. Raises nothing that waiting can mend."""
        try:
            async with asyncio.timeout(self._settings.renew_deadline_s):
                return await self._tried()
        except TROUBLE as error:
            logger.warning("the lease %s cannot be had: %r", LEASE, error)
            return False

    async def _tried(self) -> bool:
        found = await self._cluster.get(LEASES, LEASE, self._settings.namespace)
        if found is None:
            return await self._cluster.create(LEASES, self._mine({}, taken=True)) is not None
        if found.get("spec") != (self._seen or {}).get("spec"):
            self._seen, self._seen_at = found, self._now()
        taken = self._holder != self._settings.identity
        if taken and self._holder and self._now() - self._seen_at < self._lasts_s(found):
            return False
        self._seen = await self._cluster.replace(LEASES, self._mine(found, taken=taken))
        self._seen_at = self._now()
        return True

    def _lasts_s(self, found: Object) -> float:
        return float(found["spec"].get("leaseDurationSeconds") or self._settings.lease_duration_s)

    def _mine(self, found: Object, *, taken: bool) -> Object:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = dict(found.get("spec", {}))
        if taken:
            spec |= {"acquireTime": now, "leaseTransitions": spec.get("leaseTransitions", -1) + 1}
        spec |= {
            "holderIdentity": self._settings.identity,
            # An integer, never less than it is: who reads it must not come too early.
            "leaseDurationSeconds": max(1, -int(-self._settings.lease_duration_s // 1)),
            "renewTime": now,
        }
        metadata = found.get("metadata", {"name": LEASE, "namespace": self._settings.namespace})
        return {"apiVersion": LEASES.api_version, "kind": LEASES.kind, "metadata": metadata, "spec": spec}

    def _released(self, found: Object) -> Object | None:
        if found["spec"].get("holderIdentity") != self._settings.identity:
            return None
        return found | {"spec": found["spec"] | {"holderIdentity": "", "leaseDurationSeconds": 1}}
