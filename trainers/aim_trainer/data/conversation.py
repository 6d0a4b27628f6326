"""OpenAI's messages, as their fine-tuning files and chat completions have them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypeGuard, get_args

from pydantic import ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from .examples import Conversation, Message
from .jsonl import parsed
from .problems import RowProblem, shortened

_STRICT = ConfigDict(extra="forbid", strict=True)
_Role = Literal["system", "developer", "user", "assistant", "tool"]
_ROLES = frozenset(get_args(_Role))
_Name = Annotated[str, Field(min_length=1)]


class _TextPart(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]  # how pydantic configures a TypedDict
    type: Literal["text"]
    text: str


class _Called(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    name: _Name
    arguments: NotRequired[str | dict[str, Any] | None]


class _ToolCall(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    id: NotRequired[str | None]
    type: NotRequired[Literal["function"] | None]
    function: _Called


class _Message(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    role: _Role
    content: NotRequired[str | list[_TextPart] | None]
    name: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[list[_ToolCall] | None]
    tool_call_id: NotRequired[str | None]
    weight: NotRequired[Literal[0, 1] | None]


class _Function(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    name: _Name


class _Tool(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    type: Literal["function"]
    function: _Function


class _Row(TypedDict):
    __pydantic_config__ = ConfigDict(extra="ignore", strict=True)  # type: ignore[misc]
    messages: Annotated[list[_Message], FailFast(), Field(min_length=1)]  # one is told: not all of a million
    tools: NotRequired[list[_Tool] | None]


_row = TypeAdapter(_Row).validator


def conversation(record: dict[str, Any]) -> Conversation:
    """{messages, tools?}; both may be JSON text, as a CSV or Parquet column has them. Raises RowProblem."""
    if record.get("tools") is None and _is_plain(messages := record.get("messages")):
        return Conversation(messages)
    for field in ("messages", "tools"):
        if isinstance(text := record.get(field), str):
            record = {**record, field: parsed(text, field) if text else None}
    try:
        row: dict[str, Any] = _row.validate_python(record)
    except ValidationError as problem:
        raise said(problem, record) from None
    messages = row["messages"]
    return Conversation(messages, row.get("tools") or None, _mended(messages))


def _mended(messages: list[Message]) -> tuple[int, ...]:
    """Makes messages what templates expect, in place; positions of answers of weight 0. Raises RowProblem."""
    answers, untrained = 0, []
    for position, message in enumerate(messages):
        _mend(message, f"messages[{position}]")
        if message["role"] == "assistant":
            answers += 1
            if message.pop("weight", None) == 0:
                untrained.append(position)
    if not answers:
        raise RowProblem("messages", "no assistant turn to train on")
    if answers == len(untrained):
        raise RowProblem("messages", "every assistant turn has weight 0: nothing to train on")
    return tuple(untrained)


def _is_plain(messages: Any) -> TypeGuard[list[Message]]:
    """Most conversations are: roles and texts that say something. These are told in a tenth of the time."""
    answered = False
    try:
        for message in messages:
            role, content = message["role"], message["content"]
            if len(message) != 2 or role not in _ROLES or type(content) is not str:
                return False
            if role == "assistant":
                if not content or content.isspace():
                    return False
                answered = True
    except (KeyError, TypeError):  # no list of objects with these two keys, or a role that is a list
        return False
    return answered


def _mend(message: Message, field: str) -> None:
    for key in [key for key, value in message.items() if value is None]:
        del message[key]
    content = message.get("content", "")
    if not isinstance(content, str):
        # As vLLM joins the parts of a message for a template that takes text.
        content = "\n".join(part["text"] for part in content)
    message["content"] = content
    if message["role"] == "assistant":
        if not (content and not content.isspace()) and not message.get("tool_calls"):
            raise RowProblem(f"{field}.content", "the assistant's answer is empty")
    elif message.get("tool_calls"):
        raise RowProblem(f"{field}.tool_calls", f"only an assistant calls tools (role is {message['role']})")
    elif message.get("weight") is not None:
        raise RowProblem(f"{field}.weight", f"is of assistant messages (role is {message['role']})")
    for number, call in enumerate(message.get("tool_calls", [])):
        _mend_call(call, f"{field}.tool_calls[{number}]")


def _mend_call(call: dict[str, Any], field: str) -> None:
    call["type"] = "function"
    if call.get("id") is None:
        call.pop("id", None)
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{field}.function.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowProblem(f"{field}.function.arguments", f"an object is expected, not {shortened(arguments)}")
    call["function"]["arguments"] = arguments


def said(problem: ValidationError, record: Any) -> RowProblem:
    """The first field that is wrong, and all that is said of it; of a field of several kinds, what is wrong in it."""
    errors = problem.errors(include_url=False, include_context=False)
    named = [(_field(error["loc"], record), error) for error in errors]
    first = named[0][0]
    first = next((field for field, _ in named if field.startswith(f"{first}[")), first)
    told = " or ".join(dict.fromkeys(error["msg"] for field, error in named if field == first))
    error = next(error for field, error in named if field == first)
    if error["type"] in ("missing", "extra_forbidden"):
        return RowProblem(first, told)
    return RowProblem(first, f"{told} (got {shortened(error['input'])})")


def _field(location: tuple[int | str, ...], value: Any) -> str:
    """messages[0].role; which of several kinds pydantic tried is no part of it."""
    field = ""
    for step in location:
        if isinstance(step, int) and isinstance(value, list):
            field, value = f"{field}[{step}]", value[step]
        elif isinstance(value, dict) and (step in value or step == location[-1]):
            field, value = f"{field}.{step}" if field else str(step), value.get(step)
    return field
