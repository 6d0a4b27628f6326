"""Which pods run which version of a policy: each guardrail is asked, by its own metrics.

A ConfigMap's change reaches a pod when its kubelet comes by, and is in force when the guardrail has tried it: what the
object says is not what runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_FAMILY = "guardrail_policy_info"
_TIMEOUT = aiohttp.ClientTimeout(total=5)
_AT_ONCE = 16
_MOST_BYTES = 4 * 2**20
_SERVICE = "serving.kserve.io/inferenceservice"
#: KServe's name for the guardrail, beside a runtime and in a pod of its own.
_CONTAINERS = ("transformer-container", "kserve-container")

State = Literal["current", "stale", "unknown"]


class Running(NamedTuple):
    """One pod. version: None: it did not say; message: why."""

    name: str
    service: str
    version: str | None
    message: str = ""

    def state(self, wanted: str) -> State:
        if self.version is None:
            return "unknown"
        return "current" if self.version == wanted else "stale"


def mounting(pods: Iterable[Mapping[str, Any]], config_map: str) -> list[Mapping[str, Any]]:
    """Pods that mount it and are not about to go."""
    return [
        pod
        for pod in pods
        if "deletionTimestamp" not in pod["metadata"]
        and pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
        and any((each.get("configMap") or {}).get("name") == config_map for each in pod["spec"].get("volumes") or ())
    ]


async def running(pods: Sequence[Mapping[str, Any]], policy: str) -> list[Running]:
    """What each of them says that it runs of that policy."""
    turns = asyncio.Semaphore(_AT_ONCE)
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        return list(await asyncio.gather(*(_asked(session, turns, pod, policy) for pod in pods)))


async def _asked(
    session: aiohttp.ClientSession, turns: asyncio.Semaphore, pod: Mapping[str, Any], policy: str
) -> Running:
    name, labels = pod["metadata"]["name"], pod["metadata"].get("labels") or {}
    found = Running(name, labels.get(_SERVICE, ""), None)
    address = pod.get("status", {}).get("podIP")
    if not address:
        return found._replace(message="it has no address yet")
    try:
        async with turns, session.get(f"http://{_host(address)}:{_port(pod)}/metrics") as response:
            response.raise_for_status()
            text = (await response.content.read(_MOST_BYTES)).decode(errors="replace")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return found._replace(message=f"{type(error).__name__}: {error}"[:200])
    version = _version(text, policy)
    return found._replace(version=version, message="" if version else f"it runs no policy called {policy}")


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _port(pod: Mapping[str, Any]) -> int:
    ports = {each["name"]: each.get("ports") or () for each in pod["spec"].get("containers") or ()}
    listed = next((ports[name] for name in _CONTAINERS if ports.get(name)), ())
    return int(listed[0]["containerPort"]) if listed else 8080


def _version(text: str, policy: str) -> str | None:
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples if family.name == _FAMILY else ():
                if sample.labels.get("name") == policy and sample.value == 1:
                    return sample.labels.get("version")
    except ValueError:  # cut off, or no metrics at all
        return None
    return None
