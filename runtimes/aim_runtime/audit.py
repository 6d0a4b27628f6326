"""Who changed what is served: one JSON line for each admin action, beside the access log or in a file of its own.

An audit never fails the action that it tells of: a line that cannot be written is counted, and what it says goes to the
process's own log.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import REGISTRY, CollectorRegistry, Counter

from aim_kserve.access import log_if_any, write_all
from aim_kserve.errors import StartupError
from aim_kserve.identity import current_caller
from aim_kserve.redacted import redacted

logger = logging.getLogger("aim.audit")

_MODE = 0o640


class Audit:
    """The trail. Call it with what happened:

    ``audit("load", model="m", outcome="refused", reason="3.2 GiB short", seconds=0.01)``

    Actions: ``load``, ``unload``, ``evict``, ``migrate``, ``load_adapter``, ``unload_adapter``; outcomes: ``ok``,
    ``refused``, ``failed``. The line also says who asked, where it was a request: its id and trace (as in the access
    log), the caller's address, and its credential's id and tenant where identity is on; null where the process itself
    did (a model of the start, a placement).

    Args:
        write: takes each line whole; raises OSError or ValueError where it cannot.
        registry: for the count of lost lines.
    """

    def __init__(self, write: Callable[[bytes], None], registry: CollectorRegistry = REGISTRY) -> None:
        self._write = write
        self._lost = Counter("aim_audit_lost_lines", "Audit lines that could not be written", registry=registry)

    @classmethod
    def to(cls, file: Path | None, registry: CollectorRegistry = REGISTRY) -> Audit:
        """A trail in ``file``; None: on stdout, beside the access log's lines.

        Raises:
            StartupError: ``file`` cannot be written.
        """
        if file is None:
            return cls(write_all, registry)
        try:
            _append(file, b"")
        except OSError as error:
            raise StartupError(
                f"--audit_log {file}: cannot be written ({error.strerror}): give a file in a directory that can be"
            ) from error
        return cls(lambda line: _append(file, line), registry)

    def __call__(self, action: str, **fields: Any) -> None:
        log, caller = log_if_any(), current_caller()
        entry = {
            "ts": time.time(),
            "audit": action,
            "model": None,
            "outcome": None,
            "reason": None,
            "seconds": None,
            "client": log and log.client,
            "credential": caller and caller.credential_id,
            "tenant": caller and caller.tenant,
            "request_id": log and log.request_id,
            "trace_id": log and log.trace_id,
            **fields,
        }
        try:
            line = orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS, default=str)
            self._write(redacted(line.decode()).encode())
        except (OSError, ValueError, TypeError) as error:  # full, closed; a field that JSON has no form for
            self._lost.inc()
            logger.warning("an audit line is lost (%s): %s", error, entry)


def _append(file: Path, line: bytes) -> None:
    """One write at the end, to whatever has that name now: the file may have been rotated. A pipe that nobody reads
    is an error and no wait."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, _MODE)
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)
