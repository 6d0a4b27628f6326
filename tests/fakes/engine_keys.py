"""A key of every provider the secret scanner knows, made from the scanner's own patterns."""

from __future__ import annotations

import re
import re._parser as parser  # type: ignore[import-not-found]
import string
from random import Random
from typing import Any, NamedTuple

_PRINTABLE = {chr(code) for code in range(33, 127)}
_CATEGORIES = {
    "CATEGORY_DIGIT": set(string.digits),
    "CATEGORY_SPACE": {" "},
    "CATEGORY_WORD": set(string.ascii_letters + string.digits + "_"),
    "CATEGORY_NOT_DIGIT": _PRINTABLE - set(string.digits),
    "CATEGORY_NOT_SPACE": _PRINTABLE,
    "CATEGORY_NOT_WORD": _PRINTABLE - set(string.ascii_letters + string.digits + "_"),
}


class Sample(NamedTuple):
    """A text that ends with a key, and where the key begins (0: no name stands before it)."""

    text: str
    start: int

    @property
    def key(self) -> str:
        return self.text[self.start :]


def sample(detail: dict[str, Any], random: Random) -> Sample:
    """A text a rule's pattern may match, without what it wants behind the key. Filters are not looked at."""
    regex = detail["detection_regex"].replace(r"\z", r"\Z").replace("[[:alnum:]]", "[a-zA-Z0-9]")
    flags = re.VERBOSE if re.search(r"\(\?\w*x\w*\)", regex) else 0
    writer = _Writer(random)
    writer.sequence(parser.parse(re.sub(r"\(\?[isxm]+\)", "", regex), flags))
    text, group = "".join(writer.pieces), detail.get("betterleaks_secret_group") or 1
    start, end = writer.groups.get(group, (0, len(text)))
    text = text[:end]
    blank = len(text) - len(text.lstrip())
    return Sample(text[blank:], max(0, start - blank))


class _Writer:
    """Writes what a parsed pattern matches: long repeats short, optional parts left out, `=` or `:` between name and
    value.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._length = 0
        self._any_case = False
        self.pieces: list[str] = []
        self.groups: dict[int, tuple[int, int]] = {}

    def sequence(self, tree: Any) -> None:
        for op, value in tree:
            getattr(self, f"_{str(op).lower()}", self._nothing)(value)

    def _put(self, char: str) -> None:
        self.pieces.append(char)
        self._length += 1

    def _nothing(self, _: Any) -> None:
        """Anchors and look-arounds match no character."""

    def _literal(self, code: int) -> None:
        self._put(chr(code))

    def _not_literal(self, code: int) -> None:
        self._put(self._random.choice(sorted(set(string.ascii_letters) - {chr(code)})))

    def _any(self, _: Any) -> None:
        self._put(self._random.choice(string.ascii_letters))

    def _in(self, items: Any) -> None:
        chars = set().union(*(self._chars(str(op), value) for op, value in items))
        char = self._random.choice(sorted(_PRINTABLE - chars if str(items[0][0]) == "NEGATE" else chars))
        self._put(self._random.choice([char.lower(), char.upper()]) if self._any_case else char)

    def _chars(self, op: str, value: Any) -> set[str]:
        if op == "RANGE":
            return {chr(code) for code in range(value[0], value[1] + 1)} & _PRINTABLE
        if op == "CATEGORY":
            return _CATEGORIES[str(value)]
        return {chr(value)} if op == "LITERAL" else set()

    def _branch(self, value: Any) -> None:
        single = [branch[0] for branch in value[1] if len(branch) == 1]
        if any(str(op) == "IN" and ("LITERAL", ord("=")) in [(str(o), v) for o, v in items] for op, items in single):
            self._put("=")
            return
        signs = [b for b in value[1] if len(b) == 1 and str(b[0][0]) == "LITERAL" and chr(b[0][1]) in "=:"]
        self.sequence(self._random.choice(signs or value[1]))

    def _subpattern(self, value: Any) -> None:
        group, added, _, tree = value
        start, outer = self._length, self._any_case
        self._any_case = outer or bool(added & re.IGNORECASE)
        self.sequence(tree)
        self._any_case = outer
        if group:
            self.groups[group] = (start, self._length)

    def _max_repeat(self, value: Any) -> None:
        least, most, tree = value
        for _ in range(self._random.randint(least, min(int(most), least + 6)) if least else 0):
            self.sequence(tree)

    _min_repeat = _max_repeat
