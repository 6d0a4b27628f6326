"""Telephone numbers: which groups of a row of digits are one.

With a country code (`+49 30 901820`, `0049 30 ...`) a number proves itself. In national form nearly any 7 to 10 digits
are somebody's number somewhere: such a number counts where its writing says that it is one (an area code in brackets,
a leading 0, the 3-3-4 of North America, its region's own separators) or a word before it does (`Tel.`, `mobile`). The
others score 0.3, below the default threshold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from aim_guardrail.detectors.digit_rows import Hit, Row
from aim_guardrail.detectors.numbering import (
    MAX_DIGITS,
    MIN_DIGITS,
    Numbering,
    international_lengths,
    is_international,
)
from aim_guardrail.detectors.words import IDENTIFIER_WORDS, PHONE_WORDS, named, words_before

_SCORE = 0.4  # Presidio's for every phone number
_UNMARKED_SCORE = 0.3
_MOST_GROUPS = 8
_IDENTIFIER_REACH = 12

# Gaps within one number; the first after an area code may be wider: 0171 / 1234567.
_GAPS = frozenset({" ", "-", ".", "/", ")", ") ", ")-", ")/", "(", " (", "-(", ".(", " / ", " - "})
_AFTER_AREA = frozenset({"/", " / ", " - "})
_WIDE = _AFTER_AREA | {" "}
_PLUS = re.compile(r"(?:\(\+|\+\(?|%2[Bb])\Z")
_OPENING = re.compile(r"[(\[]\Z")
_LEADS = frozenset("+([Bb")  # with one of which both of them end
_EMPHASIS = "_*~"
# In a word, a version, a range of two dots, behind the point of a decimal; `Tel.030` is a label.
_PART_BEFORE = re.compile(r"(?:[A-Za-z0-9][-.]?|(?<!\.)\.\.|(?:\A|[^A-Za-z0-9.])\.)\Z")
_LABEL_BEFORE = re.compile(r"(?:tel|fon|fax|phone|mob|mobil|handy)\.?\Z", re.IGNORECASE)
_CLOCK = re.compile(r"[0-9]:\Z")
_PART_AFTER = re.compile(r"[-._]?[A-Za-z0-9]")
# Bytes in hexadecimal before: `3a 01 42 68 53 00`. A word of two such letters (`de 01 42 ...`) alone is none.
_HEX_DUMP = re.compile(
    r"(?:\A|[^0-9A-Za-z:])(?:[0-9A-Fa-f]{2} [A-Fa-f]{2}|(?=[A-Fa-f]{0,7}[0-9])[0-9A-Fa-f]{2,8}) {1,2}\Z"
)

_NOT_A_PHONE = re.compile(
    r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"  # dotted quad, valid address or not
    r"|[0-9]+\.[0-9]+"  # decimal
    r"|.*(?<![0-9])(?:19|20)[0-9]{2}([-/. ])[01]?[0-9]\1[0-3]?[0-9](?![0-9]).*"  # 2022-09-03
    r"|[0-3]?[0-9]([-/. ])[0-3]?[0-9]\2(?:19|20)[0-9]{2}(?![0-9]).*"  # 03.09.2022, 9/3/2022
    r"|(?:19|20)[0-9]{2}[-/ ](?:19|20)[0-9]{2}"  # years
    r"|97[89][- ][0-9]{1,5}[- ][0-9]+[- ][0-9]+[- ][0-9]"  # ISBN
    r"|[0-9]+ \((?:19|20)[0-9]{2}"  # 036108 (2005), a citation's
    r"|[01]{4}(?: [01]{4})+"  # binary
    r"|1[0-9]{9}|1[0-9]{12}"  # Unix time in seconds or milliseconds
)
# Mobiles as India, China and others write them, where nothing but such a number stands in the row.
_MOBILES = frozenset({(5, 5), (3, 4, 4), (3, 3, 4)})
# As ZIP+4 and social security numbers are written: counts where a word says phone.
_AMBIGUOUS = re.compile(r"[0-9]{5}-[0-9]{4}|[0-9]{3}-[0-9]{2}-[0-9]{4}")
# `phone: 4155552671`: digits without separators count behind a label only.
_LABEL = re.compile(
    r"(?:phone|tel|telefon[eo]?|mobile|cell|fax|whatsapp)(?:[ _-]?(?:number|num|no|nr))?\.?[\"']?"
    r"(?:\s?[:=]|\sis)\s?[\"'(]?\Z",
    re.IGNORECASE,
)


def phones(rows: Iterable[Row], plans: Numbering, known: Sequence[tuple[int, int]]) -> Iterator[Hit]:
    """The telephone numbers in these rows, outside of what is `known` to be something else (spans in order)."""
    at = 0
    for row in rows:
        start, end = row.start, row.end
        while at < len(known) and known[at][1] <= start:
            at += 1
        if at < len(known) and known[at][0] <= start and end <= known[at][1]:
            continue  # all of it is something else
        upto = at
        while upto < len(known) and known[upto][0] < end:
            upto += 1
        for first, last in _pieces(row, known[at:upto]):
            if row.groups[last][1] - row.groups[first][0] >= MIN_DIGITS:
                yield from _in_piece(row, first, last, plans)


def _pieces(row: Row, known: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The stretches of groups that no gap and nothing known divides, each from a + on."""
    start = row.groups[0][0]
    first, at = 1 if _CLOCK.search(row.scan, max(start - 2, 0), start) else 0, 0  # 12:30 0171 1234567
    for index, (start, end) in enumerate(row.groups[first:], first):
        while at < len(known) and known[at][1] <= start:
            at += 1
        taken = at < len(known) and known[at][0] < end
        if index > first and (taken or row.gap(index) not in _GAPS):
            yield first, index - 1
            first = index
        if taken:
            first = index + 1
    if first < len(row.groups):
        yield first, len(row.groups) - 1


def _in_piece(row: Row, first: int, last: int, plans: Numbering) -> Iterator[Hit]:
    lead = _lead(row, first)
    prefix = _international_prefix(row, first, lead)
    if prefix is not None:
        end = _international_end(row, first, last, prefix)
        if end is not None and not _is_part(row, first, end, anywhere=True):
            yield _hit(row, first, end, _SCORE)
            first = end + 1
        elif not prefix:
            return
    if first <= last:
        yield from _national(row, first, last, plans)


def _lead(row: Row, index: int) -> str:
    """The +, the opening bracket or both that stand right before a group and belong to the number."""
    start = row.groups[index][0]
    before = row.scan[max(start - 3, 0) : start]
    if before[-1:] not in _LEADS:
        return ""
    mark = _PLUS.search(before) or _OPENING.search(before)
    return mark[0] if mark else ""


def _international_prefix(row: Row, first: int, lead: str) -> int | None:
    """How many digits stand before the country code: none behind a +, those of 00 or 011; None: there is no code."""
    if "+" in lead or "%" in lead:
        return 0
    start, end = row.groups[first]
    if row.scan.startswith("00", start):
        return 2
    return 3 if row.scan.startswith("011", start) and end == start + 3 else None


def _international_end(row: Row, first: int, last: int, prefix: int) -> int | None:
    """The last group of the longest valid number that begins with `prefix` digits and a country code."""
    digits = row.digits(first, min(last, first + MAX_DIGITS + 2))[prefix:]
    size, lengths = international_lengths(digits)
    end, count, found = first, -prefix, None
    while size and end <= last and count < MAX_DIGITS:
        count += row.groups[end][1] - row.groups[end][0]
        national = digits[size:count]
        if "(0)" in row.scan[row.groups[first][0] : row.groups[end][1] + 1]:
            national = national.removeprefix("0")
        if count >= MIN_DIGITS and size + len(national) in lengths and is_international(int(digits[:size]), national):
            found = end
        end += 1
    # Digits without separators name no international prefix, and pairs of digits are bytes.
    bare = found == first or (found is not None and set(row.lengths(first, found)) == {2})
    return None if prefix and bare else found


def _national(row: Row, first: int, last: int, plans: Numbering) -> Iterator[Hit]:
    """The numbers in a stretch, the surest and longest of those that overlap."""
    scored = []
    for start, end in dict.fromkeys(_candidates(row, first, last)):
        if MIN_DIGITS <= sum(row.lengths(start, end)) <= MAX_DIGITS:
            whole = (start, end) == (0, len(row.groups) - 1)
            scored.append((_score(row, start, end, plans, whole=whole), start, end))
    taken = bytearray(last + 1)
    for score, start, end in sorted(scored, key=lambda candidate: (-candidate[0], candidate[1], -candidate[2])):
        if score and not any(taken[start : end + 1]):
            taken[start : end + 1] = b"\1" * (end + 1 - start)
            yield _hit(row, start, end, score)


def _hit(row: Row, first: int, last: int, score: float) -> Hit:
    """The number with its + and with an opening bracket, if it closes that itself."""
    start, end, lead = row.groups[first][0], row.groups[last][1], _lead(row, first)
    if lead[:1] in ("(", "[") and not any(sign in row.scan[start:end] for sign in ")]"):
        lead = lead[1:]
    return Hit(start - len(lead), end, score)


def _candidates(row: Row, first: int, last: int) -> Iterator[tuple[int, int]]:
    if last - first < _MOST_GROUPS:
        yield first, last
    if named(PHONE_WORDS, row.scan, row.groups[first][0]):
        for end in range(min(last, first + _MOST_GROUPS) - 1, first, -1):
            yield first, end
    start = first
    for index in range(first, last + 1):
        if ")" in row.gap(index + 1) if index < last else False:
            yield from _bracketed(row, index, min(last, index + 4))
        if index == last or row.gap(index + 1) == " ":
            if (start, index) != (first, last) and index - start < _MOST_GROUPS:
                yield start, index
            start = index + 1


