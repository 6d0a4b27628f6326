"""COMMIT.json: what makes files a checkpoint. It is written when all of them are there, and tells if they still are."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aim_trainer.errors import StoreError
from aim_trainer.places.place import checked

from .checkpoint import Identity

#: Of the layout. One that was written by a later release is passed over: what it means is not known here.
VERSION = 1
NAME = "COMMIT.json"


class Unusable(Exception):
    """Not a checkpoint to resume from; `str()` says why."""


class Content(BaseModel):
    """A file's size in bytes and SHA-256."""

    model_config = ConfigDict(frozen=True)
    size: int
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Commit(BaseModel):
    """folder: of this attempt's files, below the checkpoint's own; two writers of one step are never in the same."""

    model_config = ConfigDict(frozen=True)
    version: int
    step: int
    world_size: int
    identity: dict[str, str]
    metrics: dict[str, float]
    folder: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    files: Annotated[dict[str, Content], Field(min_length=1)]

    def belongs_to(self, identity: Identity) -> None:
        """Raises Unusable: another run's, or other data or mathematics of this one; says which."""
        ours = asdict(identity)
        other = [name for name, value in ours.items() if self.identity.get(name) != value]
        if other:
            raise Unusable(f"of another job: other {', '.join(other)}")

    def as_bytes(self) -> bytes:
        """As JSON; NaN as JSON has none is left out of the metrics."""
        written = self.model_dump()
        written["metrics"] = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        return json.dumps(written, indent=2, sort_keys=True).encode()


def read_commit(data: bytes) -> Commit:
    """Raises Unusable: not JSON, not of this shape, or of a later version."""
    try:
        found: Any = json.loads(data)
        version = found["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Unusable(f"corrupt: {NAME} cannot be read") from None
    if version != VERSION:
        raise Unusable(f"{NAME} is of version {str(version)[:20]}, this release knows {VERSION}")
    try:
        commit = Commit.model_validate(found)
        for name in commit.files:
            checked(name, NAME)
    except ValidationError as error:
        (where, *_) = error.errors()[0]["loc"]
        raise Unusable(f"corrupt: {NAME}: {where}") from None
    except StoreError as error:
        raise Unusable(f"corrupt: {error.problem}") from None
    return commit


def content(file: Path) -> Content:
    """Of a file as it is now. Raises OSError."""
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
        return Content(size=data.tell(), sha256=digest)
