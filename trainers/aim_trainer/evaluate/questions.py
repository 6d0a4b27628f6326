"""What is asked of both models: the prompts of held-out rows, with the answers that were wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aim_trainer.data.tokens import Row, Tokens

from .regressions import Regression

_SEED = 0


class Question(NamedTuple):
    """tokens: what the model is given; prompt and wanted: the same and its answer, as text."""

    tokens: list[int]
    prompt: str
    wanted: str


def held_out_questions(tokens: Tokens, tokenizer: Any, count: int) -> list[Question]:
    """Up to `count` rows, the same ones each time, and fewer ones among the first of more: what stands before the last
    trained span is asked, the span is wanted. Rows that begin with it ask nothing and are left out.
    """
    order = np.random.default_rng(_SEED).permutation(len(tokens)).tolist()
    opening = _opening(tokenizer)
    found: list[Question] = []
    for row in order:
        question = _question(tokens[row], tokenizer, opening)
        if question is not None:
            found.append(question)
        if len(found) == count:
            break
    return found


def regression_questions(regressions: Sequence[Regression], tokenizer: Any) -> list[Question]:
    """Each prompt as what a user says first, in the tokenizer's template; as it is, where there is none."""
    return [
        Question(_asked(regression.prompt, tokenizer), regression.prompt, regression.wanted())
        for regression in regressions
    ]


def _question(row: Row, tokenizer: Any, opening: str) -> Question | None:
    trained = np.flatnonzero(row.trained)
    if not len(trained):
        return None
    end = int(trained[-1]) + 1
    gaps = np.flatnonzero(row.trained[:end] == 0)
    first = int(gaps[-1]) + 1 if len(gaps) else 0
    if first == 0:
        return None
    prompt, wanted = row.tokens[:first].tolist(), row.tokens[first:end].tolist()
    asked = _text(prompt, tokenizer).removesuffix(opening).rstrip()
    return Question(prompt, asked, _text(wanted, tokenizer))


def _opening(tokenizer: Any) -> str:
    """What the template puts before an answer, as `assistant`: nobody asked it."""
    if tokenizer.chat_template is None:
        return ""
    messages = [{"role": "user", "content": "a"}]
    asked, opened = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens) for opens in (False, True)
    )
    tokens = tokenizer(opened.removeprefix(asked), add_special_tokens=False)["input_ids"]
    return _text(tokens, tokenizer)


def _asked(prompt: str, tokenizer: Any) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text(tokens: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
