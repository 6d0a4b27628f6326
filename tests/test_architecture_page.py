"""docs/architecture.md names every room, floor and file there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
FOLDERS = {
    "aim_profile": "profiles",
    "aim_kserve": "runtimes",
    "aim_runtime": "runtimes",
    "aim_guardrail": "transformers",
    "aim_trainer": "trainers",
    "aim_operator": "runtimes",
}
#: Folders that the page names as a whole: what is in them is their own pages' to say.
WHOLE = {"aim_guardrail.detectors"}


def floors(package: str) -> list[set[str]]:
    """Top first, as import-linter holds them."""
    (layers,) = (each["layers"] for each in CONTRACTS if each.get("containers") == [package])
    return [set(re.findall(r"\w+", layer)) for layer in layers]


def names(text: str) -> set[str]:
    """What stands in backticks, without the slash of a folder or the ending of a file."""
    return {name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([\w./]+)`", text)}


def section(heading: str) -> str:
    """What stands under a heading, up to the next of its level."""
    (found,) = re.findall(rf"^### {re.escape(heading)}\n(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE)
    return found


def column(heading: str, at: int) -> list[set[str]]:
    rows = [line.split("|")[1:-1] for line in section(heading).splitlines() if line.startswith("|")][2:]
    return [found for row in rows if (found := names(row[at]))]


@pytest.mark.parametrize(
    ("package", "heading", "at"),
    [
        ("aim_runtime", "The floors of `aim_runtime`", 0),
        ("aim_kserve", "The other floors of the request path", 0),
        ("aim_guardrail", "The other floors of the request path", 1),
        ("aim_trainer", "The floors of `aim_trainer`", 0),
        ("aim_operator", "The floors of `aim_operator`", 0),
    ],
)
def test_the_floors_are_those_that_are_held(package: str, heading: str, at: int) -> None:
    held = [floor for floor in floors(package) if floor != {"__main__"}]
    assert column(heading, at) == held


def test_the_rooms_of_aim_profile_are_those_that_are_held() -> None:
    held = [floor for floor in reversed(floors("aim_profile")) if floor != {"__main__"}]
    assert column("The rooms of `aim_profile`, ground first", 0) == held


@pytest.mark.parametrize("package", FOLDERS)
def test_every_file_is_on_the_page(package: str) -> None:
    root = ROOT / FOLDERS[package] / package
    named = {name.rpartition("/")[2] for name in names(PAGE)} | {name.rpartition(".")[2] for name in names(PAGE)}
    files = [
        path
        for path in root.rglob("*.py")
        if not path.stem.startswith("__") and f"{package}.{path.relative_to(root).parts[0]}" not in WHOLE
    ]
    assert len(files) >= 10
    assert [str(path) for path in files if path.stem not in named] == []
