"""Builds the images with buildah on a small local base, starts what each of them starts, and calls it.

The bases of versions.env are tens of gigabytes, so Debian stands in for them here; with torch in it where a base brings
torch. The wheels are fetched once and mounted: the builds themselves need no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from image_build import ROOT, Build, epoch, revision
from image_calls import call_guardrail, call_operator, call_runtime, call_trainer, import_all
from image_install import SBOM_TOOL, normalized, requirements
from image_store import Container, Failed, Store, check

WORK = ROOT / ".run/images"
WHEELS = WORK / "wheels"
LOCK = ROOT / "requirements.lock"
BASE, TORCH_BASE = "localhost/aim-base", "localhost/aim-base-torch"
#: What each is built with here: vLLM comes with its base, so the runtime is called on llama.cpp.
EXTRAS: Mapping[str, str] = {
    "aim-runtime-cpu": "runtime,cache,tracing,embedded",
    "aim-guardrail": "guardrail,tracing",
    "aim-trainer": "trainer",
    "aim-operator": "operator",
}
#: What each must be able to import, to the last module.
PACKAGES: Mapping[str, Sequence[str]] = {
    "aim-runtime-cpu": ("aim_kserve", "aim_runtime"),
    "aim-guardrail": ("aim_kserve", "aim_guardrail"),
    "aim-trainer": ("aim_trainer",),
    "aim-operator": ("aim_operator",),
}
_DEBIAN = ("bookworm", "3.11")
_PACKAGES = "python3,python3-pip,ca-certificates"
# Its Python is 3.11.2, which redis wants it for; a newer one here would not fetch it.
_FOR_ITS_PYTHON = "async-timeout"
# In the certificates and in pip's configuration of each build; in no image.
_CANARY = "what-no-layer-may-hold-6f1d2c"


class Row(NamedTuple):
    """What is known of an image that was checked. Sizes are MiB of its file system, of it the base's; packages: those
    of its SBOM; again: what a second build differs in, None: none was asked for."""

    image: str
    build_s: float
    check_s: float
    size_mib: float
    base_mib: float
    packages: int
    did: str
    again: str | None


def base(store: Store) -> None:
    """Debian with Python, made once; where it is there, nothing is done."""
    if store.has(BASE):
        return
    root, context = WORK / "debian", WORK / "base"
    shutil.rmtree(root, ignore_errors=True)
    context.mkdir(parents=True, exist_ok=True)
    # No terminal and no locale: debconf would ask.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    debootstrap = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _DEBIAN[0], str(root)]
    check(subprocess.run(debootstrap, env=environment, check=False).returncode == 0, "debootstrap: it failed")
    subprocess.run(["tar", "-C", str(root), "--one-file-system", "-cf", str(context / "base.tar"), "."], check=True)
    (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n", encoding="utf-8")
    store("bud", "--isolation", "chroot", "--tag", BASE, str(context), stderr=subprocess.DEVNULL)
    shutil.rmtree(root)
    shutil.rmtree(context)


def torch_base(store: Store) -> None:
    """The same with torch, as rocm/pytorch has it: what a base brings must not be replaced."""
    if store.has(TORCH_BASE):
        return
    (pin,) = (line for line in LOCK.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    context = WORK / "torch"
    context.mkdir(exist_ok=True)
    install = f"pip install --no-cache-dir --break-system-packages --no-index --find-links /wheels {pin}"
    (context / "Dockerfile").write_text(
        f"FROM scratch AS wheels\nFROM {BASE}\nRUN --mount=type=bind,from=wheels,target=/wheels {install}\n"
    )
    options = ("--isolation", "chroot", "--pull-never", "--build-context", f"wheels={WHEELS}")
    store("bud", *options, "--tag", TORCH_BASE, str(context), stderr=subprocess.DEVNULL)


def wheels(name: str) -> None:
    """What an image is installed from, as the lock pins it: fetched, and compiled, where it is not there yet."""
    pyproject = ROOT / "pyproject.toml"
    build_system = tomllib.loads(pyproject.read_text(encoding="utf-8"))["build-system"]
    wanted = [*requirements(EXTRAS[name].split(","), pyproject), *build_system["requires"], SBOM_TOOL, _FOR_ITS_PYTHON]
    stamp = WHEELS / f"{name}.made-of"
    made_of = hashlib.sha256("\n".join([*wanted, LOCK.read_text(encoding="utf-8")]).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == made_of:
        return
    WHEELS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--progress-bar", "off", "--constraint", str(LOCK)]
    done = subprocess.run([*command, "--wheel-dir", str(WHEELS), *wanted], check=False)
    check(done.returncode == 0, "pip wheel: it failed")
    stamp.write_text(made_of)


def lint() -> None:
    """hadolint and trivy find nothing in the Dockerfiles. trivy's checks are those that it brings: no network."""
    folder = Path(sys.executable).parent
    dockerfiles = [str(path) for path in (ROOT / "images").glob("*/Dockerfile")]
    trivy = ["config", "--skip-check-update", "--quiet", "--exit-code", "1", "--ignorefile", "images/.trivyignore"]
    for tool, arguments in (("hadolint", dockerfiles), ("trivy", [*trivy, "images"])):
        command = [str(folder / tool), *arguments]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
        check(done.returncode == 0, f"{tool}: exit {done.returncode}\n{done.stdout}{done.stderr}")


