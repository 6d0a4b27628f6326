"""Personal data: where it may stand is searched here, in time linear in the text; what a value is, checksums say.

Every search looks at bounded pieces: a pattern of ours finds a candidate, cheap tests throw most of them out, and the
library that knows (Presidio's recognizers, libphonenumber) judges the value alone. So a finding depends on its own unit
(see `aim_guardrail.text`), a few characters before it and one after it, which is what streaming needs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import ClassVar

from aim_guardrail.detectors.addresses import emails, ips
from aim_guardrail.detectors.base import Finding
from aim_guardrail.detectors.cards import cards
from aim_guardrail.detectors.custom_patterns import CustomPatterns
from aim_guardrail.detectors.decoded import RUN, says_text, with_views
from aim_guardrail.detectors.digit_rows import Hit, in_uri, rows, unquoted
from aim_guardrail.detectors.identifiers import IDENTIFIERS
from aim_guardrail.detectors.linear_patterns import LinearPattern
from aim_guardrail.detectors.numbering import REGIONS, numbering
from aim_guardrail.detectors.phones import phones
from aim_guardrail.detectors.pii_labels import IDENTIFIER_LABELS, PII_LABELS
from aim_guardrail.detectors.pii_options import PiiOptions
from aim_guardrail.detectors.presidio import LABELS, Recognizer, iban_lengths, recognizers
from aim_guardrail.text import CONTEXT_CHARS, WINDOW_CHARS, Text

# Every pattern begins with the characters it looks for, and only there looks back: that is what makes it fast.
_IBAN_START = re.compile(r"([A-Z](?<![A-Z0-9].)[A-Z])[0-9]{2}(?=[ %-]?[A-Z0-9])")
# Not behind a +, unless that is a space in a query string.
_SSN = re.compile(
    r"[0-9](?<![A-Za-z0-9].)(?<!(?<![A-Za-z0-9])\+.)[0-9]{2}([- .]|%2[0Dd])[0-9]{2}\1[0-9]{4}(?![A-Za-z0-9])(?!\1[0-9])"
)
_CRYPTO = re.compile(r"[b13](?<![A-Za-z0-9].)(?:(?<=b)c1|(?<!b))[a-zA-HJ-NP-Z0-9]{25,59}(?![A-Za-z0-9])")

# What a URL writes so is no part of a value, but a blank or a hyphen between two digits, a plus sign, or an at sign.
_ENCODED = re.compile(r"%(?:0[0-9A-Fa-f]|2[1-9AaCcFf]|(?<![0-9].)(?:20|2[Dd])|3[A-Fa-f]|5[B-Eb-e]|60|7[B-Eb-e])")

_BETWEEN = "|||"  # stands for it: an account's groups may be as far apart

_CUT = re.compile(r"\n|(?<=[a-z])[ \t](?=[a-z])")  # between lines and between words

# An at sign, seven digits, or an address with fewer: long texts are searched by RE2, in a tenth of the time.
_VALUE = r"[0-9](?:[^0-9]*[0-9]){6}|[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:|[A-Za-z0-9]{26}"
_PERSONAL = LinearPattern(_VALUE)
_PERSONAL_OR_RUN = LinearPattern(f"{_VALUE}|{RUN}")  # of most texts neither is true: one search tells
_LONG_CHARS = 128
_DIGITS = re.compile("[0-9]+")
_SHORT_IP = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:")
_IDENTIFIER = LinearPattern("[A-Z0-9][A-Z0-9.-]{6}")  # of those with few digits
_LONG_WORD = re.compile(r"[A-Za-z0-9]{26}")


class PiiDetector:
    """Finds the labels it is given. Loading blocks for a tenth of a second, once per process; thread-safe.

    `regions`: whose national telephone numbers are known, None: every region's.
    """

    family: ClassVar[str] = "pii"

    def __init__(
        self, labels: frozenset[str], regions: frozenset[str] | None = None, options: PiiOptions | None = None
    ) -> None:
        self.options = options or PiiOptions()
        known = {**PII_LABELS, **IDENTIFIER_LABELS, **self.options.labels}
        if unknown := labels - known.keys():
            raise ValueError(f"unknown entities {', '.join(sorted(unknown))}")
        self.labels = labels
        self.regions = regions
        self._thresholds = {label: known[label].threshold for label in labels}
        self._identifiers = [IDENTIFIERS[label] for label in sorted(labels & IDENTIFIERS.keys())]
        own = [custom for custom in self.options.custom if custom.label in labels]
        self._custom = CustomPatterns(own) if own else None
        self._recognizers = recognizers(labels & LABELS)
        self._plans = numbering(regions or REGIONS) if "PHONE_NUMBER" in labels else None
        self._ibans = _iban_patterns() if "IBAN_CODE" in labels else {}

    def may_find(self, scan: str) -> bool:
        """An at sign, seven digits, or an address with fewer."""
        if len(scan) > WINDOW_CHARS:
            return True  # a search of all would keep other threads waiting
        if "@" in scan or "%40" in scan:
            return True
        if self._custom is not None and self._custom.may_find(scan):
            return True
        if self._identifiers and _IDENTIFIER.search(scan):
            return True
        if len(scan) >= _LONG_CHARS:
            return _PERSONAL_OR_RUN.search(scan) and (_PERSONAL.search(scan) or says_text(scan))
        return _is_personal(scan) or says_text(scan)

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        """Personal data that begins at `since` or later (none can begin before and end after it)."""
        return with_views(text, since, self._plain)

    def _plain(self, text: Text, since: int) -> list[Finding]:
        return [finding for start, end in _windows(text.scan, since) for finding in self._scan_window(text, start, end)]

    def _scan_window(self, text: Text, since: int, end: int) -> Iterator[Finding]:
        first = max(0, since - CONTEXT_CHARS) if end - since < len(text.scan) else 0
        scan = text.scan[first:end]
        for label, hit in self._hits(_ENCODED.sub(_BETWEEN, scan) if "%" in scan else scan, since - first):
            span = text.span(first + hit.start, first + hit.end)
            yield Finding("pii", label, *span, hit.score, _rule_id(label))

    def _hits(self, scan: str, since: int) -> list[tuple[str, Hit]]:
        found: list[tuple[str, Hit]] = []
        digit = _DIGITS.search(scan, since)
        near = max(digit.start() - 2, since) if digit else len(scan)  # the third character is one, or an earlier
        for label, search in _SEARCH.items():
            if label in self.labels:
                found += [(label, hit) for hit in search(scan, since, near, self._recognizers[label])]
        if "IBAN_CODE" in self.labels:
            found += [("IBAN_CODE", hit) for hit in self._accounts(scan, near)]
        if self._identifiers and (_IDENTIFIER.search(scan[since:]) or _PERSONAL.search(scan[since:])):
            found += [(kind.label, hit) for kind in self._identifiers for hit in kind.hits(scan, since)]
        if self._custom is not None:
            found += self._custom.hits(scan, since)
        return found + self._in_rows(scan, near, found)

    def _in_rows(self, scan: str, since: int, found: list[tuple[str, Hit]]) -> list[tuple[str, Hit]]:
        """Cards, then phones: what counts as something else by its own threshold is no phone."""
        if not self.labels & {"CREDIT_CARD", "PHONE_NUMBER"}:
            return []
        digit_rows = list(rows(scan, since))
        new: list[tuple[str, Hit]] = []
        if "CREDIT_CARD" in self.labels:
            new += [("CREDIT_CARD", hit) for hit in cards(digit_rows, self._recognizers["CREDIT_CARD"])]
        if self._plans is not None:
            sure = sorted(hit[:2] for label, hit in found + new if hit.score >= self._thresholds[label])
            new += [("PHONE_NUMBER", hit) for hit in phones(digit_rows, self._plans, sure)]
        return new

    def _accounts(self, scan: str, since: int) -> Iterator[Hit]:
        recognizer, at = self._recognizers["IBAN_CODE"], since
        while start := _IBAN_START.search(scan, at):
            at = start.start() + 4
            pattern = self._ibans.get(start[1])
            account = pattern.match(scan, start.start()) if pattern else None
            # Where a URI goes on, the account does not go on behind its end.
            crosses = account is not None and " " in account[0] and in_uri(scan, account.start())
            if account and not crosses and _is_account(account[0], recognizer):
                yield Hit(*account.span(), 1.0)
                at = account.end()


def _is_personal(scan: str) -> bool:
    """The same of a short text, without an at sign."""
    groups = _DIGITS.findall(scan)
    if not groups:
        return False
    return sum(map(len, groups)) >= 7 or (_SHORT_IP.search(scan) or _LONG_WORD.search(scan)) is not None


def _windows(scan: str, since: int) -> Iterator[tuple[int, int]]:
    """The text from `since` on in pieces between which no value lies, so that other threads have their turn."""
    while since < len(scan):
        cut = _CUT.search(scan, since + WINDOW_CHARS)
        end = cut.end() if cut else len(scan)
        yield since, end
        since = end


Search = Callable[[str, int, int, Recognizer], Iterator[Hit]]
"""Searches the text from an index on; what has a digit among its first three characters begins at the second one."""


def _iban_patterns() -> dict[str, re.Pattern[str]]:
    """Each country's number of characters, in groups or not."""
    return {
        country: re.compile(rf"{country}[0-9]{{2}}(?:(?:[ -]|%2[0D]|\|\|\|)?[A-Z0-9]){{{length - 4}}}(?![A-Z0-9])")
        for country, length in iban_lengths().items()
    }


def _is_account(account: str, recognizer: Recognizer) -> bool:
    return recognizer.score(unquoted(account).replace(_BETWEEN, "")) > 0


def _ssns(scan: str, _: int, near: int, recognizer: Recognizer) -> Iterator[Hit]:
    for number in _SSN.finditer(scan, near):
        start, end = number.span()
        goes_on = scan[start - 1 : start] == number[1] and scan[start - 2 : start - 1].isdigit()
        if not goes_on and (score := recognizer.score(unquoted(number[0]))):
            yield Hit(start, end, score)


def _coins(scan: str, _: int, near: int, recognizer: Recognizer) -> Iterator[Hit]:
    for address in _CRYPTO.finditer(scan, near):
        if score := recognizer.score(address[0]):
            yield Hit(*address.span(), score)


@functools.cache
def _rule_id(label: str) -> str:
    source = "presidio" if label in LABELS else "libphonenumber" if label == "PHONE_NUMBER" else "aim"
    return f"{source}.{label.lower()}"


_SEARCH: dict[str, Search] = {
    "CRYPTO": _coins,
    "EMAIL_ADDRESS": emails,
    "IP_ADDRESS": ips,
    "US_SSN": _ssns,
}
