"""Tool calls in a model's text, found as it comes: content here, calls with their arguments there.

The ways to write a call, told by what the chat template itself writes:

hermes    ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``  (Hermes, Qwen 2.5 and 3)
mistral   ``[TOOL_CALLS][{"name": …, "arguments": {…}}, …]``, and ``[TOOL_CALLS]name[ARGS]{…}`` since v11
llama     ``{"name": …, "parameters": {…}}``, several separated by ``;``, after ``<|python_tag|>`` or alone (Llama 3)

A call that turns out to be malformed before it has been told stays what it was, text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .json_object import JsonObject

Way = Literal["hermes", "mistral", "llama"]

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_NAMED = re.compile(rf"(?P<name>{_NAME.pattern})\s*(\[CALL_ID\][\w-]+)?(\[ARGS\])?\s*")
_MOST_NAME = 160  # characters to wait for the end of what stands before the arguments


class _Marks(NamedTuple):
    """begin: what calls begin with; end: what each ends with; between: what may stand between two."""

    begin: str
    end: str
    between: str


_MARKS: dict[Way, _Marks] = {
    "hermes": _Marks("<tool_call>", "</tool_call>", ""),
    "mistral": _Marks("[TOOL_CALLS]", "", "[],"),
    "llama": _Marks("<|python_tag|>", "", ";"),
}


def way_of(template: str) -> Way | None:
    """How a model with that chat template writes calls; None where it writes them in no way known here."""
    if "<tool_call>" in template and "<function=" not in template:  # Qwen3-Coder's XML stands inside the same tags
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|start_header_id|>" in template):
        return "llama"
    return None


def marker_tokens(way: Way) -> tuple[str, ...]:
    """Texts that models have as control tokens, which must be shown to be found."""
    return {
        "hermes": ("<tool_call>", "</tool_call>"),
        "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        "llama": ("<|python_tag|>",),
    }[way]


@dataclass(slots=True)
class CallDelta:
    """What is added to one call. ``name`` is set on its first."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Piece:
    """What a piece of the model's text turned out to be."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class _Call:
    """One call being read.

    Args:
        name: given where only the arguments are to come.
    """

    def __init__(self, index: int, tell: Callable[[CallDelta], None], name: str | None = None) -> None:
        self._index = index
        self._tell = tell
        self._given = name
        self._object = JsonObject(self._value)
        self._name_text: list[str] = []  # of the name's value, until it ends
        self._is_object = False  # whether the arguments' value is one
        self._value_text: list[str] = []  # of an arguments' value that is none
        self._waiting: list[str] = []  # arguments that came before the name
        self._has_arguments = False
        self.told = False

    @property
    def done(self) -> bool:
        return self._object.done

    @property
    def broken(self) -> bool:
        return self._object.broken

    def feed(self, text: str) -> int:
        """How many characters of ``text`` were the call's."""
        used = self._object.feed(text)
        if self._given is not None:
            self._add(text[:used], None if self.told else self._given)
        elif self.done and self.told and not self._has_arguments:
            self._add("{}")
        return used

    def _value(self, piece: str, key: str, ends: bool) -> None:
        if self._given is not None:
            return
        if key == "name" and not self.told:
            self._name_text.append(piece)
            name = _string("".join(self._name_text)) if ends else None
            if name:
                self._add("".join(self._waiting), name)
        elif key in _ARGUMENTS:
            self._argument(piece, ends)

    def _argument(self, piece: str, ends: bool) -> None:
        """An object's text as it comes; a string holds an object's text; anything else is no arguments."""
        self._is_object = self._is_object or (not self._value_text and piece.startswith("{"))
        if self._is_object:
            self._add(piece)
            self._is_object = not ends
            return
        self._value_text.append(piece)
        if ends:
            self._add(_string("".join(self._value_text)) or "{}")

    def _add(self, arguments: str, name: str | None = None) -> None:
        self._has_arguments = self._has_arguments or bool(arguments)
        self.told = self.told or name is not None
        if self.told:
            self._tell(CallDelta(self._index, name, arguments))
        else:
            self._waiting.append(arguments)


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class ToolCallText:
    """One choice's text. Linear in it, however it is cut into pieces.

    Args:
        way: how calls are written.
        most: calls to tell at most (``parallel_tool_calls: false``: 1); later ones are dropped.
        begun: the text begins behind the mark, and is nothing but calls.
    """

    def __init__(self, way: Way, most: int | None = None, *, begun: bool = False) -> None:
        self._way = way
        self._marks = _MARKS[way]
        self._most = most
        self._only_calls = begun
        self._rest = ""  # not yet decided
        self._raw: list[str] = []  # decided to be a call's, of which nothing has been told
        self._space: list[str] = []  # white space that is content only if no call follows it
        self._piece = Piece()
        self._content: list[str] = []  # of the piece
        self._call = _Call(0, self._tell)
        self._marked = False  # whether a mark came since the last call
        # Llama writes a call alone without a mark: any answer may begin with one.
        self._read = self._between if begun or way == "llama" else self._text
        self.calls = 0

    def push(self, text: str, *, last: bool = False) -> Piece:
        """What may be told now; ``last``: nothing more will come."""
        self._piece, self._content = Piece(), []
        self._rest += text
        while self._rest and self._read():
            pass
        if last:
            self._finish()
        self._piece.content = "".join(self._content)
        return self._piece

    # --- what is being read: each consumes some of the rest, and says whether to go on or to wait for more ---------

    def _text(self) -> bool:
        begin = self._marks.begin
        found = self._rest.find(begin)
        if found < 0:
            kept = _overlap(self._rest, begin)
            self._show(self._rest[: len(self._rest) - kept])
            self._rest = self._rest[len(self._rest) - kept :]
            return False
        self._show(self._rest[:found])
        self._take(found + len(begin), raw=begin)
        self._read, self._marked = self._between, True
        return True

    def _between(self) -> bool:
        """After a mark or a call: another call, or text again."""
        stripped = self._rest.lstrip(_SPACE)
        self._take(len(self._rest) - len(stripped))
        begin = self._marks.begin
        if begin.startswith(stripped) and stripped != begin:
            return False
        if stripped.startswith(begin):
            self._take(len(begin))
            self._marked = True
        elif stripped[0] in self._marks.between:
            self._take(1)
        elif stripped[0] == "{":
            self._call = _Call(self.calls, self._tell)
            self._read = self._object
        elif self._marked and self._way == "mistral" and _NAME.match(stripped):
            self._read = self._name
        else:
            self._as_text()
        return True

    def _name(self) -> bool:
        """Mistral's ``name[ARGS]{``, ``name[CALL_ID]id[ARGS]{``, ``name{``."""
        head, brace, _ = self._rest.partition("{")
        if not brace and len(head) <= _MOST_NAME:
            return False
        found = _NAMED.fullmatch(head) if brace else None
        if found is None:
            self._as_text()
            return True
        self._take(len(head))
        self._call = _Call(self.calls, self._tell, found["name"])
        self._read = self._object
        return True

    def _object(self) -> bool:
        used = self._call.feed(self._rest)
        self._take(used)
        ends = self._call.done or self._call.broken
        if self._call.told:
            self._raw = []
            self.calls += ends
        if ends and self._call.told and self._call.done:
            self._read, self._marked = self._end if self._marks.end else self._between, False
        elif ends:
            self._as_text()
        return True

    def _end(self) -> bool:
        stripped = self._rest.lstrip(_SPACE)
        if self._marks.end.startswith(stripped) and stripped != self._marks.end:
            return False
        self._rest = stripped.removeprefix(self._marks.end)
        self._read = self._text
        return True

    def _finish(self) -> None:
        if self._read == self._text:
            self._show(self._rest)
        elif self._read == self._object and self._call.told:
            self.calls += 1  # cut off by the limit of tokens: what was told stands
        elif self._read != self._end and not (self.calls and (self._only_calls or self._read == self._between)):
            self._show("".join(self._raw) + self._rest)
        if not self.calls:
            self._content += self._space
        self._rest, self._raw, self._space = "", [], []

    # --- what is told ------------------------------------------------------------------------------------------------

    def _take(self, count: int, raw: str | None = None) -> None:
        self._raw.append(self._rest[:count] if raw is None else raw)
        self._rest = self._rest[count:]

    def _as_text(self) -> None:
        """What was taken for a call is none: it stays text, and so does what follows, up to the next mark."""
        raw, self._raw = "".join(self._raw), []
        self._read = self._text
        if not (self._read_separator(raw) and self.calls):
            self._show(raw)

    def _read_separator(self, raw: str) -> bool:
        return not raw.strip(_SPACE + self._marks.between)

    def _show(self, text: str) -> None:
        bare = text.rstrip(_SPACE)
        if bare:
            self._content += [*self._space, bare]
            self._space = []
        self._space.append(text[len(bare) :])

    def _tell(self, delta: CallDelta) -> None:
        self._space = []
        if self._most is not None and delta.index >= self._most:
            return
        calls = self._piece.calls
        if calls and calls[-1].index == delta.index:
            calls[-1].arguments += delta.arguments
        else:
            calls.append(delta)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that begins ``mark``."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
