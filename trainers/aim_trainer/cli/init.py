"""`aim-trainer init`: a job to start from, out of a template or of another trainer's configuration."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from aim_trainer.errors import JobError


def template(name: str) -> str:
    """The commented job of that template."""
    return (files("aim_trainer.job") / "templates" / f"{name}.yaml").read_text(encoding="utf-8")


def foreign(file: Path, drop: list[str]) -> str:
    """The job that another trainer's configuration asks for; how it differs stands above it. Raises JobError."""
    from aim_trainer.job.conversion import read_foreign
    from aim_trainer.job.read import as_yaml

    job, notes = read_foreign(file, drop)
    head = [f"# Made from {' '.join(file.name.split())}.", *(f"# - {' '.join(note.split())}" for note in notes)]
    return "\n".join(head) + "\n" + as_yaml(job)


def write(text: str, out: Path | None) -> None:
    """To stdout, or to a file that must not be there. Raises JobError."""
    if out is None:
        sys.stdout.write(text)
        return
    try:
        with out.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError as problem:
        raise JobError(f"{out}: is there already", field=str(out), remedy="name another file") from problem
    except OSError as problem:
        raise JobError(f"{out}: {problem.strerror}", field=str(out), remedy="name a file in a folder") from problem
