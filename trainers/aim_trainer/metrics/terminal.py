"""What a person sees while it trains: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from .records import Evaluation, Note, Record, Saved, Step
from .words import bytes_in_words, numbers_in_words, seconds_in_words

#: In a log: no two lines of steps are nearer, unless it is the last; none are farther apart by both measures.
NEAREST_S, FARTHEST_S, FARTHEST_SHARE = 5.0, 30.0, 0.05
_SMOOTHING = 0.9
#: Of a row that is shown, what the loss counts (data/masked).
_TRAINED = r"(?s)⟦.*?(⟧|$)"


def terminal(stream: IO[str] | None = None) -> Bar | Lines:
    """A bar where `stream` (stderr, if None) is a terminal that can be drawn on, else lines."""
    console = Console(file=stream, stderr=stream is None, highlight=False, soft_wrap=True)
    drawn = console.is_terminal and not console.is_dumb_terminal
    return Bar(console) if drawn else Lines(console.file)


class Lines:
    """One line for what happens, and for a step now and then."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream or sys.stderr, clock
        self._last: tuple[float, float] | None = None
        self._rate = _Rate()

    def tell(self, record: Record) -> None:
        """Raises OSError: nobody reads any more, or the disk of the log is full."""
        if isinstance(record, Step):
            self._rate.add(record)
            if not self._is_due(record):
                return
            self._last = self._clock(), record.step / record.steps
            self._say(f"step {record.step}/{record.steps} {_percent(record)}  {_said(record, self._rate.value)}")
        else:
            self._say(_event(record))

    def close(self) -> None:
        """Nothing is held."""

    def _is_due(self, step: Step) -> bool:
        if self._last is None or step.step >= step.steps:
            return True
        seconds, share = self._clock() - self._last[0], step.step / step.steps - self._last[1]
        return seconds >= NEAREST_S and (seconds >= FARTHEST_S or share >= FARTHEST_SHARE)

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class Bar:
    """The bar stays at the bottom; what happens scrolls above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]{task.percentage:>3.0f} %"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the numbers leave
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._rate = _Rate()

    def tell(self, record: Record) -> None:
        """Raises OSError: the terminal is gone."""
        if not isinstance(record, Step):
            event = Text(_event(record), style=_style(record))
            event.highlight_regex(_TRAINED, "green")
            self._console.print(event)
            return
        self._rate.add(record)
        if self._task is None:
            self._task = self._progress.add_task("", total=record.steps)
            self._progress.start()
        said = f"step {record.step}/{record.steps}  {_said(record, self._rate.value, with_rate=False)}"
        self._progress.update(self._task, completed=record.step, description=said)
        if record.step >= record.steps:
            self.close()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._progress.stop()


class _Rate:
    """Tokens a second, smoothed: the time of a single step says little."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, step: Step) -> None:
        self._tokens = _SMOOTHING * self._tokens + step.tokens
        self._seconds = _SMOOTHING * self._seconds + step.seconds

    @property
    def value(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0 else 0.0


def _said(step: Step, tokens_per_second: float, with_rate: bool = True) -> str:
    """with_rate: with the learning rate, for which a bar of 80 columns has no room."""
    learned = f"  lr {step.learning_rate:.2e}" if with_rate else ""
    left = f"  {seconds_in_words(step.eta_s)} left" if step.step < step.steps else ""
    return f"loss {step.loss:.4f}{learned}  {tokens_per_second:,.0f} tokens/s{left}"


def _percent(step: Step) -> str:
    return f"({100 * step.step // step.steps:.0f} %)"


def _event(record: Evaluation | Saved | Note) -> str:
    match record:
        case Evaluation():
            return f"evaluated at step {record.step}: {numbers_in_words(record.metrics)}"
        case Saved():
            size = bytes_in_words(record.bytes)
            return f"checkpoint of step {record.step}: {record.uri} ({size} in {seconds_in_words(record.seconds)})"
        case Note():
            return record.message if record.message.startswith(record.kind) else f"{record.kind}: {record.message}"


def _style(record: Evaluation | Saved | Note) -> str:
    if isinstance(record, Note):
        return {"failed": "bold red", "retried": "yellow", "paused": "yellow", "done": "bold green"}.get(
            record.kind, ""
        )
    return "cyan" if isinstance(record, Evaluation) else "dim"
