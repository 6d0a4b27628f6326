"""Text as detectors see it: folded to ASCII once, with a way back to the original's code points; and its units.

**Folding** makes look-alike spellings equal before anything is searched: compatibility forms (fullwidth letters,
ligatures, circled digits: Unicode NFKD), every script's decimal digits, typographic dashes and quotes become ASCII,
em dashes a space (they part words, as spaces do); invisible characters (category Cf: zero-width, soft hyphen, bidi
controls; fillers) and combining marks vanish; letters with accents lose them; other Latin, Greek and Cyrillic letters
become `x`; everything else (CJK, emoji, ...) becomes a line break, because no value we look for continues across it.
Backslash escapes (`\\n`, `\\"`, `\\u0040`, behind any number of backslashes) become what they stand for: answers are
often JSON, or code, and `"\\nAKIA..."` holds a key.
Folding works code point by code point (hence NFKD without marks rather than NFKC) and escape by escape, so it gives
the same result however a stream is cut between them; an escape still incomplete is held back.

**Units** are the pieces of folded text that no value crosses: a run without breaks, extended over the gaps between
digit groups (`4111 1111 1111 1111`, `+49 (30) 123-45`), over the groups of an IBAN, over a whole URI and over a
whole private key block. Text may be released, and scans may be windowed, between units and nowhere else.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

CONTEXT_CHARS = 512
"""How far back before a unit a detector may look (keywords such as `aws_secret_access_key = `)."""

WINDOW_CHARS = 8192
"""How much is searched at once: a search holds the interpreter until it finds something."""

# Never inside a value: whitespace and the punctuation that quotes, lists and encloses.
BREAKS = r"\s\",;<>()\[\]{}`"
BREAK_CHARS = frozenset(' \t\n\r\f\v\x1c\x1d\x1e\x1f",;<>()[]{}`')
# What may stand between two digit groups of one phone, card or account number (libphonenumber's set).
_GAP = r"[-x./ ()\[\]~]"

IGNORABLE = frozenset([0x115F, 0x1160, 0x2065, 0x3164, 0xFFA0, *range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000)])
"""Code points that show nothing though Unicode calls them letters, or nothing yet: fillers of Hangul, and what is to be
ignored by default (DerivedCoreProperties.txt, `Default_Ignorable_Code_Point`)."""

_UNIT_PATTERN = rf"""(?:
        [(\[][-x./\ ()\[\]~+]{{0,6}}(?=[0-9]|\Z)                      # ( of a number's area code
      | (?<=[0-9]){_GAP}{{1,6}}(?=[0-9]|\Z)                           # between digit groups
      | (?<![A-Z0-9])[A-Z]{{2}}[0-9]{{2}}(?:[ -]?[A-Z0-9])*+(?:[ -]\Z)?  # IBAN
      | ://[^\s"'`]*+                                                 # the rest of a URI
      | [0-9]++ | [A-Z]++ | : | [^{BREAKS}:A-Z0-9]++
    )++""".replace(_GAP, _GAP.replace(" ", r"\ ")).replace("[ -]", r"[\ -]")
_UNIT = re.compile(_UNIT_PATTERN, re.VERBOSE)
# Units that are over, and what stands between: the last unit, where it touches the end, is left.
_FINISHED = re.compile(f"(?:(?:{_UNIT_PATTERN})?+.)*+", re.VERBOSE | re.DOTALL)

_RUN_END = re.compile(r"[\s\"'`]")

# Behind any number of backslashes (JSON within JSON), each of which may be written \u005c itself.
_BACKSLASHES = r"(?<!\\)(?<!\\u005[cC])(?:\\u005[cC]|\\)++"
_ESCAPE = re.compile(_BACKSLASHES + r"""(?:u([0-9A-Fa-f]{4})|([bfnrtv"'/]))""")
_OPEN_ESCAPE = re.compile(_BACKSLASHES + r"(?:u[0-9A-Fa-f]{0,3})?\Z")
_OPEN_ESCAPE_CHARS = 6  # its last backslash is as close to the end

_KEY_HEADER = r"-----BEGIN[ A-Z0-9_-]{0,100}?PRIVATE[ ]KEY(?:[ ]BLOCK)?-----"
_KEY_GAP = r"(?:\s|\\[nrt]|[\"'+,])"
_KEY_ATTRIBUTE = r"[A-Za-z][A-Za-z-]*+:(?:[^\n\\-]++|-(?!----))*+"  # not beyond the next header: linear for many
_KEY_ATTRIBUTES = rf"(?:{_KEY_ATTRIBUTE}(?:\n|\\n))*+"
_KEY_LINE = r"[A-Za-z0-9+/=]{40,}+"

PRIVATE_KEY = re.compile(
    rf"(?i:{_KEY_HEADER}){_KEY_GAP}*+{_KEY_ATTRIBUTES}{_KEY_GAP}*+{_KEY_LINE}(?:{_KEY_GAP}++{_KEY_LINE})*+"
    rf"(?:(?:{_KEY_GAP}++[A-Za-z0-9+/=]++){{0,2}}{_KEY_GAP}*(?i:-----END[ A-Z0-9_-]{{0,100}}?KEY(?:[ ]BLOCK)?-----)"
    rf"|{_KEY_GAP}++[A-Za-z0-9+/=]++)?"
)
"""A private key block: armour header, attribute lines, Base64 lines; with its END line, or cut short."""

_OPEN_KEY_BODY = re.compile(
    rf"(?i:{_KEY_HEADER}){_KEY_GAP}*+(?:{_KEY_ATTRIBUTES}(?:{_KEY_ATTRIBUTE}\\?\Z"
    rf"|{_KEY_GAP}*+(?:{_KEY_LINE}{_KEY_GAP}++)*+(?:[A-Za-z0-9+/=]++{_KEY_GAP}++){{0,2}}[A-Za-z0-9+/=]*+\\?"
    r"(?i:-{1,5}(?:E(?:N(?:D[ A-Z0-9_-]{0,110})?)?)?)?\Z))"
)
_KEY_START = re.compile("-----BEGIN", re.IGNORECASE)
_OPEN_KEY_HEADER = re.compile(r"-----BEGIN[ A-Z0-9_-]{0,130}\Z", re.IGNORECASE)


class Text:
    """A text and its folded form `scan` (ASCII). ASCII without escapes is its own folded form, at no cost.

    Attributes:
        decoded: from which index on its encoded runs were looked for, and each: where it is and what it says; None:
            nobody looked yet. Detectors share it.
    """

    __slots__ = ("_starts", "decoded", "original", "scan")

    def __init__(self, original: str) -> None:
        self.original = original
        self._starts: array[int] | None = None
        self.decoded: tuple[int, Sequence[tuple[int, int, str]]] | None = None
        self.scan = original
        if not original.isascii() or "\0" in original:
            pieces = (original[at : at + WINDOW_CHARS] for at in range(0, len(original), WINDOW_CHARS))
            self.scan = "".join(piece.translate(_FOLD) for piece in pieces)
            if any(len(_FOLD[ord(char)]) != 1 for char in set(original)):
                self._starts = array("l", (i for i, char in enumerate(original) for _ in _FOLD[ord(char)]))
        if "\\" in self.scan and _ESCAPE.search(self.scan):
            self._fold_escapes()

    @classmethod
    def folded(cls, scan: str) -> Text:
        """A text that is folded already (folding again might take what an escape left for another)."""
        text = cls("")
        text.original = text.scan = scan
        return text

    def _fold_escapes(self) -> None:
        before = self._starts if self._starts is not None else array("l", range(len(self.scan)))
        pieces, starts, done = [], array("l"), 0
        for escape in _ESCAPE.finditer(self.scan):
            plain = _FOLD[int(escape[1], 16)] if escape[1] else _ESCAPED.get(escape[2], "\n")
            pieces += [self.scan[done : escape.start()], plain]
            starts += before[done : escape.start()] + array("l", [before[escape.start()]] * len(plain))
            done = escape.end()
        self.scan = "".join([*pieces, self.scan[done:]])
        self._starts = starts + before[done:]

    def origin(self, index: int) -> int:
        """The code point of the original that `scan[index]` came from; the original's length at the end."""
        if self._starts is None:
            return index
        return self._starts[index] if index < len(self._starts) else len(self.original)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The original's code points behind `scan[start:end]` (not empty), characters that folding removed
        inside it or right after it included.
        """
        if self._starts is None:
            return start, end
        while end < len(self._starts) and self._starts[end] == self._starts[end - 1]:  # the rest of a ligature
            end += 1
        return self._starts[start], self.origin(end)


@lru_cache(512)
def context_of(key: str) -> str:
    """What stands before the value of a key, folded: as JSON would write it, so that it ends between two units."""
    return f'"{Text(key[-CONTEXT_CHARS:]).scan}": "'


def units(scan: str) -> list[tuple[int, int]]:
    """The units of a folded text as (start, end), private key blocks aside."""
    return [match.span() for match in _UNIT.finditer(scan)]


def safe_cut(scan: str) -> int:
    """The largest index up to which no value can be touched by text yet to come. `scan` must begin at a cut."""
    if "\\" in scan[-_OPEN_ESCAPE_CHARS:] and (escape := _OPEN_ESCAPE.search(scan)):
        scan = scan[: escape.start()]
    finished = _FINISHED.match(scan)
    assert finished is not None  # it matches any text
    return _before_keys(scan, finished.end()) if "-----" in scan else finished.end()


def run_end(scan: str) -> int | None:
    """Where the unbroken run that `scan` begins within is over, None if that is not known yet. Only whitespace and
    quotes count, as the run may be a URI.
    """
    inside, start, end = iter(units(scan)), 0, 0
    for gap in _RUN_END.finditer(scan):
        while end <= gap.start():
            start, end = next(inside, (len(scan), len(scan)))
        if gap.start() < start:
            return gap.start()
    return None


def holds_private_key(scan: str) -> bool:
    """Whether the text ends within a private key block whose header is complete."""
    return any(_OPEN_KEY_BODY.match(scan, header.start()) for header in _KEY_START.finditer(scan))


def _before_keys(scan: str, cut: int) -> int:
    """The cut, moved before every private key block that it, or the end of the text, falls into."""
    starts: list[int] = []
    for header in reversed(list(_KEY_START.finditer(scan))):
        at = header.start()
        block = PRIVATE_KEY.match(scan, at)
        inside = block is not None and at < cut < block.end()
        if inside or _OPEN_KEY_HEADER.match(scan, at) or _OPEN_KEY_BODY.match(scan, at):
            starts = starts or [start for start, _ in units(scan)]
            cut = min(cut, starts[bisect_right(starts, at) - 1])
    return cut


_QUOTES = {**dict.fromkeys("‘’‚‛", "'"), **dict.fromkeys("“”„‟«»", '"'), **dict.fromkeys("—―", " "), "×": "x"}


_ESCAPED = {'"': '"', "'": "'", "/": "/", "t": "\t"}  # the others are line breaks


class _FoldTable(dict[int, str]):
    """Code point to folded string, filled as code points are met."""

    def __missing__(self, code_point: int) -> str:
        folded = self[code_point] = _fold(chr(code_point))
        return folded


def _fold(char: str) -> str:
    folded = "".join(_fold_part(part) for part in unicodedata.normalize("NFKD", char))
    if len(folded) < 2:
        return folded
    # Of "(1)" or "1/2" what can be part of a value; never a break, so that no unit ends within a character.
    return "".join(part for part in folded if part not in BREAK_CHARS) or folded[0]


def _fold_part(char: str) -> str:
    if char in _QUOTES:
        return _QUOTES[char]
    category = unicodedata.category(char)
    if category in ("Cf", "Mn", "Me") or char == "\0" or ord(char) in IGNORABLE:
        return ""
    if char.isascii():
        return char
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Pd" or char == "\N{MINUS SIGN}":
        return "-"
    if category == "Zs" or char == "\N{BRAILLE PATTERN BLANK}":
        return " "
    # Latin, Greek and Cyrillic letters are part of a word; the scripts beyond need no spaces between words.
    return "x" if category[0] == "L" and char < "\u0530" else "\n"


_FOLD = _FoldTable({code_point: chr(code_point) for code_point in range(1, 128)})
