"""The lease by client-go's rules, over a clock of the test's own and the API double."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from aim_operator.cluster import Cluster as Api
from aim_operator.leadership import Leadership, LeadershipLost
from aim_operator.settings import Settings, SettingsError
from kube_double.cluster import Cluster

LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"


class Replica:
    """One, with its own idea of the time."""

    def __init__(self, api: Api, name: str) -> None:
        self.time_s = 0.0
        settings = Settings(namespace="default", identity=name, retry_period_s=0.001)
        self.leadership = Leadership(api, settings, lambda: self.time_s)

    async def leads(self) -> bool:
        return await self.leadership.attempt()


@pytest.fixture
async def api(kubernetes: Cluster, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    monkeypatch.setenv("KUBECONFIG", str(kubernetes.kubeconfig))
    async with Api() as found:
        yield found


def lease(kubernetes: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = kubernetes.read(f"{LEASES}/aim-operator")["spec"]
    return found


@pytest.mark.cluster
async def test_another_leads_when_it_has_seen_no_renewal_for_the_leases_time(kubernetes: Cluster, api: Api) -> None:
    first, second = Replica(api, "first"), Replica(api, "second")
    assert await first.leads()
    assert not await second.leads()
    second.time_s = 14.9
    assert not await second.leads()
    second.time_s = 15.1
    assert await second.leads()
    assert (lease(kubernetes)["holderIdentity"], lease(kubernetes)["leaseTransitions"]) == ("second", 1)


@pytest.mark.cluster
async def test_who_finds_another_in_its_place_leads_no_longer(kubernetes: Cluster, api: Api) -> None:
    first, second = Replica(api, "first"), Replica(api, "second")
    assert await first.leads()
    assert not await second.leads()
    second.time_s = 16
    assert await second.leads()
    with pytest.raises(LeadershipLost, match="second holds it"):
        await first.leadership.hold()


async def test_who_cannot_renew_in_time_leads_no_longer(kubernetes: Cluster, api: Api) -> None:
    first = Replica(api, "first")
    assert await first.leads()
    kubernetes.double.faults.refuses("leases", "GET", 10**6, 503)
    holding = asyncio.create_task(first.leadership.hold())
    await asyncio.sleep(0)  # it has looked at the clock
    first.time_s = 10.1
    with pytest.raises(LeadershipLost, match="could not renew"):
        await holding


async def test_a_few_failures_do_not_end_it(kubernetes: Cluster, api: Api) -> None:
    first = Replica(api, "first")
    assert await first.leads()
    kubernetes.double.faults.refuses("leases", "GET", 2, 503)
    kubernetes.double.faults.conflicts("leases", 2)
    holding = asyncio.create_task(first.leadership.hold())
    while kubernetes.double.faults.pending:  # noqa: ASYNC110  # the double is in another thread
        await asyncio.sleep(0.001)
    assert not holding.done()
    holding.cancel()


@pytest.mark.cluster
async def test_who_leaves_is_not_waited_for(kubernetes: Cluster, api: Api) -> None:
    first, second = Replica(api, "first"), Replica(api, "second")
    assert await first.leads()
    await second.leadership.release()  # not its own
    assert lease(kubernetes)["holderIdentity"] == "first"
    await first.leadership.release()
    assert await second.leads()


@pytest.mark.cluster
async def test_of_many_that_want_it_at_once_one_gets_it(kubernetes: Cluster, api: Api) -> None:
    replicas = [Replica(api, f"replica-{number}") for number in range(5)]
    assert sum(await asyncio.gather(*(each.leads() for each in replicas))) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Settings(renew_deadline_s=20), "--renew-deadline 20"),
        (Settings(retry_period_s=10), "--renew-deadline 10"),
        (Settings(webhook_host="h"), "--webhook-host h: webhooks need --certificates"),
    ],
)
def test_settings_that_cannot_hold_are_named(settings: Settings, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        settings.checked()
