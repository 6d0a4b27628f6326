"""The pages of aim-profile: every command runs, and prints what the page shows (… stands for lines left out)."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.cli.picture import draw
from aim_profile.plans.fleet import load_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.workload import load_workloads

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "profiles.md").read_text(encoding="utf-8")


def sessions(page: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a page's console blocks with the lines under it."""
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for session in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = session.rstrip("\n").split("\n")
            yield command, lines


@pytest.mark.parametrize(("page", "commands"), [("profiles.md", 12), ("capacity.md", 2)])
def test_every_command_prints_what_the_page_says(
    page: str, commands: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (DOCS / "samples").glob("*.yaml"):
        shutil.copy(file, tmp_path)
    more = (DOCS / "samples/workloads.yaml").read_text(
        encoding="utf-8"
    ) + "  - {name: more, kind: guardrail, memory: 6GiB}\n"
    (tmp_path / "more.yaml").write_text(more, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = list(sessions((DOCS / page).read_text(encoding="utf-8")))
    assert len(found) == commands
    for command, expected in found:
        words = shlex.split(command.removesuffix("; echo $?"))
        assert words.pop(0) == "aim-profile"
        result = CliRunner().invoke(app, words)
        printed = result.stdout.splitlines()
        if command.endswith("; echo $?"):
            printed.append(str(result.exit_code))
        else:
            assert result.exit_code == 0, command
        for run in filter(None, " \n".join(expected).split("…")):
            lines = [line.rstrip() for line in run.strip("\n").split("\n") if line.strip()]
            seen = [line.rstrip() for line in printed if line.strip()]
            assert any(seen[at : at + len(lines)] == lines for at in range(len(seen))), f"$ {command}\n{run}"
    for picture in tmp_path.glob("capacity.svg"):
        assert picture.read_text(encoding="utf-8") == (DOCS / "samples" / picture.name).read_text(encoding="utf-8")


def test_every_verb_is_on_the_page() -> None:
    for command in app.registered_commands:
        assert re.search(rf"\b{command.name or command.callback.__name__}\b", PAGE)  # type: ignore[union-attr]


def test_the_picture_is_that_of_the_samples() -> None:
    samples = DOCS / "samples"
    plan = make_plan(load_fleet(samples / "fleet.yaml"), load_workloads(samples / "workloads.yaml"))
    assert (samples / "plan.svg").read_text(encoding="utf-8") == draw(plan), (
        "run `aim-profile plan fleet.yaml workloads.yaml --svg plan.svg` in docs/samples"
    )
