"""How sure a judge is of its word: the probability of one of two words, by the tokens where it was said. Pure."""

from __future__ import annotations

import math

from aim_guardrail.detectors.judge.backend import Said, Token, Unreadable


def probability(said: Said, at: int, words: tuple[str, str]) -> float:
    """P(first of `words`), given that it was one of both: 0..1.

    Args:
        at: where in the answer's text the word begins.
        words: in lower case; no beginning of one is a beginning of the other.

    Raises:
        Unreadable: the probability of either is unknown. The token that was sampled is known, listed or not: a "Yes"
            beside a list that has "No" alone is no P of 0.
    """
    token = _token_at(said, at)
    masses = [0.0, 0.0]
    for text, logprob in {**token.top, token.text: token.logprob}.items():
        word = text.strip().lower()
        for of, whole in enumerate(words):
            if word and whole.startswith(word):
                masses[of] += math.exp(min(logprob, 0.0))
    if not all(masses):
        raise Unreadable(
            f"no probabilities of both {words[0]!r} and {words[1]!r}: have the server list more tokens, "
            "or say 'logprobs: false'"
        )
    return masses[0] / sum(masses)


def _token_at(said: Said, at: int) -> Token:
    """The token that begins with the character at `at`, blanks before it aside."""
    if not said.tokens:
        raise Unreadable("it has no logprobs: have the server send them, or say 'logprobs: false'")
    begin, wanted = 0, "".join(token.text for token in said.tokens).find(said.text) + at
    for token in said.tokens if wanted >= at else ():
        if begin + len(token.text) - len(token.text.lstrip()) == wanted and token.text.strip():
            return token
        begin += len(token.text)
    raise Unreadable("its logprobs are not those of its text")