def build(store: Store, name: str, tag: str) -> float:
    """Builds it; returns the seconds it took."""
    command = [*store.words, "bud", "--isolation", "chroot", "--pull-never", "--quiet"]
    made = Build(command, tag, "localhost", revision(), epoch=epoch(), wheels=WHEELS, **secrets())
    argv = made.argv(name, base_of(name), {"EXTRAS": EXTRAS[name], "BUILD_PACKAGES": ""})
    started = time.monotonic()
    with (WORK / f"{name}.log").open("w") as log:
        code = subprocess.run(argv, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
    check(code == 0, f"{name}: the build failed: {WORK / name}.log")
    return time.monotonic() - started


def base_of(name: str) -> str:
    """What stands in for the image's base here."""
    return TORCH_BASE if name == "aim-trainer" else BASE


def secrets() -> dict[str, Path]:
    """Certificates and pip's configuration, the canary in both; pip asks no index."""
    ca, pip_conf = WORK / "ca.pem", WORK / "pip.conf"
    ca.write_text(f"# {_CANARY}\n", encoding="utf-8")
    index = f"https://someone:{_CANARY}@index.example.com/simple"
    pip_conf.write_text(f"[global]\nno-index = true\nextra-index-url = {index}\n", encoding="utf-8")
    return {"ca": ca, "pip_conf": pip_conf}


def inspect(name: str, document: Mapping[str, Any], container: Container) -> int:
    """What holds for all images. Returns how many packages its SBOM names."""
    config, labels = container.config, container.config["Labels"]
    check(config["User"] == "10001:0", f"{name}: is started as {config['User']}")
    check("PYTHONSAFEPATH=1" in config["Env"], f"{name}: PYTHONSAFEPATH is not set")
    said = {key.removeprefix("org.opencontainers.image."): value for key, value in labels.items()}
    wanted = {"title": name.removesuffix("-cpu"), "revision": revision(), "base.name": base_of(name)}
    check(wanted.items() <= said.items(), f"{name}: labels say {said}")
    check(container.says("id", "-G") == "0", f"{name}: other groups than 0")
    no_secrets(name, document, container)
    return sbom(name, container)


def no_secrets(name: str, document: Mapping[str, Any], container: Container) -> None:
    """Neither the canary, nor a file of the build's mounts. All that the last stage makes is one layer here."""
    check(_CANARY not in json.dumps(document), f"{name}: a secret of the build is in its configuration or history")
    found = subprocess.run(["grep", "-rlF", "-e", _CANARY, container.root], text=True, stdout=subprocess.PIPE)
    check(found.returncode == 1, f"{name}: secrets of the build are in {found.stdout.split()}")
    mounts = [container.root / path for path in ("etc/pip.conf", "run/secrets", "wheels", "src", "root/.cache")]
    left = [str(path) for path in mounts if path.exists() and _holds(path)]
    check(not left, f"{name}: left behind by the build: {left}")


def _holds(path: Path) -> bool:
    return any(each.is_file() and each.stat().st_size for each in (path, *path.rglob("*")))


def sbom(name: str, container: Container) -> int:
    """The CycloneDX document names what is there, in the lock's versions but for what the base brings."""
    document = json.loads(container.says("cat", "/opt/aim/sbom.cdx.json"))
    check(document["bomFormat"] == "CycloneDX", f"{name}: no CycloneDX document")
    named = {normalized(each["name"]): each["version"] for each in document["components"]}
    there = {normalized(each) for each in container.says("/opt/aim/bin/python", "-c", _DISTRIBUTIONS).split()}
    differ = sorted((named.keys() | {"aim-kserve"}) ^ there)
    check(not differ, f"{name}: only in the CycloneDX document, or only there: {', '.join(differ)}")
    pins = dict(line.split("==") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    brought = {normalized(each) for each in container.says("/usr/bin/python3", "-c", _DISTRIBUTIONS).split()}
    free = brought | {"aim-kserve", _FOR_ITS_PYTHON}
    for at in sorted(named.keys() - free):
        is_pinned = named[at].partition("+")[0] == pins.get(at, "").partition("+")[0]
        check(is_pinned, f"{name}: {at} {named[at]} is not the lock's {pins.get(at, 'anything')}")
    return len(named)


_DISTRIBUTIONS = "from importlib.metadata import distributions as found; print(*(each.name for each in found()))"


def call(store: Store, name: str, container: Container) -> str:
    """What it did."""
    folder = WORK / "calls" / name
    folder.mkdir(parents=True, exist_ok=True)
    import_all(container, PACKAGES[name])
    if name == "aim-trainer":
        return call_trainer(container)
    if name == "aim-operator":
        return call_operator(container, folder)
    if name == "aim-runtime-cpu":
        return call_runtime(container, folder)
    runtime = tagged("aim-runtime-cpu")
    check(store.has(runtime), "aim-guardrail is called in front of aim-runtime-cpu: build that first")
    with store.container(runtime) as behind:
        return call_guardrail(container, folder, behind)


def tagged(name: str, tag: str = "check") -> str:
    """As the store knows it."""
    return f"localhost/{name}:{tag}"


def again(store: Store, name: str) -> str:
    """Builds it a second time, and says in which files the layers differ; empty: their digests are the same."""
    build(store, name, "again")
    first, second = (store.document(tagged(name, tag))["OCIv1"]["rootfs"]["diff_ids"] for tag in ("check", "again"))
    if first == second:
        return ""
    with store.container(tagged(name)) as one, store.container(tagged(name, "again")) as other:
        found = [path for path in differing(one.root, other.root)]
    return f"{len(found)} files differ: {', '.join(found[:8])}" if found else "times or owners of files differ"


def differing(one: Path, other: Path) -> Iterator[str]:
    """Files of other contents, or in one of the two alone, below both."""
    command = ["diff", "--recursive", "--brief", "--no-dereference", one, other]
    told = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    for line in told.splitlines():
        yield line.replace(str(one), "").replace(str(other), "")


def examine(store: Store, name: str, twice: bool) -> Row:
    """Builds, inspects and calls one."""
    took, begun = build(store, name, "check"), time.monotonic()
    with store.container(tagged(name)) as container:
        packages = inspect(name, store.document(tagged(name)), container)
        did = call(store, name, container)
    checked = time.monotonic() - begun
    sizes = [store.mebibytes(image) for image in (tagged(name), base_of(name))]
    return Row(name, took, checked, *sizes, packages, did, again(store, name) if twice else None)


def main() -> int:
    """Exits 1 with one line where an image does not build, start or do what it should."""
    parser = argparse.ArgumentParser(prog="image_check", description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"some of: {', '.join(EXTRAS)} (default: all)")
    parser.add_argument("--twice", action="store_true", help="build each again: are the layers' digests the same?")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.name) - EXTRAS.keys()):
        parser.error(f"no image of the check is called {unknown[0]!r}; there are: {', '.join(EXTRAS)}")
    try:
        return run([name for name in EXTRAS if name in (asked.name or EXTRAS)], asked.twice)
    except Failed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1


