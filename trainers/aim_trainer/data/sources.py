"""Where rows come from: a file by its name's ending, a saved dataset, a dataset of a hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from aim_trainer.errors import StoreError
from aim_trainer.job.dataset import Source
from aim_trainer.places.open import open_file
from aim_trainer.scratch import scratch

from .csv_rows import csv_rows
from .jsonl import json_lines
from .lines import FileProblem
from .problems import RowProblem

Records = Iterator[tuple[int, dict[str, Any] | RowProblem]]
_BUFFER_BYTES = 1 << 20
#: hf://org/name[/config][@revision]
_HUB = re.compile(r"hf://(?:datasets/)?([^/@]+/[^/@]+)(?:/([^@]+))?(?:@(.+))?")


def records(source: Source) -> Records:
    """Line or row number, from 1, and the row or what is wrong with it. Raises FileProblem; StoreError where a place is
    away.
    """
    if source.uri.startswith("hf://"):
        yield from _of_hub(source)
    elif os.path.isdir(_path(source.uri)):
        yield from _of_directory(source)
    else:
        with _opened(source.uri) as file:
            yield from _of_file(source.uri, file)


def _of_file(uri: str, file: BinaryIO) -> Records:
    name = uri.split("?", 1)[0].lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return json_lines(file)
    if name.endswith((".csv", ".tsv")):
        return csv_rows(file, "\t" if name.endswith(".tsv") else ",")
    if name.endswith(".parquet"):
        from .arrow import parquet_rows

        return parquet_rows(file)
    raise FileProblem("its name ends in none of .jsonl, .ndjson, .csv, .tsv, .parquet (also with .gz)")


def _of_directory(source: Source) -> Records:
    from .arrow import dataset_rows, saved_dataset

    directory = Path(_path(source.uri))
    if not ((directory / "dataset_dict.json").exists() or (directory / "state.json").exists()):
        raise FileProblem(
            "is a directory, and none that datasets' save_to_disk wrote; name its files as dataset.sources"
        )
    return dataset_rows(saved_dataset(directory, source.split))


def _of_hub(source: Source) -> Records:
    from .arrow import dataset_rows, hub_dataset

    matched = _HUB.fullmatch(source.uri)
    if matched is None:
        raise FileProblem("hf://org/name, hf://org/name/config or hf://org/name@revision is expected")
    name, config, revision = matched.groups()
    return dataset_rows(hub_dataset(name, config, source.split, revision))


def _path(uri: str) -> str:
    """Of a local file or directory; of anything else no path that there is."""
    return unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri


@contextmanager
def _opened(uri: str) -> Iterator[BinaryIO]:
    """A local file, or a copy of one that is elsewhere, for as long as it is read. Raises FileProblem, StoreError."""
    place, name = open_file(uri)
    with scratch() as directory:
        local = place.path()
        file = local / name if local else place.read(name, directory / "source")
        try:
            if file.exists() and not file.is_file():
                raise FileProblem("is a pipe or a device: rows are read twice, so save them to a file")
            with file.open("rb", buffering=_BUFFER_BYTES) as opened:
                yield opened
        except FileNotFoundError:
            raise FileProblem("there is no such file") from None
        except PermissionError:
            raise FileProblem("may not be read: permission denied") from None
        except OSError as problem:
            raise StoreError(f"{uri}: cannot be read: {problem}", field="dataset.source", value=uri) from None
