"""The transformer as a process of its own, and how tests talk through it to the fake predictor."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import httpx
import orjson

from served import Served


def guardrail(predictor_host: str, *flags: str, **options: Any) -> Served:
    """``python -m aim_guardrail`` for model ``m``, with the shipped policy `values` where the flags name none."""
    if not {"--policy", "--guardrails"} & set(flags):
        flags = (*flags, "--policy", "values")
    return Served(["-m", "aim_guardrail", "--model_name", "m", "--predictor_host", predictor_host, *flags], **options)


def orders(**what: Any) -> dict[str, str]:
    """The header that tells the fake predictor what to do."""
    return {"x-fake": orjson.dumps(what).decode()}


def ask(text: str, **more: Any) -> dict[str, Any]:
    """A chat body."""
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events, ``[DONE]`` as it is."""
    blocks = [block for block in response.text.split("\n\n") if block]
    data = [line.removeprefix("data: ") for block in blocks for line in block.split("\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else orjson.loads(item) for item in data]


def said(events: list[Any], choice: int = 0, field: str = "content") -> str:
    """The text of one choice of a stream."""
    chosen = [c for event in events if event != "[DONE]" for c in event.get("choices", []) if c["index"] == choice]
    return "".join((c["delta"].get(field) if "delta" in c else c["text"]) or "" for c in chosen)


def metric(server: Served, name: str, /, headers: Mapping[str, str] | None = None, **labels: str) -> float:
    """The sum of a metric's samples that have these labels; ``headers`` where metrics are not everybody's."""
    total = 0.0
    for line in httpx.get(f"{server.url}/metrics", headers=headers).text.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name:
            found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            total += float(match[3]) if labels.items() <= found.items() else 0
    return total


def eventually(condition: Any, within_s: float = 20) -> bool:
    """Whether it comes true; how long that may take is a busy machine's."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
