"""A server as a child process: started, its last words kept, ended with all it has started."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

GRACE_S = 5.0  # from SIGTERM to SIGKILL: GPU drivers clean up badly after the latter
_GUARD = Path(__file__).with_name("guard.py")
_KILL_S = 5.0  # for the kernel to end what has been killed
_KEPT_BYTES = 16 * 1024
_LONGEST_LINE = 400
#: What a Python program ends with: ``RuntimeError: …``, perhaps behind a logger's ``[2026-01-01 12:00:00]``.
_CAUSE = re.compile(r"\b\w*(Error|Exception)\b\S*: |\berror: ", re.IGNORECASE)


class ServerProcess:
    """One command, run once. Its output goes to our standard error as it comes."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = tuple(command)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tail = b""

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", str(_GUARD), str(GRACE_S), *self.command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: we end it when our own requests have ended
        )
        self._reader = asyncio.create_task(self._pass_on(self._process.stdout))

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 128 + n after signal n."""
        return self._process.returncode if self._process is not None else None

    async def wait(self) -> int:
        """Until it has ended by itself; its output is complete then."""
        assert self._process is not None
        assert self._reader is not None
        code = await self._process.wait()
        await asyncio.wait([self._reader], timeout=1)
        return code

    def last_words(self) -> str:
        """Why it ended, as far as it said: the last line that names an error, or its last line."""
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines() if line.strip()]
        words = next(
            (line for line in reversed(lines) if _CAUSE.search(line)), lines[-1] if lines else "it said nothing"
        )
        return words[:_LONGEST_LINE]

    async def stop(self) -> None:
        """End it and everything it has started; returns when they are gone."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S + _KILL_S):
                await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            self._reader.cancel()

    async def _pass_on(self, output: asyncio.StreamReader | None) -> None:
        while output is not None and (part := await output.read(_KEPT_BYTES)):
            self._tail = (self._tail + part)[-_KEPT_BYTES:]
            sys.stderr.buffer.write(part)
            sys.stderr.buffer.flush()
