"""One spelling for many: the form in which a text is scored, and the decoded copies scored beside it.

Training and scoring use the same functions; a change here is a new model (`make train-injection`). Every step is
linear in the text: patterns begin with what they look for, and look-aheads are bounded.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
import unicodedata
import urllib.parse
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, islice

from aim_guardrail.text import IGNORABLE

_LOOK_ALIKES = dict(
    zip(
        map(ord, "аеорсхіуѕјһԁԛԝɡαεορτυνκιβΑΒΕΖΗΙΚΜΝΟΡΤΥΧАВЕКМНОРСТХУІЅЈ"),
        "aeopcxiysjhdqwgaeoptuvkibABEZHIKMNOPTYXABEKMHOPCTXYISJ",
        strict=True,
    )
)
"""Cyrillic and Greek letters that look like a Latin one; undone only in words that mix the alphabets."""
_SMALL_CAPITALS = dict(zip(map(ord, "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ"), "abcdefghijklmnoprstuvwyz", strict=True))
_TAGS = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}
"""Unicode's invisible tag characters: ASCII written so that nobody sees it."""
_BOXED = {first + at: chr(ord("A") + at) for first in (0x1F150, 0x1F170, 0x1F1E6) for at in range(26)}
"""White letters in circles and squares, and those that flags are spelt with."""
_UNSEEN = dict.fromkeys(IGNORABLE - _TAGS.keys(), "") | {0x2800: " "}  # a Braille pattern without dots is a blank
_SAME = _UNSEEN | _TAGS | _SMALL_CAPITALS | _BOXED
_ESCAPED = re.compile(r"\\(?=[^\x00-\x7f])")  # a backslash before each letter of a foreign script
_INVISIBLE = frozenset({"Cf", "Mn", "Co"})
_WORD = re.compile(r"[^\W\d_]+")
_LATIN = re.compile("[A-Za-z]")
_CYRILLIC_OR_GREEK = re.compile("[\u0370-\u03ff\u0400-\u052f\u0261]")
_SPACED_OUT = re.compile(r"(?<![A-Za-z])(?:[A-Za-z][ \-_.*|/\\]{1,2}){4,}[A-Za-z](?![A-Za-z])")
_MARKS = re.compile(r"[\-_.*|/\\]+")
_BLANKS = re.compile(r"\s+")

_LEET = str.maketrans("4310$5@7!6€+|", "aeiossatigetl")
_LEET_WORD = re.compile(
    r"(?<![\w$@!€+|])(?=[a-z0-9$@!€+|]{0,20}[a-z])(?=[a-z0-9$@!€+|]{0,20}[0-9$@€+|])[a-z0-9$@!€+|]{2,20}(?![\w$@€+|])"
)

_COMMON = re.compile(r"\b(?:the|and|you|your|all|ignore|instructions|system|prompt|say|is|to|a|of)\b")
_WHOLE_CIPHER_CHARS = range(15, 400)  # rot13 or reversal of a whole text: short ones only
_COMMON_WORDS = 2  # a copy with so many of them is English

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{20,}={0,2}")
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}[ ,:]?){12,}")
_PERCENT = re.compile(r"(?:%[0-9a-fA-F]{2}){4,}|%20")
_ENTITY = re.compile("&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]{2,8});?")
_URL_SAFE = str.maketrans("-_", "+/")
_BASE64_RUNS, _HEX_RUNS = 6, 4
_PRINTABLE = re.compile("[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]{12,}")
_DECODED_LETTERS = 0.8
_DEPTH = 2  # base64 in base64
_PIECE_CHARS = 256


