"""Views: a text as the secret rules must see it to find a key wrapped in Markdown, a URL or punctuation.

Most rules want a word to begin at the key and a quote, whitespace or a ; behind it. That is how keys stand in code; in
an answer they stand in `**KEY**`, `_KEY_`, `?key=KEY&v=1`, `/a/KEY/b` or `(KEY).`. No single text shows them all,
because what delimits one key is part of another (`_`, `-`, `/`, `.`). Hence several views, each with one kind of
delimiter put aside. All are as long as the text, character for character, so that a span found in a view holds in the
text. What a view shows of a character depends on its unit, a few characters before and the one behind it, as
`Detector` demands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from aim_guardrail.text import BREAKS

# Every pattern begins with the characters it looks for, and only there looks back: that is what makes it fast.
_STOP = rf"(?:[{BREAKS}'|]|\Z)"  # what ends a word; in every view
_CLOSING = "[.:!?*_~%-]"  # may stand before it behind a key, one after the other
_KEY = r"(?<=[A-Za-z0-9_=/+.~:!$%@-]{12}.)"  # the character is behind something as long as the shortest key ...
_NO_NAME = r"(?<![a-z_.-]{12}.)(?<![A-Z_.-]{12}.)"  # ... that is no long name, whose value is to come

# In no key: shown as a ; behind one. (A | stands in Facebook's tokens, behind 15 or 16 digits; .:!% only end a word,
# and two more dots make an ellipsis.)
_PUNCTUATION = re.compile(
    r"[)\]}<(\[{&#*^$@\\?.:!,>|%](?:(?<=[&#])(?=[\w.\[\]-]{1,64}=)"
    rf"|{_KEY}(?:(?<=[)\]}}<(\[{{&#*^$@\\])|(?<=\?)(?!=)|(?<=\.)(?=\.\.)"
    rf"|(?<=[.:!%])(?={_CLOSING}{{0,7}}{_STOP})"
    rf"|(?:(?<=,)|(?<![^=]=>)(?<=>)|(?<![0-9]{{15}}\|)(?<=\|))(?:(?={_STOP})|{_NO_NAME})))"
)
# Emphasis, bullets and backslashes before a key, the same behind one.
_MARKUP = re.compile(
    rf"[*_~\\-](?:(?<![A-Za-z0-9_.~*\\+-].)(?P<opening>[*_~\\-]{{0,7}})(?=[A-Za-z0-9$][^{BREAKS}]{{3}})"
    rf"|{_KEY}[*_~\\-]{{0,7}}(?={_CLOSING}{{0,8}}{_STOP}))"
)
_GAP = re.compile(f"[{BREAKS}]")
# %20, %22, %3C, ...: what stands for a character that is in no key.
_ESCAPES = re.compile("%(?:0[0-9A-Fa-f]|2[0-9AaCc]|3[A-Fa-f]|40|5[B-Eb-e]|60|7[B-Db-d])")
_SLASH = re.compile(f"/{_KEY}")
_COLON = re.compile(rf"[:+](?:(?<=\+){_KEY}|(?<=:)(?<=[A-Za-z0-9_.-]{{12}}.){_NO_NAME})")


def views(scan: str) -> list[str]:
    """The folded text itself, and the views of it that differ. Linear in its length."""
    punctuated = _PUNCTUATION.sub(";", scan)
    unmarked: Sequence[str] = _without_marks(punctuated) if _MARKUP.search(punctuated) else (punctuated,)
    if "%" in punctuated:
        unmarked = [_ESCAPES.sub("   ", text) for text in unmarked]
    return list(dict.fromkeys([scan, punctuated, *unmarked, _SLASH.sub(";", punctuated), _COLON.sub(";", punctuated)]))


def _without_marks(scan: str) -> tuple[str, str]:
    """Blanks for opening marks, semicolons for closing ones: as many as were opened right before the key (it may end
    with _ or - itself), else all of them, or the last.
    """
    every = bytearray(scan, "ascii")
    last = every.copy()
    opened, behind = -1, 0
    for mark in _MARKUP.finditer(scan):
        start, end = mark.span()
        if mark["opening"] is not None:
            every[start:end] = last[start:end] = b" " * (end - start)
            opened, behind = sum(char in "_~-" for char in mark[0]), end
            continue
        known = opened >= 0 and not _GAP.search(scan, behind, start)
        for view, count in ((every, end - start), (last, 1)):
            first = max(start, end - (opened if known else count))
            view[first:end] = b";" * (end - first)
        opened = -1
    return every.decode(), last.decode()
