"""Which country an address is in, by a MaxMind database (GeoLite2, GeoIP2, DB-IP: Country or City)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import maxminddb

from aim_kserve.client_address import address_of
from aim_kserve.identity.files import signature

logger = logging.getLogger("aim.server")

#: Such databases come anew once a week or so.
RECHECK_S = 60.0


class GeoDatabase:
    """A database file, read anew when it changes. While it cannot be read, the last good one serves.

    Raises:
        ValueError: it is none to begin with.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._looked_s = clock()
        self._seen = signature(file)
        self._reader = _opened(file)

    def country(self, client: str | None) -> str | None:
        """The ISO 3166-1 code of the country where an address is; None where that is not known."""
        address = address_of(client) if client is not None else None
        if address is None:
            return None
        if self._clock() - self._looked_s >= RECHECK_S:
            self._looked_s = self._clock()
            self._look()
        try:
            found = self._reader.get(address)
        except (ValueError, maxminddb.InvalidDatabaseError):  # IPv6 in a database of IPv4 alone; a broken record
            return None
        return _code(found, "country") or _code(found, "registered_country")

    def close(self) -> None:
        self._reader.close()

    def _look(self) -> None:
        """Reading tens of megabytes is nothing for the event loop: the database at hand serves until it is done."""
        seen = signature(self._file)
        if seen != self._seen:
            self._seen = seen
            Thread(target=self._reopen, name="geo", daemon=True).start()

    def _reopen(self) -> None:
        try:
            self._reader = _opened(self._file)
        except ValueError as error:
            logger.warning("--geo_database %s: %s; the last good one serves", self._file, error)
        else:
            logger.info("--geo_database %s: read anew", self._file)


def _opened(file: Path) -> Any:
    try:
        if file.exists() and not file.is_file():  # whoever opens a pipe waits for a writer
            raise ValueError("no regular file")
        # In memory: of a mapped file that is written over, the next look-up would end the process (SIGBUS).
        return maxminddb.open_database(file, maxminddb.MODE_MEMORY)
    except Exception as error:  # the edge of third-party engines: a broken file makes this one raise what it likes
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot be read ({reason}): give a MaxMind database of countries (.mmdb)") from error


def _code(record: Any, key: str) -> str | None:
    country = record.get(key) if isinstance(record, dict) else None
    code = country.get("iso_code") if isinstance(country, dict) else None
    return code if isinstance(code, str) else None
