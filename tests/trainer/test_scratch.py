"""Directories for a while: gone with their block, and with the next process where theirs was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aim_trainer.errors import ResourceError
from aim_trainer.scratch import scratch

HOLDS = """
import sys
from aim_trainer.scratch import scratch
with scratch() as directory:
    (directory / "weights").write_bytes(b"half")
    print(directory, flush=True)
    sys.stdin.read()
"""


def holder(directory: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds one, and where."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS],
        env={"TMPDIR": str(directory), "PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_taken_away_by_the_next(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "kept").touch()
    (tmp_path / "tmp/other-dir").mkdir(parents=True)
    (tmp_path / "tmp/aim-trainer-link").symlink_to(elsewhere)
    killed, left = holder(tmp_path / "tmp")
    killed.kill()
    killed.communicate()
    assert (left / "weights").exists()
    living, held = holder(tmp_path / "tmp")
    assert not left.exists()
    later, also = holder(tmp_path / "tmp")
    assert (held / "weights").exists()
    for process in (living, later):
        process.communicate()
    assert not held.exists()
    assert not also.exists()
    assert sorted(path.name for path in (tmp_path / "tmp").iterdir()) == ["aim-trainer-link", "other-dir"]
    assert (elsewhere / "kept").exists()


def test_a_place_that_takes_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with (
        pytest.raises(ResourceError, match=r"^TMPDIR: .*none: No such file or directory; make room there, or set"),
        scratch(),
    ):
        pass
