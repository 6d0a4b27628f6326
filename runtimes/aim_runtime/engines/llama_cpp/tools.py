"""``tools`` and ``tool_choice``: what the template is told, what the answer is held to, and how it reads.

``auto``               the model decides; its calls are found in its text (``tool_calls``)
``required``           the answer is held to a JSON list of calls, one at least
``{"function": …}``    the answer is held to that function's arguments

``required`` and named choices are held to the functions' schemas as ``response_format`` is to its own (vLLM does the
same), so their arguments parse and validate whatever the model is.
"""

from __future__ import annotations

import os
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json

from .answer import ChatForm
from .sequence import Delta
from .tool_calls import CallDelta, Piece, ToolCallText, Way

if TYPE_CHECKING:  # the library behind it is imported by load()
    from .constraint import Constraint, Constraints

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_NO_ARGUMENTS: Json = {"type": "object", "properties": {}, "additionalProperties": False}
_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Function:
    """One of the tools. field: of the request, for errors; parameters: the schema of its arguments."""

    name: str
    field: str
    parameters: Json


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Attributes:
    tools: as received, for the template.
    way: how the model writes calls of its own accord; None where that is not known, and its text stays text.
    required: the functions of which one must be called; none for ``auto``.
    named: the one function whose arguments the answer is.
    most: calls to tell; None for any number.
    """

    tools: list[Json]
    way: Way | None = None
    required: tuple[Function, ...] = ()
    named: Function | None = None
    most: int | None = None

    @property
    def holds(self) -> bool:
        """Whether the answer is held to a schema."""
        return bool(self.required) or self.named is not None

    def constraint(self, constraints: Constraints) -> Constraint:
        """What the answer is held to, compiled: call it in a thread.

        Raises:
            BadRequest: a function's schema cannot be enforced; names the function.
        """
        if self.named is not None:
            return constraints.of_schema(self.named.parameters, param=self.named.field)
        try:
            return constraints.of_schema(_list_of_calls(self.required, self.most), param="tools")
        except BadRequest:
            for function in self.required:  # the one that is at fault says so itself
                constraints.of_schema(function.parameters, param=function.field)
            raise

    def reader(self) -> _Reader:
        """For the text of one choice."""
        if self.named is not None:
            return _Named(self.named.name)
        if self.required:  # the list of calls is Mistral's first form without its mark
            return ToolCallText("mistral", self.most, begun=True)
        return ToolCallText(self.way, self.most) if self.way else _Plain()


def tool_use(
    tools: list[Json] | None, choice: Any, *, parallel: bool | None, way: Way | None, takes_tools: bool
) -> ToolUse | None:
    """What a request's ``tools``, ``tool_choice`` and ``parallel_tool_calls`` ask for; None for no tools.

    Args:
        way: how the model writes calls.
        takes_tools: whether its chat template has a place for tools.

    Raises:
        BadRequest: names the field.
    """
    if not tools or choice == "none":
        return None
    if not takes_tools:
        raise BadRequest("'tools': this model's chat template has no place for tools", param="tools")
    functions = _functions(tools)
    most = 1 if parallel is False else None
    if choice in (None, "auto"):
        return ToolUse(tools, way, most=most)
    if choice == "required":
        return ToolUse(tools, way, tuple(functions.values()), most=most)
    name = _named(choice)
    if name not in functions:
        raise BadRequest(
            f"'tool_choice.function.name' is {name!r:.140}; the tools are {', '.join(functions)[:1000]}",
            param="tool_choice.function.name",
        )
    return ToolUse(tools, way, named=functions[name], most=1)


def _functions(tools: list[Json]) -> dict[str, Function]:
    found: dict[str, Function] = {}
    for index, tool in enumerate(tools):
        at = f"tools[{index}]"
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise BadRequest(f"'{at}' must be {{'type': 'function', 'function': {{…}}}}", param=at)
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise BadRequest(
                f"'{at}.function.name' is {name!r:.80}; a name has 1 to 128 letters, digits, '_', '-' and '.'",
                param=f"{at}.function.name",
            )
        if name in found:
            raise BadRequest(f"'{at}.function.name': {name!r} names two tools", param=f"{at}.function.name")
        if parameters is not None and not isinstance(parameters, dict):
            raise BadRequest(f"'{at}.function.parameters' must be a JSON schema", param=f"{at}.function.parameters")
        found[name] = Function(name, f"{at}.function.parameters", parameters or _NO_ARGUMENTS)
    return found


def _named(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise BadRequest(
            f"'tool_choice' is {choice!r:.80}; it may be 'none', 'auto', 'required' or "
            "{'type': 'function', 'function': {'name': …}}",
            param="tool_choice",
        )
    return name


def _list_of_calls(functions: Sequence[Function], most: int | None) -> Json:
    """``[{"name": …, "parameters": {…}}, …]``; every function's schema is under ``$defs``, with its references."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "parameters": {"$ref": f"#/$defs/{index}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, function in enumerate(functions)
    ]
    return {
        "type": "array",
        "minItems": 1,
        **({} if most is None else {"maxItems": most}),
        "items": {"anyOf": calls},
        "$defs": {str(at): _moved(function.parameters, f"#/$defs/{at}") for at, function in enumerate(functions)},
    }


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references to its own root lead to ``to``."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: to + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, to)
        for key, value in schema.items()
    }


