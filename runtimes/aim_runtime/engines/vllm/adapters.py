"""The LoRA adapters of one vLLM engine: loaded, replaced and unloaded while it serves."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from aim_kserve.errors import BadRequest
from aim_runtime.engines.adapters import check_name, not_loaded, refused, unknown_model

from .adapter_files import BaseModel, Copies, Copy, some
from .build import Built
from .engine import is_cpu_build
from .errors import dead
from .lanes import Lanes
from .output import one_line

logger = logging.getLogger("aim.engine.vllm")

_SAID = re.compile(r"Worker failed with error '(.*?)(?:', please check|$)")
_BASE, _ADAPTED = "base", "adapted"


@dataclass(eq=False, slots=True)
class _Adapter:
    """``copy`` is None for one that vLLM loaded by itself (``--lora-modules``). ``users``: requests that have it.
    ``closed``: nobody new gets it; where it is being replaced, ``replaced`` is set when the new one is there."""

    request: LoRARequest
    copy: Copy | None = None
    users: int = 0
    closed: bool = False
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    replaced: asyncio.Event | None = None


class Adapters:
    """By name. Lives in the event loop.

    Args:
        built: the engine.
        models: vLLM's own list of names (``OpenAIServingModels``), which its serving objects ask.
        served: the model's own name.
        model_dir: its directory.
    """

    def __init__(self, built: Built, models: Any, served: str, model_dir: Path) -> None:
        config = built.llm.vllm_config.lora_config
        self._llm = built.llm
        self._models = models
        self._served = served
        self._verifies = built.asks_workers
        self._copies = Copies(BaseModel(model_dir, config.max_lora_rank)) if config is not None else None
        self._lanes = Lanes() if config is not None and is_cpu_build() else None
        self._loaded = {name: _Adapter(request) for name, request in models.lora_requests.items()}
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, adapter in self._loaded.items() if not adapter.closed or adapter.replaced)

    @property
    def waiting(self) -> int:
        """Requests that vLLM has not been given yet."""
        return self._lanes.waiting if self._lanes is not None else 0

    async def check_loaded(self) -> None:
        """That those which vLLM loaded by itself are really applied. Raises BadRequest."""
        for name, adapter in self._loaded.items():
            await self._check_applied(name, Path(adapter.request.lora_path), adapter.request.lora_int_id)

    async def load(self, name: str, path: Path) -> None:
        """As ``engines.base.TakesAdapters``."""
        check_name(name, self._served)
        if self._copies is None:
            raise refused(
                name,
                path,
                "this engine was started without room for adapters: start it with --adapters, or with "
                "--engine_args --enable-lora",
            )
        await self._to_its_end(self._load(name, path, self._copies))

    async def unload(self, name: str) -> None:
        """As ``engines.base.TakesAdapters``."""
        adapter = self._loaded.get(name)
        if adapter is None or adapter.closed:
            raise not_loaded(name, self.names)
        adapter.closed = True
        await self._to_its_end(self._unload(name, adapter))

    async def lease(self, model: Any) -> Lease:
        """A request for ``model`` begins: it keeps its adapter, and what must not be computed beside it waits.

        Raises:
            NotFound: the adapter is being unloaded.
            Unavailable: too many are waiting.
        """
        adapter = self._loaded.get(model) if isinstance(model, str) else None
        while adapter is not None and adapter.closed:
            if adapter.replaced is None:
                raise unknown_model(model, (self._served, *self.names))
            await adapter.replaced.wait()
            adapter = self._loaded.get(model)
        lease = Lease(adapter, None)
        if self._lanes is not None:
            try:
                await self._lanes.enter(_ADAPTED if adapter is not None else _BASE)
            except BaseException:
                lease.end()
                raise
            lease.lanes = self._lanes
        return lease

    def end_waiting(self) -> None:
        if self._lanes is not None:
            self._lanes.end()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._copies is not None:
            self._copies.close()

    async def _load(self, name: str, path: Path, copies: Copies) -> None:
        async with self._one_at_a_time:
            copy = await asyncio.to_thread(copies.take, name, path)
            request = LoRARequest(name, self._models.lora_id_counter.inc(1), str(copy.path))
            try:
                await self._add(name, path, request)
            except BaseException:
                self._drop(copy)
                raise
            old = self._loaded.get(name)
            if old is not None:
                await self._close(old)
            self._models.lora_requests[name] = request
            self._loaded[name] = _Adapter(request, copy)
            logger.info("adapter %r loaded: %d modules, sha256 %s, %s", name, len(copy.modules), copy.digest, path)
            if old is not None:
                assert old.replaced is not None
                old.replaced.set()
                await self._remove(old)

    async def _close(self, old: _Adapter) -> None:
        """Wait for the requests of one that is about to be replaced; new ones of its name wait for the new one.

        vLLM tells adapters of a batch apart by name, so two of one name must not run at once.
        """
        old.closed, old.replaced = True, asyncio.Event()
        await self._until_unused(old)

    async def _unload(self, name: str, adapter: _Adapter) -> None:
        await self._until_unused(adapter)
        if self._loaded.get(name) is adapter:
            del self._loaded[name]
            self._models.lora_requests.pop(name, None)
        await self._remove(adapter)
        logger.info("adapter %r unloaded", name)

    async def _until_unused(self, adapter: _Adapter) -> None:
        while adapter.users:
            adapter.unused.clear()
            await adapter.unused.wait()

    async def _add(self, name: str, path: Path, request: LoRARequest) -> None:
        """Have the workers load it, and see that they apply it. Raises BadRequest; it is gone again then."""
        try:
            await self._llm.add_lora(request)
            await self._check_applied(name, path, request.lora_int_id)
        except EngineDeadError:
            raise dead() from None
        except Exception as error:  # vLLM's workers refuse in many ways, and the exception comes from afar
            with _forgiven():
                await self._llm.remove_lora(request.lora_int_id)
            if isinstance(error, BadRequest):
                raise
            raise refused(name, path, _reason(error).replace(request.lora_path, str(path))) from error

    async def _check_applied(self, name: str, path: Path, adapter_id: int) -> None:
        if not self._verifies:
            return
        parts = await self._llm.collective_rpc("adapter_modules", args=(adapter_id,))
        applied = {module for part, _ in parts for module in part}
        nowhere = sorted(set.intersection(*(set(part) for _, part in parts)) - applied)
        if nowhere or not applied:
            which = some(nowhere) or "any of them"
            raise refused(
                name,
                path,
                f"the model has no place for {len(nowhere)} of its modules ({which}): "
                "made for another model, or kept out by --lora-target-modules",
            )

    async def _remove(self, adapter: _Adapter) -> None:
        with _forgiven():
            await self._llm.remove_lora(adapter.request.lora_int_id)
        if adapter.copy is not None:
            self._drop(adapter.copy)

    def _drop(self, copy: Copy) -> None:
        """Unless another name has the same weights."""
        if self._copies is not None and not any(
            other.copy is not None and other.copy.digest == copy.digest for other in self._loaded.values()
        ):
            self._copies.drop(copy)

    async def _to_its_end(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)


class Lease:
    """What one request holds until :meth:`end`, which may be called again."""

    def __init__(self, adapter: _Adapter | None, lanes: Lanes | None) -> None:
        self._adapter = adapter
        self.lanes = lanes
        if adapter is not None:
            adapter.users += 1

    def end(self) -> None:
        adapter, self._adapter = self._adapter, None
        if adapter is not None:
            adapter.users -= 1
            if not adapter.users:
                adapter.unused.set()
        lanes, self.lanes = self.lanes, None
        if lanes is not None:
            lanes.leave()


def _reason(error: Exception) -> str:
    """What the worker said, without how it came here."""
    told = one_line(error)
    said = _SAID.search(told)
    return said[1] if said else told


@contextmanager
def _forgiven() -> Iterator[None]:
    """For what only frees memory: the worker has forgotten it already, or is gone."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  as above
        logger.debug("an adapter was not removed: %s", error)
