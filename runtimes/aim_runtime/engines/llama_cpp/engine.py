"""The embedded engine: llama.cpp through llama-cpp-python, in this process, no GPU needed.

The way of a request: ``request`` checks it, ``prompts`` makes tokens of it, this file makes sequences,
``scheduler`` computes them, ``answer`` shapes the answer.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from aim_kserve.errors import BadRequest, Unavailable
from aim_runtime.engines.base import EngineStats, Json, ModelLoadError, Operation, RequestContext, Stream

from .answer import CHAT, COMPLETION, Answer, AnswerStream, Form, Mailbox
from .chat_template import ChatTemplate, TemplateRefusal
from .file import find_gguf
from .prompts import Prompt, Prompts
from .request import (
    REQUESTS,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    StreamOptions,
    TokenizeBody,
    check_common,
    check_prompts,
    parse,
    sampling_of,
)
from .schema import grammar_of
from .sequence import Generation, Sequence, Sink

if TYPE_CHECKING:  # the library behind these two takes 0.3 s to import: load() does it
    from .bindings import LlamaModel
    from .scheduler import Scheduler

#: vLLM's and OpenAI's default for text completions. Chat may use the rest of the context.
_COMPLETION_TOKENS = 16
_CELL_STEP = 256  # llama.cpp pads the cache to this


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a loaded engine has."""

    model: LlamaModel
    scheduler: Scheduler
    prompts: Prompts
    has_template: bool


