"""What the engines' LoRA adapters have in common: how they are named, and how one is refused."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import orjson
from pydantic import BeforeValidator

from aim_kserve.errors import BadRequest, NotFound

NAME_CHARACTERS = 256


def _named_paths(value: object) -> object:
    """``a=/path,b=/path`` or a JSON object as a mapping."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("{"):
        try:
            return orjson.loads(text)
        except ValueError as error:
            raise ValueError(f"not a JSON object: {error}") from None
    pairs = [[part.strip() for part in item.partition("=")] for item in text.split(",") if item.strip()]
    if bad := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise ValueError(f"{bad[0]!r} is no name=path: give a=/path/of/a,b=/path/of/b")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice: give each adapter a name of its own")
    return {name: path for name, _, path in pairs}


#: A setting: adapter name → where it lies. Text is ``name=path,…`` or a JSON object.
AdapterPaths = Annotated[dict[str, Path], BeforeValidator(_named_paths)]
#: What an engine's settings say of it.
ADAPTERS_SETTING = "LoRA adapters to load with the model: name=path,… or a JSON object"


def check_name(name: str, served: str) -> None:
    """Whether clients can ask for an adapter by ``name``.

    Raises:
        BadRequest: empty, too long, not printable, or the model's own name.
    """
    if not name or len(name) > NAME_CHARACTERS or not name.isprintable() or name != name.strip():
        raise BadRequest(
            f"lora_name: {name[:80]!r} is no name: give 1 to {NAME_CHARACTERS} printable characters", param="lora_name"
        )
    if name == served:
        raise BadRequest(f"lora_name: {name!r} is the model itself: give the adapter another name", param="lora_name")


def refused(name: str, path: Path, why: str) -> BadRequest:
    """The adapter cannot be loaded; nothing has changed."""
    return BadRequest(f"adapter {name!r} ({path}): {why}", param="lora_path", code="adapter_refused")


def not_loaded(name: str, loaded: Collection[str]) -> NotFound:
    there = ", ".join(loaded) or "none"
    return NotFound(f"adapter {name!r} is not loaded; loaded are: {there}", param="lora_name", code="adapter_not_found")


def unknown_model(asked: str, names: Collection[str]) -> NotFound:
    """A body's ``model`` is neither the model nor one of its adapters, any more."""
    return NotFound(
        f"model {asked!r} does not exist; this engine has: {', '.join(names)}", param="model", code="model_not_found"
    )
