"""docs/troubleshooting.md quotes what the code says: each piece of a message, between what differs, is in it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
SOURCES = ("profiles", "runtimes", "transformers", "trainers")
#: The first cells of all tables but the first, which is about places.
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


@cache
def corpus() -> str:
    """All source, strings over several lines as one, what is put into them as …"""
    files = [file for folder in SOURCES for file in sorted((ROOT / folder).rglob("*.py"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r"\{[^{}\n]*\}", "…", re.sub(r"([\"'])\n\s*[fr]*\1", "", text))


def pieces(message: str) -> list[str]:
    return [piece for each in message.split("…") if (piece := each.strip(" :;,.()='\"-")) and len(piece) > 2]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_says_so(message: str) -> None:
    assert pieces(message), "nothing of it stands still"
    assert [piece for piece in pieces(message) if piece not in corpus()] == []


def test_there_are_messages_and_each_stands_once() -> None:
    assert len(MESSAGES) > 60
    assert len(set(MESSAGES)) == len(MESSAGES)


def test_a_message_that_nobody_says_is_found() -> None:
    assert pieces("the … is on fire: pour water") == ["the", "is on fire: pour water"]
    assert "is on fire: pour water" not in corpus()
