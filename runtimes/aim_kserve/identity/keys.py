"""The key file: who holds a key, and what each may ask for. YAML or JSON, versioned; of a key only its hash.

A key is ``aim_<id>_<secret>``: the id finds its entry, so that one comparison tells, and scanners of sources know the
form. The secret is 256 bits from the system's generator, of which a plain SHA-256 tells nothing; a slow hash is for
secrets that people choose.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from aim_kserve.durable import write_atomically
from aim_kserve.errors import StartupError
from aim_kserve.identity.caller import Caller, QosClass, Scope
from aim_kserve.identity.files import read_bounded
from aim_kserve.identity.identifiers import RESERVED
from aim_kserve.identity.key_text import parse, shown
from aim_kserve.redacted import redacted

PREFIX = "aim_"
SECRET_BYTES = 32
#: What a Kubernetes Secret may hold, which is some 6,000 keys.
MAX_FILE_BYTES = 1024 * 1024
WORLD = 0o007


def _no_secret(value: str) -> str:
    if redacted(value) != value:
        raise ValueError("it is a key or token, which logs would tell: give a name")
    return value


def _written_out(value: object) -> object:
    """Pydantic takes a number for seconds since 1970: ``not_before: 20270131`` would be long past."""
    if isinstance(value, str) and not _TIME.match(value):
        raise ValueError("is no time")
    if not isinstance(value, str | datetime):
        raise ValueError("is no time of a day" if isinstance(value, date) else "is no time")
    return value


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("its year in UTC is not 1 to 9999") from None


_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d")
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$"), AfterValidator(_no_secret)]
Time = Annotated[AwareDatetime, BeforeValidator(_written_out), AfterValidator(_in_utc)]


class ApiKey(BaseModel):
    """One key of the file: what whoever holds it is, and from when to when.

    ``id``: names the key in logs and metrics. ``hash``: ``sha256:`` and the hexadecimal SHA-256 of the key's text.
    ``class``: the highest class of service it may ask for. ``models``: patterns of served names; left out: all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    id: str = Field(pattern=r"^[a-z0-9](?:[a-z0-9.-]{0,62}[a-z0-9])?$", max_length=64)
    hash: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    tenant: Name
    qos_class: QosClass | None = Field(None, alias="class")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    models: tuple[Name, ...] | None = Field(None, min_length=1)
    not_before: Time | None = None
    expires: Time | None = None
    note: str | None = Field(None, max_length=1000)

    @field_validator("id")
    @classmethod
    def _is_free(cls, value: str) -> str:
        if value in RESERVED:
            raise ValueError(f"{value!r} means something else in metrics: choose another")
        return value

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> ApiKey:
        if self.not_before is not None and self.expires is not None and self.not_before >= self.expires:
            raise ValueError("expires is not after not_before: the key would never be valid")
        return self

    def has_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires

    def is_for(self, text: str) -> bool:
        """Whether ``text`` is this key. Takes as long whatever it is."""
        return hmac.compare_digest(digest(text), self.hash)

    def caller(self) -> Caller:
        """Who holds it."""
        return Caller(self.id, self.tenant, frozenset(self.scopes), self.qos_class, self.models)


class KeyFile(BaseModel):
    """All of a file's keys, each id once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()

    @field_validator("keys")
    @classmethod
    def _have_one_id_each(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        seen: set[str] = set()
        for key in keys:
            if key.id in seen:
                raise ValueError(f"id {key.id!r} is there twice: each key has its own")
            seen.add(key.id)
        return keys


class _Written(KeyFile):
    """As it must be in a file: nothing is guessed there."""

    version: Literal[1]
    keys: tuple[ApiKey, ...]


def digest(text: str) -> str:
    """What the file keeps of a key."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def new_key(
    key_id: str,
    *,
    tenant: str,
    scopes: Sequence[Scope] = ("infer",),
    qos_class: QosClass | None = None,
    models: Sequence[str] | None = None,
    not_before: datetime | None = None,
    expires: datetime | None = None,
    note: str | None = None,
) -> tuple[str, ApiKey]:
    """A key's text, which is to be shown once and kept nowhere, and its entry for the file.

    Raises:
        StartupError: a value no key may have; one line a field: name, what is wrong, value.
    """
    text = f"{PREFIX}{key_id}_{secrets.token_hex(SECRET_BYTES)}"
    fields = {
        "id": key_id,
        "hash": digest(text),
        "tenant": tenant,
        "class": qos_class,
        "scopes": tuple(scopes),
        "models": None if models is None else tuple(models),
        "not_before": not_before,
        "expires": expires,
        "note": note,
    }
    try:
        return text, ApiKey.model_validate(fields)
    except ValidationError as error:
        raise StartupError("\n".join(_told(item) for item in error.errors(include_url=False))) from None


def id_of(text: str) -> str | None:
    """The id in a key's text; None where it has not the form of a key."""
    key_id, found, secret = text.removeprefix(PREFIX).partition("_")
    return key_id if text.startswith(PREFIX) and found and secret else None


