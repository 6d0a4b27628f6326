"""Chat messages as a template takes them: known roles, plain text contents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json

_ROLES = ("system", "developer", "user", "assistant", "tool")


def plain_messages(messages: Sequence[Json], *, takes_tools: bool) -> list[Json]:
    """Messages with contents joined to strings and ``developer`` spelled ``system``, which templates know.

    Raises:
        BadRequest: an unknown role, or contents that are no text; ``param`` is e.g. ``messages[2].role``.
    """
    return [_plain(message, f"messages[{i}]", takes_tools) for i, message in enumerate(messages)]


def _plain(message: Json, at: str, takes_tools: bool) -> Json:
    role = message.get("role")
    if role not in _ROLES:
        known = ", ".join(_ROLES)
        raise BadRequest(f"'{at}.role' is {role!r}; roles are {known}", param=f"{at}.role")
    calls = message.get("tool_calls")
    if (role == "tool" or calls) and not takes_tools:
        field = f"{at}.role" if role == "tool" else f"{at}.tool_calls"
        raise BadRequest(f"'{field}': this model's chat template has no place for tools", param=field)
    if calls:
        message = {**message, "tool_calls": _calls(calls, f"{at}.tool_calls")}
    content = message.get("content")
    if content is None and role == "assistant":  # OpenAI's history: only calls, a refusal, or nothing was said
        return {**message, "content": ""}
    text = _text(content, f"{at}.content")
    return {**message, "role": "system" if role == "developer" else role, "content": text}


def _calls(calls: Any, at: str) -> list[Json]:
    """Calls with arguments as objects: clients send JSON text, templates write what they get as JSON."""
    if not isinstance(calls, list):
        raise BadRequest(f"'{at}' must be a list of calls", param=at)
    return [_call(call, f"{at}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, at: str) -> Json:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest(f"'{at}.function' must be an object with a 'name'", param=f"{at}.function")
    arguments = function.get("arguments") or {}
    try:
        read = orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"'{at}.function.arguments' is not JSON: {error}", param=f"{at}.function.arguments") from error
    if not isinstance(read, dict):
        raise BadRequest(
            f"'{at}.function.arguments' is a JSON {type(read).__name__}, not an object",
            param=f"{at}.function.arguments",
        )
    return {**call, "function": {**function, "arguments": read}}


def _text(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        kind = "missing" if content is None else f"of type {type(content).__name__}"
        raise BadRequest(f"'{at}' is {kind}: give a string or a list of text parts", param=at)
    return "".join(_part(part, f"{at}[{i}]") for i, part in enumerate(content))


def _part(part: Any, at: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise BadRequest(f"'{at}.type' is {kind!r}: this model reads text only", param=f"{at}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRequest(f"'{at}.text' must be a string", param=f"{at}.text")
    return text
