"""What the server ran on: read on its machine where that is this one, or in an emulation file of it; else unknown.

An address on this machine is no proof: a port may be forwarded. So the process that listens there is looked for; where
it is not seen, or is known to forward, the hardware is unknown, and the evidence speaks for no profile.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil
from prometheus_client.parser import text_string_to_metric_families

from aim_profile.errors import AimProfileError
from aim_profile.nodes.bounded import read_bounded
from aim_profile.nodes.facts import Card, Node
from aim_profile.nodes.read import load_emulated, read_node
from aim_profile.serving.evidence import Hardware
from aim_runtime.measure.errors import MeasureError

#: Programs that listen here for a server elsewhere.
FORWARDERS = frozenset({"kubectl", "ssh", "sshd", "socat", "docker-proxy", "haproxy", "nginx", "envoy", "oc", "k9s"})
_MOST_CPUINFO = 2**16
_DEVICE_INFO = "aim_model_device_info"


class Found(NamedTuple):
    """The hardware, and why nothing better is known where it is unknown."""

    hardware: Hardware
    note: str = ""


class Place(NamedTuple):
    """A device the server says an engine runs on."""

    card: int
    partition: int
    mode: str


def places(metrics: str, model: str) -> list[Place]:
    """What `aim_model_device_info` says of that model; nothing where the server is not ours."""
    try:
        families = list(text_string_to_metric_families(metrics))
    except ValueError:
        return []
    rows = [sample.labels for each in families if each.name == _DEVICE_INFO for sample in each.samples]
    kept = [row for row in rows if row.get("model_name") == model]
    try:
        return [Place(int(row["card"]), int(row["partition"]), row["compute_mode"]) for row in kept]
    except (KeyError, ValueError):
        return []


def hardware_of(url: str, said: Iterable[Place], *, node: Path | None, gpu_count: int | None, on_cpu: bool) -> Found:
    """Args:
        said: devices that the server names.
        node: an emulation file of its machine, instead of this one.
        gpu_count: devices of the engine where the server does not say.
        on_cpu: the engine computes on processors, GPUs or not.

    Raises:
        MeasureError: the file cannot be read, or the devices are not in it.
    """
    if node is None and (why := not_here(url)):
        return Found(Hardware(told_by="unknown"), why)
    try:
        read = load_emulated(node) if node else read_node()
    except AimProfileError as error:
        raise MeasureError(f"--node {node}: {error}" if node else str(error), exit_code=2 if node else 1) from None
    return _on(read, list(said), "file" if node else "node", gpu_count, on_cpu=on_cpu)


def _on(node: Node, said: list[Place], told_by: Any, gpu_count: int | None, *, on_cpu: bool) -> Found:
    gpus = [card for card in node.cards if not card.is_cpu]
    here = told_by == "node"
    if on_cpu or not gpus:
        cores = _cores(node) or (len(os.sched_getaffinity(0)) if here else None)
        return Found(Hardware(told_by=told_by, cpu=_cpu_name() if here else None, cores=cores))
    used = [card for card in gpus if card.index in {place.card for place in said}] if said else gpus
    kinds = {(card.product, card.planned_as, card.alloc_mode) for card in used}
    if len(kinds) != 1:
        return Found(Hardware(told_by="unknown"), "the cards here are of several kinds, and the server names none")
    card, count = used[0], len(said) or gpu_count or (1 if len(gpus) == 1 else None)
    if count is None:
        return Found(Hardware(told_by="unknown"), "the server does not say how many devices it has: give --gpu-count")
    if card.accelerator is None or card.planned_as is None:
        return Found(Hardware(told_by="unknown"), f"{card.product} in {card.mode_text} is not in the catalogue")
    return Found(_of_card(card, count, told_by, here=here))


def _of_card(card: Card, count: int, told_by: Any, *, here: bool) -> Hardware:
    return Hardware(
        told_by=told_by,
        gpu=card.product,
        partition=card.planned_as,
        alloc_mode=card.alloc_mode or "CAPPING",
        gpu_count=count,
        driver=_line(Path("/sys/module/amdgpu/version")) if here else None,
        rocm=_line(Path("/opt/rocm/.info/version")) if here else None,
        cpu=_cpu_name() if here else None,
        cores=len(os.sched_getaffinity(0)) if here else None,
    )


def not_here(url: str) -> str | None:
    """Why the server is not known to run on this machine; None: its process is here."""
    parts = urlsplit(url)
    if not _is_this_machine(parts.hostname or ""):
        return f"{parts.hostname} is another machine: give --node FILE, written there by `aim-profile node export`"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        listening = [each.pid for each in psutil.net_connections("tcp") if _listens(each, port)]
        names = {psutil.Process(pid).name() for pid in listening if pid}
    except psutil.Error:
        names = set()
    if not names:
        return f"no process is seen to listen on port {port} here: it may be forwarded (give --node FILE)"
    if forwarded := sorted(names & FORWARDERS):
        return f"{forwarded[0]} listens on port {port} for a server elsewhere: give --node FILE"
    return None


def _listens(connection: Any, port: int) -> bool:
    return bool(connection.status == psutil.CONN_LISTEN and connection.laddr.port == port)


def _is_this_machine(host: str) -> bool:
    own = {address.address for each in psutil.net_if_addrs().values() for address in each}
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(address in own or ipaddress.ip_address(str(address)).is_loopback for address in found)


def _cores(node: Node) -> int | None:
    return next((card.partitions[0].compute_units for card in node.cards if card.is_cpu and card.partitions), None)


def _cpu_name() -> str | None:
    text = (read_bounded(Path("/proc/cpuinfo"), _MOST_CPUINFO) or b"").decode("utf-8", "replace")
    names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(names, None) or None


def _line(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")[:100].strip() or None
    except (OSError, UnicodeDecodeError):
        return None
