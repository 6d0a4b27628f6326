"""What a request's placeholders stand for, so that its answer can say it again. Pure; kept for the request only.

Values of rules with `restore` are hidden from the predictor and from every detector of the answer; the last thing that
is done to an answer is to put them back. Placeholders that stood in the prompt as it came are nobody's: their numbers
are not given out, and they are never restored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

_PLACEHOLDER = re.compile(r"<[A-Z][A-Z0-9_]{0,60}_[0-9]{1,9}>")
_OPEN = re.compile(r"<(?:[A-Z][A-Z0-9_]{0,71})?\Z")
_OPEN_CHARS = 73
#: Strings that are JSON by their protocols: what is put into them is written as JSON writes it.
_JSON_KEYS = frozenset(["arguments", "partial_json"])


class Vault:
    """Placeholders and their values. Not thread-safe; says nothing of what it holds."""

    __slots__ = ("_taken", "_values")

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._taken: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._values)

    def reserve(self, texts: Iterable[str]) -> None:
        """The placeholders in these texts, as they came, stand for themselves."""
        for text in texts:
            for placeholder in _PLACEHOLDER.findall(text) if "<" in text else ():
                self._taken.add(placeholder)
                self._values.pop(placeholder, None)

    def is_taken(self, placeholder: str) -> bool:
        """Whether it stands for itself."""
        return placeholder in self._taken

    def keep(self, placeholder: str, value: str) -> None:
        """What a placeholder stands for."""
        if placeholder not in self._taken:
            self._values[placeholder] = value

    def restored(self, text: str, *, in_json: bool = False) -> str:
        """The text with what its placeholders stand for; `in_json`: it is JSON."""
        if not self._values or "<" not in text:
            return text
        return _PLACEHOLDER.sub(lambda found: self._value(found[0], in_json), text)

    def restore_in(self, node: Any) -> bool:
        """Restore every string within a JSON value, in place; True if any is another now."""
        changed = False
        stack = [node] if self._values else []
        while stack:
            node = stack.pop()
            places = node.items() if type(node) is dict else enumerate(node)
            for key, value in list(places):
                if type(value) in (dict, list):
                    stack.append(value)
                elif type(value) is str and "<" in value:
                    node[key] = self.restored(value, in_json=key in _JSON_KEYS)
                    changed = changed or node[key] != value
        return changed

    def _value(self, placeholder: str, in_json: bool) -> str:
        value = self._values.get(placeholder, placeholder)
        return json.dumps(value, ensure_ascii=False)[1:-1] if in_json else value


def open_placeholder(text: str) -> int:
    """Where a placeholder begins that the text may not have the end of yet; the text's length where there is none."""
    found = _OPEN.search(text, max(len(text) - _OPEN_CHARS, 0))
    return len(text) if found is None else found.start()
