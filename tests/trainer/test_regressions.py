"""Prompts whose answers must stay right: their file, and what is asked of an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aim_trainer.errors import DataError
from aim_trainer.evaluate.regressions import MOST_ERRORS, Regression, read_regressions


def written(folder: Path, *lines: object) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(file)


def test_the_prompts_are_read_in_order(tmp_path: Path) -> None:
    uri = written(tmp_path, {"prompt": "2+2?", "contains": "4"}, "", {"prompt": "hi", "expected": "Hello."}, "")
    assert [(each.prompt, each.wanted()) for each in read_regressions(uri)] == [
        ("2+2?", "contains '4'"),
        ("hi", "Hello."),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": "a"}, "give one of expected, contains and matches"),
        ({"prompt": "a", "contains": "b", "expected": "c"}, "give one of expected, contains and matches"),
        ({"prompt": "", "contains": "b"}, "prompt: String should have at least 1 character"),
        ({"prompt": "a", "contain": "b"}, "contain: Extra inputs are not permitted"),
        ({"prompt": "a", "matches": "(b"}, "matches: no regular expression: missing )"),
        ({"prompt": 7, "contains": "b"}, "prompt: Input should be a valid string"),
        ("[1]", "Input should be a valid dictionary or instance of Regression"),
        ("{", "not JSON: Expecting property name"),
        ("[" * 100_000, "not JSON: nested too deeply"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, line: object, told: str) -> None:
    uri = written(tmp_path, {"prompt": "2+2?", "contains": "4"}, line)
    with pytest.raises(DataError) as raised:
        read_regressions(uri)
    assert f"{uri}:2: " in str(raised.value)
    assert told in str(raised.value)


def test_mistakes_are_capped(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read_regressions(written(tmp_path, *["x"] * 100))
    assert len(str(raised.value).splitlines()) == MOST_ERRORS + 1
    assert str(raised.value).endswith("… and 80 more")


@pytest.mark.parametrize(("content", "told"), [(b"", "no prompts"), (b"\n\n", "no prompts"), (b"\xff{}", "not UTF-8")])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_regressions(str(file))


@pytest.mark.parametrize(
    ("wish", "answer", "right"),
    [
        ({"expected": "Paris is it."}, " Paris  is it.\n", True),
        ({"expected": "Paris"}, "paris", False),
        ({"contains": "Paris"}, "It is Paris.", True),
        ({"contains": "Paris"}, "It is Rome.", False),
        ({"matches": r"\b4\b"}, "It is 4.", True),
        ({"matches": r"^4$"}, "It is 4.", False),
        ({"matches": r"^(a|a)*$"}, "a" * 5000 + "b", False),  # would backtrack for longer than anybody waits
    ],
)
def test_what_is_asked_of_an_answer(wish: dict[str, str], answer: str, right: bool) -> None:
    assert Regression.model_validate({"prompt": "p", **wish}).holds(answer) is right
