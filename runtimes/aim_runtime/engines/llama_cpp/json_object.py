"""One JSON object, scanned as its text comes: which top-level value each character belongs to."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

#: Takes a piece of a top-level value's text, its key, and whether the value ends with it.
Taker = Callable[[str, str, bool], None]

_SPACE = " \t\r\n"


class _At(Enum):
    START = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    INSIDE = auto()
    AFTER = auto()
    DONE = auto()
    BROKEN = auto()


class JsonObject:
    """Not a validator: it follows strings and brackets, which is all that finding values needs. Linear.

    Args:
        take: is told of values as they come.
    """

    def __init__(self, take: Taker) -> None:
        self._take = take
        self._at = _At.START
        self._key = ""
        self._letters: list[str] = []  # of a key that is being read
        self._depth = 0
        self._in_string = self._escaped = self._bare = False

    @property
    def done(self) -> bool:
        """Whether the object is complete."""
        return self._at is _At.DONE

    @property
    def broken(self) -> bool:
        """Whether this cannot become a JSON object."""
        return self._at is _At.BROKEN

    def feed(self, text: str) -> int:
        """How many characters of ``text`` belong to the object: all, unless it ended (or broke) among them."""
        begun = 0  # of the value's text within this piece
        for at, character in enumerate(text):
            if self._at is _At.INSIDE:
                if self._within(character):
                    continue
                # A number or word ends with what follows it; anything else with its own last character.
                end = at + 1 if character in '"]}' and not self._bare else at
                self._take(text[begun:end], self._key, True)
                self._at = _At.AFTER
                if end > at:
                    continue
            if self._at is _At.VALUE and character not in _SPACE:
                begun = at
            self._outside(character)
            if self._at is _At.DONE:
                return at + 1
            if self._at is _At.BROKEN:
                return at
        if self._at is _At.INSIDE:
            self._take(text[begun:], self._key, False)
        return len(text)

    def _within(self, character: str) -> bool:
        """Whether the value goes on after this character."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
                return self._depth > 0
            return True
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif self._bare:
            return character not in ",}" + _SPACE
        elif character in "}]":
            self._depth -= 1
            return self._depth > 0
        return True

    def _outside(self, character: str) -> None:
        if self._at is _At.KEY:
            self._in_key(character)
            return
        if character in _SPACE:
            return
        follows = {
            (_At.START, "{"): _At.KEY_OR_END,
            (_At.KEY_OR_END, '"'): _At.KEY,
            (_At.KEY_OR_END, "}"): _At.DONE,
            (_At.COLON, ":"): _At.VALUE,
            (_At.AFTER, ","): _At.KEY_OR_END,
            (_At.AFTER, "}"): _At.DONE,
        }
        if self._at is _At.VALUE:
            self._at, self._depth = _At.INSIDE, int(character in "{[")
            self._in_string = character == '"'
            self._bare = not self._depth and not self._in_string
        else:
            self._at = follows.get((self._at, character), _At.BROKEN)
            if self._at is _At.KEY:
                self._letters = []

    def _in_key(self, character: str) -> None:
        if character == '"' and not self._escaped:
            self._at, self._key = _At.COLON, "".join(self._letters)
            return
        self._escaped = character == "\\" and not self._escaped
        self._letters.append(character)
