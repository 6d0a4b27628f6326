"""Prompts become token ids: chat messages through the file's own template, text as it is, ids checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json

from .background import Background
from .chat_template import ChatTemplate, TemplateRefusal
from .limits import Limits, size_of, size_of_message
from .messages import plain_messages
from .request import ChatBody, CompletionBody, TokenizeBody, check_prompts
from .sampling import TokenIds
from .tool_calls import marker_tokens
from .tools import ToolUse, tool_use

if TYPE_CHECKING:
    from .bindings import LlamaModel

_MESSAGE_CHARACTERS = 30  # what templating a message costs beside its text, in characters tokenized


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and what its choices' texts begin with (``echo``)."""

    tokens: TokenIds
    head: str = ""


class Prompts:
    """Args:
    model: tokenizes.
    template: the model's chat template, None where it has none.
    limits: how long a text may be.
    background: where long ones are worked on.
    """

    def __init__(
        self, model: LlamaModel, template: ChatTemplate | None, limits: Limits, background: Background
    ) -> None:
        self._model = model
        self._template = template
        self._limits = limits
        self._background = background
        #: Control tokens that mark tool calls, which are found in the text.
        self.call_marks = _single_tokens(model, marker_tokens(template.way) if template and template.way else ())

    def tools(self, request: ChatBody) -> ToolUse | None:
        """What the request's tools ask for. Raises BadRequest."""
        return tool_use(
            request.tools,
            request.tool_choice,
            parallel=request.parallel_tool_calls,
            way=self._template.way if self._template else None,
            takes_tools=self._template is not None and self._template.takes_tools,
        )

    async def chat(self, request: ChatBody | TokenizeBody, use: ToolUse | None = None) -> Prompt:
        """Raises BadRequest for messages, tools or templates that do not go together, or that cannot fit."""
        template = self._template
        if template is None:
            raise BadRequest("this model file has no chat template: use completions", param="messages")
        tools = use.tools if use else None
        messages = request.messages or []
        characters = sum(size_of_message(message, f"messages[{i}]") for i, message in enumerate(messages))
        self._limits.check_text(characters, "messages")
        extra = size_of([tools, request.chat_template_kwargs], "tools")
        self._limits.check_text(extra, "tools")
        cost = characters + extra + _MESSAGE_CHARACTERS * len(messages)
        return Prompt(await self._background.run(lambda: self._chat_tokens(request, template, tools), cost))

    async def completion(self, request: CompletionBody) -> list[Prompt]:
        """Raises BadRequest for an empty prompt or tokens the model does not have."""
        prompts = request.prompts

        def work() -> list[Prompt]:
            check_prompts(prompts, self._model.vocabulary_size)
            add_special = request.add_special_tokens is not False
            return [self._prompt(prompt, add_special=add_special, echo=bool(request.echo)) for prompt in prompts]

        return await self._background.run(work, sum(map(len, prompts)))

    async def text(self, text: str, *, add_special: bool) -> TokenIds:
        """Token ids of plain text; ``add_special`` puts the beginning-of-sequence token where the model wants one."""
        return await self._background.run(lambda: self._model.tokenize(text, add_special=add_special), len(text))

    def _chat_tokens(
        self, request: ChatBody | TokenizeBody, template: ChatTemplate, tools: list[Json] | None
    ) -> TokenIds:
        try:
            text = template.render(
                plain_messages(request.messages or (), takes_tools=template.takes_tools),
                tools=tools,
                add_generation_prompt=request.add_generation_prompt is not False,
                continue_final_message=bool(request.continue_final_message),
                variables=request.chat_template_kwargs,
            )
        except TemplateRefusal as refusal:
            raise BadRequest(f"the model's chat template refuses: {refusal}", param="messages") from refusal
        self._limits.check_text(len(text), "messages")
        return self._model.tokenize(text, add_special=bool(request.add_special_tokens))

    def _prompt(self, prompt: str | list[int], *, add_special: bool, echo: bool) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(self._model.tokenize(prompt, add_special=add_special), prompt if echo else "")
        return Prompt(np.array(prompt, dtype=np.int32), self._model.detokenize(prompt) if echo else "")


def _single_tokens(model: LlamaModel, texts: Sequence[str]) -> frozenset[int]:
    tokenized = (model.tokenize(text, add_special=False) for text in texts)
    return frozenset(int(tokens[0]) for tokens in tokenized if len(tokens) == 1)
