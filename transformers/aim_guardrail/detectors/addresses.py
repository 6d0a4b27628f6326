"""E-mail and IP addresses: where one may stand. Whether it is one Presidio says (public suffixes, `ipaddress`)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from aim_guardrail.detectors.digit_rows import Hit
from aim_guardrail.detectors.presidio import Recognizer
from aim_guardrail.detectors.words import ADDRESS_WORDS, VERSION_WORDS, words_before

# Presidio's pattern takes every \w and many symbols for a local part, so that `to=bob@x.com` or the text of a script
# without spaces becomes part of the address. This one takes what providers hand out.
_LOCAL_CHARS, _DOMAIN_CHARS = 64, 253  # RFC 5321
_AT = re.compile("[@%](?:(?<=@)|40)")
_PLAIN_AT = re.compile("@")  # of most texts all: one character is found much faster
_LOCAL_REVERSED = re.compile(r"[A-Za-z0-9._%+'-]+")
_DOMAIN = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]{0,61}[A-Za-z0-9](?![A-Za-z0-9])"
)

_IPV4 = re.compile(
    r"[0-9](?<![A-Za-z0-9].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![A-Za-z0-9]|\.[0-9])(?:/[0-9]{1,2}(?![A-Za-z0-9]))?"
)
# A colon may stand before it behind a word that is no group of hexadecimal digits itself.
_NAMED = "".join(rf"|(?<=[G-Zg-z][A-Za-z]{{{letters}}}:)" for letters in range(4))
_IPV6 = re.compile(
    r"(?:(?<![A-Za-z0-9:])|(?<=[A-Za-z]{5}:)"
    + _NAMED
    + r")(?<![0-9]\.)(?=[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{3,39}+(?:\.[0-9]{1,3}){0,3}"
    r"(?:%(?!2[0Dd])[0-9A-Za-z]{1,16})?(?:/[0-9]{1,3})?(?![A-Za-z0-9:])"
)
_COLONS = re.compile(":[0-9A-Fa-f]{0,4}:")  # in each of them
_NOBODYS_IP = re.compile(
    r"(?:127(?:\.[0-9]+){3}|0(?:\.[0-9]+){3}|::1|255(?:\.[0-9]+){3}|ffff:[f:0]+)(?:/[0-9]+)?"  # loopback, masks
    r"|1\.1\.1\.1|1\.0\.0\.1|8\.8\.8\.8|8\.8\.4\.4|9\.9\.9\.9"  # public name servers
    r"|2001:4860:4860::88(?:88|44)|2606:4700:4700::1(?:111|001)"
)
# Global unicast, unique local, link-local and multicast addresses; NAT64; IPv4 in IPv6. `1::3` and `::2` are slices.
_SHORTENED = re.compile(
    r"(?:[23][0-9A-Fa-f]{3}|[Ff][CcDdEeFf][0-9A-Fa-f]{2}|64:ff9b):|::(?:ffff:(?:0:)?)?[0-9]+\.", re.I
)
_OCTETS = re.compile(r"(?::[0-9A-Fa-f]{2}){7}")  # EUI-64 and the like: every group a byte

# ==1.2.3.4, (1:1.2.3.4-5), name-1.2.3.4.tar.gz, and the head of a Debian changelog
_PINNED = re.compile(
    r"(?:[\w\])\"']\s{0,2}[=~<>!]=|\^|<<|[0-9]:|[A-Za-z+][-_])\s?\Z|(?:\A|\n)[a-z0-9][a-z0-9+.-]{1,40} \(\Z"
)
# 1.52-.87 2.83-2.12 3.51.98.32: numbers of an SVG path, of which each point begins another one
_PATH_DATA = re.compile(r"(?:[A-Za-z]-?|\.[0-9]{1,4}-)\.[0-9][-0-9. ]*\Z|\.[0-9]{1,4}-[0-9]{1,3}\.[0-9][-0-9. ]*\Z")
_PINS = frozenset("=^<:-_(")  # which of these, and at most a blank behind it
_CLOSE_CHARS = 24
_SMALL = 32  # parts of versions and section numbers are small; one address in 4,000 has only such parts


def emails(scan: str, since: int, _: int, recognizer: Recognizer) -> Iterator[Hit]:
    """E-mail addresses whose domain ends in a public suffix."""
    done = since
    for sign in (_AT if "%40" in scan else _PLAIN_AT).finditer(scan, since):
        at = sign.start()
        domain = _DOMAIN.match(scan, sign.end(), sign.end() + 1 + _DOMAIN_CHARS)
        start = _local_start(scan, at, done) if domain else None
        if domain and start is not None:
            end = domain.end()
            if scan[start] == "_" == scan[end : end + 1]:
                start += 1  # emphasis
            score = recognizer.score(scan[start:end].replace("%40", "@")) if start < at else 0.0
            if score:
                yield Hit(start, end, score)
                done = end


def _local_start(scan: str, at: int, since: int) -> int | None:
    """Where the local part before the @ begins; None where there is none, or one too long."""
    local = _LOCAL_REVERSED.match(scan[max(at - _LOCAL_CHARS - 1, since) : at][::-1])
    if local is None or local.end() > _LOCAL_CHARS:
        return None
    start = at - local.end()
    start += len(local[0]) - len(local[0][::-1].lstrip(".%+'-"))
    return start if start < at else None


def ips(scan: str, since: int, near: int, recognizer: Recognizer) -> Iterator[Hit]:
    """IP addresses of somebody: no loopback, no network masks, no networks, no versions. `near`: where the first may
    begin that begins with a digit.
    """
    for address in _IPV4.finditer(scan, near):
        start, end = address.span()
        if not _follows_digits(scan, start) and not _is_version(scan, address):
            yield from _ip(scan, start, end, recognizer)
    if _COLONS.search(scan, since):
        for address in _IPV6.finditer(scan, since):
            start, end = address.span()
            start += scan[start] == ":" != scan[start + 1]
            if scan[end - 1] == ":" and scan[end - 2] != ":":
                end -= 1
            value = scan[start:end]
            if _SHORTENED.match(value) or (value.count(":") == 7 and not _OCTETS.search(value)):
                yield from _ip(scan, start, end, recognizer)


def _ip(scan: str, start: int, end: int, recognizer: Recognizer) -> Iterator[Hit]:
    value = scan[start:end]
    score = 0.0 if _NOBODYS_IP.fullmatch(value) or _is_network(value) else recognizer.score(value)
    if score:
        yield Hit(start, end, score)


def _is_network(value: str) -> bool:
    """Whether this is a network rather than an address in it: `10.0.0.0/8`, `2001:db8::/32`."""
    address, _, prefix = value.partition("/")
    return bool(prefix) and (address.endswith("::") or (address.endswith(".0") and int(prefix) <= 24))


def _follows_digits(scan: str, start: int) -> bool:
    return scan[start - 1 : start] == "." and scan[start - 2 : start - 1].isdigit()


def _is_version(scan: str, address: re.Match[str]) -> bool:
    """Whether four dotted numbers are a version or a section: what stands before says so, or all parts are small and
    nothing says address.
    """
    start = address.start()
    if _PATH_DATA.search(scan, max(start - _CLOSE_CHARS, 0), start):
        return True
    telling = [word for word in words_before(scan, start) if word in VERSION_WORDS or word in ADDRESS_WORDS]
    if telling and telling[-1] in VERSION_WORDS:
        return True
    if scan[max(start - 2, 0) : start].rstrip()[-1:] in _PINS and _PINNED.search(scan, max(start - 44, 0), start):
        return True
    small = max(map(int, address[0].partition("/")[0].split("."))) < _SMALL
    if not small or "/" in address[0] or address[0].startswith("10."):
        return False
    return ADDRESS_WORDS.isdisjoint(words_before(scan, start, _CLOSE_CHARS))
