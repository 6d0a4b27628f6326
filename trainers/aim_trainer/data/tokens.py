"""Tokenised rows on disk: written once, mapped into memory by every worker.

A directory: `tokens.bin` (int32), `trained.bin` (uint8: 1 where the loss counts), `ends.bin` (int64: each row's end),
`labels.bin` (int32, a classification's alone) and `about.json`, written last: without it the directory is not whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aim_trainer.files import write_whole

Ints = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]


class Row(NamedTuple):
    """tokens: (n,); trained: (n,), 1 where the loss counts; label: a classification's class."""

    tokens: Ints
    trained: Mask
    label: int | None = None


class Tokens:
    """The rows of a directory, in the order they were written. `about`: what the writer said of them."""

    def __init__(self, directory: Path) -> None:
        self.about: dict[str, Any] = json.loads((directory / "about.json").read_bytes())
        self.ends: npt.NDArray[np.int64] = _mapped(directory / "ends.bin", np.int64)
        self._tokens = _mapped(directory / "tokens.bin", np.int32)
        self._trained = _mapped(directory / "trained.bin", np.uint8)
        labels = directory / "labels.bin"
        self._labels = _mapped(labels, np.int32) if labels.exists() else None

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Row:
        first, end = (int(self.ends[index - 1]) if index else 0), int(self.ends[index])
        label = None if self._labels is None else int(self._labels[index])
        return Row(self._tokens[first:end], self._trained[first:end], label)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row: (rows,)."""
        return np.diff(self.ends, prepend=0)

    def trained_tokens(self) -> int:
        """Of all rows together."""
        return int(np.count_nonzero(self._trained))


def write_tokens(directory: Path, rows: Iterable[Row], about: dict[str, Any]) -> None:
    """Writes the rows one by one; a directory that was begun and not ended is begun again."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "about.json").unlink(missing_ok=True)
    (directory / "labels.bin").unlink(missing_ok=True)
    ends: list[int] = []
    labels: list[int] = []
    end = 0
    with (directory / "tokens.bin").open("wb") as tokens, (directory / "trained.bin").open("wb") as trained:
        for row in rows:
            tokens.write(np.ascontiguousarray(row.tokens, np.int32).data)
            trained.write(np.ascontiguousarray(row.trained, np.uint8).data)
            end += len(row.tokens)
            ends.append(end)
            if row.label is not None:
                labels.append(row.label)
    np.asarray(ends, np.int64).tofile(directory / "ends.bin")
    if labels:
        np.asarray(labels, np.int32).tofile(directory / "labels.bin")
    write_about(directory, about)


def write_about(directory: Path, about: dict[str, Any]) -> None:
    """What makes the directory whole, or what more is known of it since."""
    write_whole(directory / "about.json", json.dumps(about, indent=2, sort_keys=True).encode())


def newest(folder: Path) -> Path | None:
    """The whole directory below `folder` that was written last; None: there is none."""
    whole = sorted(folder.glob("*/about.json"), key=lambda about: about.stat().st_mtime)
    return whole[-1].parent if whole else None


def _mapped(file: Path, kind: Any) -> npt.NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(file, kind, mode="r") if file.stat().st_size else np.empty(0, kind)