def normal(text: str) -> str:
    """Lower case, one blank between words, compatibility forms and look-alikes folded, the invisible dropped,
    spaced-out letters joined. Lone surrogates are kept; nothing is an error.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _ESCAPED.sub("", text.translate(_SAME)))
        text = "".join(char for char in text if char.isascii() or unicodedata.category(char) not in _INVISIBLE)
        if _CYRILLIC_OR_GREEK.search(text):
            text = _WORD.sub(_latin, text)
    joined = _SPACED_OUT.sub(_joined, text)
    return _BLANKS.sub(" ", joined).strip().lower()


def copies(text: str) -> list[str]:
    """The text's normal form first, then those of its decoded copies: digits for letters (l33t), rot13 and reversal of
    short texts without an English word, base64, hex, percent and HTML escapes. At most a few times the text's length.
    """
    found: dict[str, None] = {}
    for decoded in (text, *_decoded(text, _DEPTH)):
        plain = normal(decoded)
        found.update(dict.fromkeys([plain, _LEET_WORD.sub(_letters, plain), *_deciphered(plain)]))
    return list(found)


def original(text: str, plain: str, start: int, end: int) -> tuple[int, int]:
    """The code points of a text that `start` to `end` of its normal form `plain` were made of; a run of blanks or of
    spaced-out letters at an edge may be cut. Linear: lengths are found piece by piece, the place within one by halving.
    """
    if len(plain) == len(text) or (start == 0 and end == len(plain)):
        return (start, end) if end < len(plain) else (start, len(text))
    begin = len(text) - len(text.lstrip())
    pieces = range(begin, len(text), _PIECE_CHARS)
    edges = list(accumulate((_length(text[at : at + _PIECE_CHARS]) for at in pieces), initial=0))

    def place(at: int) -> int:
        piece = min(max(bisect_right(edges, at) - 1, 0), len(pieces) - 1)
        within = text[pieces[piece] : pieces[piece] + _PIECE_CHARS]
        return pieces[piece] + bisect_left(range(len(within)), at - edges[piece], key=lambda k: _length(within[:k]))

    found = place(start)
    return found, max(place(end), found + 1) if end < len(plain) else len(text)


def _length(piece: str) -> int:
    """Of a piece's normal form, blanks at its edges kept."""
    return len(normal(f"#{piece}#")) - 2


def _joined(match: re.Match[str]) -> str:
    """`a-l-l o-f` without its marks; `a l l  o f`, where there are none, without its single blanks."""
    letters = _MARKS.sub("", match[0])
    if letters == match[0]:
        letters = letters.replace("  ", "\t").replace(" ", "").replace("\t", " ")
    return letters


def _latin(match: re.Match[str]) -> str:
    word = match[0]
    mixed = _LATIN.search(word) and _CYRILLIC_OR_GREEK.search(word)
    return word.translate(_LOOK_ALIKES) if mixed else word


def _letters(match: re.Match[str]) -> str:
    return match[0].translate(_LEET)


def _deciphered(plain: str) -> Iterator[str]:
    if len(plain) not in _WHOLE_CIPHER_CHARS or _COMMON.search(plain):
        return
    for copy in (codecs.encode(plain, "rot13"), plain[::-1]):
        if len(_COMMON.findall(copy)) >= _COMMON_WORDS:
            yield copy


def _decoded(text: str, depth: int) -> Iterator[str]:
    """What escapes and encodings in the text stand for, where that is text, and what stands encoded in that."""
    found = [*_first(_base64_runs(text), _BASE64_RUNS), *_first(_hex_runs(text), _HEX_RUNS)]
    if _PERCENT.search(text):
        found.append(urllib.parse.unquote(text))
    if "&#" in text:
        found.append(_ENTITY.sub(lambda match: html.unescape(match[0]), text))
    for copy in found:
        yield copy
        if depth > 1:
            yield from _decoded(copy, depth - 1)


def _first(copies: Iterator[str], most: int) -> list[str]:
    """The first of many copies, and all others as one: scoring a copy has a price, however short it is."""
    found = list(islice(copies, most))
    rest = " ".join(copies)
    return [*found, rest] if rest else found


def _base64_runs(text: str) -> Iterator[str]:
    for match in _BASE64.finditer(text):
        run = match[0].rstrip("=").translate(_URL_SAFE)
        try:
            raw = base64.b64decode(run + "=" * (-len(run) % 4))
        except binascii.Error:
            continue
        if copy := _readable(raw):
            yield copy


def _hex_runs(text: str) -> Iterator[str]:
    for match in _HEX.finditer(text):
        if copy := _readable(bytes.fromhex(re.sub("[ ,:]", "", match[0]))):
            yield copy


def _readable(raw: bytes) -> str:
    """What in it is text, long enough to say anything; whatever stands before, between and behind."""
    return " ".join(filter(_is_text, _PRINTABLE.findall(raw.decode(errors="replace"))))


def _is_text(stretch: str) -> bool:
    return sum(char.isalpha() or char == " " for char in stretch) > _DECODED_LETTERS * len(stretch)
