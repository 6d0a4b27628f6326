"""Texts from a grammar: YAML rules of alternatives, in which `{rule}` stands for one of that rule's alternatives.

A rule in capitals is chosen once a text, so that a name or a topic stays the same throughout. `{rule|base64}` encodes.
`{small}` and `{number}` are numbers. Other braces are text.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from random import Random

import yaml

_SLOT = re.compile(r"\{([A-Za-z_]+)(\|base64)?\}")
_NUMBERS = {"small": (2, 50), "number": (1000, 99999)}


class Grammar:
    """Rules of one file. The same `Random` gives the same texts."""

    def __init__(self, path: Path) -> None:
        self._rules: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))

    def rules(self) -> list[str]:
        """The names of the rules."""
        return list(self._rules)

    def alternatives(self, rule: str) -> list[str]:
        """As they stand in the file."""
        return self._rules[rule]

    def unknown(self) -> set[str]:
        """What is named in braces and is no rule."""
        named = {match[1] for texts in self._rules.values() for text in texts for match in _SLOT.finditer(text)}
        return named - self._rules.keys() - _NUMBERS.keys()

    def make(self, random: Random, rule: str) -> str:
        """One text of a rule."""
        return self._fill(random, random.choice(self._rules[rule]), {})

    def sample(self, random: Random, first: str, rule: str, count: int, last: str = "") -> list[str]:
        """An opening, `count` different alternatives of a rule and a close, about the same name and topic."""
        rules = self._rules[rule]
        chosen = random.sample(rules, min(count, len(rules)))
        texts = [*self._some(random, first), *chosen, *self._some(random, last)]
        bound: dict[str, str] = {}
        return [self._fill(random, text, bound) for text in texts]

    def _some(self, random: Random, rule: str) -> list[str]:
        return [random.choice(self._rules[rule])] if rule else []

    def _fill(self, random: Random, text: str, bound: dict[str, str]) -> str:
        def slot(match: re.Match[str]) -> str:
            name = match[1]
            if name in bound:
                return bound[name]
            if name in _NUMBERS:
                return str(random.randrange(*_NUMBERS[name]))
            if name not in self._rules:
                return match[0]
            value = self._fill(random, random.choice(self._rules[name]), bound)
            if name.isupper():
                bound[name] = value
            return base64.b64encode(value.encode()).decode() if match[2] else value

        return _SLOT.sub(slot, text)
