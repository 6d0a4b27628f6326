"""Families of installed distributions: the documented example through the real server; what cannot be used is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fake_predictor import FakePredictor
from guarded import ask, guardrail, orders

PAGE = Path(__file__).parents[2] / "docs/guardrail-families.md"


def installed(folder: Path, name: str, entry: str, module: str, code: str) -> None:
    """A distribution as pip leaves it in a folder."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[aim_guardrail.families]\n{entry}\n")
    (folder / f"{module}.py").write_text(code)


def env(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def said(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aim_guardrail", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env(folder), check=False)


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    """The page's example, its code and policy as they stand there."""
    code, policy = (
        re.search(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL) for kind in ("python", "yaml")
    )
    assert code is not None
    assert policy is not None
    installed(tmp_path, "acme", "acme = acme_words:FAMILY", "acme_words", code[1])
    (tmp_path / "acme.yaml").write_text(policy[1])
    return tmp_path


def test_the_documented_family_is_served_and_shown(acme: Path, predictor: FakePredictor):
    shown = said(acme, "catalog", "acme")
    assert (shown.returncode, "COMPETITOR" in shown.stdout, "competitors" in shown.stdout) == (0, True, True)
    with guardrail(predictor.host, "--policy", str(acme / "acme.yaml"), env=env(acme)) as server:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json=ask("who?"), headers=orders(say="Ask Globex or Initech")
        )
        assert answer.json()["choices"][0]["message"]["content"] == "Ask <COMPETITOR_1> or Initech"
        assert answer.headers["x-guardrail-families"] == "acme"


@pytest.mark.parametrize(
    ("entry", "code", "reason"),
    [
        ("acme = broken:FAMILY", "import no_such_module", "acme cannot be imported (ModuleNotFoundError: No module"),
        ("acme = broken:FAMILY", "FAMILY = 3", "acme brings broken:FAMILY, which is no aim_guardrail.detectors"),
        (
            "acme = broken:FAMILY",
            "from aim_guardrail.detectors.family import Family\nFAMILY = Family('other', 'batch', {}, print)",
            "acme calls it 'other' itself: the entry point's name must be the family's",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_where_it_is_named(entry: str, code: str, reason: str, tmp_path: Path):
    installed(tmp_path, "acme", entry, "broken", code)
    (tmp_path / "p.yaml").write_text("version: 2\nname: a\nprompt: [{type: acme, action: block}]\n")
    refused = said(tmp_path, "policy", "validate", str(tmp_path / "p.yaml"))
    assert refused.returncode == 1
    assert f"type 'acme' cannot be used: {reason}" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert said(tmp_path, "check", "hello", "--policy", "values").returncode == 0  # nobody else is disturbed


def test_ours_keep_their_names(tmp_path: Path):
    code = "from aim_guardrail.detectors.family import Family\nFAMILY = Family('pii', 'batch', {}, print)"
    installed(tmp_path, "thief", "pii = thief:FAMILY", "thief", code)
    assert said(tmp_path, "check", "bob@example.com", "--policy", "values").returncode == 1
