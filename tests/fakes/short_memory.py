"""A process whose memory runs out for real."""

from __future__ import annotations

import resource
from pathlib import Path

from aim_trainer.recipe import batch_size
from aim_trainer.recipe.model import load
from tiny_runs import tiny_job

_ROOM_BYTES = 64 * 2**20


def try_batches(model: Path) -> None:
    """Few rows fit, far too many do not, and few fit again."""
    job = tiny_job(model, batchSize="auto")
    loaded = load(job)
    small = batch_size._full(job, 2, 60)
    assert batch_size.fits(loaded, small)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM_BYTES, resource.RLIM_INFINITY))
    assert not batch_size.fits(loaded, batch_size._full(job, 2000, 60))
    assert batch_size.fits(loaded, small)
