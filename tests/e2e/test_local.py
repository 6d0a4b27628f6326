"""``make demo`` and ``make run``'s own words: what they say when something is in the way, and the demo itself."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ports import free_ports

pytestmark = pytest.mark.model
PORTS = ("http_port", "grpc_port", "runtime_http_port", "runtime_grpc_port")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def local(command: str, model_dir: Path, cwd: Path, *more: str, **ports: int) -> subprocess.CompletedProcess[str]:
    chosen = {**dict(zip(PORTS, free_ports(4), strict=True)), **ports}
    flags = [part for name, port in chosen.items() for part in (f"--{name}", str(port))]
    argv = [sys.executable, "-m", "aim_runtime.local", command, "--model_dir", str(model_dir), *flags, *more]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize("command", ["run", "demo"])
@pytest.mark.parametrize("which", PORTS)
def test_a_taken_port_is_named(command: str, which: str, taken: int, embedded_model: Path, tmp_path: Path) -> None:
    done = local(command, embedded_model.parent, tmp_path, **{which: taken})
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: port {taken} is taken (Address already in use): stop what uses it, or choose another {which.upper()}="
    ]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    done = local("run", tmp_path / "nowhere", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: runtime ended with exit 1: error:")
    assert "nowhere" in done.stderr


def test_demo_shows_each_case(embedded_model: Path, tmp_path: Path) -> None:
    done = local("demo", embedded_model.parent, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    verdicts = [line.split()[1].rstrip(",") for line in done.stdout.splitlines() if line.startswith("   verdict")]
    assert verdicts == ["allow", "redact", "block", "block", "block", "block", "allow"]
    assert done.stdout.splitlines()[-1] == "7 questions, all verdicts as expected"


def test_ones_own_questions_are_asked_behind_a_system_prompt(embedded_model: Path, tmp_path: Path) -> None:
    asked = ["--system", "Answer in one word.", "--question", "Which colour has the sky?", "--question", "2 + 2?"]
    done = local("ask", embedded_model.parent, tmp_path, *asked)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("   prompt")] == [
        "   prompt   Which colour has the sky?",
        "   prompt   2 + 2?",
    ]
    assert sum(line.startswith("   verdict  allow, HTTP 200") for line in lines) == 2
