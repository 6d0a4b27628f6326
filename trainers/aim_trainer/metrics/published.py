"""What a run published, posted to the operator that carries the job out: {"uri": …, "digest": …, "profile": "…"}.

As `kubeflow` tells how far it is, with the same certificate and token; but this is told once, and waited for.
"""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path

from .kubeflow import CA_CERT, TOKEN, post
from .records import Note, Record

#: What the operator puts into the containers of a job.
URL = "AIM_TRAINER_PUBLISHED_URL"
#: An operator that starts anew is away for less.
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class Published:
    """Raises OSError: the certificate cannot be read."""

    def __init__(self, environment: Mapping[str, str], sleep: Callable[[float], None] = time.sleep) -> None:
        self._url, self._token, self._sleep = environment[URL], environment.get(TOKEN), sleep
        ca_cert = environment.get(CA_CERT)
        self._tls = ssl.create_default_context(cafile=ca_cert) if self._url.startswith("https://") else None

    def tell(self, record: Record) -> None:
        """Of all records, what was published. Raises OSError: the operator does not take it, or is away for long."""
        if not isinstance(record, Note) or "uri" not in record.fields:
            return
        profile = record.fields.get("profile")
        text = Path(str(profile)).read_text(encoding="utf-8") if profile else None
        told = {"uri": record.fields["uri"], "digest": record.fields.get("digest"), "profile": text}
        body = json.dumps({key: value for key, value in told.items() if value is not None}).encode()
        for pause_s in _PAUSES_S:
            try:
                self._post(body)
                return
            except urllib.error.HTTPError as refused:
                if refused.code < 500:
                    raise
            except OSError:
                pass
            self._sleep(pause_s)
        self._post(body)

    def close(self) -> None:
        """Nothing is kept."""

    def _post(self, body: bytes) -> None:
        try:
            post(self._url, body, self._token, self._tls)
        except HTTPException as problem:
            raise OSError(f"{self._url}: {problem}") from problem
