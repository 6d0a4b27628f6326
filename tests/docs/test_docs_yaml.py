"""YAML on the pages is what the readers of such files take: policies, jobs, prices, keys, our kinds, KServe's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aim_guardrail.policy import parse_policy
from aim_kserve.identity.keys import read as read_keys
from aim_operator.admission.annotated import check
from aim_operator.admission.service import Service
from aim_profile.exporter.prices import load_prices
from aim_runtime.models.file import load_models
from aim_runtime.qos.policy import policy_of
from aim_runtime.settings import RuntimeSettings
from aim_trainer.job.read import read_job
from crd_schemas import CRDS, violations

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(page.name, block[1], id=f"{page.name}: {block[1].strip().splitlines()[0][:40]}")
    for page in PAGES
    for block in re.findall(r"^( *)```ya?ml\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
]
JOB = (ROOT / "docs/samples/finetuning/job.yaml").read_text(encoding="utf-8")
#: What is others', or a piece of a file that says nothing alone: page → the first key of the block.
ELSEWHERE = {("classifiers.md", "options"), ("ext-proc.md", "http_filters"), ("identity.md", "scrape_configs")}
#: Its family is of no distribution that is installed here.
NOT_INSTALLED = "guardrail-families.md"


def policy(text: str, _: Path) -> None:
    head = "" if "version:" in text else "version: 2\nname: shown\n"
    rule = "" if re.search(r"^(prompt|answer):", text, re.MULTILINE) else "prompt: [{type: pii, action: log}]\n"
    parse_policy(f"{head}{text}{rule}", "docs")


def by_file(read: Callable[[Path], Any]) -> Callable[[str, Path], None]:
    def read_text(text: str, folder: Path) -> None:
        file = folder / "shown.yaml"
        file.write_text(text, encoding="utf-8")
        read(file)

    return read_text


def part_of_a_job(text: str, folder: Path) -> None:
    raw = yaml.safe_load(JOB)
    raw["spec"] |= yaml.safe_load(text)
    by_file(read_job)(yaml.safe_dump(raw), folder)


def of_a_cluster(text: str, _: Path) -> None:
    for document in yaml.safe_load_all(text):
        version = document.get("apiVersion", "")
        if (version, document.get("kind", "")) in CRDS or version.startswith("aim.amd.com/"):
            assert violations(document) == []
        if document.get("kind") == "InferenceService":
            check(Service(document), {})


def keys(text: str, folder: Path) -> None:
    by_file(read_keys)(text.replace("5e88…", "5e88" * 16), folder)


def models(file: Path) -> None:
    load_models(file, RuntimeSettings.load([], {}, prog="docs", description=""))


READERS: dict[str, Callable[[str, Path], None]] = {
    "gpu_hour:": by_file(load_prices),
    "classes:": by_file(policy_of),
    "keys:\n- id": keys,
    "models:\n- name": by_file(models),
    "kind: FineTuningJob": by_file(read_job),
    "apiVersion:": of_a_cluster,
    "validation:\n": part_of_a_job,
    "search:\n": part_of_a_job,
    "version: 2": policy,
    "prompt:\n": policy,
}


@pytest.mark.parametrize(("page", "text"), BLOCKS)
def test_its_reader_takes_it(page: str, text: str, tmp_path: Path) -> None:
    if page == NOT_INSTALLED or (page, text.partition(":")[0].strip()) in ELSEWHERE:
        yaml.safe_load(text)
        return
    (read, *_) = (reader for mark, reader in READERS.items() if re.search(f"^{mark}", text, re.MULTILINE))
    read(text, tmp_path)


@pytest.mark.parametrize("text", ["kind: FineTuningJob\nspec: {}", "version: 2\nprompt: [{type: pi, action: log}]"])
def test_what_no_reader_takes_is_found(text: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"shown\.yaml|docs"):  # each reader has its own
        test_its_reader_takes_it("any.md", text, tmp_path)


def test_there_are_blocks_of_each_kind() -> None:
    assert len(BLOCKS) >= 25
    for mark in READERS:
        assert any(re.search(f"^{mark}", block.values[1], re.MULTILINE) for block in BLOCKS), mark  # type: ignore[arg-type]
