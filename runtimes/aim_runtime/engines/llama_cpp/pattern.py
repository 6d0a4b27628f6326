"""A JSON Schema ``pattern`` in the dialect of the grammar library, allowing no text that the pattern does not.

Read as Python's ``re`` reads it, because that is what validators in Python hold an answer against. Where ECMA 262 and
Python differ (what ``\\d``, ``\\w`` and ``\\s`` mean beyond ASCII), only what both allow may be generated.

Every set of characters is written out without the control characters that JSON has no short escape for: the grammars
allow no ``\\u`` escapes, and the library's quoting of sets that hold all control characters lets a quote or a backslash
pass that the set excludes (derivre 0.3.12, ``quote_all_ctrl``).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

_MAX_CHARACTERS = 2_000
_MAX_REPEATS = 1_000
#: What a JSON string can hold without ``\u`` escapes.
_WRITABLE = r"[\x08-\x0A\x0C\x0D\x20-\x7E\x{80}-\x{10FFFF}]"
_ANYTHING = f"{_WRITABLE}*"
#: Inside a class: characters that certainly belong to a category, and all that may.
_CERTAIN = {
    op.CATEGORY_DIGIT: "0-9",
    op.CATEGORY_NOT_DIGIT: r"[^\p{Nd}]",
    op.CATEGORY_WORD: "0-9A-Za-z_",
    op.CATEGORY_NOT_WORD: r"[^\p{L}\p{M}\p{N}_]",
    op.CATEGORY_SPACE: r"\x09\x0A\x0C\x0D\x20",
    op.CATEGORY_NOT_SPACE: r"[^\s\x1C-\x1F\p{Z}\x{FEFF}]",
}
_POSSIBLE = {
    op.CATEGORY_DIGIT: r"\p{Nd}",
    op.CATEGORY_NOT_DIGIT: "[^0-9]",
    op.CATEGORY_WORD: r"\p{L}\p{M}\p{N}_",
    op.CATEGORY_NOT_WORD: "[^0-9A-Za-z_]",
    op.CATEGORY_SPACE: r"\s\x1C-\x1F\p{Z}\x{FEFF}",
    op.CATEGORY_NOT_SPACE: r"[^\x09\x0A\x0C\x0D\x20]",
}
_REFUSED = {
    op.ASSERT: "look-around",
    op.ASSERT_NOT: "look-around",
    op.AT: "an anchor or boundary in its middle",
    op.GROUPREF: "a back-reference",
    op.GROUPREF_EXISTS: "a back-reference",
}
_GROUPS = (op.BRANCH, op.SUBPATTERN)

_Items = Sequence[tuple[Any, Any]]


class PatternRefused(ValueError):
    """Says what about the pattern cannot be enforced."""


def translated(pattern: str) -> str:
    """An anchored regular expression for the texts that ``pattern`` is found in.

    Raises:
        PatternRefused: no regular expression, too long, or not a regular language.
    """
    if len(pattern) > _MAX_CHARACTERS:
        raise PatternRefused(f"has {len(pattern)} characters: {_MAX_CHARACTERS} is the most")
    try:
        with warnings.catch_warnings(action="ignore"):  # of syntax that a later Python may read otherwise
            parsed = _parser.parse(pattern)
        if parsed.state.flags & ~re.UNICODE:
            raise PatternRefused("sets flags")
        return f"^{_sequence(parsed, left=True, right=True)}$"
    except (re.error, OverflowError) as error:
        raise PatternRefused(f"is no regular expression: {error}") from error
    except RecursionError as error:
        raise PatternRefused("is nested too deeply") from error


def _sequence(items: _Items, *, left: bool, right: bool) -> str:
    """Items one after the other. ``left`` and ``right``: whether the text may go on beyond, but for an anchor."""
    items = list(items)
    if left and items and items[0] in ((op.AT, op.AT_BEGINNING), (op.AT, op.AT_BEGINNING_STRING)):
        del items[0]
        left = False
    if right and items and items[-1] in ((op.AT, op.AT_END), (op.AT, op.AT_END_STRING)):
        del items[-1]
        right = False
    opens = left and bool(items) and items[0][0] in _GROUPS  # a group at the edge has anchors of its own
    closes = right and bool(items) and items[-1][0] in _GROUPS
    last = len(items) - 1
    parts = [
        _item(kind, value, left=opens and at == 0, right=closes and at == last)
        for at, (kind, value) in enumerate(items)
    ]
    return f"{_ANYTHING if left and not opens else ''}{''.join(parts)}{_ANYTHING if right and not closes else ''}"


def _item(kind: Any, value: Any, *, left: bool, right: bool) -> str:
    if kind is op.LITERAL:
        return _character(value)
    if kind is op.NOT_LITERAL:
        return _set(f"[^{_code(value)}]")
    if kind is op.ANY:
        return _set(r"[^\x0A]")
    if kind is op.IN:
        return _class(value)
    if kind is op.BRANCH:
        return f"(?:{'|'.join(_sequence(branch, left=left, right=right) for branch in value[1])})"
    if kind is op.SUBPATTERN:
        return _group(value, left=left, right=right)
    if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
        return _repeat(*value)
    raise PatternRefused(f"has {_REFUSED.get(kind, str(kind).lower())}")


def _group(value: tuple[Any, int, int, _Items], *, left: bool, right: bool) -> str:
    _, flags_on, flags_off, items = value
    if flags_on or flags_off:
        raise PatternRefused("sets flags")
    return f"(?:{_sequence(items, left=left, right=right)})"


def _repeat(least: int, most: Any, items: _Items) -> str:
    count = max(least, 0 if most is op.MAXREPEAT else most)
    if count > _MAX_REPEATS:
        raise PatternRefused(f"repeats {count} times: {_MAX_REPEATS} is the most")
    return f"(?:{_sequence(items, left=False, right=False)}){{{least},{'' if most is op.MAXREPEAT else most}}}"


def _class(items: _Items) -> str:
    negated = items[0][0] is op.NEGATE
    categories = _POSSIBLE if negated else _CERTAIN
    parts = []
    for kind, value in items[negated:]:
        if kind is op.CATEGORY:
            parts.append(categories[value])
        else:
            low, high = value if kind is op.RANGE else (value, value)
            parts.append(f"{_code(low)}-{_code(high)}")
    return _set(f"[{'^' if negated else ''}{''.join(parts)}]")


def _set(characters: str) -> str:
    return f"[{characters}&&{_WRITABLE}]"


def _character(code: int) -> str:
    if not is_writable(chr(code)):
        raise PatternRefused(f"asks for U+{code:04X}, which is not generated")
    return _code(code)


def _code(code: int) -> str:
    return f"\\x{{{code:X}}}"


def is_writable(text: str) -> bool:
    """Whether a JSON string can hold ``text`` without ``\\u`` escapes: no control characters but the named ones."""
    return not any((c < " " and c not in "\b\t\n\f\r") or c == "\x7f" or "\ud800" <= c <= "\udfff" for c in text)
