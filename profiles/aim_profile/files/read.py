"""YAML (and JSON, which is YAML) that people write: read with limits, refused with file, line, key and remedy.

fleet.yaml:7: nodes[2].crads: unknown key; did you mean cards?
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from datetime import date
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from aim_profile.errors import AimProfileError

from .kinds import Kind, described, looks_like
from .place import MisplacedError, Place, did_you_mean, dotted, keys_at, line_of
from .shape import ShapeError, check_shape

_MAX_FILE_BYTES = 64 * 2**20
# libyaml's parser where PyYAML was built with it: ten times as fast, and as safe.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# With the backslashes before it: an even number of them, or the first escape is none.
_SURROGATES = re.compile(r"(?<!\\)((?:\\\\)*)(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})")

Checked = TypeVar("Checked", bound=BaseModel)


class Parsed(NamedTuple):
    """A well-formed file, parsed once: `raw` are its plain values, `text` is for the lines of errors in it."""

    named: str
    text: str
    raw: Any


def read_parsed(file: Path, error: type[AimProfileError]) -> Parsed:
    """The file, whatever kind of file it is. Raises `error` with file and line where it is not YAML."""
    return parsed(read_text(file, error), str(file), error)


def parsed(text: str, named: str, error: type[AimProfileError]) -> Parsed:
    """The same of text; `named` stands in errors for the file."""
    text = _json_as_yaml(text)
    return Parsed(named, text, parse_yaml(text, named, error))


def _json_as_yaml(text: str) -> str:
    """JSON is YAML but for one thing: it may write a character beyond U+FFFF as two escapes, a surrogate pair."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    return _SURROGATES.sub(lambda pair: pair[1] + json.loads(f'"{pair[2]}"'), text)


def read_text(file: Path, error: type[AimProfileError]) -> str:
    """The file's text. Raises `error` naming the file."""
    try:
        with file.open("rb") as opened:  # a device or a pipe has no size, and may have no end
            raw = opened.read(_MAX_FILE_BYTES + 1)
        if len(raw) > _MAX_FILE_BYTES:
            raise error(f"{file}: larger than {_MAX_FILE_BYTES // 2**20} MiB", field=str(file))
        return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8").read()  # line ends as of a text file
    except OSError as problem:
        why = f"{file}: {problem.strerror or problem}"
        raise error(why, field=str(file), remedy="name a file that can be read") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{file}: {problem}", field=str(file)) from problem


def parse_yaml(text: str, named: str, error: type[AimProfileError]) -> Any:
    """Plain values of YAML text. Raises `error` with file and line: not YAML, a key twice, too deep, too much of it."""
    try:
        if (values := _of_json(text)) is not None:
            return values
        built = check_shape(text, _LOADER)
        return built.value if built.common else yaml.load(text, Loader=_LOADER)
    except ShapeError as problem:
        raise error(f"{named}:{problem.line}: {problem}", field=problem.field) from problem
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f"{named}:{mark.line + 1}" if mark else named
        why = " ".join(str(getattr(problem, "problem", None) or problem).split())
        raise error(f"{where}: not YAML: {why}", field=named) from problem


def _of_json(text: str) -> Any:
    """The values of JSON that says each thing once, by a parser made for it; None: YAML's says what is wrong."""
    if not text.lstrip().startswith(("{", "[")) or "\\ud" in text or "\\uD" in text:
        return None
    try:
        return json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _no_number(text: str) -> float:
    raise ValueError(text)


def check_as(model: type[Checked], file: Parsed, error: type[AimProfileError], kind: Kind) -> Checked:
    """The file as one of that kind. Raises `error`: `named:LINE: workloads[3].precision: Input should be …`."""
    check_kind(file.raw, kind, file.named, error)
    return check(model, file.raw, file.named, error, file.text)


def check_kind(raw: object, kind: Kind, named: str, error: type[AimProfileError]) -> None:
    """Raises `error` where it is no mapping, or plainly a file of another kind: says which, and which is needed."""
    if not isinstance(raw, Mapping):
        found = "empty" if raw is None else f"a {type(raw).__name__}"
        raise error(f"{named}: {found}, not a mapping: {described(kind)} is needed here", field=named)
    found_kind = looks_like(raw)
    if found_kind is not None and found_kind != kind:
        raise error(
            f"{named}: looks like {described(found_kind)}; {described(kind)} is needed here", field=named, value=named
        )


def check(
    model: type[Checked],
    raw: object,
    named: str,
    error: type[AimProfileError],
    text: str | None = None,
    inside: Place = (),
) -> Checked:
    """`raw` as `model`. text: the file `raw` was read from, for the line; inside: the keys under which it stands there.

    Raises `error`: `named:LINE: nodes[2].gpu: …`.
    """
    try:
        return model.model_validate(raw)
    except (ValidationError, RecursionError) as problem:
        place, why, value = _first(problem, model)
        place = _in_file(place, raw)
        where = dotted((*inside, *place))
        found = located(named, text, (*inside, *place)) if text is not None and place else named
        raise error(f"{found}: {where}: {why}", field=where, value=value) from problem


def _in_file(place: Place, raw: object) -> Place:
    """Without what pydantic adds below a value that has nothing in it: which of several types it tried."""
    for at, part in enumerate(place):
        if isinstance(raw, Mapping):
            raw = raw.get(part)
        elif isinstance(raw, list):
            raw = raw[part] if isinstance(part, int) and part < len(raw) else None
        elif raw is not None:
            return place[:at]
    return place


def located(named: str, text: str, place: Place) -> str:
    """`fleet.yaml:7`: the file and the line of the key at `place` of the (well-formed) text."""
    return f"{named}:{line_of(text, place, _LOADER)}"


def _first(problem: ValidationError | RecursionError, model: type[BaseModel]) -> tuple[Place, str, object]:
    if isinstance(problem, RecursionError):
        return (), "nested too deeply", None
    errors = problem.errors(include_url=False)
    # An unknown key first: what else is wrong is mostly its doing (`nmae` unknown, `name` missing).
    first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
    place, value = first["loc"], first["input"]
    if first["type"] == "extra_forbidden":
        return place, f"unknown key; {did_you_mean(str(place[-1]), keys_at(model, place[:-1]))}", value
    why = first["msg"].removeprefix("Value error, ")
    if isinstance(knows := first.get("ctx", {}).get("error"), MisplacedError):
        return (*place, *knows.place), why, value
    # As it was written: `Input should be 1` of the text '1' says nothing.
    written = repr(value) if isinstance(value, str) else str(value)
    if isinstance(value, str | int | float | date) and written not in why:
        why += f" (got {written:.80})"
    return place, why, value
