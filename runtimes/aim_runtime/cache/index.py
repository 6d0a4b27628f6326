"""What a volume holds: one small JSON file per entry, content below a name of its own, a link where servers look.

::

    CACHE/org/model -> .aim-cache/content/KEY     what --model_id finds: complete, or not there
    CACHE/.aim-cache/entries/KEY.json             revision, source, digests, sizes, state
                    /content/KEY/                 files that were verified, all of them
                    /leases/KEY                   locked by whoever serves it; its time is the last use
                    /partial/NAME/{files,state}   on the way; a later attempt goes on with them
                    /locks/NAME                   held by whoever fetches NAME
                    /stats.json, /trash/
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aim_kserve.durable import sync_directory
from aim_runtime.cache.durable import link_atomically, write_in_place
from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.uri import checked_name, parse_uri, safe_path

State = Literal["publishing", "complete", "damaged"]
OWN = ".aim-cache"
_VERSION = 1
_YEAR_9999_S = 253402300799


class CachedFile(BaseModel):
    """A file as it was verified. ``validator``: the source's word for this version of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: Annotated[int, Field(ge=0)]
    sha256: str
    validator: str = ""


class Entry(BaseModel):
    """One model at one revision. ``source``: without anything secret. ``listed``: a digest of what the source listed,
    by which an unchanged source is known. ``bad``: the files that the last ``verify`` found damaged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    key: str
    name: str
    source: str
    revision: str
    listed: str
    files: tuple[CachedFile, ...]
    fetched_at: Annotated[float, Field(ge=0, le=_YEAR_9999_S)]
    state: State
    pinned: bool = False
    bad: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _stays_in_the_cache(self) -> Self:
        """Whoever can write to the volume must not make ``prune`` or ``verify`` touch what is not below it."""
        try:
            checked_name(self.name)
            for file in self.files:
                safe_path(file.path, "files")
        except CacheError as error:
            raise ValueError(str(error)) from None
        if self.key.partition("@")[0] != slug(self.name) or not self.key.partition("@")[2].isalnum():
            raise ValueError(f"key: {self.key[:100]!r} is not one of {self.name}")
        if not (self.source + self.revision).isprintable():
            raise ValueError("source, revision: with control characters")
        return self

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


class Cache:
    """A volume at ``root``, which may be mounted to be read only for whoever only reads. Its calls raise OSError."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.own = self.root / OWN

    def content(self, key: str) -> Path:
        return self.own / "content" / key

    def lease(self, key: str) -> Path:
        return self.own / "leases" / key

    def partial(self, name: str) -> Path:
        return self.own / "partial" / slug(name)

    def lock(self, name: str) -> Path:
        return self.own / "locks" / slug(name)

    def link(self, name: str) -> Path:
        return self.root / name

    def entries(self) -> list[Entry]:
        """All that can be read, by name and age: one that is broken takes no other model along. Raises OSError."""
        found = [entry for path in self._files() if isinstance(entry := _read(path), Entry)]
        return sorted(found, key=lambda entry: (entry.name, entry.fetched_at))

    def entry(self, key: str) -> Entry | None:
        """As it is now; None: it is gone, or cannot be read."""
        found = _read(self.own / "entries" / f"{key}.json")
        return found if isinstance(found, Entry) else None

    def unreadable(self) -> dict[str, str]:
        """Key → what is wrong with its file and what to do; nothing removes such an entry or its content."""
        return {path.stem: found for path in self._files() if isinstance(found := _read(path), str)}

    def keys(self) -> set[str]:
        """Of all entries, those that cannot be read, too."""
        return {path.stem for path in self._files()}

    def _files(self) -> list[Path]:
        try:
            names = os.listdir(self.own / "entries")  # glob takes a directory that may not be read for an empty one
        except FileNotFoundError:
            return []
        return [self.own / "entries" / name for name in names if name.endswith(".json") and not name.startswith(".")]

    def write(self, entry: Entry) -> None:
        """Durably. Raises OSError."""
        path = self.own / "entries" / f"{entry.key}.json"
        write_in_place(path, entry.model_dump_json(indent=1).encode())

    def forget(self, key: str) -> None:
        (self.own / "entries" / f"{key}.json").unlink(missing_ok=True)

    def is_current(self, entry: Entry) -> bool:
        """Whether the entry is what its name stands for."""
        with contextlib.suppress(OSError):
            return (self.link(entry.name).parent / os.readlink(self.link(entry.name))).resolve() == (
                self.content(entry.key).resolve()
            )
        return False

    def is_whole(self, entry: Entry) -> bool:
        return entry.state == "complete" and self.content(entry.key).is_dir()

    def find(self, wanted: str) -> Entry | None:
        """The complete entry of that id, or of that source; of several revisions the one its name stands for, else the
        newest. hf:// and oci:// without a revision are what was fetched as such; a commit or digest finds, too.
        """
        if "://" not in wanted and not wanted.startswith("/"):
            found = [entry for entry in self.entries() if entry.name == wanted and self.is_current(entry)]
        else:
            uri = parse_uri(wanted)
            base = uri.text.removesuffix(f"@{uri.revision}") if uri.revision else uri.text
            found = [
                entry
                for entry in self.entries()
                if entry.source == uri.text
                or (uri.revision and entry.revision == uri.revision and _base(entry.source) == _base(base))
            ]
        whole = [entry for entry in found if self.is_whole(entry)]
        return max(whole, key=lambda entry: (self.is_current(entry), entry.fetched_at), default=None)

    def last_used(self, entry: Entry) -> float:
        """Seconds since the epoch: of the last start of a server with it, or of its fetch."""
        with contextlib.suppress(OSError):
            return max(entry.fetched_at, self.lease(entry.key).stat().st_mtime)
        return entry.fetched_at

    def touch(self, entry: Entry) -> None:
        """It is used now. Nothing happens on a volume that is mounted to be read only."""
        with contextlib.suppress(OSError):
            os.utime(self.lease(entry.key))

    def publish(self, entry: Entry, files: Path) -> None:
        """Make ``files``, all verified, the content of ``entry``: it is whole before it has its name, at every moment.

        A killed attempt is finished by :meth:`recover`, which takes what is in place of an entry that is being
        published for whole: what stood there before, damaged or left behind, goes first. Raises OSError.
        """
        place = self.content(entry.key)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            self.discard(place)
            sync_directory(place.parent)
        self.write(entry.model_copy(update={"state": "publishing"}))
        files.rename(place)
        sync_directory(place.parent)
        self._finish(entry)

    def _finish(self, entry: Entry) -> None:
        lease = self.lease(entry.key)
        lease.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(lease, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
        self.write(entry.model_copy(update={"state": "complete", "bad": ()}))
        link_atomically(self.link(entry.name), self.content(entry.key))

    def recover(self, name: str) -> None:
        """Finish what a killed process began to publish; forget what has no content. Only with the name's lock held."""
        for entry in self.entries():
            if entry.name != name:
                continue
            if not self.content(entry.key).is_dir():
                self.forget(entry.key)
            elif entry.state == "publishing":
                self._finish(entry)

    def make_current(self, entry: Entry) -> None:
        if not self.is_current(entry):
            link_atomically(self.link(entry.name), self.content(entry.key))

    def unlink(self, entry: Entry) -> None:
        """Its name stands for nothing any more, if it stood for this entry."""
        if self.is_current(entry):
            link = self.link(entry.name)
            link.unlink(missing_ok=True)
            for parent in list(link.parents)[: entry.name.count("/")]:
                with contextlib.suppress(OSError):
                    parent.rmdir()

    def discard(self, path: Path) -> None:
        """Out of sight at once, then off the disk."""
        trash = self.own / "trash"
        trash.mkdir(parents=True, exist_ok=True)
        gone = trash / uuid.uuid4().hex
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def check_free(self, name: str) -> None:
        """Raises CacheError: where the name's link is to stand, somebody else's directory does."""
        link = self.link(name)
        for parent in (*list(link.parents)[: name.count("/")], link):
            ours = parent.is_symlink() if parent == link else (parent.is_dir() and not parent.is_symlink())
            if os.path.lexists(parent) and not ours:
                raise CacheError(f"{parent}: is here already and not this cache's: move it away, or give --name")


def _read(path: Path) -> Entry | str | None:
    """None: pruned since it was listed. A text: what is wrong with it, and the remedy."""
    try:
        text = path.read_bytes()
        entry = Entry.model_validate_json(text)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        return f"{path}: cannot be read: {where}: {first['msg']}: {_remedy(text)}"
    if entry.key != path.stem:
        return f"{path}: cannot be read: key: {entry.key[:100]!r} is not the file's: {_remedy(text)}"
    return entry


def _remedy(text: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        if json.loads(text)["version"] > _VERSION:
            return "a newer version of aim-runtime wrote it: use that one, or another --cache"
    return "add the model again, or delete the file"


def _base(source: str) -> str:
    """A source without its revision."""
    scheme, _, rest = source.partition("://")
    if scheme not in ("hf", "oci"):
        return source
    rest = rest.partition("@")[0]
    host, slash, repository = rest.partition("/")
    return f"{scheme}://{host}{slash}{repository.partition(':')[0]}"


def slug(name: str) -> str:
    """An id as one file name; ids hold no ``--``."""
    return name.replace("/", "--")


def now() -> float:
    return time.time()
