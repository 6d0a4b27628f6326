"""A model file's own Jinja chat template: messages in, prompt text out.

The environment is Hugging Face's (``transformers.utils.chat_template_utils``): trimmed blocks, loop controls,
``raise_exception``, ``strftime_now``, an unescaped ``tojson`` and a no-op ``generation`` block. It is sandboxed:
a template comes from a downloaded file.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .tool_calls import Way, way_of


class TemplateRefusal(Exception):
    """The template refuses these messages, or cannot render them. The message is the template's own."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; in serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own contract)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


def _strftime_now(format_: str) -> str:
    return datetime.datetime.now().astimezone().strftime(format_)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text.
        special_tokens: what templates know by name, e.g. ``{"bos_token": "<s>", "eos_token": "</s>"}``.

    Raises:
        TemplateRefusal: the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateRefusal(f"the chat template is not valid Jinja: {error}") from error
        #: Whether the template has a place for tool definitions.
        self.takes_tools = "tools" in source
        #: How the model writes its calls, where that is known.
        self.way: Way | None = way_of(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. ``variables`` are the client's own (``chat_template_kwargs``).

        Args:
            continue_final_message: leave the last message, whose content is a string, open at its end.

        Raises:
            TemplateRefusal: the template refuses these messages, or fails on them.
        """
        if continue_final_message:
            return self._open_ended(messages, tools, variables)
        names = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render({**self._special_tokens, **(variables or {}), **names})
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            # A template is a program: on unusual messages it fails like one.
            raise TemplateRefusal(str(error) or type(error).__name__) from error

    def _open_ended(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> str:
        """The prompt up to the end of the last message's content, which a mark shows. As in Hugging Face's
        ``apply_chat_template``: where the template trims contents, this one's trailing space goes, too."""
        mark = f"<end-{os.urandom(8).hex()}>"
        marked = {**messages[-1], "content": f"{messages[-1]['content']}{mark} "}
        text = self.render([*messages[:-1], marked], tools=tools, add_generation_prompt=False, variables=variables)
        head, found, tail = text.rpartition(mark)
        if not found:
            raise TemplateRefusal("it leaves out the final message, which cannot be continued then")
        return head if tail.startswith(" ") else head.rstrip()
