"""What all tests share: the embedded model, free ports, and a run in which no skip is allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ports import free_ports

ROOT = Path(__file__).parent.parent
EMBEDDED_MODEL = ROOT / ".models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# llama.cpp and OpenMP spin when cores are shared: one thread each, or tests are flaky by a factor of fifty.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On a busy machine the time of a property test says nothing, nor does that of drawing its values.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """Path of the embedded model's GGUF file; skips where it has not been fetched."""
    path = Path(os.environ.get("AIM_EMBEDDED_MODEL", EMBEDDED_MODEL))
    if not path.is_file():
        pytest.skip(f"{path} is missing: make model")
    return path


def pytest_configure(config: pytest.Config) -> None:
    # The servers under test are processes of their own: give them the source roots this process got from pytest.
    roots = [str(ROOT / name) for name in ("runtimes", "transformers", "profiles", "trainers", "tests/fakes")]
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)
    os.environ["PYTHONSAFEPATH"] = "1"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """``NO_SKIPS=1`` (CI): a skipped test is a failed run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if os.environ.get("NO_SKIPS") and skipped and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    return free_ports(1)[0]
