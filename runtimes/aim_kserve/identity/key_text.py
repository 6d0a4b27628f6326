"""A key file's text: YAML, of which JSON is a part, read within limits; what is wrong is told with its line. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.composer import Composer

from aim_kserve.errors import StartupError
from aim_kserve.redacted import redacted

MAX_DEPTH = 6  # a key file's own is 4

T = TypeVar("T", bound=BaseModel)


def parse(text: str, origin: str, model: type[T], told: Callable[[Any], str]) -> T:
    """``text`` as a ``model``; ``told`` says in a line what one of pydantic's errors is.

    Raises:
        StartupError: no YAML, or not of that form: file, line, which key, what is wrong; never a credential.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        data = _built(loader, root) if root is not None else None
    except yaml.YAMLError as error:
        raise StartupError(_syntax(error, origin)) from None
    if not isinstance(data, dict):
        raise StartupError(f"{origin}:1: a key file is a mapping: version: 1 and keys: a list")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise StartupError(f"{_place(root, first['loc'], origin)}: {told(first)}") from None


class _Bounded:
    """Composes in Python what a parser in C reads: PyYAML's composer in C holds the interpreter for all of the file
    (6,000 keys: 0.6 s in which no request goes on), and goes as deep as the text does."""

    def __init__(self, text: str) -> None:
        _BASES[-1].__init__(self, text)
        self.anchors: dict[str, yaml.Node] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[attr-defined]  # a parser's
        if isinstance(event, yaml.AliasEvent) or self._depth > MAX_DEPTH:
            is_alias = isinstance(event, yaml.AliasEvent)
            what = "an alias: write out what it stands for" if is_alias else f"more than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[misc]  # a composer's
        self._depth -= 1
        return node


_BASES: tuple[Any, ...] = (Composer, yaml.CSafeLoader) if yaml.__with_libyaml__ else (yaml.SafeLoader,)
_Loader: Any = type("_Loader", (_Bounded, *_BASES), {})


def _built(loader: Any, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_built(loader, child) for child in node.value]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node)
    built: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="the name of a field is a text", problem_mark=key.start_mark)
        name = str(key.value)
        if name in built:
            raise yaml.MarkedYAMLError(problem=f"{shown(name, 80)} is given twice", problem_mark=key.start_mark)
        built[name] = _built(loader, value)
    return built


def _scalar(loader: Any, node: yaml.Node) -> Any:
    """PyYAML's constructors raise what they happen to meet: 2027-13-45 is no date, nor is ``!!timestamp soon``."""
    try:
        return loader.construct_object(node)
    except (ValueError, LookupError, AttributeError, ArithmeticError):
        kind = node.tag.rpartition(":")[2]
        raise yaml.MarkedYAMLError(problem=f"no {kind} is written so", problem_mark=node.start_mark) from None


def shown(value: object, most: int) -> str:
    """At most ``most`` characters of a value as Python writes it, without a credential, nor a part of one."""
    return redacted(repr(value))[:most]


def _syntax(error: yaml.YAMLError, origin: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{origin}:{mark.line + 1}" if mark is not None else origin
    return f"{where}: not valid YAML ({_line(getattr(error, 'problem', None) or error)}): fix the syntax"


def _line(error: object) -> str:
    return redacted(" ".join(str(error).split()))[:200]


def _place(root: yaml.Node, loc: tuple[int | str, ...], origin: str) -> str:
    """``FILE:LINE: keys[3] (its id)`` of the value at ``loc``."""
    node, line, which = root, root.start_mark.line, ""
    for at, part in enumerate(loc):
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == part), None)
            node, line = (pair[1], pair[0].start_mark.line) if pair else (node, line)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
            if at == 1:
                which = f" keys[{part}]{_id(node)}:"
    return f"{origin}:{line + 1}:{which}".removesuffix(":")


def _id(node: yaml.Node) -> str:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    found = next((value.value for key, value in pairs if key.value == "id" and isinstance(value.value, str)), None)
    return f" ({shown(found, 70)})" if found else ""
