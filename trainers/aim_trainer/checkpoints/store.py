"""Checkpoints in any place: `step-000200/`, whole once its COMMIT.json is there.

URI/
  support-bot-3f1c09d2ab41/    one job's mathematics on its data: change either, and the next run has its own
    step-000200/
      COMMIT.json              written last: which files, how long, their SHA-256
      9f8e…/                   the files, in a folder of this attempt
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import uuid
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, astuple
from pathlib import Path

from aim_trainer.errors import StoreError
from aim_trainer.job.job import Checkpoints
from aim_trainer.places.open import open_place
from aim_trainer.places.patience import PATIENCE_S
from aim_trainer.places.place import Place
from aim_trainer.scratch import scratch

from .checkpoint import Checkpoint, Identity
from .commit import NAME, VERSION, Commit, Content, Unusable, content, read_commit

_STEP = re.compile(r"step-(\d{6,12})")
_log = logging.getLogger(__name__)


def open_store(uri: str, identity: Identity, keep: Checkpoints, patience_s: float = PATIENCE_S) -> PlacedCheckpoints:
    """The checkpoints of `identity` at a path, file:// or s3://; `keep` says how many stay. Raises StoreError."""
    place = open_place(uri, patience_s)
    return PlacedCheckpoints(place, f"{identity.run}-{_digest(identity)}", identity, keep)


def _digest(identity: Identity) -> str:
    return hashlib.sha256("\n".join(astuple(identity)).encode()).hexdigest()[:12]


