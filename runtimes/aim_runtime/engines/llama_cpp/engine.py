"""The embedded engine: llama.cpp through llama-cpp-python, in this process, no GPU needed.

``loading`` makes what it runs on. The way of a request: ``request`` checks it, ``prompts`` makes tokens of it, this
file makes sequences, ``scheduler`` computes them, ``answer`` shapes the answer.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aim_kserve.errors import BadRequest, ServingError, ShutdownError, Unavailable
from aim_runtime.engines.base import EngineStats, Json, ModelLoadError, Operation, RequestContext, Stream
from aim_runtime.fields import Fields, fields_of

from .adapters import Adapter, Adapters
from .answer import CHAT, COMPLETION, Answer, AnswerStream, Form, Mailbox
from .background import INLINE_CHARACTERS
from .loading import Loaded, Sizes, load
from .progress import MOST_BETWEEN_LOOKS_S
from .prompts import Prompt
from .request import (
    REQUESTS,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    ResponseFormat,
    StreamOptions,
    TokenizeBody,
    check_common,
    check_prompts,
    parse,
    sampling_of,
)
from .sequence import Generation, Sequence, Sink
from .tools import ToolForm, ToolUse

logger = logging.getLogger("aim.engine.llama_cpp")

if TYPE_CHECKING:  # the library behind it is imported by load()
    from .constraint import Constraint

#: vLLM's and OpenAI's default for text completions. Chat may use the rest of the context.
_COMPLETION_TOKENS = 16
_CUT_OFF_S = 1.0  # for the decode thread to end its requests itself: it does so between two steps
_STOP_S = 2.0  # a thread that ends at all ends within a step or a prompt


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
        stall_timeout_s: time without a step, while there is work, after which the engine is no longer healthy.
        parked_memory_bytes: host memory for what requests had computed that made way for more urgent ones; beyond it,
            that is computed again. None: as kv_cache_memory_bytes.
        adapters: LoRA adapters (GGUF files) to load with the model: name → file.
        deterministic: a prompt's log probabilities are the same to the bit whatever runs beside it (see ``exact``).
            Each slot then has its own cache for max_model_len tokens: ``slots`` is how many of them
            kv_cache_memory_bytes holds, if that is less.
    """

    name = "llama_cpp"
    parks = True  # see ``engines.base.Parks``

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
        parked_memory_bytes: int | None = None,
        stall_timeout_s: float = 60.0,
        adapters: Mapping[str, Path] | None = None,
        deterministic: bool = False,
    ) -> None:
        self._model_dir = model_dir
        self._served_name = served_model_name
        self._slots = slots
        self._sizes = Sizes(
            max_model_len=max_model_len,
            slots=slots,
            threads=threads or max(1, len(os.sched_getaffinity(0)) - 1),
            max_waiting=max_waiting,
            batch_tokens=max(batch_tokens, slots),
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            parked_memory_bytes=kv_cache_memory_bytes if parked_memory_bytes is None else parked_memory_bytes,
            deterministic=deterministic,
        )
        self._stall_timeout_s = stall_timeout_s
        self._adapters_at_start = dict(adapters or {})
        self._adapters: Adapters | None = None
        self._watch: asyncio.Task[None] | None = None
        self._max_model_len = max_model_len or 0
        self._operations: dict[str, Operation] = {}
        self._loaded: Loaded | None = None

    # -- life --------------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        return importlib.metadata.version("llama-cpp-python")

    @property
    def operations(self) -> Mapping[str, Operation]:
        return self._operations

    @property
    def requests(self) -> Mapping[str, Fields | None]:
        return {operation: fields_of(model) for operation, model in REQUESTS.items()}

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._adapters.names if self._adapters is not None else ()

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    async def load(self) -> None:
        """Load the file and start the decode thread.

        Raises:
            ModelLoadError: no such file, not a GGUF, not a model llama.cpp knows, no memory for it, or an adapter
                that is none of it.
        """
        loaded = self._loaded = await asyncio.to_thread(load, self._model_dir, self._sizes)
        self._adapters = Adapters(self._served_name, loaded.path, loaded.model, loaded.scheduler, loaded.background.run)
        try:
            for name, path in self._adapters_at_start.items():
                await self._adapters.load(name, Path(path))
        except ServingError as error:
            await self.close()
            raise ModelLoadError(error.message) from error
        self._max_model_len, self._slots = self._loaded.limits.max_model_len, self._loaded.slots
        operations: dict[str, Operation] = {
            "completions": self._complete,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
        }
        if self._loaded.has_template:
            operations["chat/completions"] = self._chat
        self._operations = operations
        self._watch = asyncio.create_task(self._watch_progress(self._loaded))

    async def load_adapter(self, name: str, path: Path) -> None:
        """Serve a GGUF LoRA adapter as ``name``; one that has the name is replaced, its requests finish with it.

        Raises:
            BadRequest: says what is wrong with the name or the file; nothing has changed.
        """
        await self._adapters_of_model.load(name, path)

    async def unload_adapter(self, name: str) -> None:
        """Returns when the requests that use it are done.

        Raises:
            NotFound: it is not loaded.
        """
        await self._adapters_of_model.unload(name)

    def healthy(self) -> bool:
        if self._loaded is None:
            return False
        return self._loaded.scheduler.alive and self._loaded.stalled_s < self._stall_timeout_s

    def stats(self) -> EngineStats:
        if self._loaded is None:
            return EngineStats(0, 0, self._slots)
        return replace(self._loaded.scheduler.stats(), stalled_s=self._loaded.stalled_s)

    async def drain(self, timeout_s: float) -> None:
        if self._loaded is None:
            return
        scheduler, background = self._loaded.scheduler, self._loaded.background
        deadline = time.monotonic() + timeout_s
        while (scheduler.in_flight or background.busy) and self.healthy() and time.monotonic() < deadline:  # noqa: ASYNC110 (threads count)
            await asyncio.sleep(0.02)
        if scheduler.in_flight and not await asyncio.to_thread(scheduler.stop, _CUT_OFF_S):
            scheduler.give_up("the engine is shutting down, and does not get on with this request")

    async def close(self) -> None:
        if self._loaded is None:
            return
        loaded, self._loaded, self._operations, self._adapters = self._loaded, None, {}, None
        if self._watch is not None:
            self._watch.cancel()
        if not await asyncio.to_thread(loaded.scheduler.stop, _STOP_S):
            raise ShutdownError(f"the decode thread has not moved for {loaded.scheduler.stalled_s:.0f} s")
        loaded.model.interrupt()
        if not await asyncio.to_thread(loaded.background.end, _STOP_S):
            raise ShutdownError("a thread that prepares requests does not end")
        loaded.scheduler.close()
        loaded.model.close()  # here, in the loop: no operation can be using it

    async def _watch_progress(self, loaded: Loaded) -> None:
        """Whoever waits for an engine that stands still is told, instead of waiting for ever."""
        while True:
            await asyncio.sleep(min(self._stall_timeout_s / 4, MOST_BETWEEN_LOOKS_S / 2))
            stalled_s = loaded.stalled_s
            if stalled_s >= self._stall_timeout_s and loaded.scheduler.unanswered:
                logger.error("the engine has not moved for %.0f s: it is not healthy", stalled_s)
                loaded.scheduler.give_up(f"the engine has not moved for {stalled_s:.0f} s: ask again")

    # -- operations --------------------------------------------------------------------------------------------

    async def _chat(self, body: Json, context: RequestContext) -> Json | Stream:
        request = self._read(ChatBody, body)
        check_common(request, slots=self._slots, vocabulary_size=self._engine.model.vocabulary_size)
        use = self._engine.prompts.tools(request)
        prompt = await self._engine.prompts.chat(request, use)
        self._check_length(prompt, "messages")
        name, limit = request.answer_tokens
        wanted = await self._wanted(request, request.top, use)
        generation = self._generation(wanted, prompt, name, limit)
        return await self._answer(ToolForm(use) if use else CHAT, [(prompt, generation)], request, context)

    async def _complete(self, body: Json, context: RequestContext) -> Json | Stream:
        request = self._read(CompletionBody, body)
        check_common(request, slots=self._slots, vocabulary_size=self._engine.model.vocabulary_size)
        wanted = await self._wanted(request, request.logprobs)
        generations = []
        for prompt in await self._engine.prompts.completion(request):
            rest = self._check_length(prompt, "prompt")
            name, limit = request.answer_tokens
            limit = min(_COMPLETION_TOKENS, rest) if limit is None else limit
            generation = self._generation(wanted, prompt, name, limit)
            if request.echo:
                generation = replace(generation, prompt_logprobs=request.logprobs)
            generations.append((prompt, generation))
        return await self._answer(COMPLETION, generations, request, context)

    async def _tokenize(self, body: Json, context: RequestContext) -> Json:
        request = self._read(TokenizeBody, body)
        if (request.prompt is None) == (request.messages is None):
            raise BadRequest("give either 'prompt' or 'messages'", param="prompt")
        prompts = self._engine.prompts
        if request.prompt is None:
            tokens = (await prompts.chat(request)).tokens
        else:
            tokens = await prompts.text(request.prompt, add_special=request.add_special_tokens is not False)

        def told() -> Json:
            ids: list[int] = tokens.tolist()
            model = self._engine.model
            strings = None
            if request.return_token_strs:
                strings = [model.piece(token, special=True).decode("utf-8", "replace") for token in ids]
            return {"count": len(ids), "max_model_len": self._max_model_len, "tokens": ids, "token_strs": strings}

        return await self._engine.background.run(told, len(tokens))

    async def _detokenize(self, body: Json, context: RequestContext) -> Json:
        request = self._read(DetokenizeBody, body)
        model = self._engine.model

        def told() -> Json:
            if request.tokens:
                check_prompts([request.tokens], model.vocabulary_size, param="tokens")
            return {"prompt": model.detokenize(request.tokens)}

        return await self._engine.background.run(told, len(request.tokens))

    # -- from a request to sequences ---------------------------------------------------------------------------

    @property
    def _engine(self) -> Loaded:
        if self._loaded is None:
            raise Unavailable("the model is not loaded")
        return self._loaded

    @property
    def _adapters_of_model(self) -> Adapters:
        if self._adapters is None:
            raise Unavailable("the model is not loaded")
        return self._adapters

    def _read(self, kind: type[Body], body: Json) -> Body:
        """Lengths first: validating costs time for every item."""
        self._engine.limits.check(body)
        request = parse(kind, body)
        self._adapters_of_model.asked_for(body.get("model"))
        return request

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

    async def _wanted(self, request: GenerationBody, logprobs: int | None, use: ToolUse | None = None) -> Generation:
        """What all prompts of a request share, read once; it has no prompt yet."""
        model = self._engine.model
        stop_tokens = frozenset(request.stop_token_ids or ())
        if request.min_tokens and len(stop_tokens | model.end_tokens) == model.vocabulary_size:
            raise BadRequest(
                f"'stop_token_ids' names every token that does not end an answer anyway, and 'min_tokens' "
                f"{request.min_tokens} forbids them all: leave one of the two out",
                param="stop_token_ids",
            )
        return Generation(
            prompt=np.empty(0, dtype=np.int32),
            max_tokens=0,
            sampling=sampling_of(request),
            stops=request.stops,
            stop_tokens=stop_tokens,
            min_tokens=request.min_tokens or 0,
            ignore_eos=bool(request.ignore_eos),
            logprobs=logprobs,
            shown=self._engine.prompts.call_marks if use and not use.holds else frozenset(),
            constraint=await self._constraint(request.response_format, use),
        )

    async def _constraint(self, format_: ResponseFormat | None, use: ToolUse | None) -> Constraint | None:
        """What the answer is held to. A large schema takes a second to compile: in a thread."""
        constraints, run = self._engine.constraints, self._engine.background.run
        if use is None or not use.holds:
            if format_ is None or format_.type == "text":
                return None
            return await run(lambda: constraints().of_format(format_), INLINE_CHARACTERS + 1)
        if format_ is not None and format_.type != "text":
            raise BadRequest(
                "'response_format' and 'tool_choice' both say what the answer is: leave one of the two out",
                param="response_format",
            )
        return await run(lambda: use.constraint(constraints()), INLINE_CHARACTERS + 1)

    def _generation(self, wanted: Generation, prompt: Prompt, limit_name: str, limit: int | None) -> Generation:
        rest = self._max_model_len - len(prompt.tokens)
        limit = rest if limit is None else limit
        if limit > rest:
            raise BadRequest(
                f"'{limit_name}' is {limit}, but the prompt's {len(prompt.tokens)} tokens leave {rest} of the "
                f"model's context of {self._max_model_len}: ask for at most {rest}",
                param=limit_name,
                code="context_length_exceeded",
            )
        return replace(wanted, prompt=prompt.tokens, max_tokens=limit, min_tokens=min(wanted.min_tokens, limit))

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
        adapter = self._adapters_of_model.asked_for(request.model)
        sequences = _sequences([g for _, g in generations], n, mailbox.put, context.priority, adapter)
        context.usage.prompt_tokens = sum(len(prompt.tokens) for prompt, _ in generations)
        options = request.stream_options or StreamOptions()
        answer = Answer(
            form,
            context.request_id,
            adapter.name if adapter else self._served_name,
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


def _sequences(
    generations: list[Generation], choices: int, sink: Sink, priority: int, adapter: Adapter | None
) -> list[Sequence]:
    """Every choice of every prompt; the later choices of one wait for the first to compute it."""
    sequences: list[Sequence] = []
    for generation in generations:
        leader: Sequence | None = None
        for _ in range(choices):
            sequence = Sequence(generation, len(sequences), sink, priority=priority, leader=leader, adapter=adapter)
            leader = leader or sequence
            sequences.append(sequence)
    return sequences
