"""A model's own chat template, rendered so that what is judged can still be told from the template's words.

The only file of the guardrail that knows jinja2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from aim_guardrail.detectors.base import Misconfigured
from aim_guardrail.detectors.judge.backend import Part, Prompt

_PLACE = re.compile("\ue000(\\d+)\ue001")  # private use: no template spells it, and data never passes the template


class ChatForm:
    """A Jinja template as models carry it.

    Raises:
        ValueError: it is none, or jinja2 is not installed.
    """

    def __init__(self, source: str) -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ValueError("path needs jinja2: install the extra 'embedded', or give an endpoint") from None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template of path's model cannot be read ({error})") from None
        self._failure = TemplateError

    def parts(self, messages: Sequence[tuple[str, Prompt]], variables: Mapping[str, Any]) -> Prompt:
        """The whole prompt, the model to answer next; without the token of the beginning.

        Raises:
            Misconfigured: the template does not take these messages.
        """
        data: list[str] = []
        given = [{"role": role, "content": _held(content, data)} for role, content in messages]
        try:
            text = self._template.render(
                {**variables, "messages": given, "add_generation_prompt": True, "bos_token": "", "eos_token": ""}
            )
        except self._failure as error:
            raise Misconfigured(f"the chat template of path's model refuses: {error}") from error
        pieces = _PLACE.split(text)
        return tuple(
            Part(data[int(piece)], True) if at % 2 else Part(piece) for at, piece in enumerate(pieces) if piece
        )


def _held(content: Prompt, data: list[str]) -> str:
    """A message whose data are numbers of `data`."""
    spelt = []
    for part in content:
        if part.is_data:
            data.append(part.text)
        spelt.append(f"\ue000{len(data) - 1}\ue001" if part.is_data else part.text)
    return "".join(spelt)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
