"""Families that installed distributions bring, by the entry point group `aim_guardrail.families`."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points

from aim_guardrail.detectors.family import Family

GROUP = "aim_guardrail.families"


def installed(taken: Collection[str]) -> tuple[dict[str, Family], dict[str, str]]:
    """The families by name, and why others cannot be used: one line each, for whoever names one.

    Args:
        taken: names that are ours.
    """
    families: dict[str, Family] = {}
    unusable: dict[str, str] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, _origin(point))):
        found = _loaded(point)
        if isinstance(found, str):
            unusable[point.name] = found
        elif point.name in taken:
            unusable.setdefault(point.name, "")  # ours stands
        elif point.name in families or point.name in unusable:
            families.pop(point.name, None)
            unusable[point.name] = f"{_origin(point)} and another distribution both bring it: remove one"
        else:
            families[point.name] = found
    return families, {name: why for name, why in unusable.items() if name not in taken}


def _loaded(point: EntryPoint) -> Family | str:
    try:
        family = point.load()
    except Exception as error:  # noqa: BLE001 - the edge of third-party code: a family that nobody names stops nobody
        return f"{_origin(point)} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if not isinstance(family, Family):
        return f"{_origin(point)} brings {point.value}, which is no aim_guardrail.detectors.family.Family"
    if family.name != point.name:
        return f"{_origin(point)} calls it {family.name!r} itself: the entry point's name must be the family's"
    return family


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
