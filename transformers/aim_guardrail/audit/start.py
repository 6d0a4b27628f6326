"""From settings to an audit that is being written."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aim_guardrail.audit.entry import Auditor
from aim_guardrail.audit.file import AuditFile
from aim_guardrail.audit.trail import Trail
from aim_guardrail.settings import GuardrailSettings
from aim_kserve.errors import StartupError
from aim_kserve.identity.key_file import read_key


@contextmanager
def auditing(settings: GuardrailSettings) -> Iterator[list[Auditor]]:
    """``with``: the audit that these settings want, none or one, being written.

    Raises:
        StartupError: its file cannot be written; one line.
    """
    if settings.audit_file is None:
        yield []
        return
    key = None if settings.audit_key_file is None else read_key(settings.audit_key_file)
    trail = Trail(_opened(settings.audit_file, key), settings.audit_overflow, settings.audit_queue)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # logrotate's: a file that was moved away is noticed without
    try:
        plain = settings.audit_tenant == "plain"
        yield [Auditor(trail, key, plain_tenant=plain, excerpt_chars=settings.audit_excerpt)]
    finally:
        trail.close()


def _opened(file: Path, key: bytes | None) -> AuditFile:
    try:
        return AuditFile(file, key)
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise StartupError(f"--audit_file {file}: {what}: give a file that this process alone may write to") from error
