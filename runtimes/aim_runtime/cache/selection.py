"""Which of a source's files a server needs: one set of weights, its configuration and its tokenizer. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from unicodedata import normalize

from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.source import RemoteFile

#: What serves a model besides its weights.
BESIDES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "USE_POLICY*")
#: Formats of weights, the one that is taken first.
WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pth", "*.pt")
_MOST_FILES = 10_000
_SHARD = "-of-"


def select(
    files: Sequence[RemoteFile], include: Sequence[str], exclude: Sequence[str], whose: str
) -> tuple[RemoteFile, ...]:
    """Those that match ``include`` (none: what serving needs) and not ``exclude``; sorted by path.

    Patterns are the shell's and match the whole path, or the file's own name where they have no ``/``.

    Raises:
        CacheError: nothing is left, or several models are there and nobody said which.
    """
    wanted = [file for file in files if _matches(file.path, include)] if include else needed(files, whose)
    left = tuple(sorted((file for file in wanted if not _matches(file.path, exclude)), key=lambda file: file.path))
    if not left:
        shown = ", ".join(sorted(file.path for file in files)[:8]) or "nothing"
        raise CacheError(f"{whose}: no file is left to fetch; there is {shown}: change --include or --exclude")
    if len(left) > _MOST_FILES:
        raise CacheError(f"{whose}: {len(left)} files, more than {_MOST_FILES}: narrow it with --include")
    _check_distinct([file.path for file in left], whose)
    return left


def _check_distinct(paths: Sequence[str], whose: str) -> None:
    """Each path is a place of its own, on volumes that tell neither case nor Unicode forms apart, too: there the second
    file would be written over the first, and both had passed.
    """
    files, seen = set(paths), dict[str, str]()
    folders = {parent for path in paths for parent in _parents(path)}
    if len(files) != len(paths) or files & folders:
        raise CacheError(f"{whose}: lists a file twice, or a file that is also a directory")
    for path in files | folders:
        other = seen.setdefault(normalize("NFC", normalize("NFC", path).casefold()), path)
        if other != path:
            first, second = sorted((other, path))
            raise CacheError(
                f"{whose}: {first!r} and {second!r} differ only in case or Unicode form, which some volumes take for "
                "one: leave one out with --exclude"
            )


def _matches(path: str, patterns: Sequence[str]) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(path).parents][:-1]


def needed(files: Sequence[RemoteFile], whose: str) -> list[RemoteFile]:
    """One format of weights, the first of :data:`WEIGHTS` that is there, and what stands beside it.

    Folders hold copies for other programs (``original/``, ``onnx/``): only where the top has no weights are they looked
    into. Raises CacheError: several GGUF files that are not parts of one.
    """
    top = [file for file in files if "/" not in file.path]
    kind = next((kind for kind in WEIGHTS if any(_matches(file.path, (kind,)) for file in top)), None)
    if kind is None:
        top = list(files)
        kind = next((kind for kind in WEIGHTS if any(_matches(file.path, (kind,)) for file in top)), None)
    if kind is None:
        return top
    weights = [file for file in top if _matches(file.path, (kind,))]
    if any(not file.path.startswith("consolidated") for file in weights):
        weights = [file for file in weights if not file.path.startswith("consolidated")]  # Mistral's second copy
    if kind == "*.gguf":
        _one_gguf(weights, whose)
    taken = {file.path for file in weights}
    return weights + [file for file in top if _matches(file.path, BESIDES) and file.path not in taken]


def _one_gguf(weights: Sequence[RemoteFile], whose: str) -> None:
    models = {file.path.rpartition(_SHARD)[0][:-6] or file.path for file in weights}
    models = {name for name in models if not name.rpartition("/")[2].startswith("mmproj")}
    if len(models) > 1:
        shown = ", ".join(sorted(models)[:8])
        raise CacheError(f"{whose}: several GGUF files ({shown}): say which, as in --include '*Q4_K_M*.gguf'")
