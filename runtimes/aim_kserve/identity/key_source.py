"""The keys that count now: the file's, followed while we serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aim_kserve.errors import StartupError, Unauthorized
from aim_kserve.identity.caller import Caller, Verified
from aim_kserve.identity.files import signature
from aim_kserve.identity.keys import ApiKey, KeyFile, check_usable, id_of, is_world_readable, read

logger = logging.getLogger("aim.identity")


@dataclass(frozen=True, slots=True)
class _Held:
    """A key, with what each request asks of it at hand. Times in seconds since the epoch."""

    key: ApiKey
    caller: Caller
    begins: float
    ends: float


class KeySource:
    """Args: ``changed``: told the ids of the file after it has been read, by the thread that read it.

    Raises:
        StartupError: the file cannot be read or is wrong, or no key of it is valid any more.
    """

    def __init__(self, path: Path, changed: Callable[[frozenset[str]], None] = lambda _: None) -> None:
        self.is_ok = True
        self._path, self._changed = path, changed
        self._seen = signature(path)
        keys = read(path)
        check_usable(path, keys)
        self._warn_of_readers()
        self._take(keys)

    def verified(self, text: str) -> Verified:
        """Who holds the key ``text``.

        Raises:
            Unauthorized: nobody, or its time has not come or is over.
        """
        held = self._held.get(id_of(text) or "")
        if held is None or not held.key.is_for(text):
            raise Unauthorized(
                "the API key is not known here: it was never made, or has been revoked", code="invalid_api_key"
            )
        now, name = time.time(), held.key.id
        if now >= held.ends:
            ended = f"{held.key.expires:%Y-%m-%dT%H:%M:%SZ}"
            raise Unauthorized(
                f"the API key {name!r} expired on {ended}: ask for another", code="expired_api_key", credential_id=name
            )
        if now < held.begins:
            begins = f"{held.key.not_before:%Y-%m-%dT%H:%M:%SZ}"
            raise Unauthorized(
                f"the API key {name!r} is valid from {begins} only", code="early_api_key", credential_id=name
            )
        return Verified(held.caller, held.ends)

    def look(self) -> None:
        """Read the file if it has changed. A wrong one leaves the keys as they are, and is told once."""
        now = signature(self._path)
        if now == self._seen:
            return
        self._seen = now
        try:
            keys = read(self._path)
        except StartupError as error:
            self.is_ok = False
            logger.error("--api_keys %s; the keys read before stay valid", error)
            return
        self._warn_of_readers()
        self._take(keys)
        self.is_ok = True
        logger.info("--api_keys %s: read again, %d keys", self._path, len(keys.keys))

    def _take(self, keys: KeyFile) -> None:
        self._held = {key.id: _held(key) for key in keys.keys}
        self._changed(frozenset(self._held))

    def _warn_of_readers(self) -> None:
        if is_world_readable(self._path):
            logger.warning("--api_keys %s: everybody on this machine may read it: chmod o= it", self._path)


def _held(key: ApiKey) -> _Held:
    begins = key.not_before.timestamp() if key.not_before is not None else float("-inf")
    ends = key.expires.timestamp() if key.expires is not None else float("inf")
    return _Held(key, key.caller(), begins, ends)
