"""What a bug report may not carry: names of machines, addresses, serial numbers, unique ids, tokens.

Kernel files pass only by what is known of them (bundle.py). Sentences pass here: names that are known to be private are
replaced wherever they stand, and so is whatever has the form of an address, an id or a secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .driver import FIXED_PLUGIN

_MOST_CHARS = 2000
_SECRETS = (
    r"(?i:\b(?:token|secret|passw(?:or)?d|api[_-]?key|bearer|authorization)\b[\"']?\s*[:=\s]\s*[\"']?(?:bearer\s+|basic\s+)?)\S+",
    r"\beyJ[\w-]{8,}(?:\.[\w-]+)*",
    r"\b(?:hf|gh[pousr]|github_pat|glpat|sk|xox[a-z]|nvapi)[_-][\w-]{8,}",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}",
)
_IDS = (
    r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b",
    r"\bGPU-[0-9a-fA-F]{4,}\b",
    r"\b(?:[0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2}\b",
    # A unique id in hexadecimal or decimal; sizes in sentences are MiB or GiB, which have fewer digits.
    r"\b(?:0x)?[0-9a-fA-F]{12,}\b",
)
_SECRET, _ID = re.compile("|".join(_SECRETS)), re.compile("|".join(_IDS))
_ADDRESS = re.compile(
    r"(?<![\w.:])(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9a-fA-F:]*:[0-9a-fA-F:]*:[0-9a-fA-F:.]*)(?![\w])"
)
# Words that name nothing in particular, though a node is called so.
_COMMON = {"", ".", "/", "node", "localhost"}


class Redactor:
    """private: names and paths as they were given, each with what it is; the longest goes first, whatever its case."""

    def __init__(self, private: Iterable[tuple[str, str]]) -> None:
        self._stands_for = {word.lower(): what for word, what in private if word.lower() not in _COMMON}
        words = sorted(self._stands_for, key=len, reverse=True)
        inner = "|".join(map(re.escape, words))
        self._private = re.compile(rf"(?<![\w-])(?:{inner})(?![\w-])", re.IGNORECASE) if words else None

    def text(self, text: str) -> str:
        """The sentence without them, and no longer than a sentence is."""
        if self._private is not None:
            text = self._private.sub(lambda found: f"<{self._stands_for.get(found[0].lower(), 'name')}>", text)
        text = _ID.sub("<id>", _SECRET.sub("<secret>", text))
        return _ADDRESS.sub(_address, text)[:_MOST_CHARS]

    def value(self, value: Any) -> Any:
        """The same of each text in a JSON value; keys are ours."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list | tuple) else value


def _address(found: re.Match[str]) -> str:
    text = found[0]
    if text == FIXED_PLUGIN:
        return text
    try:
        ipaddress.ip_address(text.rstrip(".") if ":" in text else text)
    except ValueError:
        return text
    return "<address>"
