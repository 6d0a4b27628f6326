"""YAML that people write: read with limits, refused with the file, the key and the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from aim_profile.errors import AimProfileError

_MAX_FILE_BYTES = 64 * 2**20
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Checked = TypeVar("Checked", bound=BaseModel)


def read_text(file: Path, error: type[AimProfileError]) -> str:
    """The file's text. Raises `error` naming the file."""
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise error(f"{file}: larger than {_MAX_FILE_BYTES // 2**20} MiB", field=str(file))
        return file.read_text(encoding="utf-8")
    except OSError as problem:
        raise error(f"{file}: {problem.strerror or problem}", field=str(file)) from problem
    except UnicodeDecodeError as problem:
        raise error(f"{file}: {problem}", field=str(file)) from problem


def parse_yaml(text: str, named: str, error: type[AimProfileError]) -> Any:
    """Plain values of YAML (or JSON) text. Raises `error` naming `named`."""
    try:
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise error(f"{named}: not YAML: {problem}", field=named) from problem


def check(model: type[Checked], raw: object, named: str, error: type[AimProfileError]) -> Checked:
    """`raw` as `model`. Raises `error`: `named: workloads[3].precision: Input should be …`."""
    try:
        return model.model_validate(raw)
    except (ValidationError, RecursionError) as problem:
        where, why, value = _first(problem)
        raise error(f"{named}: {where}: {why}", field=where, value=value) from problem


def _first(problem: ValidationError | RecursionError) -> tuple[str, str, object]:
    if isinstance(problem, RecursionError):
        return "file", "nested too deeply", None
    first = problem.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    why, value = first["msg"].removeprefix("Value error, "), first["input"]
    if isinstance(value, str | int | float) and first["type"] != "value_error":
        why += f" (got {value!r:.80})"
    return where or "file", why, value
