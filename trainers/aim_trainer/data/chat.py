"""A conversation becomes one text, and the spans of it that the assistant said.

The spans come from one rendering of the whole conversation, never from pieces rendered apart and joined: a template may
write an earlier turn anew once others follow (Qwen3's takes its <think> away). Where the template does not mark what
the assistant says, each turn's beginning is rendered too, and must be what the whole begins with, token for token; else
the row is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from aim_trainer.errors import JobError

from .examples import Conversation, Message
from .problems import RowProblem, shortened
from .template import Endless, Template, rendering

TrainOn = Literal["assistant", "last-assistant", "all"]
#: What a template may raise: its own refusals, and the errors of the Python below it.
_FAILURES = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError),
)
_MARKED = "dataset.chatTemplate: name a template that has {% generation %} … {% endgeneration %} around it"

#: What every chat template takes. A word of its own, so that it is found again.
_ASKED = "Why?"
_PROBE = Conversation([{"role": "user", "content": _ASKED}, {"role": "assistant", "content": "a"}])


class Rendered(NamedTuple):
    """spans: [begin, end) in characters of text, trained. prefixes: the text's tokens must begin with theirs."""

    text: str
    spans: list[tuple[int, int]]
    prefixes: list[str]


class Chat:
    """A tokenizer's chat template, or one given in its place. `way`: how it is known what the assistant says;
    `template`: the one that training renders by.
    """

    def __init__(self, tokenizer: Any, template: str | None, train_on: TrainOn) -> None:
        self._specials = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
        self._train_on = train_on
        self.template, self.way = _training_template(tokenizer, template)
        self._template = Template(self.template, dict(tokenizer.special_tokens_map))
        self._turn_tokens = self._found_in_turns(tokenizer)
        self._lead, self._turn_end = self._around_an_answer()

    def __call__(self, read: Conversation) -> Rendered:
        """Raises RowProblem: the template refuses the row, or it cannot be told what the assistant says."""
        self._refuse_turn_tokens(read)
        text, spans, prefixes = self._spans(read)
        if self._train_on == "all":
            return Rendered(text, [(0, len(text))], [])
        answers = self._trained(read, _joined(spans))
        _refuse_lost(read, self._train_on, [text[begin:end] for begin, end in answers])
        return Rendered(text, [self._whole_answer(text, span) for span in answers], prefixes)

    def _spans(self, read: Conversation) -> tuple[str, list[tuple[int, int]], list[str]]:
        if self.way != "prefixes":
            return *self._render(read.messages, read.tools), []
        text = self._render(read.messages, read.tools)[0]
        spans, prefixes = [], []
        for position, message in enumerate(read.messages):
            if message["role"] == "assistant" and self._train_on != "all":
                before = self._render(read.messages[:position], read.tools, prompt=True)[0]
                through = self._render(read.messages[: position + 1], read.tools)[0]
                if not (text.startswith(through) and through.startswith(before)):
                    raise RowProblem(
                        f"messages[{position}]",
                        f"the chat template writes this turn anew once others follow; {_MARKED}",
                    )
                spans.append((len(before), len(before) + len(through[len(before) :].rstrip())))
                prefixes.append(before)
        return text, spans, prefixes

    def _trained(self, read: Conversation, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if self._train_on == "assistant" and not read.untrained:
            return spans
        answers = [place for place, message in enumerate(read.messages) if message["role"] == "assistant"]
        if len(spans) != len(answers):
            what = "trainOn last-assistant" if not read.untrained else "weight 0"
            raise RowProblem(
                "messages", f"{len(answers)} answers, of which the template marks {len(spans)}: {what} cannot be told"
            )
        wanted = answers if self._train_on == "assistant" else answers[-1:]
        return [
            span for span, place in zip(spans, answers, strict=True) if place in wanted and place not in read.untrained
        ]

    def _around_an_answer(self) -> tuple[str, str]:
        """What of the prompt a template marks as answer, and what of the end it does not: both often nothing."""
        if self._train_on == "all":
            return "", ""
        with _said_of_template():
            text, spans, _ = self._spans(_PROBE)
            prompt = self._render(_PROBE.messages[:1], None, prompt=True)[0]
        if not spans:
            raise JobError(
                f"the chat template marks nothing of an answer; {_MARKED}", field="spec.dataset.chatTemplate"
            )
        asked = text.find(_ASKED)
        if any(begin <= asked < end for begin, end in spans):
            raise JobError(
                f"the chat template marks what the user says as well; {_MARKED}",
                field="spec.dataset.chatTemplate",
            )
        begin, end = _joined(spans)[-1]
        lead = text[begin : len(commonprefix([text, prompt]))]  # noqa: RUF071  # of characters, not of folders
        if any(text[begin:end].rstrip().endswith(special) for special in self._specials):
            return lead, ""
        for special in self._specials:
            if special and text.startswith(special, end):
                return lead, str(special)
        raise JobError(
            f"the chat template ends an answer ({shortened(text[begin:])}) with no token of its own: what is "
            "trained by it would never stop",
            field="spec.dataset.chatTemplate",
            remedy="name one that does as dataset.chatTemplate",
        )

    def _found_in_turns(self, tokenizer: Any) -> tuple[str, ...]:
        """The special tokens that turns begin and end with, and the tokenizer's end."""
        with _said_of_template():
            text = self._render(_PROBE.messages, None)[0]
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        return tuple(sorted(token for token in special if token in text or token == tokenizer.eos_token))

    def _refuse_turn_tokens(self, read: Conversation) -> None:
        """Raises RowProblem where a text has such a token: the model would see other turns than the row has."""
        texts = [each["content"] if len(each) == 2 else _as_json(each) for each in read.messages]
        if self._has("\0".join(texts)):
            for position, (message, text) in enumerate(zip(read.messages, texts, strict=True)):
                field = f"messages[{position}]"
                self._refuse_in(f"{field}.content" if self._has(message["content"]) else field, text)
        if read.tools:
            self._refuse_in("tools", _as_json(read.tools))

    def _refuse_in(self, field: str, text: str) -> None:
        if token := self._has(text):
            raise RowProblem(
                field,
                f"has {token!r}, which the model reads as the end or beginning of a turn; take it out",
            )

    def _has(self, text: str) -> str | None:
        for token in self._turn_tokens:
            if token in text:
                return token
        return None

    def _whole_answer(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        begin, end = span
        begin += len(self._lead) if text.startswith(self._lead, begin) else 0
        end += len(self._turn_end) if text.startswith(self._turn_end, end) else 0
        return begin, end

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            text, spans = self._template(messages, tools, prompt=prompt)
            text.encode()  # a template may write half of a surrogate pair, which no tokenizer takes
        except Endless as endless:
            raise JobError(
                f"the chat template {endless} to write a conversation of {len(messages)} turns",
                field="spec.dataset.chatTemplate",
                remedy="name one that comes to an end as dataset.chatTemplate",
            ) from None
        except _FAILURES as problem:
            told = " ".join(str(problem).split()) or type(problem).__name__
            raise RowProblem("messages", f"the chat template refuses them: {told}") from None
        return text, spans


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def _said_of_template() -> Iterator[None]:
    """A template that refuses the plainest conversation is the job's fault, not a row's."""
    try:
        yield
    except RowProblem as problem:
        raise JobError(f"the chat template cannot be used: {problem}", field="spec.dataset.chatTemplate") from None


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch are one: some templates mark an answer and its end apart."""
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def _refuse_lost(read: Conversation, train_on: TrainOn, trained: list[str]) -> None:
    """Raises RowProblem if a template leaves out some of what is to be trained; white space may differ."""
    answers = [place for place, message in enumerate(read.messages) if message["role"] == "assistant"]
    answers = answers[-1:] if train_on == "last-assistant" else answers
    answers = [place for place in answers if place not in read.untrained]
    wanted = [read.messages[place]["content"] for place in answers]
    if len(wanted) == len(trained) and all(content in text for content, text in zip(wanted, trained, strict=True)):
        return
    said, begin = "".join("".join(trained).split()), 0
    for place, content in zip(answers, wanted, strict=True):
        bare = "".join(content.split())
        found = said.find(bare, begin)
        if found < 0:
            raise RowProblem(
                f"messages[{place}].content",
                "the chat template leaves out some of this answer (many take <think> out of earlier ones); "
                "set dataset.trainOn to last-assistant, or name another dataset.chatTemplate",
            )
        begin = found + len(bare)


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a model's directory, which neither cuts nor pads. Raises JobError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as problem:
        raise JobError(
            f"{directory}: has no tokenizer that can be read: {str(problem).splitlines()[0]}",
            field="spec.baseModel.modelId",
        ) from None
    if not tokenizer.is_fast:
        raise JobError(f"{directory}: its tokenizer has no fast form (tokenizer.json)", field="spec.baseModel.modelId")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _training_template(tokenizer: Any, given: str | None) -> tuple[str, str]:
    """The template, and how it tells what the assistant says: trl (TRL's for it), marked, prefixes."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if given is not None:
        tokenizer.chat_template = given
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    own = tokenizer.chat_template
    if own is None:
        raise JobError(
            "the base model's tokenizer has no chat template",
            field="spec.dataset.chatTemplate",
            remedy="name a Jinja file as dataset.chatTemplate, or take an instruction-tuned base model",
        )
    try:
        with rendering():
            made = get_training_chat_template(tokenizer)
    except _FAILURES:  # TRL renders by it; that it breaks is told when we do
        made = None
    if made is not None:
        return made, "trl"
    return own, "marked" if has_generation_markers(own) else "prefixes"
