"""The real guardrail as a filter service of its own, from the serving environment: the trainer's has none."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ports import free_ports

SERVING_PYTHON = Path(__file__).parent.parent.parent / ".venv/bin/python"
#: In answers secrets are blocked, and a word that the tiny models' rows have.
POLICY = r"""
name: strict
version: 2
prompt: []
answer:
  - {type: secrets, action: block}
  - {type: pii, action: block, options: {custom: [{label: TOWN, pattern: '\b(Paris|Lisbon|Turku|Bergen|Ghent)\b'}]}}
"""
BLOCKED_WORDS = ("Paris", "Lisbon", "Turku", "Bergen", "Ghent")


@contextmanager
def filter_service(folder: Path) -> Iterator[str]:
    """Its URL, while it runs."""
    (folder / "policy.yaml").write_text(POLICY)
    http_port, grpc_port = free_ports(2)
    command = [str(SERVING_PYTHON), "-m", "aim_guardrail", "--model_name", "m", "--policy", str(folder / "policy.yaml")]
    command += ["--host", "127.0.0.1", "--http_port", str(http_port), "--grpc_port", str(grpc_port)]
    with (folder / "log").open("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            url = f"http://127.0.0.1:{http_port}"
            _wait_ready(url, server, folder / "log")
            yield url
        finally:
            server.kill()
            server.wait()


def _wait_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
