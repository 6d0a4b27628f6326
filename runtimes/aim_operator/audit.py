"""Who changed what in the cluster: one JSON line for each action, on stdout or in a file of its own.

An audit never fails the action that it tells of: a line that cannot be written is counted, and goes to the log.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter

from .settings import SettingsError

logger = logging.getLogger("aim.operator.audit")


class Audit:
    """The trail. Call it with what was done, to what, for whom, and what came of it:

    ``audit("inject_guardrail", "InferenceService", "llm/chat", by="alice", outcome="ok")``

    outcome: `ok`, `refused` or `failed`; reason: one line; by: None: the operator itself. Safe from any thread.
    Raises SettingsError at the start where the file cannot be written.
    """

    def __init__(self, file: Path | None, registry: CollectorRegistry) -> None:
        self._lost = Counter(
            "aim_operator_audit_lost_lines", "Audit lines that could not be written", registry=registry
        )
        self._lock = threading.Lock()
        try:
            self._stream = file.open("a", encoding="utf-8") if file else sys.stdout
        except OSError as error:
            raise SettingsError(f"--audit-log {file}: cannot be written ({error.strerror})") from error

    def __call__(
        self,
        action: str,
        kind: str,
        name: str,
        *,
        outcome: str,
        by: str | None = None,
        reason: str | None = None,
        **more: Any,
    ) -> None:
        told = {"ts": time.time(), "audit": action, "kind": kind, "name": name, "outcome": outcome}
        line = json.dumps(told | {"by": by, "reason": reason} | more)
        try:
            with self._lock:
                self._stream.write(f"{line}\n")
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost.inc()
            logger.error("audit line not written (%s): %s", error, line)
