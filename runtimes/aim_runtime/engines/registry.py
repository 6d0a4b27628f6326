"""Engines by name: ours, and those that installed distributions bring by entry point. Only the one that is asked for
is imported.

``kinds`` imports every engine's kind (its settings), ``create`` the engine itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from pydantic import ValidationError

from aim_runtime.engines.base import Engine, EngineSpec, ModelLoadError
from aim_runtime.engines.kind import EngineKind, EngineSettings

GROUP = "aim_runtime.engines"
#: Ours are found without any installed metadata, and in the order in which ``auto`` asks them.
BUILT_IN = {
    "llama_cpp": "aim_runtime.engines.llama_cpp.kind:KIND",
    "vllm": "aim_runtime.engines.vllm.kind:KIND",
    "sglang": "aim_runtime.engines.sglang.kind:KIND",
    "openai_server": "aim_runtime.engines.openai_server.kind:KIND",
}


def names() -> tuple[str, ...]:
    """Every engine that can be named: ours first."""
    return tuple(_found())


def kind(name: str) -> EngineKind:
    """The engine of that name, its library not imported.

    Raises:
        ModelLoadError: there is none, its name is claimed twice, or its kind cannot be imported.
    """
    found = _found().get(name)
    if found is None:
        raise ModelLoadError(f"{name!r} is no engine: the engines here are {', '.join(names())}")
    if isinstance(found, str):
        raise ModelLoadError(found)
    return found


def kinds() -> Mapping[str, EngineKind]:
    """All engines that :func:`kind` gives."""
    return {name: found for name, found in _found().items() if isinstance(found, EngineKind)}


def create(spec: EngineSpec) -> Engine:
    """The engine that ``spec`` names, not loaded yet.

    Raises:
        ModelLoadError: no such engine, an option it does not have or does not take, or its library is missing.
    """
    chosen, settings = check(spec)
    return chosen.create(replace(spec, options=settings.model_dump()), settings)


def check(spec: EngineSpec) -> tuple[EngineKind, EngineSettings]:
    """Whether :func:`create` could be tried, nothing imported: the engine and its own settings.

    Raises:
        ModelLoadError: as :func:`create`.
    """
    chosen = kind(spec.engine)
    try:
        settings = chosen.settings.model_validate(dict(spec.options))
    except ValidationError as error:
        raise ModelLoadError(_wrong_option(spec.engine, chosen, error)) from None
    if chosen.module is not None and importlib.util.find_spec(chosen.module) is None:
        raise ModelLoadError(f"the {spec.engine} engine is not installed in this environment: {chosen.remedy}")
    return chosen, settings


def serving(model: Path) -> list[str]:
    """The engines that serve what lies there. An installed one is only asked where none of ours does, so that
    installing it changes no choice that was clear."""
    answers = [name for name, each in kinds().items() if each.serves(model)]
    return [name for name in answers if name in BUILT_IN] or answers


def _wrong_option(engine: str, chosen: EngineKind, error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    option = ".".join(str(part) for part in problem["loc"][:1])
    if problem["type"] == "extra_forbidden":
        return f"{option}: not a setting of the {engine} engine, which has: {', '.join(chosen.settings.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{option}: {message} (got {problem['input']!r})" if option else f"the {engine} engine: {message}"


@cache
def _found() -> Mapping[str, EngineKind | str]:
    """Name → its kind, or why it cannot be had: told to whoever asks for it, and to nobody else."""
    claims = {name: [EntryPoint(name, value, GROUP)] for name, value in BUILT_IN.items()}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, _origin(point))):
        claims.setdefault(point.name, []).append(point)
    return {name: _load(name, points) for name, points in claims.items()}


def _load(name: str, points: list[EntryPoint]) -> EngineKind | str:
    if len(points) > 1:
        claimants = " and ".join(_origin(point) for point in points)
        return f"the engine name {name!r} is claimed by {claimants}: uninstall all but one"
    try:
        found = points[0].load()
    except Exception as error:  # noqa: BLE001  an installed distribution's own code: it must not stop other engines
        return f"the {name} engine of {_origin(points[0])} cannot be imported: {type(error).__name__}: {error}"
    if not isinstance(found, EngineKind):
        return f"the {name} engine of {_origin(points[0])}: {points[0].value} is no EngineKind (docs/engines.md)"
    return found


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "aim-kserve itself"
