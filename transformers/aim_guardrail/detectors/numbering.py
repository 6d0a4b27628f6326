"""The edge to libphonenumber: which digits are a telephone number, and how each region writes them.

Its own matcher tries one region at a time, 0.05 ms each, compiles patterns anew as they drop out of Python's cache,
and reads on into numbers that follow. Here its data of all regions is turned once into a few patterns and a table by
the lengths of digit groups, so that a candidate costs some microseconds, whatever it is.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

import phonenumbers
from phonenumbers import PhoneMetadata

REGIONS = frozenset(phonenumbers.SUPPORTED_REGIONS)
"""Every region whose numbers are known (ISO 3166-1 alpha-2)."""

MIN_DIGITS, MAX_DIGITS = 7, 15
"""The shortest number looked for; the longest with its country code (ITU-T E.164)."""

_KINDS = (
    "fixed_line",
    "mobile",
    "toll_free",
    "premium_rate",
    "shared_cost",
    "personal_number",
    "voip",
    "pager",
    "uan",
    "voicemail",
)
_OFTEN_MEANT = {"UK": "GB", "EN": "GB", "EL": "GR", "USA": "US"}
_WIDTH = re.compile(r"\(\\d(?:\{(\d+)(?:,(\d+))?\})?\)")
_MOST_WIDTHS = 13  # no group is longer than a whole national number


def nearest_region(name: str) -> str:
    """The known region that was most likely meant by an unknown one."""
    wanted = name[:40].upper()
    meant = _OFTEN_MEANT.get(wanted)
    return meant or max(sorted(REGIONS), key=lambda region: _likeness(wanted, region))


def _likeness(wanted: str, region: str) -> tuple[bool, float]:
    return wanted.startswith(region), SequenceMatcher(None, wanted, region).ratio()


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one calling code allows: its national numbers, and the prefix dialled before them at home."""

    code: int
    region: str
    number: str
    lengths: frozenset[int]
    prefix: str


@dataclass(frozen=True, slots=True)
class _Form:
    """One manner of writing a plan's numbers: with which prefix and separators, if any."""

    plan: _Plan
    prefix: str
    separators: tuple[str, ...]
    leading: str
    own: str | None = None  # a pattern, where the form has digits of its own or leaves some out

    def holds(self, digits: str) -> bool:
        """Whether these digits, in groups of this form's lengths, are a number of its plan."""
        if self.own is not None:
            return _compiled(self.own).fullmatch(digits) is not None and _is_dialled(digits, self.plan.region)
        national = digits[len(self.prefix) :]
        return (
            digits.startswith(self.prefix)
            and _compiled(self.leading).match(national) is not None
            and _compiled(self.plan.number).fullmatch(national) is not None
        )


class Numbering:
    """The numbering plans of some regions.

    Its tables are made when a candidate first needs them: some 10 to 50 ms each for all regions.
    """

    def __init__(self, regions: frozenset[str]) -> None:
        self._regions = regions

    @cached_property
    def _plans(self) -> list[_Plan]:
        return [_plan(code) for code in sorted({phonenumbers.country_code_for_region(r) for r in self._regions})]

    @cached_property
    def _forms(self) -> dict[tuple[int, ...], list[_Form]]:
        forms: dict[tuple[int, ...], list[_Form]] = {}
        for plan in self._plans:
            for lengths, form in _forms(plan):
                known = forms.setdefault(lengths, [])
                if form not in known:
                    known.append(form)
        return forms

    @cached_property
    def _american(self) -> re.Pattern[str]:
        return re.compile(_any(plan for plan in self._plans if plan.code == 1))

    @cached_property
    def _behind_zero(self) -> re.Pattern[str]:
        return re.compile(_any(plan for plan in self._plans if plan.prefix == "0"))

    @cached_property
    def _others(self) -> re.Pattern[str]:
        return re.compile(_any(plan for plan in self._plans if plan.prefix != "0"))

    @cached_property
    def _with_zero(self) -> re.Pattern[str]:
        return re.compile(_any(filter(_begins_with_zero, self._plans)))

    def is_written(self, lengths: tuple[int, ...], digits: str, separators: tuple[str, ...] | None = None) -> bool:
        """Whether groups of these lengths, with these digits and separators, are how a region writes its numbers."""
        forms = self._forms.get(lengths, ())
        return any(separators in (None, form.separators) and form.holds(digits) for form in forms)

    def is_american(self, lengths: tuple[int, ...], digits: str) -> bool:
        """Whether this is a North American number in its usual groups."""
        return lengths in ((3, 3, 4), (1, 3, 3, 4)) and self._american.fullmatch(digits[-10:]) is not None

    def is_dialled(self, digits: str) -> bool:
        """Whether the digits are a number as dialled at home behind a 0, however they are grouped."""
        if digits[:1] != "0" or digits[:2] == "00":
            return False
        return self._behind_zero.fullmatch(digits, 1) is not None or self._with_zero.fullmatch(digits) is not None

    def is_any(self, digits: str) -> bool:
        """Whether the digits are a number of some region, with or without its prefix."""
        known = self._behind_zero.fullmatch(digits) or self._others.fullmatch(digits)
        return known is not None or self.is_dialled(digits)


