"""A server process of ours: started on free ports, watched, stopped by its id."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

from ports import free_ports

FAKE_SERVER = Path(__file__).with_name("fake_server.py")
FAKE_MODELS_SERVER = Path(__file__).with_name("fake_models_server.py")


class Served:
    """``with Served([...]) as server``: runs ``python <arguments> --http_port … --grpc_port …`` on 127.0.0.1.

    Args:
        arguments: what follows ``python``.
        wait: until ``/v2/health/ready`` answers 200; raises RuntimeError with the process's stderr if it ends first.
        env: instead of ours.
        stdout: the access log goes there instead of to ``access_lines``.
        http_port, grpc_port: instead of free ones.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        wait: bool = True,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        http_port: int | None = None,
        grpc_port: int | None = None,
    ) -> None:
        free = free_ports(2)
        self.http_port, self.grpc_port = http_port or free[0], grpc_port or free[1]
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_url = f"127.0.0.1:{self.grpc_port}"
        ports = ["--host", "127.0.0.1", "--http_port", str(self.http_port), "--grpc_port", str(self.grpc_port)]
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self.process = subprocess.Popen(
            [sys.executable, *arguments, *ports], stdout=stdout or self._out, stderr=self._err, env=env
        )
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.__exit__(None, None, None)
                raise

    @classmethod
    def fake(cls, *flags: str, wait: bool = True, **options: Any) -> Self:
        """The real runtime server over the fake engine, serving model ``m``."""
        return cls(cls.fake_arguments(*flags, **options), wait=wait)

    @classmethod
    def fake_models(cls, *flags: str, wait: bool = True, **options: Any) -> Self:
        """The real runtime server over several fake engines: see ``fake_models_server.py``."""
        return cls([str(FAKE_MODELS_SERVER), orjson.dumps(options).decode(), *flags], wait=wait)

    @staticmethod
    def fake_arguments(*flags: str, **options: Any) -> list[str]:
        return [str(FAKE_SERVER), orjson.dumps(options).decode(), "--model_name", "m", *flags]

    def wait_ready(self, timeout_s: float = 60) -> None:
        self.wait_status("/v2/health/ready", 200, timeout_s)

    def wait_status(self, path: str, status: int, timeout_s: float = 60) -> httpx.Response:
        """Ask until the answer has that status."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: {self.stderr()}")
            try:
                answer = httpx.get(self.url + path)
                if answer.status_code == status:
                    return answer
            except httpx.TransportError:
                pass
            time.sleep(0.03)
        raise TimeoutError(f"{path} did not answer {status} in {timeout_s} s: {self.stderr()}")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, timeout_s: float = 30) -> int:
        return self.process.wait(timeout_s)

    def stderr(self) -> str:
        return _text(self._err)

    def access_lines(self) -> list[dict[str, Any]]:
        return [line for line in self._lines() if "audit" not in line]

    def audit_lines(self) -> list[dict[str, Any]]:
        """Of the admin actions, beside the access log."""
        return [line for line in self._lines() if "audit" in line]

    def _lines(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in _text(self._out).splitlines()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.process.poll() is None and "COVERAGE_PROCESS_CONFIG" in os.environ:
            self.terminate()  # only who ends by itself tells which lines it ran
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._out.close()
        self._err.close()


def _text(file: Any) -> str:
    """What the process has written so far. Our descriptor shares its offset: read by position."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode()
