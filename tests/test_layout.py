"""The house stands as drawn: source roots hold packages, the wheel holds all of them, nothing shadows a library."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("runtimes", "transformers", "trainers", "profiles")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


@pytest.mark.parametrize("folder", SOURCE_ROOTS)
def test_source_roots_are_never_packages(folder: str) -> None:
    assert not list((ROOT / folder).glob("*.py")), f"{folder}/ is a source root: a .py file in it shadows libraries"


def test_tests_hold_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/transformers would shadow Hugging Face's package"


def test_test_file_names_are_unique() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_every_package_is_shipped() -> None:
    found = {
        f"{folder}/{path.parent.name}" for folder in SOURCE_ROOTS for path in (ROOT / folder).glob("*/__init__.py")
    }
    assert found == set(PACKAGES), "pyproject's wheel packages: a missing or misspelt one is dropped silently"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_file_of_every_package(wheel: zipfile.ZipFile) -> None:
    shipped = set(wheel.namelist())
    wanted = {
        str(path.relative_to((ROOT / package).parent))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(wanted) > 30
    assert wanted <= shipped
    assert any(name.endswith("licenses/LICENSE") for name in shipped)


def test_console_scripts_exist() -> None:
    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"console script {target}: no such module"
        assert spec.origin is not None
        assert f"def {function}(" in Path(spec.origin).read_text(encoding="utf-8")


def test_lock_pins_every_direct_dependency() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()}
    extras = PROJECT["project"]["optional-dependencies"].values()
    for requirement in [*PROJECT["project"]["dependencies"], *(item for extra in extras for item in extra)]:
        name = requirement.split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip().lower().replace("_", "-")
        assert name in pinned, f"{name} is not in requirements.lock: make lock"
