"""`aim-trainer preview`: rows as the model will see them, and the data in figures."""

from __future__ import annotations

import sys

import numpy as np

from aim_profile.cli.output import Facts, Output, Table, show
from aim_trainer.data.masked import Stretch, marked, stretches
from aim_trainer.data.prepare import Prepared, prepare
from aim_trainer.data.statistics import Statistics
from aim_trainer.data.tokens import Tokens
from aim_trainer.job.job import FineTuningJob
from aim_trainer.recipe.base import read_tokenizer
from aim_trainer.scratch import scratch


def preview(job: FineTuningJob, samples: int, output: Output) -> None:
    """Prints. Raises DataError, JobError, StoreError: all that a run would refuse of the data."""
    with scratch() as directory:
        tokenizer = read_tokenizer(job.spec.base_model)
        tokenizer.save_pretrained(directory / "tokenizer")
        prepared = prepare(job, directory / "tokenizer", directory / "data")
        tokens = Tokens(prepared.train)
        # From all over the data, not its first rows alone.
        places = np.linspace(0, len(tokens) - 1, min(samples, len(tokens))).astype(int).tolist()
        shown = [(place, tokens[place].label, stretches(tokens[place], tokenizer)) for place in places]
        _show(job, prepared, shown, output)


def _show(
    job: FineTuningJob, prepared: Prepared, shown: list[tuple[int, int | None, list[Stretch]]], output: Output
) -> None:
    if output == "table":
        for place, label, parts in shown:
            _print_sample(f"row {place + 1}", None if label is None else job.spec.dataset.labels[label], parts)
    told = prepared.statistics
    data = {
        "statistics": told.as_json(),
        "digest": prepared.digest,
        "samples": [
            {"row": place + 1, "label": label, "stretches": [part._asdict() for part in parts]}
            for place, label, parts in shown
        ],
    }
    read = [(s.uri, s.format, f"{s.rows:,}", f"{s.weight:g}", ", ".join(s.ignored)) for s in told.sources]
    columns = ("source", "format", "rows", "weight", "not read")
    show(output, data, Facts(facts(told)), Table(columns, read, right=("rows", "weight")))


def facts(told: Statistics) -> list[tuple[str, str]]:
    """The figures, in words; what is zero is left out where it says nothing."""
    lengths = told.lengths
    left = "left out" if told.duplicates_removed else "kept"
    return [
        ("rows", f"{told.rows:,} to train on, {told.validation_rows:,} held out"),
        ("tokens", f"{told.tokens:,}, of which {told.trained_share:.1%} are trained (masks: {told.masks})"),
        ("tokens of a row", f"p50 {lengths.p50:,}, p95 {lengths.p95:,}, p99.9 {lengths.p99_9:,}, most {lengths.max:,}"),
        ("too long", _counts(told)),
        ("duplicates", f"{told.duplicates:,} rows say what an earlier one says; {left}" if told.duplicates else ""),
        ("held out", f"{told.held_out:,} rows left out, because validation has them" if told.held_out else ""),
    ]


def _counts(told: Statistics) -> str:
    counts = {
        "dropped": told.dropped,
        "cut": told.truncated,
        "left out, all that was trained cut off": told.untrained,
        "held-out ones dropped": told.validation_dropped,
        "held-out ones cut": told.validation_truncated,
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _print_sample(title: str, label: str | None, parts: list[Stretch]) -> None:
    head = f"{title}, label {label}" if label is not None else title
    if not sys.stdout.isatty():
        sys.stdout.write(f"--- {head}\n{marked(parts)}\n\n")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.rule(Text(head), align="left")
    styled = Text()
    for part in parts:
        styled.append(part.text, "green" if part.trained else "dim")
    console.print(styled, soft_wrap=True)
