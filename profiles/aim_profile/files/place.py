"""Where in a file something is wrong, and what was probably meant. Asked only once something is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, get_args

import yaml
from pydantic import BaseModel

Place = Sequence[str | int]
_MOST_WORD = 64  # characters: comparing costs their square


class MisplacedError(ValueError):
    """What a check of a whole file found wrong, and where: a validator's ValueError that knows its place."""

    def __init__(self, place: Place, problem: str) -> None:
        self.place = tuple(place)
        super().__init__(problem)


def dotted(place: Place) -> str:
    """`nodes[2].gpu`; `file` for the whole of it."""
    parts = "".join(f"[{part}]" if isinstance(part, int) else f".{part:.80}" for part in place)
    return parts.lstrip(".") or "file"


def line_of(text: str, place: Place, loader: Any) -> int:
    """The line, counted from 1, of the key (or list item) at `place`; of what holds it, as far as it exists."""
    node = yaml.compose(text, Loader=loader)
    line: int = node.start_mark.line + 1 if node else 1
    for part in place:
        found = _child(node, part)
        if found is None:
            break
        line, node = found
    return line


def _child(node: Any, part: str | int) -> tuple[int, Any] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return key.start_mark.line + 1, value
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean cards?`, or the words there are where none is near."""
    known = tuple(known)
    near = get_close_matches(word[:_MOST_WORD], known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(known)}"


def keys_at(model: type[BaseModel], place: Place) -> tuple[str, ...]:
    """The keys of the mapping at `place` of that model; none where it has no model of its own."""
    here: type[BaseModel] | None = model
    for part in place:
        if here is None:
            return ()
        named = {field.alias or name: field for name, field in here.model_fields.items()}
        if isinstance(part, str) and part in named:
            here = _model_in(named[part].annotation)
    return tuple(field.alias or name for name, field in here.model_fields.items()) if here else ()


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `X | None`, `tuple[X, ...]`, `Mapping[str, X]` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
