"""A judge in this process: llama.cpp over a GGUF file, in a thread of its own, one question at a time.

What is judged is tokenized as plain text: whatever it spells, it holds no special token. A question that is given up is
broken off within a step (on CPUs; on other devices between two).

The only file of the guardrail that knows llama-cpp-python.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from aim_guardrail.detectors.base import Misconfigured
from aim_guardrail.detectors.judge.backend import Part, Question, Said, Token, TooLong
from aim_guardrail.detectors.judge.chat_form import ChatForm
from aim_guardrail.detectors.threads import Threads

_TOP = 256  # of the vocabulary, listed with each token: both words of a verdict are among them


class InProcess:
    """Runs a GGUF model.

    Args:
        context_tokens: question and answer together.
        threads: that compute; None: all cores.

    Raises:
        ValueError: llama-cpp-python is not installed, or the file is no model that takes as much.
    """

    cost: Literal["model"] = "model"

    def __init__(self, path: str, context_tokens: int, threads: int | None) -> None:
        self._llama = _loaded(Path(path), context_tokens, threads)
        self._vocab = _Vocabulary(self._llama)
        template = self._llama.metadata.get("tokenizer.chat_template")
        self._form = None if template is None else ChatForm(template)
        self._thread = Threads(1, "judge", most_waiting=32)
        self._given_up = threading.Event()
        self._stops = _stop_when(self._llama, lambda: self._given_up.is_set())

    async def ask(self, question: Question, deadline_s: float) -> Said:
        """As of `Backend`. Raises Busy: too many questions wait."""
        given_up = threading.Event()
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                return await self._thread.run(self._answered, question, given_up)
        finally:
            given_up.set()

    async def close(self) -> None:
        """End the thread when its question has ended."""
        self._thread.close()

    # --- in the thread ------------------------------------------------------------------------------------------

    def _answered(self, question: Question, given_up: threading.Event) -> Said:
        self._given_up = given_up
        tokens = self._vocab.tokens(self._parts(question))
        most = self._llama.n_ctx()
        if len(tokens) + question.max_tokens > most:
            raise TooLong(f"{len(tokens)} tokens and the answer's are more than context_tokens ({most}): raise them")
        self._llama.reset()  # nothing of another question is reused: a verdict depends on its own text alone
        try:
            return self._said(tokens, question)
        except RuntimeError:
            if given_up.is_set():  # llama.cpp was told to stop; nobody reads this
                return Said("")
            raise

    def _parts(self, question: Question) -> Iterable[Part]:
        if question.prompt is not None:
            return question.prompt
        if self._form is None:
            raise Misconfigured("the file of path has no chat template: give a model that is made for conversations")
        return self._form.parts(question.messages, question.variables)

    def _said(self, tokens: list[int], question: Question) -> Said:
        said: list[Token] = []
        for token in self._sampled(tokens, question):
            if self._given_up.is_set() or self._vocab.is_end(token):
                break
            said.append(Token(self._vocab.text(token), *self._logprobs(token, question.schema is None)))
            if len(said) == question.max_tokens:
                return Said("".join(one.text for one in said), tuple(said), is_cut=True)
        return Said("".join(one.text for one in said), tuple(said))

    def _sampled(self, tokens: list[int], question: Question) -> Iterator[int]:
        from llama_cpp import LlamaGrammar

        grammar = None
        if question.schema is not None:
            grammar = LlamaGrammar.from_json_schema(json.dumps(question.schema), verbose=False)
        sampled: Iterator[int] = self._llama.generate(tokens, temp=0.0, repeat_penalty=1.0, grammar=grammar)
        return sampled

    def _logprobs(self, token: int, are_wanted: bool) -> tuple[float, dict[str, float]]:
        """Of the token just sampled, and of the likeliest in its place."""
        if not are_wanted:
            return 0.0, {}
        import numpy as np
        from llama_cpp import llama_get_logits_ith

        count = self._llama.n_vocab()
        logits = np.ctypeslib.as_array(llama_get_logits_ith(self._llama.ctx, -1), shape=(count,)).astype(np.float64)
        logprobs = logits - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        top = np.argpartition(logprobs, -min(_TOP, count))[-_TOP:]
        top = top[np.argsort(logprobs[top])]  # of tokens that are spelt alike, the likeliest counts
        return float(logprobs[token]), {self._vocab.text(int(one)): float(logprobs[one]) for one in top}


class _Vocabulary:
    """A model's tokens and their spellings."""

    def __init__(self, llama: Any) -> None:
        from llama_cpp import LLAMA_TOKEN_ATTR_CONTROL, LLAMA_TOKEN_ATTR_USER_DEFINED, llama_model_get_vocab

        self._llama = llama
        self._vocab = llama_model_get_vocab(llama.model)
        self._texts: dict[int, str] = {}
        special = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_USER_DEFINED
        attributes = ((token, llama._model.token_get_attr(token)) for token in range(llama.n_vocab()))
        self._special = {self.text(token): token for token, attribute in attributes if attribute & special}
        spellings = sorted(filter(None, self._special), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, spellings)) + ")") if spellings else None

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._llama.detokenize([token], special=True).decode("utf-8", "replace")
        return self._texts[token]

    def is_end(self, token: int) -> bool:
        from llama_cpp import llama_vocab_is_eog

        return bool(llama_vocab_is_eog(self._vocab, token))

    def tokens(self, parts: Iterable[Part]) -> list[int]:
        """Special tokens where our parts spell them; what lies between, ours and what is judged, as plain text, its
        joints unseen."""
        tokens = [self._llama.token_bos()] if self._llama._model.add_bos_token() else []
        plain: list[str] = []
        for part in parts:
            pieces = [part.text] if part.is_data or self._split is None else self._split.split(part.text)
            for at, piece in enumerate(pieces):
                if at % 2 == 0:
                    plain.append(piece)
                else:
                    tokens += [*self._plain(plain), self._special[piece]]
                    plain = []
        return tokens + self._plain(plain)

    def _plain(self, texts: list[str]) -> list[int]:
        text = "".join(texts).encode("utf-8", "replace")
        ids: list[int] = self._llama.tokenize(text, add_bos=False, special=False) if text else []
        return ids


def _loaded(path: Path, context_tokens: int, threads: int | None) -> Any:
    try:
        from llama_cpp import Llama
    except ImportError:
        raise ValueError("path needs llama-cpp-python: install the extra 'embedded', or give an endpoint") from None
    if not path.is_file():
        raise ValueError(f"path {path}: no such file")
    try:
        llama = Llama(str(path), n_ctx=context_tokens, n_threads=threads, n_threads_batch=threads, verbose=False)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"path {path}: no model that llama.cpp can run ({error})") from None
    trained = llama.metadata.get(f"{llama.metadata.get('general.architecture')}.context_length")
    if trained is not None and int(trained) < context_tokens:
        raise ValueError(f"path {path}: this model takes {trained} tokens: lower context_tokens ({context_tokens})")
    return llama


def _stop_when(llama: Any, is_over: Any) -> Any:
    """Has llama.cpp ask between two operations whether to stop; what is returned must live as long as the model."""
    from llama_cpp import ggml_abort_callback, llama_set_abort_callback

    callback = ggml_abort_callback(lambda _: is_over())
    llama_set_abort_callback(llama.ctx, callback, ctypes.c_void_p())
    return callback
