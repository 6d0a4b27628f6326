"""What the registry knows of an engine before it is imported: its settings, the models it serves, how to make one.

The module that holds a kind is imported for every start, whichever engine is chosen: it must not import the engine's
library, nor anything else that takes long.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict

from .base import Engine, EngineSpec


class EngineSettings(BaseModel):
    """An engine's own settings. A field is a flag, an ``AIM_`` variable and ``EngineSpec.options``' key, and says so
    as in ``aim_kserve.settings``: ``Field(default, description=…, json_schema_extra={"annotation": …})``. Every field
    has a default; a value may come as text."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _engine_args(value: object) -> object:
    """A JSON object as a mapping, anything else as a command line."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return orjson.loads(text) if text.startswith("{") else shlex.split(text)
    except ValueError as error:
        raise ValueError(f"neither a JSON object nor a command line: {error}") from None


#: The flags of the engine's own command line: words, or flag → value. Text is a JSON object or a command line.
EngineArgs = Annotated[list[str] | dict[str, Any], BeforeValidator(_engine_args)]


def command_line(engine_args: Sequence[str] | Mapping[str, object]) -> list[str]:
    """Flags as an argument list. In a mapping True is ``--flag``, False ``--no-flag``, None nothing at all, a list
    several values, and a mapping JSON (which is how the flags of vLLM and SGLang take one)."""
    if not isinstance(engine_args, Mapping):
        return list(engine_args)
    return [word for flag, value in engine_args.items() for word in _flag(flag.lstrip("-").replace("_", "-"), value)]


def _flag(flag: str, value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, Mapping):
        return [f"--{flag}", json.dumps(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [f"--{flag}", *(str(item) for item in value)]
    return [f"--{flag}={value}"]


#: Of a setting that several engines have: one flag, so one description.
DETERMINISTIC = "the same request gets the same answer whatever else runs: slower (docs/requests.md)"


@dataclass(frozen=True, slots=True)
class EngineKind:
    """An engine that can be asked for by name: the object behind an entry point of the group ``aim_runtime.engines``.

    settings: its own settings; EngineSpec.options is validated by it.
    create: makes the engine, not loaded yet, of a spec and its validated options; the place to import it.
    serves: whether ``--engine auto`` may choose it for this directory or file.
    reads: what ``serves`` looks for, in words, for the message that nothing was found; "" if it is never chosen so.
    module: what must be importable for it; None if nothing but ours.
    remedy: how to get that module.
    """

    settings: type[EngineSettings]
    create: Callable[[EngineSpec, Any], Engine]
    serves: Callable[[Path], bool] = lambda _: False
    reads: str = ""
    module: str | None = None
    remedy: str = "install it"
