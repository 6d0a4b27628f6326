"""What makes an answer the same to the bit, whatever else is computed and was computed before. Pure.

A sum of floats depends on its order, and llama.cpp's kernels order it by the shape of a batch: one row is computed by
another kernel than four, 64 rows by another than 32, attention by where the cells lie. So every token is computed in a
shape that follows from its own sequence alone, in a stream (cells) of its own:

* a prompt is cut every CHUNK_TOKENS, from its beginning, and each chunk is a batch;
* a generated token is a batch;
* of earlier prompts whole chunks are taken over, and nothing that was generated.

Rows of several sequences cannot be put together even where a trial finds them equal: quantized layers hide a difference
from most tokens (Q4_K's rows passed a trial by up to seven, and then five answers of seven differed).
"""

from __future__ import annotations

#: As fast as larger ones: 5.7 ms per token, of 32 tokens 5.8 (SmolLM2-135M, one thread).
CHUNK_TOKENS = 64


def part(wanted: int, affordable: int) -> int:
    """Tokens for a step of a prompt that has ``wanted`` left and stands at the beginning of a chunk: whole chunks, one
    at least."""
    return min(wanted, max(CHUNK_TOKENS, whole_chunks(affordable)) if wanted > affordable else wanted)


def whole_chunks(tokens: int) -> int:
    """The part of so many tokens that is whole chunks."""
    return tokens // CHUNK_TOKENS * CHUNK_TOKENS


def cuts(tokens: int, prompt: int) -> list[int]:
    """The sizes that so many tokens are computed in, the first ``prompt`` of which are a prompt's. Those after it were
    generated, and are computed again as they were: one by one."""
    chunked = min(tokens, prompt)
    return [min(CHUNK_TOKENS, chunked - at) for at in range(0, chunked, CHUNK_TOKENS)] + [1] * (tokens - chunked)
