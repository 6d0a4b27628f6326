"""Where a request came from: its connection's address or, behind proxies that are trusted, what they say of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import unquote

Address = IPv4Address | IPv6Address

_FORWARDED_FOR = b"x-forwarded-for"
#: Of what proxies say, the last so many are looked at: no chain is longer.
_MOST_HOPS = 32
_MOST_CHARACTERS = 128  # of an address with its zone and port: what is longer is none


class Proxies:
    """Those that are trusted: addresses and networks (``10.0.0.0/8``). Nobody else's word counts.

    Raises:
        ValueError: one is neither, or has bits set behind its prefix.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._networks = tuple(ip_network(each) for each in trusted)

    def client(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The address from which a request came by a connection from ``peer``, which is given back where it is none.

        Each proxy adds, at the end of ``x-forwarded-for``, who asked it: so the last that is no trusted proxy's own is
        the client, whatever stands before it.
        """
        address = address_of(peer)
        if address is None or not self._trusts(address):
            return _spelt(peer)
        said = b",".join(value for name, value in headers if name == _FORWARDED_FOR).rsplit(b",", _MOST_HOPS)
        for hop in reversed(said[-_MOST_HOPS:]):
            before = address_of(hop.decode("latin-1").strip())
            if before is None:
                break
            address = before
            if not self._trusts(address):
                break
        return str(address)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def address_of(text: str) -> Address | None:
    """``1.2.3.4``, ``1.2.3.4:80``, ``2001:db8::1``, ``[2001:db8::1]:80``; an IPv4 address within IPv6 as itself."""
    return _read(text) if len(text) <= _MOST_CHARACTERS else None


@lru_cache(maxsize=1024)
def _read(text: str) -> Address | None:
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(maxsize=1024)
def _spelt(peer: str) -> str:
    """An address in its own form, what is none as it is: a connection's every request asks."""
    return str(address_of(peer) or peer)


def grpc_peer(peer: str) -> str:
    """The address of what gRPC calls a peer: ``ipv4:127.0.0.1:4242``, ``ipv6:%5B::1%5D:4242``."""
    kind, _, rest = peer.partition(":")
    return unquote(rest) if kind in ("ipv4", "ipv6") else peer