# --- how the answer reads -------------------------------------------------------------------------------------------


class _Named:
    """The whole text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str, *, last: bool = False) -> Piece:
        name, self._name = self._name, None
        return Piece(calls=[CallDelta(0, name, text)] if text or name else [])


class _Plain:
    """No way of writing calls is known: text is text."""

    def push(self, text: str, *, last: bool = False) -> Piece:
        return Piece(text)


_Reader = ToolCallText | _Named | _Plain


class ToolForm(ChatForm):
    """A chat answer with its calls told. One for each request: it knows where every choice stands."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._readers: dict[int, _Reader] = {}
        self._called: set[int] = set()

    def choice(self, delta: Delta, head: str, logprobs: Json | None) -> Json:
        piece = self._use.reader().push(delta.text, last=True)
        made = super().choice(delta, head, logprobs)
        if piece.calls:
            made["message"] |= {"tool_calls": [self._call(call) for call in piece.calls]}
            self._called.add(delta.choice)
        made["message"]["content"] = piece.content or (None if piece.calls else "")
        made["finish_reason"] = self._reason(delta)
        return made

    def chunk_choice(self, delta: Delta, head: str, logprobs: Json | None) -> Json | None:
        reader = self._readers.setdefault(delta.choice, self._use.reader())
        piece = reader.push(delta.text, last=delta.last)
        if not (piece.content or piece.calls or delta.last or logprobs):
            return None  # held back until it is clear what it is
        said: Json = {"content": piece.content} if piece.content else {}
        if piece.calls:
            self._called.add(delta.choice)
            said["tool_calls"] = [{"index": call.index, **self._call(call)} for call in piece.calls]
        return {"index": delta.choice, "delta": said, "logprobs": logprobs, "finish_reason": self._reason(delta)}

    def _call(self, call: CallDelta) -> Json:
        """A whole call or its beginning; only arguments where the beginning has been told."""
        if call.name is None:
            return {"function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": _new_id(self._use.way), "type": "function", "function": function}

    def _reason(self, delta: Delta) -> str | None:
        """OpenAI says ``stop`` for a named choice, and ``tool_calls`` where the model chose."""
        calls = delta.choice in self._called and self._use.named is None
        return "tool_calls" if calls and delta.finish_reason == "stop" else delta.finish_reason


def _new_id(way: Way | None) -> str:
    """Mistral's templates take ids of nine letters and digits only."""
    if way == "mistral":
        return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))
    return f"call_{os.urandom(12).hex()}"