def run(names: Sequence[str], twice: bool) -> int:
    """Builds and calls them; prints a row for each, and writes them to .run/images/report.json."""
    check(sys.version.startswith(_DEBIAN[1]), f"the wheels are for Python {_DEBIAN[1]}, and this is {sys.version}")
    missing = [tool for tool in ("buildah", "crun", "debootstrap") if not shutil.which(tool)]
    check(not missing, f"{', '.join(missing)} is not installed: make images-deps")
    WORK.mkdir(parents=True, exist_ok=True)
    store, begun = Store(WORK), time.monotonic()
    print("==> hadolint, trivy; the base, and the wheels", flush=True)
    lint()
    base(store)
    for name in names:
        wheels(name)
    if "aim-trainer" in names:
        torch_base(store)
    print(f"    {time.monotonic() - begun:.0f} s", flush=True)
    print(f"{'image':16} {'build s':>7} {'check s':>7} {'MiB':>5} {'base':>5} {'packages':>8}", flush=True)
    rows = []
    for name in names:
        rows.append(row := examine(store, name, twice))
        sizes = f"{row.size_mib:5.0f} {row.base_mib:5.0f} {row.packages:8}"
        print(f"{name:16} {row.build_s:7.0f} {row.check_s:7.0f} {sizes}  {row.did}", flush=True)
        if row.again is not None:
            print(f"{'':16} built again: {row.again or 'the same digests'}", flush=True)
    store("rmi", "--prune")
    whole = {"revision": revision(), "seconds": time.monotonic() - begun, "images": [row._asdict() for row in rows]}
    (WORK / "report.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print(f"==> {len(names)} images in {whole['seconds']:.0f} s; {WORK / 'report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
