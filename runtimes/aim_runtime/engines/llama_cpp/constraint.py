"""Answers held to a JSON schema: which tokens may come next. The only file that imports ``llguidance``.

The library (Microsoft's, also behind vLLM and llama.cpp) matches with derivatives and an Earley parser, so a step is
bounded by fuel, not by how ambiguous the grammar is. ``schema`` bounds what it is given.

A vocabulary's tree is built once per model, a schema is compiled once while it is remembered, and each answer walks
its own copy of the compiled grammar.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

import llguidance
import numpy as np
import orjson
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json

from .request import ResponseFormat
from .sampling import Logits
from .schema import enforceable
from .unenforceable import Unenforceable

#: On one line, a space after comma and colon if the model likes: small models lose themselves in blanks, and what the
#: library calls flexible has no end. No ``\u`` escapes: a name could be spelt in two ways, and pass for another.
_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
    "lenient": False,
}
#: Half of the library's defaults and less, for steps of at most some 25 ms; ordinary schemas need a hundredth.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_items_in_row=5_000,
    max_lexer_states=20_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
_PLACE_S = 1.0  # spent at most on finding the part of a schema that the library refuses
_IMPOSSIBLE = "Unsatisfiable"
_SCHEMA = "response_format.json_schema.schema"
_ANY_OBJECT: Json = {"type": "object"}
_KEPT = 64  # compiled schemas


class Vocabulary(Protocol):
    """What is asked of a model."""

    vocabulary_size: int
    end_tokens: frozenset[int]

    def piece(self, token: int, *, special: bool = False) -> bytes: ...


class Constraints:
    """Compiles schemas for one model.

    Args:
        vocabulary: read here and not again.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens: Any = _Tokens(vocabulary)  # the library's type names a class, its code asks for these attributes
        self._tokenizer = llguidance.LLTokenizer(tokens, eos_token=sorted(vocabulary.end_tokens) or None)
        self._compiled = lru_cache(maxsize=_KEPT)(self._compile)

    def of_format(self, format_: ResponseFormat) -> Constraint:
        """What a ``response_format`` other than text asks for. Raises BadRequest like ``of_schema``."""
        if format_.type == "json_object":
            return self.of_schema(_ANY_OBJECT, param="response_format")
        wanted = format_.json_schema
        if wanted is None or wanted.schema_ is None:
            raise BadRequest(f"'{_SCHEMA}' is required with response_format.type 'json_schema'", param=_SCHEMA)
        return self.of_schema(wanted.schema_, param=_SCHEMA, strict=bool(wanted.strict))

    def of_schema(self, schema: Json, *, param: str, strict: bool = False) -> Constraint:
        """The JSON documents that ``schema`` allows. A large one takes a second of CPU: call it in a thread.

        Args:
            schema: as the client sent it.
            param: the field that holds it, for errors.
            strict: see ``schema.enforceable``.

        Raises:
            BadRequest: no schema, too big, or it asks for what cannot be enforced; names the place and the keyword.
        """
        try:
            return self._compiled(orjson.dumps(schema), strict)
        except Unenforceable as error:
            raise BadRequest(f"'{param}{error.at}' {error.reason}", param=param) from error
        except (orjson.JSONEncodeError, RecursionError) as error:  # more than 254 levels
            raise BadRequest(f"'{param}' is nested too deeply, or holds what JSON cannot", param=param) from error

    def _compile(self, text: bytes, strict: bool) -> Constraint:
        schema = enforceable(orjson.loads(text), strict=strict)
        matcher, refusal = self._matcher(schema)
        if refusal:
            at, refusal = self._place(schema, refusal)
            raise Unenforceable(at, f"cannot be enforced: {refusal}")
        return Constraint(matcher, self._tokenizer.vocab_size)

    def _matcher(self, schema: Json) -> tuple[Any, str]:
        """A matcher at its first token, and why there is none."""
        body = orjson.dumps({**schema, "x-guidance": _OPTIONS}).decode()
        # no_forcing: the model chooses how to spell what is fixed; the library would ask for the tokenizer's way.
        grammar = f'%llguidance {{"no_forcing": true}}\nstart: %json {body}'
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return matcher, _reason(matcher.get_error()) if matcher.is_error() else ""

    def _place(self, schema: Json, refusal: str) -> tuple[str, str]:
        """The smallest part of ``schema`` that is refused on its own, and why."""
        definitions, place = schema.get("$defs", {}), ""
        parts, deadline = _parts(schema), time.monotonic() + _PLACE_S
        while time.monotonic() < deadline and (entry := next(parts, None)):
            at, part = entry
            _, reason = self._matcher({**part, "$defs": definitions})
            # What is only impossible is often left out without harm: it explains nothing but an impossible whole.
            if reason and reason.startswith(_IMPOSSIBLE) <= refusal.startswith(_IMPOSSIBLE):
                place, refusal, parts = place + at, reason, _parts(part)
        return place, refusal


