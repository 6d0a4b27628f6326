"""What vLLM's processes are to each other, with processes that vLLM is not needed for."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from aim_runtime.engines.vllm import orphans

#: A parent that starts a process, which starts another, and says who they are.
FAMILY = """
import subprocess, sys, time
from aim_runtime.engines.vllm import orphans
watch = orphans.end_with_this_process()
CHILD = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, start_new_session=True)
print(watch.pid, child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(600)
"""


@dataclass
class Family:
    parent: subprocess.Popen[str]
    watch: psutil.Process
    child: psutil.Process
    grandchild: psutil.Process

    def end_parent(self) -> None:
        """The others are known half a second after they have begun."""
        time.sleep(1.5)
        self.parent.kill()
        self.parent.wait()


@pytest.fixture
def family() -> Iterator[Family]:
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        yield Family(parent, *(psutil.Process(int(word)) for word in parent.stdout.readline().split()))
        parent.kill()


def test_a_killed_parent_takes_all_along(family: Family) -> None:
    others = [family.watch, family.child, family.grandchild]
    assert set(orphans.descendants(family.parent.pid)) == {process.pid for process in others}
    family.end_parent()
    assert psutil.wait_procs(others, 10)[1] == []


def test_a_process_that_lost_its_own_parent_goes_too(family: Family) -> None:
    time.sleep(1.5)
    family.child.kill()
    assert family.grandchild.is_running()
    family.end_parent()
    assert psutil.wait_procs([family.watch, family.grandchild], 10)[1] == []


def test_a_watch_over_nobody_ends_at_once() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    watch = subprocess.run([sys.executable, orphans.__file__, str(ended.pid)], timeout=30, check=False)
    assert watch.returncode == 0
