"""A policy's YAML text: read within limits, refused in one line, and where each of its keys stands. Pure.

The guardrail reads policies of people who may not be the ones who run it: no text may cost more than its size, take the
process down or end in a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

MAX_CHARS = 256 * 1024  # PyYAML reads some 100,000 in a second
MAX_DEPTH = 20  # a policy's own is 5
MAX_NODES = 10_000  # with aliases written out; a policy of all families has about 100

_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class PolicyError(ValueError):
    """A policy cannot be used. The message is one line: file, line, key, what is wrong, the remedy."""


class Source:
    """A YAML mapping and the places of its keys.

    Attributes:
        data: what it says.

    Raises:
        PolicyError: it is no YAML mapping of text keys, each given once; or too large, too deep, or without an end.
    """

    def __init__(self, text: str, origin: str) -> None:
        self._origin = origin
        if len(text) > MAX_CHARS:
            raise PolicyError(f"{origin}: larger than {MAX_CHARS} characters: no policy needs that, shorten it")
        try:
            loader = _Loader(text)
            root = loader.get_single_node()
            self._sizes: dict[int, int] = {}
            self._measure(root, set())
            self.data: Any = loader.construct_document(root) if root is not None else None
        except yaml.YAMLError as error:
            raise PolicyError(self._syntax(error)) from error
        if not isinstance(root, yaml.MappingNode):
            raise PolicyError(f"{origin}:1: a policy is a mapping (version, name, prompt, answer, ...)")
        self._root = root

    def error(self, loc: tuple[int | str, ...], message: str) -> PolicyError:
        """What is wrong with the value at ``loc`` (keys and list positions from the root), with its line."""
        line, key = self._locate(loc)
        return PolicyError(f"{self._origin}:{line}: {_in_line(key)}: {message}")

    def _locate(self, loc: tuple[int | str, ...]) -> tuple[int, str]:
        node: yaml.Node = self._root
        line, key = node.start_mark.line, ""
        for part in loc:
            if isinstance(node, yaml.MappingNode):
                pair = next((p for p in node.value if p[0].value == part), None)
                if pair is not None:
                    node, line = pair[1], pair[0].start_mark.line
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
        return line + 1, key or "policy"

    def _syntax(self, error: yaml.YAMLError) -> str:
        mark = getattr(error, "problem_mark", None)
        where = f"{self._origin}:{mark.line + 1}" if mark is not None else self._origin
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        return f"{where}: not valid YAML ({what[:200]}): fix the syntax"

    def _measure(self, node: yaml.Node | None, above: set[int]) -> int:
        """How many nodes ``node`` stands for, every alias written out. Raises PolicyError."""
        if node is None or isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in above:
            raise self._refusal(node, "an alias stands within what it refers to: write it out")
        size = self._sizes.get(id(node))
        if size is None:
            above.add(id(node))
            size = self._sizes[id(node)] = sum((self._measure(child, above) for child in self._children(node)), start=1)
            above.remove(id(node))
        if size > MAX_NODES:
            raise self._refusal(node, f"more than {MAX_NODES} values, aliases written out: no policy needs that")
        return size

    def _children(self, node: yaml.Node) -> Iterator[yaml.Node]:
        if isinstance(node, yaml.SequenceNode):
            yield from node.value
            return
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag not in _KEY_TAGS:
                raise self._refusal(key, "a key must be text: put it in quotes")
            if key.value in seen:
                raise self._refusal(key, f"{_in_line(key.value)}: given twice: keep one")
            seen.add(key.value)
            yield value

    def _refusal(self, node: yaml.Node, message: str) -> PolicyError:
        return PolicyError(f"{self._origin}:{node.start_mark.line + 1}: {message}")


def _in_line(key: str) -> str:
    """A key as it may stand in a line."""
    return key if key.isprintable() and len(key) <= 100 else repr(key[:100])


class _Loader(yaml.SafeLoader):
    """Bounded in depth; whatever its constructors stumble over is an error of YAML with its line."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"{node.value!r:.60} is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from error
