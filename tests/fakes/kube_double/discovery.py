"""What a server says of itself: versions, groups and resources."""

from __future__ import annotations

from typing import Any

from .kinds import Kind, Kinds

_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_VERSION = {"major": "1", "minor": "34", "gitVersion": "v1.34.0", "platform": "linux/amd64"}


def discovered(kinds: Kinds, path: str) -> dict[str, Any] | None:
    """The answer to a path of discovery; None: it is none."""
    if path == "/version":
        return _VERSION
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    versions = dict.fromkeys(kind.group_version for kind in kinds)
    if path == "/apis":
        groups: dict[str, list[str]] = {}
        for each in versions:
            if "/" in each:
                groups.setdefault(each.partition("/")[0], []).append(each)
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(*item) for item in groups.items()]}
    wanted = path.removeprefix("/apis/").removeprefix("/api/")
    if wanted not in versions:
        return None
    resources = [each for kind in kinds if kind.group_version == wanted for each in _resources(kind)]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": wanted, "resources": resources}


def _group(name: str, versions: list[str]) -> dict[str, Any]:
    listed = [{"groupVersion": each, "version": each.partition("/")[2]} for each in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def _resources(kind: Kind) -> list[dict[str, Any]]:
    own = {"singularName": kind.name.lower(), "namespaced": kind.namespaced, "kind": kind.name, "verbs": _VERBS}
    names = [kind.plural, *([f"{kind.plural}/status"] if kind.has_status else ())]
    shown = [{"name": name, **own} for name in names]
    if kind.short_names:
        shown[0]["shortNames"] = list(kind.short_names)
    return shown
