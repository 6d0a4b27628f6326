"""A base model that lies elsewhere, as files here."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from aim_trainer.errors import JobError
from aim_trainer.places.open import open_file, open_place
from aim_trainer.scratch import scratch

_until_exit = ExitStack()
atexit.register(_until_exit.close)


@cache
def fetched(uri: str) -> Path:
    """The directory, or the .gguf file, at an s3:// URI. Each process fetches it once, and removes it when it ends.

    Raises StoreError, or JobError where nothing lies there.
    """
    directory = _until_exit.enter_context(scratch())
    if uri.endswith(".gguf"):
        place, name = open_file(uri)
        return place.read(name, directory / name)
    place = open_place(uri)
    if not (entries := place.files()):
        field = "spec.baseModel.modelId"
        raise JobError(f"{field}: {uri}: no files there", field=field, value=uri, remedy="give the model's directory")
    for entry in entries:
        (directory / entry.name).parent.mkdir(parents=True, exist_ok=True)
        place.read(entry.name, directory / entry.name)
    return directory
