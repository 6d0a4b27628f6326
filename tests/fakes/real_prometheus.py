"""Debian's Prometheus over servers of a test or of `make e2e`, with our rules at a short interval."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import yaml

from manifest_files import MANIFESTS
from ports import free_ports

RULES = MANIFESTS / "monitoring/aim.rules"
_START_S = 60


def is_installed() -> bool:
    return shutil.which("prometheus") is not None


class Prometheus:
    """Started over these scrape configurations; files in `folder`."""

    def __init__(self, folder: Path, targets: list[dict[str, Any]]) -> None:
        (port,) = free_ports(1)
        rules = re.sub(r"interval: \d+s", "interval: 500ms", RULES.read_text())
        (folder / "aim.rules").write_text(rules)
        configuration = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str((folder / "aim.rules").resolve())],
            "scrape_configs": targets,
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
        self.log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            ["prometheus", *flags, f"--web.listen-address=127.0.0.1:{port}"], stdout=self.log, stderr=self.log
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series with a number now; NaN is none."""
        answer = self.http.get("/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", (expr, answer)
        return [each for each in answer["data"]["result"] if not math.isnan(float(each["value"][1]))]

    def wait(self, condition: Callable[[], bool], what: Callable[[], object], seconds: float = _START_S) -> None:
        """Until it is so. Raises AssertionError with what is not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if condition():
                    return
            assert self.process.poll() is None, Path(self.log.name).read_text()
            time.sleep(0.1)
        raise AssertionError(what())

    def close(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        self.log.close()


def target(job: str, address: str, labels: Mapping[str, str], **more: Any) -> dict[str, Any]:
    return {"job_name": job, "static_configs": [{"targets": [address], "labels": dict(labels)}], **more}
