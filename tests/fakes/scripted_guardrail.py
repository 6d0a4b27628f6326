"""The transformer whose batch detectors do what the text says, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from guarded import ask, metric, orders
from scripted_detectors import __file__ as scripted
from scripted_detectors import did
from served import Served

CHAT = "/v1/chat/completions"


@contextmanager
def serving(policy: str, folder: Path, host: str, *flags: str) -> Iterator[Guarded]:
    file = folder / "policy.yaml"
    file.write_text(f"version: 2\nname: p\n{policy}")
    ports = ["--model_name", "m", "--predictor_host", host, "--policy", str(file), *flags]
    with Served([scripted, *ports]) as server:
        yield Guarded(server)


class Guarded:
    """A transformer whose detectors do what they are told."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self._seen = 0

    def __call__(self, text: str, **told: Any) -> httpx.Response:
        return httpx.post(f"{self.server.url}{CHAT}", json=ask(text), headers=orders(**told), timeout=30)

    def did(self) -> list[str]:
        """``name what`` since it was last asked."""
        all_of_it = did(self.server.stderr())
        new, self._seen = all_of_it[self._seen :], len(all_of_it)
        return [f"{line['detector']} {line['did']}" for line in new]

    def count(self, name: str, /, **labels: str) -> float:
        return metric(self.server, f"guardrail_{name}_total", **labels)

    def grown(self, name: str, /, **labels: str) -> Callable[[], float]:
        before = self.count(name, **labels)
        return lambda: self.count(name, **labels) - before
