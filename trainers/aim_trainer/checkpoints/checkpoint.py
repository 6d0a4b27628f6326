"""What a checkpoint is, and what a place of them must do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Identity:
    """What a checkpoint belongs to. One of another job's mathematics or data is foreign and never resumed from.

    spec_digest: of the parts of the job that decide the weights (not of where results go, nor how many workers where
    globalBatchSize keeps the mathematics); data_digest: of the tokenised rows.
    """

    run: str
    spec_digest: str
    data_digest: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was committed: `uri` of its directory, `metrics` measured at that step."""

    step: int
    uri: str
    world_size: int
    metrics: dict[str, float]


class CheckpointStore(Protocol):
    """A place of checkpoints of one identity: `step-000200/` with `COMMIT.json` written last."""

    def save(self, step: int, files: Path, world_size: int, metrics: dict[str, float]) -> Checkpoint:
        """Copies every file under `files` and commits. Raises StoreError (place away after retries, disk full); then
        what was committed before is as it was.
        """
        ...

    def newest_valid(self) -> Checkpoint | None:
        """The newest whose files are all there with their digests; others are named in the log and passed over."""
        ...

    def fetch(self, checkpoint: Checkpoint, into: Path) -> Path:
        """Its files as a local directory (its own, where the place is local). Raises StoreError."""
        ...

    def prune(self) -> None:
        """Removes all but the last and best ones the job keeps."""
        ...