class LlamaCppEngine:
    """One GGUF model, continuous batching on the CPU.

    Args:
        model_dir: a GGUF file, or a directory that holds exactly one.
        served_model_name: ``model`` in answers.
        max_model_len: longest prompt plus answer in tokens; default and upper bound: what the model was trained on.
        slots: sequences that run at once.
        threads: compute threads; default: the usable CPUs less one for the event loop.
        max_waiting: sequences that may queue beyond the slots before requests are refused.
        batch_tokens: most tokens computed in one step.
        kv_cache_memory_bytes: room for the cache that all slots share. It holds at least one sequence of
            max_model_len, and at most ``slots`` of them.
    """

    name = "llama_cpp"

    def __init__(
        self,
        model_dir: Path,
        *,
        served_model_name: str,
        max_model_len: int | None = None,
        slots: int = 8,
        threads: int | None = None,
        max_waiting: int = 256,
        batch_tokens: int = 512,
        kv_cache_memory_bytes: int = 512 * 2**20,
    ) -> None:
        self._model_dir = model_dir
        self._served_name = served_model_name
        self._wanted_len = max_model_len
        self._slots = slots
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) - 1)
        self._max_waiting = max_waiting
        self._batch_tokens = max(batch_tokens, slots)
        self._kv_cache_memory_bytes = kv_cache_memory_bytes
        self._max_model_len = max_model_len or 0
        self._operations: dict[str, Operation] = {}
        self._loaded: _Loaded | None = None

    # -- life --------------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        return importlib.metadata.version("llama-cpp-python")

    @property
    def operations(self) -> Mapping[str, Operation]:
        return self._operations

    @property
    def requests(self) -> Mapping[str, type[BaseModel]]:
        return REQUESTS

    @property
    def adapters(self) -> tuple[str, ...]:
        return ()

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    async def load(self) -> None:
        """Load the file and start the decode thread.

        Raises:
            ModelLoadError: no such file, not a GGUF, not a model llama.cpp knows, or no memory for it.
        """
        self._loaded = await asyncio.to_thread(self._load)
        operations: dict[str, Operation] = {
            "completions": self._complete,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
        }
        if self._loaded.has_template:
            operations["chat/completions"] = self._chat
        self._operations = operations

    def healthy(self) -> bool:
        return self._loaded is not None and self._loaded.scheduler.alive

    def stats(self) -> EngineStats:
        if self._loaded is None:
            return EngineStats(0, 0, self._slots)
        return self._loaded.scheduler.stats()

    async def drain(self, timeout_s: float) -> None:
        if self._loaded is None:
            return
        scheduler = self._loaded.scheduler
        deadline = time.monotonic() + timeout_s
        while scheduler.in_flight and scheduler.alive and time.monotonic() < deadline:  # noqa: ASYNC110 (a thread counts)
            await asyncio.sleep(0.02)
        if scheduler.in_flight:
            await asyncio.to_thread(scheduler.stop)

    async def close(self) -> None:
        if self._loaded is None:
            return
        loaded, self._loaded, self._operations = self._loaded, None, {}
        await asyncio.to_thread(loaded.scheduler.close)
        await asyncio.to_thread(loaded.model.close)

    def _load(self) -> _Loaded:
        path = find_gguf(self._model_dir)
        try:
            from .bindings import LlamaError, LlamaModel
        except ImportError as error:
            raise ModelLoadError(
                f"llama-cpp-python cannot be imported ({error}): pip install 'aim-kserve[embedded]'"
            ) from error
        from .scheduler import Scheduler

        try:
            model = LlamaModel(path)
            self._fit_length(model.trained_context, path)
            context = model.new_context(
                cells=self._cells(model.kv_bytes_per_token),
                slots=self._slots,
                batch_tokens=self._batch_tokens,
                threads=self._threads,
            )
        except LlamaError as error:
            raise ModelLoadError(f"llama.cpp cannot load {path}: {error}") from error
        template = _template_of(model, path)
        scheduler = Scheduler(model, context, slots=self._slots, max_waiting=self._max_waiting)
        scheduler.start()
        return _Loaded(model, scheduler, Prompts(model, template), template is not None)

    def _fit_length(self, trained: int, path: Path) -> None:
        wanted = self._wanted_len or trained
        if wanted > trained:
            raise ModelLoadError(
                f"max_model_len {wanted} is {wanted - trained} tokens more than {path.name} was trained on ({trained})"
            )
        self._max_model_len = wanted

    def _cells(self, kv_bytes_per_token: int) -> int:
        """Cache cells: what the memory holds, but one full sequence at least and all slots' at most."""
        affordable = self._kv_cache_memory_bytes // max(1, kv_bytes_per_token)
        cells = max(self._max_model_len, min(affordable, self._slots * self._max_model_len))
        return -(-cells // _CELL_STEP) * _CELL_STEP

    # -- operations --------------------------------------------------------------------------------------------

    async def _chat(self, body: Json, context: RequestContext) -> Json | Stream:
        request = parse(ChatBody, body)
        check_common(request, slots=self._slots, vocabulary_size=self._engine.model.vocabulary_size)
        prompt = await self._engine.prompts.chat(request)
        self._check_length(prompt, "messages")
        name, limit = request.answer_tokens
        generation = self._generation(request, prompt, name, limit, request.top)
        return await self._answer(CHAT, [(prompt, generation)], request, context)

    async def _complete(self, body: Json, context: RequestContext) -> Json | Stream:
        request = parse(CompletionBody, body)
        check_common(request, slots=self._slots, vocabulary_size=self._engine.model.vocabulary_size)
        generations = []
        for prompt in await self._engine.prompts.completion(request):
            rest = self._check_length(prompt, "prompt")
            name, limit = request.answer_tokens
            limit = min(_COMPLETION_TOKENS, rest) if limit is None else limit
            generation = self._generation(request, prompt, name, limit, request.logprobs)
            if request.echo:
                generation = replace(generation, prompt_logprobs=request.logprobs)
            generations.append((prompt, generation))
        return await self._answer(COMPLETION, generations, request, context)

    async def _tokenize(self, body: Json, context: RequestContext) -> Json:
        request = parse(TokenizeBody, body)
        if (request.prompt is None) == (request.messages is None):
            raise BadRequest("give either 'prompt' or 'messages'", param="prompt")
        prompts, model = self._engine.prompts, self._engine.model
        if request.prompt is None:
            tokens = (await prompts.chat(request)).tokens
        else:
            tokens = await prompts.text(request.prompt, add_special=request.add_special_tokens is not False)
        ids: list[int] = tokens.tolist()
        strings = None
        if request.return_token_strs:
            strings = [model.piece(token, special=True).decode("utf-8", "replace") for token in ids]
        return {"count": len(ids), "max_model_len": self._max_model_len, "tokens": ids, "token_strs": strings}

    async def _detokenize(self, body: Json, context: RequestContext) -> Json:
        request = parse(DetokenizeBody, body)
        model = self._engine.model
        if request.tokens:
            check_prompts([request.tokens], model.vocabulary_size, param="tokens")
        return {"prompt": model.detokenize(request.tokens)}

    # -- from a request to sequences ---------------------------------------------------------------------------

    @property
    def _engine(self) -> _Loaded:
        if self._loaded is None:
            raise Unavailable("the model is not loaded")
        return self._loaded

    def _check_length(self, prompt: Prompt, field: str) -> int:
        """Tokens left for the answer. Raises BadRequest when there are none."""
        count, most = len(prompt.tokens), self._max_model_len
        if count >= most:
            raise BadRequest(
                f"the prompt has {count} tokens and the model's context is {most}, of which the answer needs "
                f"at least 1: shorten '{field}' by {count - most + 1} tokens",
                param=field,
                code="context_length_exceeded",
            )
        return most - count

    def _generation(
        self, request: GenerationBody, prompt: Prompt, limit_name: str, limit: int | None, logprobs: int | None
    ) -> Generation:
        rest = self._max_model_len - len(prompt.tokens)
        limit = rest if limit is None else limit
        if limit > rest:
            raise BadRequest(
                f"'{limit_name}' is {limit}, but the prompt's {len(prompt.tokens)} tokens leave {rest} of the "
                f"model's context of {self._max_model_len}: ask for at most {rest}",
                param=limit_name,
                code="context_length_exceeded",
            )
        return Generation(
            prompt=prompt.tokens,
            max_tokens=limit,
            sampling=sampling_of(request),
            stops=request.stops,
            stop_tokens=frozenset(request.stop_token_ids or ()),
            min_tokens=min(request.min_tokens or 0, limit),
            ignore_eos=bool(request.ignore_eos),
            logprobs=logprobs,
            grammar=grammar_of(request.response_format, self._engine.model),
        )

    async def _answer(
        self,
        form: Form,
        generations: list[tuple[Prompt, Generation]],
        request: GenerationBody,
        context: RequestContext,
    ) -> Json | Stream:
        """Start every choice, then answer whole or as a stream."""
        scheduler = self._engine.scheduler
        n = request.choices
        if n * len(generations) > scheduler.capacity:
            raise BadRequest(
                f"{len(generations)} prompts with {n} choices each are {n * len(generations)} sequences; "
                f"the engine takes {scheduler.capacity}: send fewer prompts",
                param="prompt",
            )
        mailbox = Mailbox(n * len(generations), wake_at_end=not request.stream)
        priority = context.priority or request.priority or 0
        sequences = _sequences([g for _, g in generations], n, mailbox.put, priority)
        context.usage.prompt_tokens = sum(len(prompt.tokens) for prompt, _ in generations)
        options = request.stream_options or StreamOptions()
        answer = Answer(
            form,
            context.request_id,
            self._served_name,
            context.usage,
            heads=[prompt.head for prompt, _ in generations for _ in range(n)],
            choices_per_prompt=n,
            logprobs=generations[0][1].logprobs,
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
        )
        scheduler.submit(sequences)

        def release() -> None:
            """The client is gone, or has its answer: stop what still runs."""
            if mailbox.open:
                scheduler.cancel(sequences)

        if request.stream:
            return AnswerStream(answer.chunks(mailbox), release)
        try:
            return await answer.whole(mailbox)
        finally:
            release()


def _sequences(generations: list[Generation], choices: int, sink: Sink, priority: int) -> list[Sequence]:
    """Every choice of every prompt; the later choices of one wait for the first to compute it."""
    sequences: list[Sequence] = []
    for generation in generations:
        leader: Sequence | None = None
        for _ in range(choices):
            sequence = Sequence(generation, len(sequences), sink, priority=priority, leader=leader)
            leader = leader or sequence
            sequences.append(sequence)
    return sequences


def _template_of(model: LlamaModel, path: Path) -> ChatTemplate | None:
    if model.chat_template is None:
        return None
    try:
        return ChatTemplate(model.chat_template, {"bos_token": model.bos_text, "eos_token": model.eos_text})
    except TemplateRefusal as error:
        raise ModelLoadError(f"{path}: {error}") from error