def read(path: Path) -> KeyFile:
    """The keys of a file.

    Raises:
        StartupError: it cannot be read, or is no key file: file, line, which key, field, value, remedy.
    """
    try:
        return parse(read_bounded(path, MAX_FILE_BYTES).decode(), str(path), _Written, _told)
    except OSError as error:
        raise StartupError(f"{path}: cannot be read ({error.strerror}): give a readable key file") from error
    except UnicodeDecodeError as error:
        raise StartupError(f"{path}: not UTF-8 at byte {error.start}: give a YAML or JSON file") from None
    except ValueError as error:
        raise StartupError(f"{path}: {error}: remove keys that are not used") from None


def write(path: Path, keys: KeyFile) -> None:
    """Put ``keys`` in the file's place: whole or not at all, readable by its owner only. A link is followed, so that
    it stays one. Hold :func:`locked` from reading to writing.

    Raises:
        StartupError: it cannot be written.
    """
    try:
        text = _text(keys, is_json=path.suffix == ".json")
        write_atomically(path.resolve(), text.encode(), mode=0o600)
    except OSError as error:
        raise StartupError(f"{path}: cannot be written ({error.strerror}): give a path in a writable folder") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """``with``: nobody else changes the file through this module. The lock is a file beside it, ``.NAME.lock``.

    Raises:
        StartupError: another process holds the lock, or it cannot be made.
    """
    target = path.resolve()
    lock = target.with_name(f".{target.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"{path}: cannot be locked ({error.strerror}): give a path in a writable folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StartupError(f"{path}: another process is changing it ({lock}): try again when it is done") from error
    try:
        yield
    finally:
        os.close(descriptor)


def add(path: Path, entry: ApiKey) -> None:
    """Append a key; makes the file where there is none.

    Raises:
        StartupError: the id is taken, the file is wrong or locked, or cannot be written.
    """
    with locked(path):
        held = read(path) if path.exists() else KeyFile()
        if any(key.id == entry.id for key in held.keys):
            raise StartupError(f"{path}: id {entry.id!r} is taken: choose another, or revoke that key first")
        write(path, KeyFile(keys=(*held.keys, entry)))


def revoke(path: Path, key_id: str) -> ApiKey:
    """Take a key out of the file; returns what it was.

    Raises:
        StartupError: there is none of that id; the file is wrong or locked, or cannot be written.
    """
    read(path)  # where there is no file, no lock is left beside it
    with locked(path):
        held = read(path)
        gone = next((key for key in held.keys if key.id == key_id), None)
        if gone is None:
            known = ", ".join(key.id for key in held.keys[:20]) or "none"
            raise StartupError(f"{path}: no key has the id {key_id!r}; there are: {known}")
        write(path, KeyFile(keys=tuple(key for key in held.keys if key is not gone)))
        return gone


def is_world_readable(path: Path) -> bool:
    """Whether anybody on the machine may read or change the file. Raises OSError."""
    return bool(path.stat().st_mode & WORLD)


def check_usable(path: Path, keys: KeyFile) -> None:
    """Raises StartupError: nobody could be let in by any key of the file."""
    now = datetime.now(UTC)
    expired = [key for key in keys.keys if key.has_expired(now)]
    if not keys.keys:
        raise StartupError(f"{path}: keys: has none, so that nobody is let in: add one (aim-runtime keys new)")
    if len(expired) == len(keys.keys):
        last = max(expired, key=lambda key: key.expires or now)
        raise StartupError(
            f"{path}: keys: every one has expired, {last.id!r} as the last on {last.expires:%Y-%m-%dT%H:%M:%SZ}: "
            "add one (aim-runtime keys new)"
        )


def _text(keys: KeyFile, *, is_json: bool) -> str:
    if is_json:
        return keys.model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n"
    return yaml.safe_dump(keys.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=False, width=1000)


_FIELDS = "id, hash, tenant, class, scopes, models, not_before, expires, note"
_REMEDIES = {
    "hash": "it is sha256: and 64 hexadecimal digits, as aim-runtime keys new writes it",
    "id": "a to z, 0 to 9, - and . and at most 64 of them",
    "not_before": "write a time with its zone, as 2027-01-31T00:00:00Z",
    "expires": "write a time with its zone, as 2027-01-31T00:00:00Z",
    "version": "this is a key file of another version: version: 1 is known",
}


def _told(item: object) -> str:
    """What is wrong with a field, its value and the remedy. Never the value where it may be a secret in the wrong
    place."""
    assert isinstance(item, dict)
    loc, message = item["loc"], str(item["msg"]).removeprefix("Value error, ")
    within = loc[2:] if loc[0] == "keys" and len(loc) > 1 else loc
    name = next((part for part in reversed(within) if isinstance(part, str)), "")
    if item["type"] == "extra_forbidden":
        known = "version, keys" if len(loc) == 1 else _FIELDS
        return f"{redacted(name)}: unknown field; known: {known}"
    if item["type"] == "missing":
        return f"{name}: missing: add it"
    remedy = f": {_REMEDIES[name]}" if name in _REMEDIES else ""
    is_told = name not in ("hash", "keys", "") and not isinstance(item["input"], dict)
    got = f" (got {shown(item['input'], 80)})" if is_told else ""
    return f"{name}: {message}{got}{remedy}".removeprefix(": ")