@functools.cache
def numbering(regions: frozenset[str]) -> Numbering:
    """The plans of these regions, shared."""
    return Numbering(regions)


def international_lengths(digits: str) -> tuple[int, frozenset[int]]:
    """How many digits the country code has that these begin with, and how many a whole number; (0, none): no code."""
    for size in (1, 2, 3):
        code = int(digits[:size] or 0)
        if digits[:1] != "0" and code in phonenumbers.COUNTRY_CODE_TO_REGION_CODE:
            return size, _whole_lengths(code, size)
    return 0, frozenset()


@functools.cache
def _whole_lengths(code: int, size: int) -> frozenset[int]:
    return frozenset(size + length for length in _plan(code).lengths)


def is_international(code: int, national: str) -> bool:
    """Whether the digits behind a country code are a valid number, of whatever region."""
    return _compiled(_plan(code).number).fullmatch(national) is not None


def _is_dialled(digits: str, region: str) -> bool:
    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse(digits, region)))
    except phonenumbers.NumberParseException:
        return False


def _any(plans: Iterable[_Plan]) -> str:
    return "|".join(plan.number for plan in plans) or "(?!)"


def _metadata(code: int) -> list[Any]:
    """The data of a calling code's regions, the main one first."""
    regions = phonenumbers.COUNTRY_CODE_TO_REGION_CODE[code]
    if regions[0] == "001":
        return [PhoneMetadata.metadata_for_nongeo_region(code)]
    return [PhoneMetadata.metadata_for_region(region) for region in regions]


@functools.cache
def _plan(code: int) -> _Plan:
    described = _metadata(code)
    kinds = [getattr(region, kind) for region in described for kind in _KINDS]
    patterns = {kind.national_number_pattern for kind in kinds if kind is not None and kind.national_number_pattern}
    lengths = {length for region in described for length in region.general_desc.possible_length}
    main = described[0]
    return _Plan(code, main.id, "|".join(sorted(patterns)), frozenset(lengths), main.national_prefix or "")


def _begins_with_zero(plan: _Plan) -> bool:
    """Whether the 0 of a fixed line or a mobile is part of its number (Italy, Ivory Coast, ...)."""
    examples = (phonenumbers.example_number_for_type(plan.region, kind) for kind in (0, 1))
    return any(example is not None and example.italian_leading_zero for example in examples)


def _forms(plan: _Plan) -> Iterator[tuple[tuple[int, ...], _Form]]:
    """The written forms of a plan's numbers, by the lengths of their digit groups."""
    for style in _metadata(plan.code)[0].number_format:
        leading = style.leading_digits_pattern[-1] if style.leading_digits_pattern else ""
        rule = style.national_prefix_formatting_rule or "\\1"
        first = re.search(r"\\[0-9]", style.format)[0]  # type: ignore[index]
        shapes = {style.format, style.format.replace(first, rule.replace("\\1", first), 1)}
        widths = [_widths(low, high) for low, high in _WIDTH.findall(style.pattern)]
        for shape, sizes in itertools.product(sorted(shapes), itertools.product(*widths)):
            yield from _form(plan, shape, sizes, leading)


def _widths(low: str, high: str) -> range:
    least = int(low or 1)
    return range(least, min(int(high or least), _MOST_WIDTHS) + 1)


def _form(plan: _Plan, shape: str, sizes: tuple[int, ...], leading: str) -> Iterator[tuple[tuple[int, ...], _Form]]:
    """One form: `shape` is `(0\\1) \\2-\\3`, `sizes` how many digits each group of the pattern has."""
    expanded = re.sub(r"\\([0-9])", lambda group: "#" * sizes[int(group[1]) - 1], shape)
    groups = re.findall(r"[0-9#]+", expanded)
    if len(groups) < 2 or not MIN_DIGITS <= sum(map(len, groups)) <= MAX_DIGITS:
        return
    separators = tuple(re.findall(r"(?<=[0-9#])[^0-9#]+(?=[0-9#])", expanded))
    own = "".join(groups)
    prefix = re.match(r"[0-9]*", own)[0]  # type: ignore[index]
    whole = own == prefix + "#" * sum(sizes)
    form = _Form(plan, prefix, separators, leading, None if whole else own.replace("#", "[0-9]"))
    yield tuple(map(len, groups)), form


_compiled = functools.cache(re.compile)
"""Patterns come from the metadata only: their number is bounded, and larger than Python's own cache."""
