"""Who is believed about where a request came from."""

from __future__ import annotations

import pytest

from aim_kserve.client_address import Proxies, grpc_peer

INGRESS = Proxies(["10.0.0.0/8", "fd00::/8"])


def forwarded(*values: str) -> list[tuple[bytes, bytes]]:
    return [(b"x-forwarded-for", value.encode()) for value in values]


@pytest.mark.parametrize(
    ("peer", "said", "client"),
    [
        ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),  # nobody's proxy says so
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["1.2.3.4, 203.0.113.9, 10.0.0.7"], "203.0.113.9"),  # the client made up the first
        ("10.0.0.1", ["1.2.3.4", "203.0.113.9"], "203.0.113.9"),  # two headers are one list
        ("10.0.0.1", ["1.2.3.4, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.9, 10.0.0.7"], "10.0.0.9"),
        ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("fd00::1", ["[2001:db8::5]:443"], "2001:db8::5"),
        ("::ffff:10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("testclient", ["203.0.113.9"], "testclient"),
    ],
)
def test_the_last_that_is_no_trusted_proxys_own(peer: str, said: list[str], client: str) -> None:
    assert INGRESS.client(peer, forwarded(*said)) == client


def test_nobody_is_believed_unless_named() -> None:
    assert Proxies().client("127.0.0.1", forwarded("203.0.113.9")) == "127.0.0.1"


def test_a_chain_without_an_end_is_not_followed() -> None:
    assert INGRESS.client("10.0.0.1", forwarded("203.0.113.9," + "10.0.0.2," * 100_000 + "10.0.0.2")) == "10.0.0.2"


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:127.0.0.1:4242", "127.0.0.1:4242"), ("ipv6:%5B::1%5D:4242", "[::1]:4242"), ("unix:/x", "unix:/x")],
)
def test_what_grpc_calls_a_peer(peer: str, address: str) -> None:
    assert grpc_peer(peer) == address


def test_a_network_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="host bits"):
        Proxies(["10.0.0.1/8"])
