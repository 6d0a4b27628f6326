"""The settings of all engines in one place, so that each can be a flag before an engine is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .kind import EngineKind

Fields = dict[str, tuple[Any, FieldInfo]]


@dataclass(frozen=True, slots=True)
class SideBySide:
    """fields: what ``pydantic.create_model`` takes; a setting that engines share stands in the first one's group.
    owners: setting → the engines that have it. clashes: engine → why its settings cannot stand beside the others'.
    """

    fields: Fields
    owners: Mapping[str, tuple[str, ...]]
    clashes: Mapping[str, str]


def side_by_side(kinds: Mapping[str, EngineKind], *, taken: type[BaseModel]) -> SideBySide:
    """Args:
    taken: the model that the fields will be added to; its names are not to be had.
    """
    fields: Fields = {}
    owners: dict[str, tuple[str, ...]] = {}
    clashes: dict[str, str] = {}
    for engine, kind in kinds.items():
        own = kind.settings.model_fields
        clash = next((name for name, info in own.items() if not _fits(name, info, fields, taken)), None)
        if clash is not None:
            clashes[engine] = f"the {engine} engine: its setting {clash!r} already means something else: rename it"
            continue
        for name, info in own.items():
            owners[name] = (*owners.get(name, ()), engine)
            fields.setdefault(name, (info.rebuild_annotation(), _in_group(info, f"{engine} engine")))
    for name, (_, info) in fields.items():
        if owners[name][1:]:
            info.description = f"{info.description} (of {', '.join(owners[name][1:])}, too)"
    return SideBySide(fields, owners, clashes)


def _fits(name: str, info: FieldInfo, fields: Fields, taken: type[BaseModel]) -> bool:
    if name in fields:
        return bool(fields[name][0] == info.rebuild_annotation())
    return name not in taken.model_fields and not hasattr(taken, name) and not info.is_required()


def _in_group(info: FieldInfo, group: str) -> FieldInfo:
    grouped = copy(info)
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    grouped.json_schema_extra = {**extra, "group": group}
    return grouped
