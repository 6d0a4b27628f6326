"""Files of a Kustomize folder: marked as made, and patches of ClusterServingRuntimes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from aim_profile.files.write import dump, dump_all

from .generated import MARK
from .kserve import Document
from .serving_runtime import release


def folder_of(path: str, documents: Mapping[str, Sequence[Document]], images: Iterable[str] = ()) -> dict[str, str]:
    """A Kustomize folder: each file's objects, and the list of the files."""
    files = {f"{path}/{name}.yaml": marked(dump_all(each)) for name, each in documents.items()}
    names = [PurePosixPath(name).name for name in files]
    return {f"{path}/kustomization.yaml": kustomization(names, images), **files}


def kustomization(resources: Sequence[str], images: Iterable[str] = (), patches: Sequence[dict[str, Any]] = ()) -> str:
    """A kustomization.yaml. images: those that its objects name, by our names and this version's tag."""
    body: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(resources),
    }
    # A tag here is where a user's registry goes, too: newName.
    if listed := [{"name": name, "newTag": release()} for name in images]:
        body["images"] = listed
    if patches:
        body["patches"] = list(patches)
    return marked(dump(body))


def marked(text: str) -> str:
    """With the line that says who made it."""
    return f"# {MARK}\n{text}"


def dropped(name: str) -> dict[str, Any]:
    """The patch that leaves a runtime of the base out."""
    gone = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ClusterServingRuntime",
        "metadata": {"name": name},
        "$patch": "delete",
    }
    return {"target": {"kind": "ClusterServingRuntime", "name": f"^{name}$"}, "patch": dump(gone)}


def added(path: str, value: Any) -> dict[str, Any]:
    """A JSON patch's operation."""
    return {"op": "add", "path": path, "value": value}


def patched(names: str, operations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A JSON patch of the runtimes whose names the expression is of."""
    return {"target": {"kind": "ClusterServingRuntime", "name": names}, "patch": dump(list(operations))}
