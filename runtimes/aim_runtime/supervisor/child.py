"""``python -m aim_runtime.supervisor.child FD``: an engine's process. Started by ``launch``, spoken to in ``frames``.

It imports the engine and what that needs: no server. Nothing it does outlives its parent: the kernel ends it with the
parent, and so does the end of the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
from typing import NoReturn

import uvloop

from aim_kserve.errors import ShutdownError
from aim_kserve.log import log_to_stderr, set_levels
from aim_runtime.engines import registry
from aim_runtime.engines.base import Engine, EngineSpec, ModelLoadError, parks
from aim_runtime.supervisor.frames import Loaded, LoadFailed, Reader, Start, ToEngine
from aim_runtime.supervisor.service import Service
from aim_runtime.supervisor.words import Prefixed

logger = logging.getLogger("aim.child")

_PR_SET_PDEATHSIG = 1


def main() -> None:
    log_to_stderr(formatter=Prefixed("%(name)s: %(message)s"))
    link = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(link.fileno(), False)
    start = _first(link)
    set_levels(start.log_levels)
    _bind_to(start)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_serve(link, start.spec))
    _end(code)


def _first(link: socket.socket) -> Start:
    """The first message says what we are. Ends the process if it never comes."""
    reader = Reader(ToEngine)
    while True:
        data = link.recv(2**16)
        for message in reader.feed(data):
            if isinstance(message, Start):
                return message
        if not data:
            _end(1)


def _bind_to(start: Start) -> None:
    """Before the engine's library is imported: it counts CPUs and starts threads."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != start.parent:
        _end(1)  # it ended before the kernel was told
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if start.cpus is not None:
        os.sched_setaffinity(0, start.cpus)
    if start.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (start.memory_bytes, start.memory_bytes))


async def _serve(link: socket.socket, spec: EngineSpec) -> int:
    """Load the engine and serve it until the parent says so, or is gone."""
    loop = asyncio.get_running_loop()
    service = Service()
    await loop.create_unix_connection(lambda: service, sock=link)
    loading = loop.create_task(_load(spec, service))
    await service.over
    engine = loading.result() if loading.done() else None
    if service.over.result() is None or engine is None:
        _end(1)  # the parent is gone: nobody waits for an orderly end; or there is nothing to free
    return await _close(engine)


async def _load(spec: EngineSpec, service: Service) -> Engine | None:
    """None: it failed, and the parent has been told."""
    try:
        engine = registry.create(spec)
        await engine.load()
        requests = await asyncio.to_thread(lambda: dict(engine.requests))  # reads request models: tens of milliseconds
    except ModelLoadError as error:
        service.send(LoadFailed(str(error)))
        return None
    except MemoryError:
        service.send(LoadFailed("there is not enough memory for the model"))
        return None
    except Exception as error:  # process edge: whatever an engine's library raises, the parent has one line of it
        logger.exception("loading failed")
        service.send(LoadFailed(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"))
        return None
    gc.collect()
    gc.freeze()  # all that is alive now lives as long as the process
    service.start(engine)
    loaded = Loaded(
        engine.name,
        engine.version,
        tuple(engine.operations),
        requests,
        engine.adapters,
        engine.max_model_len,
        service.takes_adapters,
        parks(engine),
    )
    service.send(loaded)
    return engine


async def _close(engine: Engine) -> int:
    try:
        await engine.close()
    except ShutdownError as error:
        logger.error("%s", error)
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """Without the interpreter's own end, which waits for threads that may never come. If it is no good end, what we
    started ends with us: nobody else ends that."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(code)


if __name__ == "__main__":
    main()
