"""Writes a run's page."""

from __future__ import annotations

from pathlib import Path

from aim_trainer.files import write_whole
from aim_trainer.run_directory import RunDirectory

from .page import page
from .read import read_run


def write_report(run: RunDirectory) -> Path:
    """Makes `report.html` of what the run directory holds, at any time of the run; returns its path. The page is whole
    or the old one. Raises OSError: it cannot be read or written.
    """
    write_whole(run.report, page(read_run(run)).encode(errors="replace"))
    return run.report
