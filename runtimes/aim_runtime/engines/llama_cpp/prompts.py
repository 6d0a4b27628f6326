"""Prompts become token ids: chat messages through the file's own template, text as it is, ids checked."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from aim_kserve.errors import BadRequest

from .chat_template import ChatTemplate, TemplateRefusal
from .messages import plain_messages
from .request import ChatBody, CompletionBody, TokenizeBody, check_prompts
from .sampling import TokenIds

if TYPE_CHECKING:
    from .bindings import LlamaModel

#: Text longer than this is templated and tokenized in a thread: llama.cpp tokenizes about 3 MB/s, so this is 2 ms.
_INLINE_CHARACTERS = 6000


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and what its choices' texts begin with (``echo``)."""

    tokens: TokenIds
    head: str = ""


class Prompts:
    """Args:
    model: tokenizes.
    template: the model's chat template, None where it has none.
    """

    def __init__(self, model: LlamaModel, template: ChatTemplate | None) -> None:
        self._model = model
        self._template = template

    async def chat(self, request: ChatBody | TokenizeBody) -> Prompt:
        """Raises BadRequest for messages, tools or templates that do not go together."""
        template = self._template
        if template is None:
            raise BadRequest("this model file has no chat template: use completions", param="messages")
        tools = _tools(request, template) if isinstance(request, ChatBody) else None
        messages = plain_messages(request.messages or (), takes_tools=template.takes_tools)

        def tokens() -> TokenIds:
            try:
                text = template.render(
                    messages,
                    tools=tools,
                    add_generation_prompt=request.add_generation_prompt is not False,
                    continue_final_message=bool(request.continue_final_message),
                    variables=request.chat_template_kwargs,
                )
            except TemplateRefusal as refusal:
                raise BadRequest(f"the model's chat template refuses: {refusal}", param="messages") from refusal
            return self._model.tokenize(text, add_special=bool(request.add_special_tokens), parse_special=True)

        size = sum(len(message["content"]) for message in messages)
        return Prompt(tokens() if size <= _INLINE_CHARACTERS else await asyncio.to_thread(tokens))

    async def completion(self, request: CompletionBody) -> list[Prompt]:
        """Raises BadRequest for an empty prompt or tokens the model does not have."""
        check_prompts(request.prompts, self._model.vocabulary_size)
        return [
            Prompt(
                await self.text(prompt, add_special=request.add_special_tokens is not False)
                if isinstance(prompt, str)
                else np.array(prompt, dtype=np.int32),
                self._head(prompt) if request.echo else "",
            )
            for prompt in request.prompts
        ]

    async def text(self, text: str, *, add_special: bool) -> TokenIds:
        """Token ids of plain text; ``add_special`` puts the beginning-of-sequence token where the model wants one."""

        def tokens() -> TokenIds:
            return self._model.tokenize(text, add_special=add_special, parse_special=True)

        return tokens() if len(text) <= _INLINE_CHARACTERS else await asyncio.to_thread(tokens)

    def _head(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._model.detokenize(prompt)


def _tools(request: ChatBody, template: ChatTemplate) -> list[dict[str, object]] | None:
    choice = request.tool_choice
    if choice == "none" or not request.tools:
        return None
    if not template.takes_tools:
        raise BadRequest("'tools': this model's chat template has no place for tools", param="tools")
    if choice not in (None, "auto"):
        raise BadRequest(f"'tool_choice' {choice!r} cannot be enforced: use 'auto' or 'none'", param="tool_choice")
    return request.tools
