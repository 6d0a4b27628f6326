"""The values of YAML events: what `yaml.load` makes of them, several times as fast, for text without anything uncommon.

PyYAML resolves every scalar by regular expressions and builds a node for it; in a file of 100,000 entries nearly all
scalars are some that stood before. Uncommon are tags, anchors and aliases, merged keys and several documents.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import yaml

_NO_KEY = object()


class _Scalars(yaml.constructor.SafeConstructor, yaml.resolver.Resolver):
    """What a plain scalar means to PyYAML's safe loaders."""

    def __init__(self) -> None:
        yaml.constructor.SafeConstructor.__init__(self)
        yaml.resolver.Resolver.__init__(self)

    def meant(self, text: str) -> Any:
        """Its value. Raises ValueError or yaml.YAMLError where it has none by itself (`<<`)."""
        tag = self.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        return self.construct_document(yaml.ScalarNode(tag, text))


_SCALARS = _Scalars()


@lru_cache(maxsize=1 << 14)
def _meant(text: str) -> Any:
    return _SCALARS.meant(text)


class Values:
    """Built event by event. common: whether `value` is what `yaml.load` would give."""

    def __init__(self) -> None:
        self.common = True
        self._documents: list[Any] = []
        self._open: list[Any] = [self._documents]
        self._keys: list[Any] = [_NO_KEY]  # of each open mapping, the key whose value is next

    @property
    def value(self) -> Any:
        """The document's value; None where there is none."""
        return self._documents[0] if self._documents else None

    def take(self, event: yaml.Event) -> None:
        """The next event."""
        if not self.common:
            return
        try:
            self._take(event)
        except (ValueError, TypeError, yaml.YAMLError):
            self.common = False  # a key that is a collection, a scalar without a value: PyYAML says what is wrong

    def _take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.NodeEvent) and (event.anchor or event.tag):  # type: ignore[attr-defined]
            self.common = False
        elif isinstance(event, yaml.ScalarEvent):
            self._add(_meant(event.value) if event.implicit[0] else event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            made: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            self._add(made)
            self._open.append(made)
            self._keys.append(_NO_KEY)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
            self._keys.pop()
        elif isinstance(event, yaml.DocumentStartEvent) and self._documents:
            self.common = False

    def _add(self, value: Any) -> None:
        inner = self._open[-1]
        if isinstance(inner, list):
            inner.append(value)
        elif self._keys[-1] is _NO_KEY:
            hash(value)
            self._keys[-1] = value
        else:
            inner[self._keys[-1]] = value
            self._keys[-1] = _NO_KEY