class PlacedCheckpoints:
    """See `checkpoint.CheckpointStore`. Several may write the same step: the last to commit is the one that counts."""

    def __init__(self, place: Place, folder: str, identity: Identity, keep: Checkpoints) -> None:
        self._above, self._folder = place, folder
        self._place = place.at(folder)
        self._identity, self._keep = identity, keep
        #: What was fetched to be verified, by its folder: `fetch` gives it away.
        self._brought: dict[str, Path] = {}

    @property
    def uri(self) -> str:
        """Where they lie."""
        return self._place.uri

    def save(self, step: int, files: Path, world_size: int, metrics: dict[str, float]) -> Checkpoint:
        checkpoint, folder = self._at(step), uuid.uuid4().hex
        contents = {path.relative_to(files).as_posix(): content(path) for path in _below(files)}
        before = self._committed(step)
        try:
            for name in contents:
                checkpoint.write(f"{folder}/{name}", files / name)
            commit = Commit(
                version=VERSION, step=step, world_size=world_size, identity=asdict(self._identity),
                metrics=metrics, folder=folder, files=contents,
            )  # fmt: skip
            checkpoint.write_bytes(NAME, commit.as_bytes())
        except StoreError as error:
            _tidy(checkpoint, folder)
            raise _not_saved(checkpoint.uri, contents, error) from error
        if before:
            _tidy(checkpoint, before.folder)
        return Checkpoint(step, checkpoint.uri, world_size, metrics)

    def newest_valid(self) -> Checkpoint | None:
        for step in reversed(self._steps()):
            try:
                commit = self._commit(step)
                self._verify(step, commit)
                return Checkpoint(step, self._at(step).uri, commit.world_size, dict(commit.metrics))
            except Unusable as reason:
                _log.warning("%s: not resumed from: %s", self._at(step).uri, reason)
        self._name_others()
        return None

    def fetch(self, checkpoint: Checkpoint, into: Path) -> Path:
        try:
            commit = self._commit(checkpoint.step)
            here = self._at(checkpoint.step).path()
            if here is not None:
                return here / commit.folder
            brought = self._brought.pop(commit.folder, None)
            if brought is None:
                return self._bring(checkpoint.step, commit, into)
            return Path(shutil.move(brought, into))
        except Unusable as reason:
            raise StoreError(
                f"{checkpoint.uri}: {reason}", field=checkpoint.uri, remedy="resume: an older checkpoint is taken then"
            ) from reason

    def prune(self) -> None:
        commits = {step: commit for step in self._steps() if (commit := self._committed(step))}
        kept = set(sorted(commits)[-self._keep.keep_last :]) | self._best(commits)
        for step in commits.keys() - kept:
            self._at(step).remove(NAME)  # first: what is half removed is no checkpoint
            self._at(step).remove()
        for step in self._steps():
            if step < max(commits, default=0) and not self._at(step).exists(NAME):
                self._at(step).remove()

    def _best(self, commits: dict[int, Commit]) -> set[int]:
        best = self._keep.keep_best
        if best is None:
            return set()
        sign = 1 if best.mode == "min" else -1
        measured = [
            (sign * commit.metrics[best.metric], -step)
            for step, commit in commits.items()
            if best.metric in commit.metrics
        ]
        return {-min(measured)[1]} if measured else set()

    def _at(self, step: int) -> Place:
        return self._place.at(f"step-{step:06d}")

    def _steps(self) -> list[int]:
        found = (_STEP.fullmatch(name) for name in self._place.folders())
        return sorted(int(match.group(1)) for match in found if match)

    def _commit(self, step: int) -> Commit:
        """Raises Unusable: never committed, corrupt, of a later version, or not ours."""
        checkpoint = self._at(step)
        if not checkpoint.exists(NAME):
            raise Unusable(f"torn: it has no {NAME}, so it was never finished")
        commit = read_commit(checkpoint.read_bytes(NAME))
        commit.belongs_to(self._identity)
        if commit.step != step:
            raise Unusable(f"corrupt: {NAME} is of step {commit.step}")
        return commit

    def _committed(self, step: int) -> Commit | None:
        try:
            return self._commit(step)
        except Unusable:
            return None

    def _verify(self, step: int, commit: Commit) -> None:
        """Raises Unusable: a file that is not there, or not as it was."""
        here = self._at(step).path()
        if here is not None:
            _compare(here / commit.folder, commit)
            return
        until_gone = ExitStack()
        weakref.finalize(self, until_gone.close)
        self._brought[commit.folder] = self._bring(step, commit, until_gone.enter_context(scratch()) / "files")

    def _bring(self, step: int, commit: Commit, into: Path) -> Path:
        """The files, from elsewhere. Raises Unusable."""
        files = self._at(step).at(commit.folder)
        there = dict(files.files())
        for name, known in commit.files.items():
            if there.get(name) != known.size:
                raise Unusable(f"corrupt: {name} is {'not as long as it was' if name in there else 'missing'}")
            files.read(name, into / name)
        _compare(into, commit)
        return into

    def _name_others(self) -> None:
        others = [name for name in self._above.folders() if name.startswith(f"{self._identity.run}-")]
        if others := [name for name in others if name != self._folder]:
            _log.warning(
                "%s: %s: not resumed from: of other data, or of a job with other numbers", self._above.uri, others
            )


def _compare(directory: Path, commit: Commit) -> None:
    for name, known in commit.files.items():
        try:
            found = content(directory / name)
        except OSError as error:
            raise Unusable(f"corrupt: {name} cannot be read: {error.strerror}") from error
        if found != known:
            raise Unusable(f"corrupt: {name} is not what was written")


def _below(files: Path) -> Iterator[Path]:
    return (path for path in sorted(files.rglob("*")) if path.is_file())


def _tidy(place: Place, folder: str) -> None:
    """Removes an attempt's files. It is no loss where that fails: prune removes the checkpoint as a whole."""
    try:
        place.remove(folder)
    except StoreError as error:
        _log.warning("%s/%s stays: %s", place.uri, folder, error)


def _not_saved(uri: str, contents: dict[str, Content], error: StoreError) -> StoreError:
    size = sum(known.size for known in contents.values())
    return StoreError(
        f"{uri} was not saved ({size / 2**20:.1f} MiB): {error.problem}",
        field=error.field,
        remedy=f"{error.remedy}; then resume: what was committed before is as it was",
    )
