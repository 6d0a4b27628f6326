"""aim-runtime in a process of its own, asked one chat: for tests whose own environment has no engine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ports import free_ports

ROOT = Path(__file__).parents[2]
SERVING = ROOT / ".venv/bin/python"


def chat(flags: Sequence[str], cwd: Path, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The answer of `aim-runtime FLAGS`, started in `cwd` and ended again. Raises RuntimeError with what it printed."""
    http, grpc = free_ports(2)
    ports = ["--host", "127.0.0.1", "--http_port", str(http), "--grpc_port", str(grpc)]
    log = cwd.parent / "aim-runtime.log"
    with log.open("wb") as written:
        started = subprocess.Popen(
            [str(SERVING), "-m", "aim_runtime", *flags, *ports],
            cwd=cwd,
            stdout=written,
            stderr=written,
            env=_environment(),
        )
    try:
        _wait(started, f"http://127.0.0.1:{http}/v2/health/ready", log, timeout_s)
        return _asked(f"http://127.0.0.1:{http}/v1/chat/completions", body)
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(30)
        started.kill()
        started.wait()


def _environment() -> dict[str, str]:
    """Absolute: it is started elsewhere."""
    roots = [str(ROOT / name) for name in ("runtimes", "profiles")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "PYTHONSAFEPATH": "1"}


def _wait(started: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if started.poll() is not None:
            break
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=5),
        ):
            return
        time.sleep(0.2)
    raise RuntimeError(f"not ready, {started.poll()}: {log.read_text()[-4000:]}")


def _asked(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