def _bracketed(row: Row, first: int, last: int) -> Iterator[tuple[int, int]]:
    """From an area code in brackets to every group before the next closing bracket, the longest first."""
    end = first + 1
    while end < last and ")" not in row.gap(end + 1):
        end += 1
    yield from ((first, at) for at in range(end, first, -1))


def _score(row: Row, first: int, last: int, plans: Numbering, *, whole: bool) -> float:
    """How certain it is that these groups are a telephone number: 0, 0.3 or 0.4."""
    value = row.scan[row.groups[first][0] : row.groups[last][1]]
    if _NOT_A_PHONE.fullmatch(value) or _is_part(row, first, last):
        return 0.0
    start = row.groups[first][0] - len(_lead(row, first))
    digits = row.digits(first, last)
    if first == last:
        marked = _LABEL.search(row.scan, max(start - 32, 0), start) is not None
        return (_SCORE if marked else _UNMARKED_SCORE) if plans.is_any(digits) else 0.0
    if not plans.is_any(digits) and not plans.is_written(row.lengths(first, last), digits):
        return 0.0
    if not _consistent(row, first, last):
        return 0.0
    marked = not _AMBIGUOUS.fullmatch(value) and _is_marked(row, first, last, plans, whole=whole)
    if not named(PHONE_WORDS, row.scan, start):
        marked = marked and IDENTIFIER_WORDS.isdisjoint(words_before(row.scan, start, _IDENTIFIER_REACH))
        return _SCORE if marked else _UNMARKED_SCORE
    return _SCORE


def _is_marked(row: Row, first: int, last: int, plans: Numbering, *, whole: bool) -> bool:
    """Whether the writing alone says that this is a telephone number."""
    digits, lengths, gaps = row.digits(first, last), row.lengths(first, last), _gaps(row, first, last)
    if plans.is_american(lengths, digits) and (gaps[-1] in "-." or whole):
        return True  # 415-555-2671
    if plans.is_dialled(digits) and min(lengths) >= 2 and not _like_a_dump(row, first, gaps):
        return len(digits) >= 9 or plans.is_written(lengths, digits)  # 030 901820
    if "(" in _lead(row, first) + gaps[0] and ")" in gaps[0] + "".join(gaps[1:2]):
        return plans.is_written(lengths, digits)  # (11) 2345-6789, 8 (495) 123-45-67
    usual = ("-" in gaps and len(digits) >= 9) or (whole and lengths in _MOBILES)
    return usual and plans.is_written(lengths, digits, gaps)  # 11 91234-5678, 98765 43210


def _gaps(row: Row, first: int, last: int) -> tuple[str, ...]:
    return tuple(row.gap(at) for at in range(first + 1, last + 1))


def _consistent(row: Row, first: int, last: int) -> bool:
    """Whether one hand could have written these groups as one number, rather than as a sum, a version, a code."""
    lengths, gaps = row.lengths(first, last), _gaps(row, first, last)
    if 1 in lengths[1:] or any(gap in _AFTER_AREA for gap in gaps[1:]):
        return False
    start = row.groups[first][0]
    if gaps[0] in _AFTER_AREA:
        area = row.scan[start] == "0" and 3 <= lengths[0] <= 6 and sum(lengths[1:]) <= 9
        if not area or row.gap(first) == " ":
            return False
    if gaps[0] in _WIDE and row.scan[start - 1 : start] == "," and row.scan[start - 2 : start - 1].isdigit():
        return False  # 1,234 567
    bracketed = any("(" in gap or ")" in gap for gap in (_lead(row, first), *gaps))
    return bracketed or "." not in gaps or set(gaps) == {"."}


def _like_a_dump(row: Row, first: int, gaps: tuple[str, ...]) -> bool:
    """Whether the groups go on from bytes in hexadecimal."""
    start = row.groups[first][0]
    return set(gaps) == {" "} and _HEX_DUMP.search(row.scan, max(start - 11, 0), start) is not None


def _is_in_word(before: str) -> bool:
    return _PART_BEFORE.search(before) is not None and not _LABEL_BEFORE.search(before)


def _is_glued(row: Row, first: int) -> bool:
    """Whether a group goes on from the one before it: 0190(74)90003 of a DOI, -.093.187 of a path."""
    gap = row.gap(first)
    return (gap == "(" and row.lengths(first - 1, first - 1)[0] >= 4) or (len(gap) > 1 and gap[-1] == ".")


def _is_part(row: Row, first: int, last: int, *, anywhere: bool = False) -> bool:
    """Whether the digits are a part of something longer (a UUID, a hash, a version); `anywhere`: of a word."""
    scan, start, end = row.scan, row.groups[first][0] - len(_lead(row, first)), row.groups[last][1]
    before = scan[max(start - 8, 0) : start].rstrip(_EMPHASIS)
    if first and _is_glued(row, first):
        return True
    if first == 0 and (before[-1:].isalnum() if anywhere else _is_in_word(before)):
        return True
    if last + 1 < len(row.groups):
        return False
    after = scan[end : end + 2]
    return after[:1].isalnum() if anywhere else _PART_AFTER.match(after) is not None
