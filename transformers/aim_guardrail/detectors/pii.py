"""Personal data: Presidio's checksum and pattern recognizers, run only on the few characters that could matter.

A cheap pattern of ours finds candidates; the recognizer of that label then judges the candidate with the characters
around it. That makes the cost of ordinary text almost nothing, and makes a finding depend on its own unit alone
(see `aim_guardrail.text`), which is what streaming needs. What recognizers are known to get wrong is corrected here,
each correction beside its reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from aim_guardrail.detectors.base import FAMILIES, Finding
from aim_guardrail.detectors.presidio import Hit, Recognizer, recognizers
from aim_guardrail.text import BREAK_CHARS, CONTEXT_CHARS, Text

_GAP = r"[-x./ ()\[\]~]"
# Seven digits and more, with what may stand between the groups of one number.
_NUMBER = re.compile(rf"(?:[(\[+][-x./ ()\[\]~+]{{0,6}})?[0-9](?:{_GAP}{{0,6}}[0-9]){{6,}}+")
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+'-])[A-Za-z0-9._%+'-]++@[A-Za-z0-9.-]++")
_IBAN = re.compile(r"(?<![A-Z0-9])[A-Z]{2}[0-9]{2}(?:[ -]?[A-Z0-9])++")
_SSN = re.compile(r"(?<![0-9])[0-9]{3}[- .]?[0-9]{2}[- .]?[0-9]{4}(?![0-9])")
_IP = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|(?<![\w:])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]*+[%/\w]*+")
_NOBODYS_IP = re.compile(r"(?:127(?:\.[0-9]+){3}|0\.0\.0\.0|::1|255\.255\.255\.[0-9]+)(?:/[0-9]+)?")
_CRYPTO = re.compile(r"(?<![A-Za-z0-9])(?:bc1|[13])[a-zA-HJ-NP-Z0-9]{25,59}(?![A-Za-z0-9])")

_DIGITS = re.compile(r"[0-9]+")
_LONG_WORD = re.compile(r"[A-Za-z0-9]{26}")
_IN_URI = re.compile(r"://[^\s\"'`]*\Z")
_GROUP = re.compile(r"[ -]")


class PiiDetector:
    """Finds the labels it is given. Loading blocks for half a second, once per process; thread-safe."""

    family = "pii"

    def __init__(self, labels: frozenset[str]) -> None:
        unknown = labels - FAMILIES["pii"].keys()
        if unknown:
            raise ValueError(f"unknown entities {', '.join(sorted(unknown))}")
        self.labels = labels
        self._recognizers = recognizers(labels)

    def may_find(self, scan: str) -> bool:
        """An at sign, seven digits, or an address with fewer."""
        if "@" in scan:
            return True
        digits = sum(map(len, _DIGITS.findall(scan)))
        return digits >= 7 or (digits > 0 and (_IP.search(scan) or _LONG_WORD.search(scan)) is not None)

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        """Personal data that begins at `since` or later (none can begin before and end after it)."""
        found: dict[Hit, str] = {}
        for label, search in _SEARCH.items():
            if label in self.labels:
                found |= dict.fromkeys(search(text.scan, since, self._recognizers[label]), label)
        if "PHONE_NUMBER" in self.labels:
            phones = _phones(text.scan, since, self._recognizers["PHONE_NUMBER"], list(found))
            found |= dict.fromkeys(phones, "PHONE_NUMBER")
        return [
            Finding("pii", label, *text.span(hit.start, hit.end), hit.score, f"presidio.{label.lower()}")
            for hit, label in found.items()
        ]


Search = Callable[[str, int, Recognizer], Iterator[Hit]]


def _around(scan: str, start: int, end: int, recognizer: Recognizer) -> Iterator[Hit]:
    """The recognizer's hits in a candidate, seen with one character before it and at most three after it, the
    last of which may be a break: no more, because a stream may not know more.
    """
    left = max(start - 1, 0)
    right = end
    while right < min(end + 3, len(scan)) and (right == end or scan[right - 1] not in BREAK_CHARS):
        right += 1
    for hit in recognizer.find(scan[left:right]):
        if hit.start + left >= start:
            yield Hit(hit.start + left, hit.end + left, hit.score)


def _cards(scan: str, since: int, recognizer: Recognizer) -> Iterator[Hit]:
    for number in _NUMBER.finditer(scan, since):
        if sum(map(len, _DIGITS.findall(number[0]))) >= 12:
            for hit in _around(scan, *number.span(), recognizer):
                if _is_card(re.sub("[^0-9]", "", scan[hit.start : hit.end])):
                    yield hit


def _is_card(digits: str) -> bool:
    """Presidio accepts any Luhn number that begins with 1, 3, 4, 5 or 6: one in ten timestamps and database ids.
    Real card numbers follow ISO/IEC 7812: UATP 1 (15 digits), 3 (14-16, JCB to 19), 2221-2720, 4, 5, 6 (12-19).
    """
    if digits[0] == "1":
        return len(digits) == 15
    if digits[:2] in ("34", "37"):
        return len(digits) == 15
    if digits[0] == "4":
        return len(digits) in (13, 16, 18, 19)
    return len(digits) >= 12


def _ssns(scan: str, since: int, recognizer: Recognizer) -> Iterator[Hit]:
    for number in _SSN.finditer(scan, since):
        yield from _around(scan, *number.span(), recognizer)


def _phones(scan: str, since: int, recognizer: Recognizer, known: list[Hit]) -> Iterator[Hit]:
    """Last, and only on digits that are nothing else: libphonenumber costs more than all the rest."""
    for number in _NUMBER.finditer(scan, since):
        for start, end in _without(number.span(), known):
            if sum(map(len, _DIGITS.findall(scan, start, end))) < 7:
                continue
            for hit in _phones_in(scan, start, end, recognizer):
                # libphonenumber takes "ext. 123" along, which may come much later in a stream.
                stop = hit.start + len(_UP_TO_EXTENSION.match(scan[hit.start : hit.end])[0])  # type: ignore[index]
                value = scan[hit.start : stop]
                if not _NOT_A_PHONE.fullmatch(value) and not _is_part(scan, hit.start, stop):
                    yield Hit(hit.start, stop, _BARE_NUMBER_SCORE if value.isdigit() else hit.score)


def _phones_in(scan: str, start: int, end: int, recognizer: Recognizer) -> Iterator[Hit]:
    hits = list(_around(scan, start, end, recognizer))
    if not hits and _INTERNATIONAL.match(scan, start, end):
        # libphonenumber reads on into a number that follows, and then finds neither.
        for group in reversed(list(_DIGITS.finditer(scan, start, end))[1:-1]):
            if hits := list(_around(scan[: group.end()], start, group.end(), recognizer)):
                break
    yield from hits


def _without(span: tuple[int, int], known: list[Hit]) -> Iterator[tuple[int, int]]:
    start, end = span
    for hit in sorted(known):
        if hit.start < end and start < hit.end:
            yield start, max(start, hit.start)
            start = max(start, hit.end)
    yield start, end


# 2147483648 is a valid number in the US. Presidio scores it like +1 214 748 3648; we do not: a policy that wants such
# numbers redacted lowers the threshold to 0.3.
_BARE_NUMBER_SCORE = 0.3

_INTERNATIONAL = re.compile(r"[(\[]?\+")
_UP_TO_EXTENSION = re.compile(r"[^A-Za-z#;,]*[0-9]")
_NOT_A_PHONE = re.compile(
    r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"  # dotted quad, valid address or not
    r"|[0-9]{1,3}\.[0-9]{4,}"  # coordinate, decimal
    r"|[12][0-9]{3}([-/.])[01]?[0-9]\1[0-3]?[0-9].*"  # ISO date
    r"|1[0-9]{9}|1[0-9]{12}"  # Unix time in seconds or milliseconds
)


def _is_part(scan: str, start: int, end: int) -> bool:
    """Whether the digits are a part of something longer: a UUID, a hash, a version, a path."""
    before, after = scan[max(start - 2, 0) : start], scan[end : end + 2]
    return bool(re.search(r"[A-Za-z0-9_][-./_]?\Z", before) or re.match(r"[-./_]?[A-Za-z0-9_]", after))


def _emails(scan: str, since: int, recognizer: Recognizer) -> Iterator[Hit]:
    if "@" in scan:
        for address in _EMAIL.finditer(scan, since):
            yield from _around(scan, *address.span(), recognizer)


def _ibans(scan: str, since: int, recognizer: Recognizer) -> Iterator[Hit]:
    at = since
    while account := _IBAN.search(scan, at):
        hits = _iban_from(scan, *account.span(), recognizer)
        yield from hits
        at = hits[0].end if hits else account.start() + 4


def _iban_from(scan: str, start: int, end: int, recognizer: Recognizer) -> list[Hit]:
    """Presidio reads on into upper-case words behind the number, so groups are added one by one. It knows each
    country's length, but as the least one only: the first that is valid is the number.
    """
    if _IN_URI.search(scan, max(start - CONTEXT_CHARS, 0), start):
        end = start + len(scan[start:end].partition(" ")[0])
    for stop in (*(start + gap.start() for gap in _GROUP.finditer(scan[start:end])), end):
        if stop - start >= 15 and (hits := list(_around(scan[:stop], start, stop, recognizer))):
            return hits
    return []


def _ips(scan: str, since: int, recognizer: Recognizer) -> Iterator[Hit]:
    for address in _IP.finditer(scan, since):
        for hit in _around(scan, *address.span(), recognizer):
            value, before, after = scan[hit.start : hit.end], scan[: hit.start][-2:], scan[hit.end : hit.end + 2]
            # 1.2.3.4.5 is a version, dead::beef a C++ name, 127.0.0.1 everybody's.
            dotted = re.search(r"[0-9]\.$", before) or re.match(r"\.[0-9]", after)
            if not dotted and _DIGITS.search(value) and not _NOBODYS_IP.fullmatch(value):
                yield hit


def _coins(scan: str, since: int, recognizer: Recognizer) -> Iterator[Hit]:
    for address in _CRYPTO.finditer(scan, since):
        for hit in _around(scan, *address.span(), recognizer):
            if (hit.start, hit.end) == address.span():
                yield hit


_SEARCH: dict[str, Search] = {
    "CREDIT_CARD": _cards,
    "CRYPTO": _coins,
    "EMAIL_ADDRESS": _emails,
    "IBAN_CODE": _ibans,
    "IP_ADDRESS": _ips,
    "US_SSN": _ssns,
}
