"""What an engine must show before it is ready: that it answers, and, where nobody vouches for it, that it makes sense.

Warm-up: one short request. The first calls on a GPU search for kernels (hipBLASLt has none tuned for small partitions,
ROCm/TheRock#7893), and no client should wait for that.

Self-check: tensor parallelism over partitions was reported to answer garbage (vllm#20125, closed as stale, not as
fixed), while every probe said ready. A known sentence must be likely, and a greedy text must be text.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aim_kserve.errors import ServingError
from aim_runtime.engines.base import Engine, Json, ModelLoadError, Prove, RequestContext

logger = logging.getLogger("aim.server")

SENTENCE = "One, two, three, four, five, six, seven, eight, nine, ten. The sun rises in the east and sets in the west."
PROMPT = "1, 2, 3, 4, 5, 6, 7,"
#: SmolLM2-135M in four bits, a very small model, has 5.1 here. One that has lost its weights finds every word of its
#: vocabulary (32,000 and more) equally likely.
MOST_PERPLEXITY = 500.0
#: Mean probability of the likeliest token. Where all are equal it is one in the vocabulary.
LEAST_CERTAINTY = 0.01
_TEXT_TOKENS = 16
_WARM_UP_TOKENS = 32  # of the prompt, in any vocabulary, and the answer
_LEAST_READABLE = 0.8


class Plausible(NamedTuple):
    """What was seen: perplexity of the sentence, mean probability of the likeliest token, and the greedy text."""

    perplexity: float
    certainty: float
    text: str


def proof(model: str, *, warm: bool, check: bool, needed: bool = True) -> Prove | None:
    """What to ask of an engine once it has loaded; None where nothing. needed: it must be checked, or is not started;
    else one that cannot be checked is, and the log says so."""
    if not (warm or check):
        return None

    async def prove(engine: Engine) -> None:
        if warm:
            logger.info("model %s: warmed up in %.2f s", model, await warm_up(engine, model))
        if check and (needed or _can_be_checked(engine)):
            found = await self_check(engine, model)
            logger.info("model %s: self-check passed, perplexity %.1f, %r", model, found.perplexity, found.text)
        elif check:
            logger.warning("model %s: no self-check, the engine has no completions to check", model)

    return prove


def _can_be_checked(engine: Engine) -> bool:
    return "completions" in engine.operations


async def warm_up(engine: Engine, model: str) -> float:
    """One short request through the engine, where its context holds one; returns its seconds.

    Raises:
        ModelLoadError: it fails.
    """
    if 0 < engine.max_model_len < _WARM_UP_TOKENS:
        return 0.0
    bodies: Mapping[str, Json] = {
        "completions": {"prompt": PROMPT, "max_tokens": 4, "temperature": 0},
        "chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "temperature": 0},
        "embeddings": {"input": PROMPT},
    }
    for operation, body in bodies.items():
        if operation in engine.operations:
            started_s = time.monotonic()
            await _ask(engine, operation, {"model": model, **body}, "warm-up")
            return time.monotonic() - started_s
    return 0.0


async def self_check(engine: Engine, model: str) -> Plausible:
    """Ask for the log probabilities of a known sentence and for a greedy text, and judge them.

    Raises:
        ModelLoadError: it is not plausible, or the engine cannot tell.
    """
    if not _can_be_checked(engine):
        raise ModelLoadError(
            "self-check: the engine has no completions, so nothing can be checked (--self_check=never)"
        )
    scored = {"model": model, "prompt": SENTENCE, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    told = await _ask(engine, "completions", scored, "self-check")
    greedy = {"model": model, "prompt": PROMPT, "max_tokens": _TEXT_TOKENS, "temperature": 0}
    written = await _ask(engine, "completions", greedy, "self-check")
    perplexity, certainty = _judged(told)
    text = str(_choice(written).get("text", ""))
    if problem := _implausible(perplexity, certainty, text):
        raise ModelLoadError(
            f"self-check: {problem}: its answers would be garbage; serve the model on one device "
            "(--self_check=never leaves the check out)"
        )
    return Plausible(perplexity, certainty, text)


def _implausible(perplexity: float, certainty: float, text: str) -> str:
    """What is wrong; empty where nothing is."""
    if not math.isfinite(perplexity):
        return "a known sentence has no log probabilities, they are not numbers"
    if perplexity > MOST_PERPLEXITY:
        return f"a known sentence has perplexity {perplexity:.0f}, above {MOST_PERPLEXITY:.0f}"
    if certainty < LEAST_CERTAINTY:
        return f"every token is equally likely (the likeliest {certainty:.2g} on average)"
    readable = sum(char.isprintable() or char.isspace() for char in text.replace("\ufffd", "\0"))
    if not text.strip() or readable < _LEAST_READABLE * len(text):
        return f"the greedy text is not text: {text[:40]!r}"
    repeated = text.strip()
    if len(repeated) >= _TEXT_TOKENS and len(set(repeated)) == 1:
        return f"the greedy text is one character over and over: {repeated[:20]!r}"
    return ""


def _judged(answer: Json) -> tuple[float, float]:
    """Perplexity of the prompt and mean probability of the likeliest token; NaN where one of them is no number."""
    logprobs = _choice(answer).get("logprobs") or {}
    tokens: Sequence[Any] = (logprobs.get("token_logprobs") or [])[1:-1]  # the first has none, the last is generated
    likeliest = [max(top.values(), default=math.nan) for top in (logprobs.get("top_logprobs") or [])[1:-1] if top]
    if not tokens or not likeliest or not all(_is_log_probability(value) for value in (*tokens, *likeliest)):
        return math.nan, math.nan
    return math.exp(-sum(tokens) / len(tokens)), sum(map(math.exp, likeliest)) / len(likeliest)


def _is_log_probability(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value <= 1e-3


def _choice(answer: Json) -> Json:
    choices = answer.get("choices") or [{}]
    return choices[0] if isinstance(choices[0], dict) else {}


async def _ask(engine: Engine, operation: str, body: Json, purpose: str) -> Json:
    try:
        answer = await engine.operations[operation](body, RequestContext(purpose))
    except ServingError as error:
        raise ModelLoadError(f"{purpose}: the first request fails: {error.message}") from error
    assert isinstance(answer, dict)  # stream is not asked for
    return answer
