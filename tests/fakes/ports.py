"""Ports nobody listened on a moment ago."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator

#: Below those that Linux gives to outgoing connections (net.ipv4.ip_local_port_range begins at 32768): none of these
#: takes a port between its choice and the server that is to listen on it.
_PORTS = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """``count`` different TCP ports on 127.0.0.1, none given before by this process until all have been."""
    return list(itertools.islice(filter(_is_free, _candidates), count))


def _own_ports() -> Iterator[int]:
    """In turn, for ever: this process' share where pytest-xdist runs several, from anywhere in it."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = _PORTS[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) :: workers]
    start = random.randrange(len(own))
    return itertools.cycle([*own[start:], *own[:start]])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


_candidates = _own_ports()
