"""The LoRA adapters of one llama.cpp engine: loaded, replaced and unloaded while it serves.

An adapter is attached to the whole context, so a step computes sequences of one adapter only (``turns``). Adapters
are made and freed by the decode thread, between two steps: llama.cpp keeps them in a list that a step reads. What
takes long, reading and checking the file, has been done by then, elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aim_runtime.engines.adapters import check_name, not_loaded, refused, unknown_model

from .adapter_file import BaseModel, Copy

if TYPE_CHECKING:  # the library behind it is imported by load()
    from .bindings import LlamaModel, LoadedLora
    from .scheduler import Scheduler

logger = logging.getLogger("aim.engine.llama_cpp")

T = TypeVar("T")

#: Reading a file is always worth a thread.
READING_COST = 10**9


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """One loaded adapter. A sequence keeps the one it began with, whatever its name stands for by then.

    ``digest``: of its weights. Equal digests compute alike, so they may share cached tokens.
    """

    name: str
    path: Path
    digest: str
    lora: LoadedLora


class Adapters:
    """By name. Lives in the event loop.

    Args:
        served: the model's own name.
        model_file: its GGUF file.
        model: makes the adapters.
        scheduler: its thread does so.
        run: runs slow work in a thread.
    """

    def __init__(self, served: str, model_file: Path, model: LlamaModel, scheduler: Scheduler, run: Any) -> None:
        self._served = served
        self._model_file = model_file
        self._model = model
        self._scheduler = scheduler
        self._run = run
        self._loaded: dict[str, Adapter] = {}
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    @cached_property
    def _base(self) -> BaseModel:
        return BaseModel.of(self._model_file)

    def asked_for(self, model: str | None) -> Adapter | None:
        """What a body's ``model`` means; None is the model itself.

        Raises:
            NotFound: neither; perhaps unloaded a moment ago.
        """
        if model is None or model == self._served:
            return None
        try:
            return self._loaded[model]
        except KeyError:
            raise unknown_model(model, (self._served, *self._loaded)) from None

    async def load(self, name: str, path: Path) -> None:
        """Serve the adapter as ``name``, instead of the one that has it. Once begun, it is done even if the caller
        leaves.

        Raises:
            BadRequest: the name cannot be had, or the file is no adapter of this model; nothing has changed.
        """
        check_name(name, self._served)
        await self._to_its_end(self._load(name, path))

    async def unload(self, name: str) -> None:
        """No request gets it from now on; returns when those that have it are done, and its memory is free.

        Raises:
            NotFound: it is not loaded.
        """
        if name not in self._loaded:
            raise not_loaded(name, self._loaded)
        await self._to_its_end(self._free(self._loaded.pop(name)))

    async def _load(self, name: str, path: Path) -> None:
        async with self._one_at_a_time:
            copy = await self._run(lambda: Copy(name, path, self._base), READING_COST)
            with copy:
                from .bindings import LlamaError

                try:
                    lora = await self._between_steps(lambda: self._model.load_adapter(copy.path))
                except LlamaError as error:
                    raise refused(name, path, str(error)) from error
            old = self._loaded.get(name)
            self._loaded[name] = Adapter(name, path, copy.digest, lora)
        logger.info("adapter %r loaded: %d modules, sha256 %s, %s", name, len(copy.modules), copy.digest, path)
        if old is not None:
            self._keep(self._free(old))

    async def _free(self, adapter: Adapter) -> None:
        await self._between_steps(lambda: self._scheduler.release(adapter), after=adapter)
        logger.info("adapter %r unloaded: sha256 %s", adapter.name, adapter.digest)

    async def _between_steps(self, work: Any, after: Adapter | None = None) -> Any:
        return await asyncio.wrap_future(self._scheduler.between_steps(work, after=after))

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(self._keep(work))

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """``work`` as a task of its own; the loop alone would forget it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("an adapter was not loaded or freed: %s", task.exception())