class Constraint:
    """A compiled schema. Any number of answers may follow it, each from its own ``begin``."""

    def __init__(self, matcher: Any, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._vocabulary_size = vocabulary_size

    def begin(self) -> Position:
        return Position(self._matcher.deep_copy(), self._vocabulary_size)


class Position:
    """Where one answer stands. Belongs to one thread."""

    def __init__(self, matcher: Any, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._mask = allocate_token_bitmask(1, vocabulary_size)

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    def mask(self, logits: Logits) -> None:
        """Set the logits of tokens that cannot come next to -inf; end tokens may come where the answer may end.

        Raises:
            BadRequest: following the schema this far takes more than a step may.
        """
        fill_next_token_bitmask(self._matcher, self._mask)
        self._check()
        allowed = np.unpackbits(self._mask[0].view(np.uint8), count=logits.size, bitorder="little").view(np.bool_)
        np.copyto(logits, -np.inf, where=~allowed)

    def accept(self, token: int) -> None:
        """Step past an allowed token that is no end token. Raises like ``mask``."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error())
            raise BadRequest(
                f"the answer broke off, because its schema cannot be followed any further: {reason}",
                param="response_format",
                code="schema_too_complex",
            )


class _Tokens:
    """A vocabulary as the library wants it. It never tokenizes: nothing is forced."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        ids = range(vocabulary.vocabulary_size)
        texts = [vocabulary.piece(token) for token in ids]
        self.special_token_ids = [token for token in ids if not texts[token] or token in vocabulary.end_tokens]
        for token in self.special_token_ids:
            texts[token] = vocabulary.piece(token, special=True)
        self.tokens = texts
        self.bos_token_id = None
        self.eos_token_id = min(vocabulary.end_tokens, default=None)  # without one, the library adds a token
        self.is_tokenizer_wrapper = True

    def __call__(self, text: str) -> list[int]:
        return []


def _parts(schema: Json) -> Iterator[tuple[str, Json]]:
    """The schemas within a schema that must each be possible, with their places."""
    for key, place in (("properties", ".properties"), ("$defs", ""), ("patternProperties", ".patternProperties")):
        for name, part in schema.get(key, {}).items():
            if isinstance(part, dict):
                yield f"{place}.{name}", part
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield f".{key}", schema[key]
    for key in ("allOf", "anyOf", "oneOf", "prefixItems"):
        for index, part in enumerate(schema.get(key, ())):
            if isinstance(part, dict):
                yield f".{key}[{index}]", part


def _reason(error: str) -> str:
    """The library's sentence without its stack, source excerpt and state."""
    if error.startswith("panic"):  # an assertion of the library's, on the number of symbols
        return "it makes too large a grammar"
    if error.startswith("NoExtension"):
        return "no text can come next"
    lines = [line for line in error.splitlines() if line.strip() and not line.startswith("<")]
    text = lines[0].rpartition("failed to compile JSON schema: ")[2] if lines else "no reason is given"
    return text if len(text) <= 200 else text[:197] + "..."
