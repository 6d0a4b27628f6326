"""A TrainJob's status, posted to Kubeflow Trainer's controller from inside the job (its KEP-2779)."""

from __future__ import annotations

import logging
import ssl
import threading
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

from .records import Record
from .trainer_status import TrainerStatus

_LOG = logging.getLogger(__name__)
#: What the controller puts into the containers of a TrainJob.
URL, CA_CERT, TOKEN = (f"KUBEFLOW_TRAINER_STATUS_{name}" for name in ("URL", "CA_CERT", "TOKEN"))
INTERVAL_S, _TIMEOUT_S = 5.0, 10.0


class Kubeflow:
    """Posts the newest status every few seconds on a thread of its own: a controller that is slow or away costs no step
    a moment.

    Raises OSError: the certificate cannot be read.
    """

    def __init__(self, environment: Mapping[str, str], interval_s: float = INTERVAL_S) -> None:
        self._url, self._token, self._interval_s = environment[URL], environment.get(TOKEN), interval_s
        ca_cert = environment.get(CA_CERT)
        self._tls = ssl.create_default_context(cafile=ca_cert) if self._url.startswith("https://") else None
        self._status, self._lock = TrainerStatus(), threading.Lock()
        self._told, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._post_all, name="kubeflow-status", daemon=True)
        self._thread.start()

    def tell(self, record: Record) -> None:
        """Only remembers."""
        with self._lock:
            self._status.add(record)
        self._told.set()

    def close(self) -> None:
        """Posts the last status, if the controller takes it in time."""
        self._closing.set()
        self._told.set()
        self._thread.join(_TIMEOUT_S)

    def _post_all(self) -> None:
        failed = False
        while True:
            self._told.wait()
            self._told.clear()
            ends = self._closing.is_set()
            try:
                self._post()
            except (OSError, ValueError, HTTPException) as problem:
                if not failed:
                    _LOG.warning("Kubeflow's controller takes no status, and training goes on without: %s", problem)
                failed = True
            if ends or (self._closing.wait(self._interval_s) and not self._told.is_set()):
                return

    def _post(self) -> None:
        with self._lock:
            body = self._status.body()
        post(self._url, body, self._token, self._tls)


def post(url: str, body: bytes, token: str | None, tls: ssl.SSLContext | None) -> None:
    """JSON to a controller. token: the file of a bearer token. Raises OSError, HTTPException."""
    headers = {"content-type": "application/json"}
    if token:
        # Read each time: the kubelet renews it.
        headers["authorization"] = f"Bearer {Path(token).read_text(encoding='utf-8').strip()}"
    request = urllib.request.Request(url, body, headers)
    urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=tls).close()
