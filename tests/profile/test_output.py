"""Printing: on a terminal only sentences are wrapped; elsewhere nothing is."""

from __future__ import annotations

import io
import re

import pytest

from aim_profile.cli.output import Facts, Table, show

WIDE = Table(("profile", "why"), [("org/model/vllm-mi300x-cpx-nps4-bf16-tp1-latency", "a reason in many words " * 8)])


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, columns: int, *blocks: Table | Facts | str) -> str:
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show("table", None, *blocks)
    return stream.getvalue()


def test_sentences_are_wrapped_and_names_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), 90, WIDE)
    assert WIDE.rows[0][0] in text
    plain = re.sub(r"\x1b\[\d*m", "", text)
    assert max(map(len, plain.splitlines())) <= 90
    assert len(text.splitlines()) > 6


def test_what_is_wider_than_the_terminal_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), 40, WIDE)
    assert f"{WIDE.rows[0][0]}  {WIDE.rows[0][1].strip()}" in text


def test_a_pipe_gets_neither_colour_nor_wrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(("tier", "MiB"), [("validated", "1"), ("x", "22222")], right=("MiB",), title="T")
    text = shown(monkeypatch, io.StringIO(), 20, table, Facts((("a", "b"), ("long", ""))), "note")
    assert text == "T\ntier         MiB\nvalidated      1\nx          22222\n\na  b\n\nnote\n"
    assert "\x1b[" in shown(monkeypatch, Terminal(), 80, table)


def test_text_that_looks_like_markup_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), 80, Table(("what",), [("[red]x[/red]",)]), Facts((("k", "[b]y"),)), "[i]z")
    for part in ("[red]x[/red]", "[b]y", "[i]z"):
        assert part in text
