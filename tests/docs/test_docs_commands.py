"""Commands on the pages are such as there are: verbs and flags by the programs' own parsers, make targets, files."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

import aim_guardrail.__main__ as guardrail
import aim_operator.__main__ as operator
import aim_profile.cli.app as profile
import aim_runtime.__main__ as runtime
import aim_trainer.cli.app as trainer
from aim_guardrail.settings import GuardrailSettings
from aim_kserve.settings import ServerSettings
from aim_runtime.settings import RuntimeSettings

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
#: Of folders that a reader makes.
THEIRS = {"my-cluster"}


class Parsed(Exception):
    """A parser took what it was given: nothing is done with it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def blocks(page: Path) -> Iterator[str]:
    """The lines of a page's code blocks, continued ones as one, without prompts, comments and what is piped on."""
    for block in re.findall(r"^( *)```\w*\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", " ", block[1]).split("\n"):
            yield line.strip().removeprefix("$ ")


def spans(page: Path) -> Iterator[str]:
    """Code within a sentence."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def commands(lines: Iterator[str]) -> Iterator[tuple[str, list[str]]]:
    """Program and arguments of each of ours."""
    for line in lines:
        for part in re.split(r"[;|&]+ |\$\(|\) |#", line):
            found = re.match(r"(?:\S*/)?(?:(aim-[a-z]+)|python -m (aim_[a-z]+)) (?=[a-z-])(.*)", part.strip())
            if found and "·" not in line and not part.strip().endswith("…"):
                yield (found[1] or found[2].replace("_", "-")), words(found[3])


def words(text: str) -> list[str]:
    """As a shell has them. […] marks what may be left out, … what may be repeated, > where it goes."""
    plain = re.sub(r"\[(-[^\]]*)\]|…", r"\1", text.partition(" > ")[0])
    return shlex.split(plain.removesuffix(")"))


def cases(lines: Callable[[Path], Iterator[str]]) -> list[Any]:
    return [
        pytest.param(program, arguments, id=f"{page.name}: {program} {' '.join(arguments)[:60]}")
        for page in PAGES
        for program, arguments in commands(lines(page))
    ]


BLOCKS, SPANS = cases(blocks), cases(spans)
APPS: dict[str, Any] = {
    name: typer.main.get_command(app)
    for name, app in {"aim-profile": profile.app, "aim-trainer": trainer.app, "aim-operator": operator.app}.items()
}
SETTINGS: dict[str, tuple[type[ServerSettings], Any]] = {
    "aim-runtime": (RuntimeSettings, runtime._VERBS),
    "aim-guardrail": (GuardrailSettings, guardrail._VERBS),
}


def of_typer(command: Any, arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that the arguments name, and its own."""
    verbs = getattr(command, "commands", None)
    if verbs is None or arguments[0].startswith("-"):
        return command, arguments
    assert arguments[0] in verbs, f"no verb {arguments[0]}"
    return verbs[arguments[0]], arguments[1:]


def take(command: Any, arguments: list[str]) -> None:
    """Parsed by the command, and not run."""
    found, own = of_typer(command, arguments)
    found.make_parser(found.context_class(found)).parse_args(own)


def run(program: str, arguments: list[str]) -> None:
    settings, verbs = SETTINGS[program]
    if verb := verbs.get(arguments[0]):
        importlib.import_module(verb.module).main(arguments[1:])
    settings.load(arguments, {}, prog="docs", description="")


def argparsed(program: str, arguments: list[str]) -> argparse.ArgumentParser:
    """The parser that the process asks, once it has taken the arguments. Raises SystemExit: it has not."""
    with pytest.raises(Parsed) as taken:
        run(program, arguments)
    return taken.value.parser


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any, **more: Any) -> NoReturn:
        parse(self, *given, **more)
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.fixture
def asked_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse_args(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.mark.usefixtures("parsed_only")
@pytest.mark.parametrize(("program", "arguments"), BLOCKS)
def test_what_a_block_says_is_taken(program: str, arguments: list[str]) -> None:
    if command := APPS.get(program):
        take(command, arguments)
    else:
        argparsed(program, arguments)


@pytest.mark.usefixtures("asked_only")
@pytest.mark.parametrize(("program", "arguments"), SPANS)
def test_what_a_sentence_names_is_there(program: str, arguments: list[str]) -> None:
    """Its verb and its flags; what else a command needs it may leave out."""
    known: set[str] = {"--help", "--install-completion"}
    if app := APPS.get(program):
        command, _ = of_typer(app, arguments)
        known |= {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
    else:
        assert arguments[0].startswith("-") or arguments[0] in SETTINGS[program][1], f"no verb {arguments[0]}"
        parser = argparsed(program, arguments)
        for word in arguments:  # keys new, cache add
            actions = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
            parser = next((each.choices[word] for each in actions if word in each.choices), parser)
        known |= parser._option_string_actions.keys()
    assert {word.partition("=")[0] for word in arguments if word.startswith("-")} <= known


@pytest.mark.usefixtures("parsed_only")
def test_what_no_program_takes_is_found() -> None:
    with pytest.raises(AssertionError, match="no verb kserve"):
        take(APPS["aim-profile"], ["kserve"])
    with pytest.raises(Exception, match="No such option: --no-such-flag"):  # typer's own, of no public name
        take(APPS["aim-profile"], ["plan", "--no-such-flag"])
    for program in SETTINGS:
        with pytest.raises(SystemExit):
            argparsed(program, ["--no_such_flag", "1"])
    assert len(BLOCKS) > 70
    assert len(SPANS) > 70


def test_make_has_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    asked = {
        (page.name, target)
        for page in PAGES
        for lines in (blocks, spans)
        for line in lines(page)
        for target in re.findall(r"^make ([a-z-]+)", line)
    }
    assert len(asked) > 20
    assert {(page, target) for page, target in asked if target not in targets} == set()


def test_what_kubectl_and_helm_are_given_is_there() -> None:
    given = {
        (page.name, path.rstrip("/"))
        for page in PAGES
        for line in blocks(page)
        if re.match(r"(kubectl|helm) ", line)
        for path in re.findall(r"(?:-k|-f|install \S+) (\S+)", line)
    }
    assert len(given) > 8
    ours = {(page, path) for page, path in given if "/" in path and path not in THEIRS}
    assert {(page, path) for page, path in ours if not (ROOT / path).exists()} == set()
