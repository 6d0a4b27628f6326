"""Payment cards: where a card number may stand among digits, and whose it could be.

The checksum (Luhn) is Presidio's. One in ten numbers passes it, so everything else decides whether text survives:
issuer prefixes and their lengths (ISO/IEC 7812; the networks' published ranges), and whether the digits stand for
themselves or are a part of a decimal, of a row of numbers, of a product code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from aim_guardrail.detectors.digit_rows import Hit, Row
from aim_guardrail.detectors.presidio import Recognizer
from aim_guardrail.detectors.words import CARD_WORDS, named

_MIN_DIGITS, _MAX_DIGITS = 12, 19
_GAPS = frozenset({" ", "-", ".", "+"})  # a + is a space in a query string

_ISSUED = re.compile(
    r"4(?:[0-9]{15}|[0-9]{17,18})"  # Visa
    r"|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"  # Mastercard
    r"|3[47][0-9]{13}"  # American Express
    r"|(?:30[0-5][0-9]|3[689][0-9]{2})[0-9]{10}|(?:30[0-5][0-9]|3[689][0-9]{2})[0-9]{12}"  # Diners Club
    r"|35(?:2[89]|[3-8][0-9])[0-9]{12,15}|(?:2131|1800)[0-9]{11}"  # JCB
    r"|220[0-4][0-9]{12,15}|81[0-9]{14,17}"  # Mir, UnionPay
    r"|(?:50|5[6-9]|6[0-9])(?:[0-9]{14}|[0-9]{16,17})"  # Discover, UnionPay, Maestro, RuPay, Troy, ...
    r"|(?:5018|5020|5038|5612|5893|6304|6390|67[0-9]{2})[0-9]{8,15}"  # Maestro of any length
)
# What else is or was issued, but looks too much like other numbers: 13-digit Visa cards like product codes, UATP like
# serial numbers. Counts where it is written in groups, or a word says card.
_RARE = re.compile(r"4[0-9]{12}|1[0-9]{14}|(?:5[06-9]|6[0-9])[0-9]{10,13}|(?:5[06-9]|6[0-9])[0-9]{15}")
_BY_BIN = frozenset({(6, 10), (6, 13)})  # the issuer's six digits, then the rest
_RARE_GROUPS = frozenset({(4, 3, 3, 3), (4, 5, 6)})

_EXPIRY = re.compile(r"(?:0[1-9]|1[0-2])[-/. ]?(?:20)?[2-9][0-9](?:[ ]+[0-9]{3,4})?")
_DECIMAL = re.compile(r"(?:[0-9]|(?<![A-Za-z0-9.]))\.\Z")


def cards(rows: Iterable[Row], luhn: Recognizer) -> Iterator[Hit]:
    """The card numbers in these rows."""
    for row in rows:
        first = 0
        while row.end - row.start >= _MIN_DIGITS and first < len(row.groups):
            last = _card_from(row, first, luhn)
            if last is not None:
                yield Hit(row.groups[first][0], row.groups[last][1], 1.0)
            first = first + 1 if last is None else last + 1


def _card_from(row: Row, first: int, luhn: Recognizer) -> int | None:
    """The last group of the longest card number that begins with the group `first`."""
    start, end = row.groups[first]
    if end - start < 4 or row.scan[start] in "079":
        return None
    return next((last for last in reversed(_ends(row, first)) if _is_card(row, first, last, luhn)), None)


def _ends(row: Row, first: int) -> list[int]:
    """Where a number that begins with this group could end, by the count of its digits and its gaps alone."""
    start, end = row.groups[first]
    count, last, gap, ends = end - start, first, "", []
    while count <= _MAX_DIGITS:
        if count >= _MIN_DIGITS:
            ends.append(last)
        last += 1
        if last == len(row.groups):
            break
        before = row.gap(last)
        gap = gap or before
        if before != gap or gap not in _GAPS:
            break
        count += row.groups[last][1] - row.groups[last][0]
    return ends


def _is_grouping(lengths: tuple[int, ...], gap: str) -> bool:
    """Whether cards are written in such groups: fours and a rest, whole groups more than one of them, or the issuer's
    six and the rest.
    """
    if len(lengths) == 2 and gap == ".":
        return False  # a decimal
    if len(lengths) == 1 or lengths in _BY_BIN or lengths in _RARE_GROUPS:
        return True
    return lengths[0] in (4, 8, 12) and min(lengths[:-1]) >= 4


def _is_card(row: Row, first: int, last: int, luhn: Recognizer) -> bool:
    digits, lengths = row.digits(first, last), row.lengths(first, last)
    start = row.groups[first][0]
    if not _ISSUED.fullmatch(digits) and not (
        _RARE.fullmatch(digits) and (lengths in _RARE_GROUPS or named(CARD_WORDS, row.scan, start))
    ):
        return False
    if not _is_grouping(lengths, row.gap(last)) or not luhn.score(digits) or not _stands_alone(row, first, last, luhn):
        return False
    return not (len(digits) == 13 and first == last and _is_ean(digits)) or named(CARD_WORDS, row.scan, start)


def _is_ean(digits: str) -> bool:
    """Whether the last of 13 digits is the check digit of an EAN (GS1): weights 1 and 3 in turn."""
    return sum(int(digit) * (3 if at % 2 else 1) for at, digit in enumerate(digits)) % 10 == 0


def _stands_alone(row: Row, first: int, last: int, luhn: Recognizer) -> bool:
    """Whether the number is no part of a word, a decimal or a row of like numbers."""
    scan, (start, end) = row.scan, (row.groups[first][0], row.groups[last][1])
    if scan[start - 1 : start].isalnum() or scan[end : end + 1].isalnum():
        return False
    if first == last:
        follows = row.gap(last + 1) if last + 1 < len(row.groups) else ""
        return follows != "." and not _DECIMAL.search(scan, max(start - 3, 0), start)
    return not _in_row_of_likes(row, first, last, luhn) or named(CARD_WORDS, scan, start)


def _in_row_of_likes(row: Row, first: int, last: int, luhn: Recognizer) -> bool:
    """Whether the row goes on in the same manner, and not with the card's expiry date and code, or another card."""
    gap, width, count = row.gap(last), row.lengths(first, first), last + 1 - first
    if last + 1 < len(row.groups) and row.gap(last + 1) == gap and row.lengths(last + 1, last + 1) == width:
        goes_on = not _is_expiry(row, last + 1) and not _is_issued(row, last + 1, last + count, luhn)
        if goes_on:
            return True
    came_on = first > 0 and row.gap(first) == gap and row.lengths(first - 1, first - 1) == width
    return came_on and not (first >= count and _is_issued(row, first - count, first - 1, luhn))


def _is_expiry(row: Row, first: int) -> bool:
    """Whether the row ends with an expiry date and, may be, a code: `12/27 123`, `1227`."""
    if len(row.groups) - first > 3:
        return False
    return _EXPIRY.fullmatch(row.scan, row.groups[first][0], row.groups[-1][1]) is not None


def _is_issued(row: Row, first: int, last: int, luhn: Recognizer) -> bool:
    """Whether these groups alone could be a card's number: a list of cards is no row of likes."""
    digits = row.digits(first, last)
    return _ISSUED.fullmatch(digits) is not None and bool(luhn.score(digits))
