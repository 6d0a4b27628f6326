"""Patches: merge (RFC 7386), JSON (RFC 6902), and server-side apply with its owners of fields.

Apply owns mappings field by field and lists whole: keys of list maps (`x-kubernetes-list-type: map`) and strategic
merge are not known here; a strategic patch is taken as a merge patch.
"""

from __future__ import annotations

import copy
from typing import Any

import jsonpatch

from .refusal import Refusal

Path = tuple[str, ...]
_NOT_OWNED = ("apiVersion", "kind")
_OWNED_METADATA = ("labels", "annotations", "finalizers", "ownerReferences")


def merged(target: Any, patch: Any) -> Any:
    """target with a merge patch, as a new value. Directives of strategic patches (`$setElementOrder…`) are dropped."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None or key.startswith("$"):
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def edited(target: dict[str, Any], operations: list[dict[str, Any]]) -> dict[str, Any]:
    """target with a JSON patch, as a new value. Raises Refusal 422."""
    try:
        result: dict[str, Any] = jsonpatch.apply_patch(target, operations)
    except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
        raise Refusal(
            422, "Invalid", f"the server rejected our request due to an error in our request: {error}"
        ) from None
    return result


def applied(
    stored: dict[str, Any] | None, wanted: dict[str, Any], manager: str, subresource: str, *, force: bool
) -> dict[str, Any]:
    """stored with what `manager` applies; what it applied before and no longer does goes, unless another owns it.

    Raises Refusal 409 where another owns a field that would change, unless forced.
    """
    before = stored or {"metadata": {}}
    owners, mine = _owners(before), _owned_paths(wanted)
    others = {key: paths for key, paths in owners.items() if key[0] != manager or key[1] != "Apply"}
    clashes = [
        (key[0], path)
        for key, paths in others.items()
        for path in paths & mine
        if _at(before, path) != _at(wanted, path)
    ]
    if clashes and not force:
        told = "; ".join(f'conflict with "{name}": .{".".join(path)}' for name, path in clashes)
        raise Refusal(409, "Conflict", f"Apply failed with {len(clashes)} conflict(s): {told}")
    for paths in others.values():
        paths -= {path for _, path in clashes}
    result = copy.deepcopy(before)
    for path in owners.get((manager, "Apply", subresource), set()) - mine:
        if not any(path in paths for paths in others.values()):
            _remove(result, path)
    result = merged(result, wanted)
    _write_owners(result, others | {(manager, "Apply", subresource): mine})
    return result


def owned_by_writer(before: dict[str, Any] | None, after: dict[str, Any], manager: str, subresource: str) -> None:
    """Writes into `after` that `manager` now owns what it changed without applying."""
    owners = _owners(before or {})
    changed = {path for path in _owned_paths(after) if _at(before, path) != _at(after, path)}
    gone = {path for paths in owners.values() for path in paths if _at(after, path) is None}
    for paths in owners.values():
        paths -= changed | gone
    owners.setdefault((manager, "Update", subresource), set()).update(changed)
    _write_owners(after, owners)


def _owned_paths(document: dict[str, Any]) -> set[Path]:
    body = {key: value for key, value in document.items() if key not in (*_NOT_OWNED, "metadata")}
    metadata = {key: value for key, value in document.get("metadata", {}).items() if key in _OWNED_METADATA}
    return {path for path in _leaves(body) if path} | {("metadata", *path) for path in _leaves(metadata) if path}


def _leaves(value: Any, at: Path = ()) -> set[Path]:
    if isinstance(value, dict) and value:
        return set().union(*(_leaves(inner, (*at, key)) for key, inner in value.items()))
    return {at}


def _at(document: Any, path: Path) -> Any:
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _remove(document: Any, path: Path) -> None:
    holder = _at(document, path[:-1])
    if isinstance(holder, dict):
        holder.pop(path[-1], None)


Owners = dict[tuple[str, str, str], set[Path]]


def _owners(document: dict[str, Any]) -> Owners:
    entries = document.get("metadata", {}).get("managedFields") or []
    return {
        (each["manager"], each["operation"], each.get("subresource", "")): _read(each["fieldsV1"]) for each in entries
    }


def _write_owners(document: dict[str, Any], owners: Owners) -> None:
    document["metadata"]["managedFields"] = [
        {
            "manager": manager,
            "operation": operation,
            **({"subresource": subresource} if subresource else {}),
            "fieldsType": "FieldsV1",
            "fieldsV1": _written(paths),
        }
        for (manager, operation, subresource), paths in owners.items()
        if paths
    ]


def _written(paths: set[Path]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path in sorted(paths):
        at = tree
        for key in path:
            at = at.setdefault(f"f:{key}", {})
    return tree


def _read(tree: dict[str, Any]) -> set[Path]:
    return {tuple(key.removeprefix("f:") for key in path) for path in _leaves(tree) if path}
