"""A small MaxMind database, written as https://maxmind.github.io/MaxMind-DB/ says."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Network, ip_network
from pathlib import Path
from typing import Any

_SEPARATOR = b"\0" * 16


def write_countries(file: Path, countries: Mapping[str, str]) -> Path:
    """``countries``: network → ISO code, as GeoLite2-Country has them."""
    data, at = b"", {}
    for code in sorted(set(countries.values())):
        at[code] = len(data)
        data += _encoded({"country": {"iso_code": code}})
    tree = _tree({_wide(network): code for network, code in countries.items()})
    nodes = b"".join(_record(side, len(tree), at) for node in tree for side in node)
    about = {
        **{"node_count": len(tree), "record_size": 24, "ip_version": 6, "database_type": "Test-Country"},
        **{"languages": ["en"], "binary_format_major_version": 2, "binary_format_minor_version": 0},
        **{"build_epoch": 1_700_000_000, "description": {"en": "test"}},
    }
    file.write_bytes(nodes + _SEPARATOR + data + b"\xab\xcd\xefMaxMind.com" + _encoded(about))
    return file


def _wide(network: str) -> IPv6Network:
    """IPv4 lies at ::/96."""
    given = ip_network(network)
    return given if isinstance(given, IPv6Network) else ip_network(f"::{given.network_address}/{96 + given.prefixlen}")


def _tree(countries: Mapping[IPv6Network, str]) -> list[list[Any]]:
    """Nodes of two sides: another node's number, a country or None."""
    tree: list[list[Any]] = [[None, None]]
    for network, code in countries.items():
        bits = f"{int(network.network_address):0128b}"[: network.prefixlen]
        node = 0
        for bit in map(int, bits[:-1]):
            if tree[node][bit] is None:
                tree.append([None, None])
                tree[node][bit] = len(tree) - 1
            node = tree[node][bit]
        tree[node][int(bits[-1])] = code
    return tree


def _record(side: Any, nodes: int, at: Mapping[str, int]) -> bytes:
    value = nodes if side is None else side if isinstance(side, int) else nodes + len(_SEPARATOR) + at[side]
    return value.to_bytes(3, "big")


#: Numbers are of 16 bits, but these.
_KINDS = {"node_count": 6, "build_epoch": 9}


def _encoded(value: Any, key: str = "") -> bytes:
    if isinstance(value, str):
        return _head(2, len(value)) + value.encode()
    if isinstance(value, dict):
        return _head(7, len(value)) + b"".join(_encoded(key) + _encoded(each, key) for key, each in value.items())
    if isinstance(value, list):
        return _head(11, len(value)) + b"".join(map(_encoded, value))
    raw = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return _head(_KINDS.get(key, 5), len(raw)) + raw


def _head(kind: int, size: int) -> bytes:
    assert size < 29
    return bytes([kind << 5 | size]) if kind < 8 else bytes([size, kind - 7])
