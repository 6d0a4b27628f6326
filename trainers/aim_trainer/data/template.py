"""A chat template as transformers compiles it: its sandbox, its names, its marks. What transformers does around each
call is left out, and so is none of the result: rendering is a third of what tokens cost.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import FrameType
from typing import Any

from jinja2 import TemplateError

from .examples import Message

#: For one rendering. The longest row allowed, of 16 MiB, takes a fraction of it.
MOST_CPU_S = 10.0


class Endless(TemplateError):
    """A template that does not come to an end, or not for a long time."""


class Template:
    """given: the tokenizer's special tokens, as its templates name them."""

    def __init__(self, text: str, given: dict[str, Any]) -> None:
        self._text, self._given = text, given

    @cached_property
    def _compiled(self) -> Any:
        # No public name of transformers' gives it; the tests hold what is rendered to what transformers renders.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template(self._text)

    @cached_property
    def _always(self) -> dict[str, Any]:
        return {**self._compiled.globals, **self._given, "documents": None}

    def __call__(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and [begin, end) in its characters of each {% generation %} block; prompt: an answer is asked for.

        Raises what a template may raise; Endless after so much CPU time.
        """
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        with rendering():
            names = {**self._always, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
            context = self._compiled.new_context(names, shared=True)
            with self._compiled.environment.activate_tracker(blocks, spans):
                for block in self._compiled.root_render_func(context):
                    blocks.append(block)  # noqa: PERF402  # one by one: the tracker counts what is there
        return "".join(blocks), spans


class _Clock:
    """count: odd while something is rendered; seen: what it was at the last tick."""

    def __init__(self) -> None:
        self.count, self.seen, self.runs = 0, 0, False

    def tick(self, _number: int, _frame: FrameType | None) -> None:
        """Raises Endless: the rendering that was at work at the last tick still is."""
        if self.count % 2 and self.count == self.seen:
            raise Endless(f"needs more than {MOST_CPU_S:g} s")
        self.seen = self.count


_clock = _Clock()


@contextmanager
def in_time() -> Iterator[None]:
    """Renderings in it end after MOST_CPU_S, twice that at the most; one timer for all of them, as setting it costs
    as much as a short row. In a main thread alone, where signals are: others render by templates that one has
    rendered by.
    """
    if _clock.runs or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGVTALRM, _clock.tick)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_S, MOST_CPU_S)
    _clock.runs = True
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _clock.runs = False


@contextmanager
def rendering() -> Iterator[None]:
    """One rendering, however many templates it is of."""
    with in_time():
        _clock.count += 1
        try:
            yield
        finally:
            _clock.count += 1
