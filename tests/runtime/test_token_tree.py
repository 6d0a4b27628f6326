"""The tokens a grammar allows are found without trying them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_runtime.engines.llama_cpp.bindings import LlamaModel, gbnf_of_schema
from aim_runtime.engines.llama_cpp.token_tree import Ids, TokenTree

PIECES = st.lists(st.text("ab", max_size=4).map(str.encode), min_size=1, max_size=30)


@given(PIECES, st.sets(st.integers(0, 3)), st.text("ab", max_size=3).map(str.encode))
def test_it_finds_what_trying_all_would(pieces: list[bytes], leaves: set[int], refused: bytes):
    leaves = {leaf for leaf in leaves if leaf < len(pieces)}
    tree, tried = TokenTree(pieces, leaves), []

    def allows(token: int) -> bool:
        return token in leaves or not pieces[token].startswith(refused)

    def test(tokens: Ids) -> Any:
        tried.extend(tokens.tolist())
        return np.array([allows(token) for token in tokens.tolist()], dtype=np.bool_)

    known = [token for token in range(len(pieces)) if pieces[token] or token in leaves]
    assert sorted(tree.allowed(test).tolist()) == [token for token in known if allows(token)]
    assert len(tried) == len(set(tried))


@pytest.fixture(scope="module")
def model(embedded_model: Path) -> Iterator[LlamaModel]:
    model = LlamaModel(embedded_model)
    yield model
    model.close()


SCHEMAS = [
    ({"enum": [f"value number {i} of many" for i in range(300)]}, '"value number 4'),
    ({"type": "object"}, '{"a🙂b": [1, "é'),
    ({"type": "string", "pattern": "^[^a-z]{2,40}$"}, '"🙂AB世'),
    ({"type": "integer"}, "12"),
]


@pytest.mark.model
@pytest.mark.parametrize(("schema", "begun"), SCHEMAS, ids=["enum", "object", "pattern", "integer"])
def test_a_grammar_allows_the_same_tokens_either_way(model: LlamaModel, schema: dict[str, Any], begun: str):
    grammar = model.new_grammar(gbnf_of_schema(schema))
    every = np.arange(model.vocabulary_size)
    for token in model.tokenize(begun, add_special=False).tolist():
        masked = np.zeros(model.vocabulary_size, np.float32)
        grammar.mask(masked)
        assert np.array_equal(np.isfinite(masked), grammar._allowed(every))
        assert grammar.allows(token)
        grammar.accept(token)
    grammar.close()


@pytest.mark.model
def test_few_tokens_are_tried_where_few_are_allowed(model: LlamaModel, monkeypatch: pytest.MonkeyPatch):
    grammar = model.new_grammar(gbnf_of_schema({"enum": [f"value number {i} of many" for i in range(1000)]}))
    tried: list[int] = []
    allowed = grammar._allowed
    monkeypatch.setattr(grammar, "_allowed", lambda tokens: (tried.append(tokens.size), allowed(tokens))[1])
    for token in model.tokenize('"value number', add_special=False).tolist():
        grammar.mask(np.zeros(model.vocabulary_size, np.float32))
        allowed(np.array([token]))
        grammar.accept(token)
    assert max(tried) < 1000
    assert sum(tried) < model.vocabulary_size / 10
    grammar.close()
