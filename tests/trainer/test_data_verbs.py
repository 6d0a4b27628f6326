"""validate and preview, as a person calls them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny_models
from aim_trainer.cli.app import app
from aim_trainer.cli.preview import preview
from aim_trainer.job.read import read_job

Tiny = Callable[[str], Path]


def job_file(tmp_path: Path, model: Path | str, **dataset: Any) -> Path:
    spec = {"baseModel": {"modelId": str(model)}, "dataset": dataset, "hyperparameters": {"maxSeqLength": 128}}
    made = {"apiVersion": "aim.amd.com/v1alpha1", "kind": "FineTuningJob", "metadata": {"name": "bot"}, "spec": spec}
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(made))
    return file


def source(tmp_path: Path, *extra: Any) -> Path:
    file = tmp_path / "chat.jsonl"
    rows = [{"messages": turns, "id": n} for n, turns in enumerate(tiny_models.conversations(30))]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]))
    return file


def test_validate_tells_of_each_source_and_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    file = job_file(tmp_path, "org/model", source=str(source(tmp_path)))
    code = (
        "import sys\nfrom aim_trainer.cli.app import app\n"
        f"app(['validate', {str(file)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{file}: bot is valid",
        f"{tmp_path}/chat.jsonl: 30 rows, conversation; not read: id",
    ]


def test_validate_names_bad_rows_and_ends_with_2(tmp_path: Path) -> None:
    file = job_file(tmp_path, "org/model", source=str(source(tmp_path, {"messages": 3})))
    done = CliRunner().invoke(app, ["validate", str(file)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"{tmp_path}/chat.jsonl:31: messages: Input should be a valid list (got 3)")
    assert CliRunner().invoke(app, ["validate", "--no-data", str(file)]).exit_code == 0


def test_validate_reads_over_http_and_names_what_is_not_there(tmp_path: Path) -> None:
    source(tmp_path)
    served = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert served.stdout is not None
        address = served.stdout.readline().split("(")[1].split(")")[0].rstrip("/")
        done = CliRunner().invoke(app, ["validate", str(job_file(tmp_path, "m", source=f"{address}/chat.jsonl"))])
        assert done.exit_code == 0, done.stderr
        assert f"{address}/chat.jsonl: 30 rows" in done.stdout
        done = CliRunner().invoke(app, ["validate", str(job_file(tmp_path, "m", source=f"{address}/no.jsonl"))])
        assert done.exit_code == 3
        assert "no.jsonl" in done.stderr
    finally:
        served.kill()
        served.communicate()


def test_preview_marks_what_is_trained_and_gives_the_figures(tiny: Tiny, tmp_path: Path) -> None:
    file = job_file(tmp_path, tiny("llama"), source=str(source(tmp_path)))
    done = CliRunner().invoke(app, ["preview", str(file), "--samples", "2"])
    assert done.exit_code == 0, done.stderr
    samples = done.stdout.split("--- row ")[1:]
    assert len(samples) == 2
    turns = tiny_models.conversations(30)
    asked, answered = turns[0][0]["content"], turns[0][1]["content"]
    if f"{asked}<|im_end|>" in samples[0]:
        assert f"<|im_start|>assistant\n⟦{answered}<|im_end|>⟧" in samples[0]
    assert "⟦" in samples[1]
    assert "to train on, " in done.stdout
    assert "(masks: marked)" in done.stdout


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def test_preview_colours_what_is_trained_on_a_terminal(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "[bold]This[/bold] one"}]
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"messages": said}) + "\n")
    job = read_job(job_file(tmp_path, tiny("llama"), source=str(file), validation={"share": 0}))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    preview(job, 1, "table")
    assert "\x1b[32m[bold]This[/bold] one<|im_end|>\x1b[0m" in terminal.getvalue()
    assert "⟦" not in terminal.getvalue()


def test_preview_for_machines(tiny: Tiny, tmp_path: Path) -> None:
    file = job_file(tmp_path, tiny("llama"), source=str(source(tmp_path)))
    done = CliRunner().invoke(app, ["preview", str(file), "--samples", "1", "-o", "json"])
    told = json.loads(done.stdout)
    assert told["statistics"]["rows"] + told["statistics"]["validation_rows"] == 30
    assert 0 < told["statistics"]["trained_share"] < 1
    (sample,) = told["samples"]
    trained = [part["text"] for part in sample["stretches"] if part["trained"]]
    assert all(text.endswith("<|im_end|>") for text in trained)


@pytest.mark.parametrize("verb", ["validate", "preview"])
def test_a_job_that_cannot_be_read_ends_with_2(tmp_path: Path, verb: str) -> None:
    done = CliRunner().invoke(app, [verb, str(tmp_path / "no.yaml")])
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr
