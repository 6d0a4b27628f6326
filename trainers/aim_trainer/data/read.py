"""Examples out of the sources of a job, each with its file and line; what cannot be trained on is collected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aim_trainer.errors import JobError
from aim_trainer.job.dataset import Source
from aim_trainer.job.job import Spec

from .examples import Completion, Conversation, Example, Labelled
from .formats import SUMMARIZE, Format, as_conversation, formats, guessed
from .lines import FileProblem
from .problems import Problems, RowProblem, named, shortened
from .sources import records

#: Names of unread fields that are kept of a source.
MOST_IGNORED = 100


class Located(NamedTuple):
    """line: its number in the source, from 1, or the row's."""

    shown: str
    line: int
    example: Example

    @property
    def where(self) -> str:
        """file:line."""
        return f"{self.shown}:{self.line}"


@dataclass
class Seen:
    """What reading a source has shown. ignored: names of fields that some row has and nobody reads."""

    uri: str
    format: str = "auto"
    rows: int = 0
    ignored: set[str] = field(default_factory=set)

    def ignore(self, names: set[str]) -> None:
        """Takes note of them; of so many that nobody would read them all, of the first."""
        if len(self.ignored) < MOST_IGNORED:
            self.ignored.update(sorted(names - self.ignored)[: MOST_IGNORED - len(self.ignored)])


class Reader:
    """Reads the rows of a job's sources as its template wants them."""

    def __init__(self, spec: Spec) -> None:
        self._template = spec.template
        self._system_prompt = spec.dataset.system_prompt
        self._formats = formats(spec.dataset.labels)
        if spec.template == "classification" and len(spec.dataset.labels) < 2:
            raise JobError(
                "spec.dataset.labels: template classification needs two or more", field="spec.dataset.labels"
            )

    def examples(self, source: Source, problems: Problems, seen: Seen) -> Iterator[Located]:
        """All rows that can be trained on; the others are added to problems. Raises StoreError."""
        before = problems.count
        try:
            yield from self._read(source, problems, seen)
        except FileProblem as problem:
            problems.add(source.shown, str(problem))
        if not seen.rows and problems.count == before:
            problems.add(source.shown, "has no rows")

    def _read(self, source: Source, problems: Problems, seen: Seen) -> Iterator[Located]:
        form: Format | None = None
        shown = source.shown
        for line, record in records(source):
            if isinstance(record, RowProblem):
                problems.add(f"{shown}:{line}", str(record))
                continue
            if source.columns:
                record = _renamed(record, source.columns)
            if form is None:
                seen.format, form = self._format(source, record)
                _refuse_missing_columns(source, record, form)
            if len(record) > len(form.needed):
                seen.ignore(record.keys() - form.needed - set(form.optional))
            try:
                example = self._as_wanted(form.read(record))
            except RowProblem as problem:
                problems.add(f"{shown}:{line}", str(problem))
                continue
            seen.rows += 1
            yield Located(shown, line, example)

    def _format(self, source: Source, first: dict[str, Any]) -> tuple[str, Format]:
        if source.format != "auto":
            return source.format, self._formats[source.format]
        try:
            name = guessed(first, self._formats)
        except RowProblem as problem:
            raise FileProblem(str(problem)) from None
        return name, self._formats[name]

    def _as_wanted(self, example: Example) -> Example:
        """Raises RowProblem where the job's template is of other rows."""
        if self._template == "chat":
            return self._with_system_prompt(as_conversation(example))
        if self._template == "classification":
            if isinstance(example, Labelled):
                return example
            raise RowProblem("", "template classification is of {text, label}")
        if not isinstance(example, Completion):
            raise RowProblem("", f"template {self._template} is of {{prompt, completion}} or {{instruction, output}}")
        if self._template == "code":
            return example
        return self._with_system_prompt(as_conversation(Completion(SUMMARIZE + example.prompt, example.completion)))

    def _with_system_prompt(self, read: Conversation) -> Conversation:
        if self._system_prompt is None or read.messages[0]["role"] in ("system", "developer"):
            return read
        messages = [{"role": "system", "content": self._system_prompt}, *read.messages]
        return read._replace(messages=messages, untrained=tuple(place + 1 for place in read.untrained))


def _renamed(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Columns under the names that the format has for them."""
    taken = set(columns.values())
    rest = {name: value for name, value in record.items() if name not in taken and name not in columns}
    return rest | {name: record[column] for name, column in columns.items() if column in record}


def _refuse_missing_columns(source: Source, first: dict[str, Any], form: Format) -> None:
    missing = [name for name in source.columns if name not in first]
    if missing:
        column = source.columns[missing[0]]
        there = named(sorted(first))
        raise FileProblem(f"columns.{missing[0]}: there is no column {shortened(column)}; other columns are: {there}")
    unknown = [name for name in source.columns if name not in form.needed + form.optional]
    if unknown:
        known = ", ".join(form.needed + form.optional)
        raise FileProblem(f"columns.{unknown[0]}: the format has no such field; it has: {known}")
