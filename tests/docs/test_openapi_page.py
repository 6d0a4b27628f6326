"""docs/openapi/ is what the servers say of themselves. ``WRITE_PAGES=1`` writes it anew; then `make docs-pages`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aim_guardrail.filter_api import document
from aim_runtime.openai_api import ENDPOINTS
from served import Served

FOLDER = Path(__file__).parents[2] / "docs/openapi"


@pytest.fixture(scope="module")
def runtime() -> Iterator[dict[str, Any]]:
    """Of the real server over an engine that has every operation."""
    with Served.fake("--runtime_adapters", "true", also=sorted(ENDPOINTS)) as server:
        yield httpx.get(f"{server.url}/openapi.json").json()


def check(name: str, said: dict[str, Any]) -> None:
    file = FOLDER / name
    text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("WRITE_PAGES"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == text, "WRITE_PAGES=1 pytest tests/docs/test_openapi_page.py"


def test_the_runtimes(runtime: dict[str, Any]) -> None:
    check("runtime.json", runtime)


def test_the_guardrails() -> None:
    check("guardrail.json", document())


def test_every_reference_leads_somewhere(runtime: dict[str, Any]) -> None:
    for said in (runtime, document()):
        known = {f"#/components/{kind}/{name}" for kind, parts in said["components"].items() for name in parts}
        text = json.dumps(said)
        asked = {part.partition('"')[0] for part in text.split('"$ref": "')[1:]}
        assert asked
        assert asked <= known


def test_both_protocols_are_there(runtime: dict[str, Any]) -> None:
    paths = runtime["paths"]
    assert {f"/v1/{name}" for name in ENDPOINTS} <= paths.keys()
    assert {
        "/v2/models/{model_name}/infer",
        "/v1/models/{model_name}:predict",
        "/metrics",
        "/readyz",
        "/tokenize",
    } <= paths.keys()
