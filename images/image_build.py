"""Builds the project's images with docker (buildx), podman or buildah, whichever works here: `make images`.

What differs between the engines is a command's words; the Dockerfiles, and what they are given, are the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENGINES: Mapping[str, tuple[str, ...]] = {
    "docker": ("docker", "buildx", "build", "--load"),
    "podman": ("podman", "build"),
    "buildah": ("buildah", "bud"),
}
#: What must succeed before an engine is chosen: a client without its daemon is none.
_PROBES: Mapping[str, Sequence[Sequence[str]]] = {
    "docker": (("docker", "info"), ("docker", "buildx", "version")),
    "podman": (("podman", "info"),),
    "buildah": (("buildah", "info"),),
}


#: What a release is built by: pushed, with buildx's own SBOM (system packages, too) and provenance beside it.
_PUSHED = "type=registry,rewrite-timestamp=true"
_RELEASE = ("docker", "buildx", "build", "--output", _PUSHED, "--sbom=true", "--provenance=mode=max")


class Image(NamedTuple):
    """One image. folder: below images/; base: of versions.env; extras: other than the Dockerfile's own;
    arguments: of the Dockerfile."""

    folder: str
    base: str
    extras: str | None = None
    arguments: Mapping[str, str] = {}


IMAGES: Mapping[str, Image] = {
    "aim-runtime": Image("runtime", "RUNTIME"),
    "aim-runtime-cpu": Image(
        "runtime",
        "RUNTIME_CPU",
        "runtime,cache,tracing,embedded,vllm",
        {
            "BUILD_PACKAGES": "build-essential cmake ninja-build",  # llama.cpp is compiled
            "PIP_EXTRA_INDEX_URL": "https://download.pytorch.org/whl/cpu",
        },
    ),
    "aim-runtime-sglang": Image("runtime", "RUNTIME_SGLANG"),
    "aim-guardrail": Image("guardrail", "GUARDRAIL"),
    "aim-trainer": Image("trainer", "TRAINER"),
    "aim-operator": Image("operator", "OPERATOR"),
}


@dataclass(frozen=True)
class Build:
    """What a build is given beside the Dockerfile. Empty: not given.

    command: the engine's, up to the options; registry: in front of the image's name; epoch: what all times in the image
    are, seconds since 1970; ca: a bundle of certificates and pip_conf: pip's configuration, both there while pip runs
    and in no layer; wheels: a folder that pip looks into.
    """

    command: Sequence[str]
    tag: str
    registry: str = ""
    revision: str = ""
    source: str = ""
    epoch: int = 0
    ca: Path | None = None
    pip_conf: Path | None = None
    wheels: Path | None = None

    def reference(self, name: str) -> str:
        """registry/name:tag."""
        return f"{self.registry.rstrip('/')}/{name}:{self.tag}".removeprefix("/")

    def argv(self, name: str, base_image: str, arguments: Mapping[str, str]) -> list[str]:
        """The command that builds `name`."""
        image = IMAGES[name]
        given = {"BASE_IMAGE": base_image, "VERSION": self.tag, "REVISION": self.revision, "SOURCE": self.source}
        given |= {**image.arguments, **({"EXTRAS": image.extras} if image.extras else {}), **arguments}
        if self.epoch:
            given["SOURCE_DATE_EPOCH"] = str(self.epoch)
        words = [*self.command, "--file", f"images/{image.folder}/Dockerfile", "--tag", self.reference(name)]
        for key, value in given.items():
            words += ["--build-arg", f"{key}={value}"]
        if self.epoch and self.command[0] != "docker":  # which takes the argument's
            words += ["--timestamp", str(self.epoch)]
        if self.wheels:
            words += ["--build-context", f"wheels={self.wheels}"]
        for secret, path in (("ca", self.ca), ("pip.conf", self.pip_conf)):
            if path:
                words += ["--secret", f"id={secret},src={path}"]
        return [*words, "."]


def versions(text: str) -> dict[str, str]:
    """versions.env's bases by key (RUNTIME, …): the tag, and the digest where one is noted."""
    lines = [line.partition("=") for line in text.splitlines() if line and not line.startswith("#")]
    values = {key: value for key, _, value in lines}
    return {
        key.removesuffix("_BASE_IMAGE"): f"{value}@{digest}" if (digest := values[_digest(key)]) else value
        for key, value in values.items()
        if key.endswith("_BASE_IMAGE")
    }


