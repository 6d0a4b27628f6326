"""An engine's process, the real one, whose engine is the fake one with a few odd ways: ``odd_child.py FD``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import Field

from aim_kserve import errors
from aim_kserve.errors import BadRequest, ServingError, ShutdownError
from aim_runtime.engines import registry
from aim_runtime.engines.base import Engine, EngineSpec, EngineStats, Json, ModelLoadError, RequestContext, Stream
from aim_runtime.engines.kind import EngineKind, EngineSettings
from aim_runtime.supervisor.child import main
from fake_engine import FakeEngine


class OddSettings(EngineSettings):
    token_s: float = 0.0
    load_s: float = 0.0
    load_error: str | None = None
    load_exit: int | None = None
    #: Fail as often as there are files of this name that can be removed, then load.
    fail_while: Path | None = None
    never_closes: bool = False
    adapters: dict[str, Path] = Field(default_factory=dict)
    own_adapter: str | None = None
    #: An adapter that ends the process, as often as there are files of this name that can be removed.
    die_while: Path | None = None


class Teapot(BadRequest):
    """An error that only the child knows."""

    status = 418
    type = "teapot_error"

    def headers(self) -> dict[str, str]:
        return {"x-tea": "green"}


@dataclass
class OddEngine(FakeEngine):
    odd: OddSettings = OddSettings()  # noqa: RUF009  frozen
    stalled_since: float | None = None
    paths: dict[str, str] = field(default_factory=dict)

    async def load(self) -> None:
        print("an odd engine loads", file=sys.stderr, flush=True)
        if self.odd.load_exit is not None:
            print("cannot go on: the moon is full", file=sys.stderr, flush=True)
            os._exit(self.odd.load_exit)
        if self.odd.fail_while is not None and self.odd.fail_while.exists():
            self.odd.fail_while.unlink()
            os._exit(7)
        for name, path in self.odd.adapters.items():
            if not path.exists():
                raise ModelLoadError(f"{path}: no such adapter")
            self.adapters = (*self.adapters, name)
        if self.odd.own_adapter is not None:
            self.adapters = (self.odd.own_adapter,)
        await super().load()
        own = (self._pid, self._kill, self._exit, self._stall, self._hang, self._garbage, self._flood, self._fail)
        own += (self._large, self._usage, self._blocks, self._environment, self._unsendable, self._spawn, self._hush)
        own += (self._paths, self._say, self._linger)
        self._operations |= {f"odd/{each.__name__[1:]}": each for each in own}

    def stats(self) -> EngineStats:
        stalled_s = 0.0 if self.stalled_since is None else time.monotonic() - self.stalled_since
        return replace(super().stats(), stalled_s=stalled_s)

    async def load_adapter(self, name: str, path: Path) -> None:
        if not path.exists():  # noqa: ASYNC240
            raise errors.NotFound(f"{path}: no such adapter", param="lora_path")
        if self.odd.die_while is not None and self.odd.die_while.exists():
            self.odd.die_while.unlink()
            os._exit(9)
        await asyncio.sleep(0.05)
        self.adapters = tuple(dict.fromkeys((*self.adapters, name)))
        self.paths[name] = str(path)

    async def unload_adapter(self, name: str) -> None:
        self.adapters = tuple(each for each in self.adapters if each != name)

    async def close(self) -> None:
        if self.odd.never_closes:
            time.sleep(600)  # noqa: ASYNC251  the point of it
        await super().close()
        if self.stalled_since is not None:
            raise ShutdownError("it stands still")

    # --- operations ---------------------------------------------------------------------------------------------------

    async def _pid(self, _: Json, __: RequestContext) -> Json:
        return {"pid": os.getpid(), "cpus": sorted(os.sched_getaffinity(0)), "modules": sorted(sys.modules)}

    async def _environment(self, body: Json, _: RequestContext) -> Json:
        return {name: os.environ.get(name) for name in body["names"]}

    async def _kill(self, _: Json, __: RequestContext) -> Json:
        os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(600)
        return {}

    async def _exit(self, body: Json, _: RequestContext) -> Json:
        print("Traceback (most recent call last):\nValueError: out of luck", file=sys.stderr, flush=True)
        os._exit(body["code"])

    async def _stall(self, _: Json, __: RequestContext) -> Json:
        """The engine stands still, its event loop does not."""
        self.stalled_since = time.monotonic()
        await asyncio.sleep(600)
        return {}

    async def _hang(self, _: Json, __: RequestContext) -> Json:
        """Not even the event loop goes on."""
        time.sleep(600)  # noqa: ASYNC251  the point of it
        return {}

    async def _garbage(self, body: Json, _: RequestContext) -> Json:
        os.write(int(sys.argv[1]), bytes.fromhex(body["hex"]))
        await asyncio.sleep(600)
        return {}

    async def _flood(self, body: Json, _: RequestContext) -> Json:
        line = "x" * 99 + "\n"

        def flood() -> None:
            for _ in range(body["lines"] // 1000):
                os.write(2, (line * 1000).encode())

        await asyncio.to_thread(flood)
        return {"lines": body["lines"]}

    async def _fail(self, body: Json, _: RequestContext) -> Json:
        if body["kind"] == "Teapot":
            raise Teapot("short and stout", param="spout", code="tea")
        kind: type[ServingError] = getattr(errors, body["kind"])
        raise kind("said so", param="p", code="c", retry_after_s=body.get("retry_after_s"))

    async def _unsendable(self, _: Json, __: RequestContext) -> Json:
        return {"number": 2**70}

    async def _large(self, body: Json, _: RequestContext) -> Stream:
        async def chunks() -> Stream:
            for number in range(body["count"]):
                self.seen.append(str(number))
                yield b"%08d" % number + bytes(body["size"])

        return chunks()

    async def _usage(self, _: Json, context: RequestContext) -> Json:
        usage = context.usage
        usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens = 3, 2, 1
        usage.queue_s, usage.prefill_s = 0.5, 0.25
        context.ignored.append("bogus")
        return {"priority": context.priority, "timeout_s": context.timeout_s}

    async def _blocks(self, body: Json, _: RequestContext) -> Json:
        block = bytearray(body["bytes"])
        return {"bytes": len(block)}

    async def _spawn(self, _: Json, __: RequestContext) -> Json:
        return {"pid": subprocess.Popen(["sleep", "600"]).pid}  # noqa: ASYNC220

    async def _paths(self, _: Json, __: RequestContext) -> Json:
        return {"paths": self.paths, "seen": self.seen}

    async def _say(self, body: Json, _: RequestContext) -> Json:
        """Print ``hex``, and log ``text`` at ``level``."""
        os.write(2, bytes.fromhex(body.get("hex", "")))
        if "text" in body:
            logging.getLogger("aim.odd").log(body["level"], body["text"])
        return {}

    async def _linger(self, body: Json, context: RequestContext) -> Json | Stream:
        """An engine that takes a while to let go of what is aborted, and says when it has."""

        async def chunks() -> Stream:
            try:
                while True:
                    yield b"{}"
                    await asyncio.sleep(0.01)
            finally:
                await asyncio.sleep(body["linger_s"])
                self.aborted.append(context.request_id)

        if body.get("stream"):
            return chunks()
        async for _ in chunks():
            pass
        return {}

    async def _hush(self, _: Json, __: RequestContext) -> Json:
        self.dead = True
        return {}


def create(spec: EngineSpec, settings: OddSettings) -> Engine:
    return OddEngine(
        spec.served_model_name,
        load_s=settings.load_s,
        load_error=settings.load_error,
        token_s=settings.token_s,
        slots=spec.max_concurrency or 8,
        odd=settings,
    )


KIND = EngineKind(OddSettings, create)

if __name__ == "__main__":
    registry.BUILT_IN["odd"] = "odd_child:KIND"
    main()
