"""The chat template as it is served, and the token that ends the assistant's turn."""

from __future__ import annotations

import re
from typing import Any

# transformers alone knows the tag: vLLM and llama.cpp fail on it. A comment with the same dashes cuts the same space.
_GENERATION = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
_SAID = "reply-4711"


def without_markers(template: str) -> str:
    """The template without `{% generation %}`; it renders the same text as before."""
    return _GENERATION.sub(lambda tag: f"{{#{tag[1]}{tag[2]}#}}", template)


def end_of_turn(tokenizer: Any) -> int | None:
    """The first special token that the chat template puts after an answer; None: no template, or none there."""
    if not tokenizer.chat_template:
        return None
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _SAID}]
    rendered = str(tokenizer.apply_chat_template(talk, tokenize=False))
    after = rendered.rpartition(_SAID)[2]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((number for number in tokenizer.encode(after, add_special_tokens=False) if number in special), None)


def end_ids(tokenizer: Any, before: int | list[int] | None) -> list[int]:
    """What ends an answer: the end of the turn first, then what ended one before and the tokenizer's own end."""
    old = before if isinstance(before, list) else [before]
    found = (end_of_turn(tokenizer), *old, tokenizer.eos_token_id)
    return list(dict.fromkeys(number for number in found if number is not None))
