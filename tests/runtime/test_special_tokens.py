"""Texts are cut only where the parts' tokens are the whole's, and tokenizing takes linear time whatever is in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime.engines.llama_cpp.bindings import LlamaModel
from aim_runtime.engines.llama_cpp.special_tokens import SpecialTokens

TOKENS = ["<a>", "<ab>", "<b", "b><", "\n\n", "\n\n\n"]
TEXTS = st.lists(st.sampled_from([*TOKENS, "<", "a", "b", ">", "\n", " ", "x"]), max_size=60).map("".join)


def partition(text: str, tokens: list[str]) -> list[str]:
    """llama.cpp's order: the longest special token first, over all that is not yet one."""
    pieces = [(text, False)]
    for token in sorted(tokens, key=len, reverse=True):
        pieces = [part for piece in pieces for part in ([piece] if piece[1] else split(piece[0], token))]
    return [piece for piece, _ in pieces if piece]


def split(text: str, token: str) -> list[tuple[str, bool]]:
    parts = [(part, False) for part in text.split(token)]
    return [item for part in parts for item in (part, (token, True))][:-1]


@given(TEXTS, st.integers(1, 20))
def test_parts_partition_like_the_whole(text: str, most: int):
    parts = list(SpecialTokens(TOKENS).parts(text, most))
    assert "".join(parts) == text
    assert [piece for part in parts for piece in partition(part, TOKENS)] == partition(text, TOKENS)


@given(TEXTS, st.integers(1, 20))
def test_nothing_is_cut_off_a_token_that_takes_in_what_stands_before(text: str, most: int):
    parts = list(SpecialTokens(TOKENS, glued=["<a>", "\n\n"]).parts(text, most))
    assert "".join(parts) == text
    assert not any(part.startswith("<a>") for part in parts[1:])


@pytest.mark.parametrize("text", ["<a>" * 10_000, "<a>x" * 10_000, "x" * 9_000 + "<ab>" * 9_000, "<a>" + "x" * 9_000])
def test_parts_with_many_special_tokens_are_short(text: str):
    for part in SpecialTokens(TOKENS).parts(text):
        assert len(part) <= 4096 or part.count("<") * 4 <= 4096 + 4


def test_a_vocabulary_without_special_tokens_cuts_nothing():
    assert list(SpecialTokens([]).parts("x" * 9_000)) == ["x" * 9_000]


# -- the real vocabulary -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(embedded_model: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(embedded_model)
    yield model
    model.close()


PIECES = ["<|im_start|>", "<|im_end|>", "<repo_name>", "<|im_", "|>", "user\n", " ", "\n", "\t", "word", "🙂", "7", "<"]


@pytest.mark.model
@settings(deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=80).map("".join), most=st.integers(1, 100))
def test_tokens_of_parts_are_those_of_the_whole(model: LlamaModel, text: str, most: int):
    parts = [model._tokenize(part, add_special=False) for part in model._special_tokens.parts(text, most)]
    assert np.array_equal(np.concatenate(parts), model._tokenize(text, add_special=False))


@pytest.mark.model
def test_a_model_says_its_longest_token(model: LlamaModel):
    assert model.token_bytes == max(len(model.piece(token, special=True)) for token in range(model.vocabulary_size))


def cpu_s(model: LlamaModel, text: str) -> float:
    """CPU seconds of this thread, which other processes do not touch; the least of three."""
    taken = []
    for _ in range(3):
        began = time.thread_time()
        model.tokenize(text, add_special=True)
        taken.append(time.thread_time() - began)
    return min(taken)


@pytest.mark.model
@pytest.mark.parametrize(
    "unit",
    [
        "<|im_end|>",
        "<|im_start|>user\nhi<|im_end|>\n",
        "<|im_",
        "<",
        "a",
        " ",
        "\n",
        "7",
        "'",
        "🙂",
        "é",
        "a1 \n",
        "word. ",
    ],
)
def test_tokenizing_is_linear(model: LlamaModel, unit: str):
    size = 100_000
    ratio = cpu_s(model, unit * (4 * size // len(unit))) / cpu_s(model, unit * (size // len(unit)))
    assert ratio < 9  # linear: 4 and a little; quadratic: 16