def _digest(key: str) -> str:
    return key.removesuffix("IMAGE") + "DIGEST"


def working_engine() -> str:
    """The first engine that answers. Exits where none does."""
    for name, probes in _PROBES.items():
        if shutil.which(name) and all(
            subprocess.run(probe, capture_output=True, check=False).returncode == 0 for probe in probes
        ):
            return name
    sys.exit(
        "error: neither docker with buildx, podman nor buildah works here: install one (make images-deps: buildah)"
    )


def release() -> str:
    """The version of pyproject.toml: what the manifests' tags say."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return version


def revision() -> str:
    """The commit that is built; empty outside of git."""
    return _of_the_commit("%H")


def epoch() -> int:
    """When it was made, in seconds since 1970: two builds of it have the same times in them. 0 outside of git."""
    return int(_of_the_commit("%ct") or 0)


@functools.cache
def _of_the_commit(what: str) -> str:
    command = ["git", "log", "-1", f"--format={what}"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else ""


@contextmanager
def pip_conf(given: Path | None, ca: Path | None) -> Iterator[Path | None]:
    """pip's configuration for a build: the one that is given, or one that names the certificates."""
    if given or not ca:
        yield given
        return
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write("[global]\ncert = /run/secrets/ca.pem\n")
        file.flush()
        yield Path(file.name)


def run(argv: Sequence[str]) -> None:
    """In the project's folder. Exits with the command's own code where it fails."""
    if code := subprocess.run(argv, cwd=ROOT, check=False).returncode:
        sys.exit(code)


def release_image(argv: Sequence[str], reference: str) -> None:
    """Pushes it, and signs what was pushed: a tag may be moved between the two, a digest may not."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        run([*argv[:-1], "--metadata-file", file.name, argv[-1]])
        digest = json.loads(Path(file.name).read_text(encoding="utf-8"))["containerimage.digest"]
    run(["cosign", "sign", "--yes", f"{reference.rpartition(':')[0]}@{digest}"])


def _readable(text: str) -> Path:
    path = Path(text).resolve()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} is not there")
    return path


def main() -> None:
    """Builds the images that are named, or all; the first that fails ends it."""
    parser = argparse.ArgumentParser(prog="image_build", description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"some of: {', '.join(IMAGES)} (default: all)")
    parser.add_argument("--engine", choices=ENGINES, default=None)
    parser.add_argument("--registry", default="", help="in front of the names: registry.example.com/llm")
    parser.add_argument("--release", action="store_true", help="push with SBOM and provenance, sign by digest (cosign)")
    parser.add_argument("--tag", default=release())
    parser.add_argument("--source", default="", help="the repository's address, for a label")
    parser.add_argument("--base-image", default="", help="instead of versions.env's; for one image")
    parser.add_argument("--extras", default="", help="of pyproject.toml, instead of the image's own; for one image")
    parser.add_argument("--ca", type=_readable, default=None, help="a bundle of certificates that pip trusts")
    parser.add_argument("--pip-conf", type=_readable, default=None)
    parser.add_argument("--wheels", type=_readable, default=None, help="a folder of wheels")
    asked = parser.parse_args()
    names = asked.name or list(IMAGES)
    if unknown := sorted(set(names) - IMAGES.keys()):
        parser.error(f"no image is called {unknown[0]!r}; there are: {', '.join(IMAGES)}")
    if len(names) != 1 and (asked.base_image or asked.extras):
        parser.error("--base-image and --extras are of one image: name it")
    if asked.release and not asked.registry:
        parser.error("--release pushes: say where to by --registry")
    bases = versions((ROOT / "images/versions.env").read_text(encoding="utf-8"))
    command = _RELEASE if asked.release else ENGINES[asked.engine or working_engine()]
    with pip_conf(asked.pip_conf, asked.ca) as conf:
        made_of = (revision(), asked.source, epoch())
        build = Build(command, asked.tag, asked.registry, *made_of, asked.ca, conf, asked.wheels)
        for name in names:
            base = asked.base_image or bases[IMAGES[name].base]
            argv = build.argv(name, base, {"EXTRAS": asked.extras} if asked.extras else {})
            print(f"==> {build.reference(name)} on {base}", flush=True)
            if asked.release:
                release_image(argv, build.reference(name))
            else:
                run(argv)


if __name__ == "__main__":
    main()
