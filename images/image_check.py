"""Builds the images with buildah on a small local base, starts what each of them starts, and calls it.

The bases of versions.env are tens of gigabytes, so Debian stands in for them here; with torch in it where a base brings
torch. The wheels are fetched once and mounted: the builds themselves need no network.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from image_build import IMAGES, ROOT, Build, revision
from image_install import SBOM_TOOL, normalized

WORK = ROOT / ".run/images"
WHEELS = WORK / "wheels"
MODEL = ROOT / ".models/smollm2"
LOCK = ROOT / "requirements.lock"
BASE, TORCH_BASE = "localhost/aim-base", "localhost/aim-base-torch"
READY_S = 120
#: What each is built with here: vLLM comes with its base, so the runtime is called on llama.cpp.
EXTRAS: Mapping[str, str] = {
    "aim-runtime-cpu": "runtime,cache,tracing,embedded",
    "aim-guardrail": "guardrail,tracing",
    "aim-trainer": "trainer",
    "aim-operator": "operator",
}
_DEBIAN = ("bookworm", "3.11")
_PACKAGES = "python3,python3-pip,ca-certificates"
# Its Python is 3.11.2, which redis wants it for; a newer one here would not fetch it.
_FOR_ITS_PYTHON = "async-timeout"
# AWS's documented example key: a secret that is nobody's.
_SECRET = "My key is AKIAIOSFODNN7EXAMPLE and wJalrXUtnFEMI/K7MDENG/bPxRfiCYzEXAMPLEKEY, what does it open?"


class Failed(Exception):
    """One line that says which image does not do what."""


def check(holds: bool, says: str) -> None:
    """Raises Failed."""
    if not holds:
        raise Failed(says)


class Store:
    """buildah with storage of its own, below .run/: nothing else on the machine sees or loses an image."""

    def __init__(self, folder: Path) -> None:
        # vfs copies every layer whole; it is for kernels, or folders, that take no overlay.
        for driver in ("overlay", "vfs"):
            self.words = ["buildah", "--storage-driver", driver, "--root", str(folder / driver)]
            self.words += ["--runroot", str(folder / f"run-{driver}")]
            if subprocess.run([*self.words, "info"], capture_output=True, check=False).returncode == 0:
                return
        raise Failed("buildah: neither overlay nor vfs storage works here")

    def __call__(self, *words: str, stderr: int | None = None) -> str:
        done = subprocess.run([*self.words, *words], text=True, stdout=subprocess.PIPE, stderr=stderr, check=False)
        check(done.returncode == 0, f"buildah {' '.join(words)}: exit {done.returncode}")
        return done.stdout.strip()

    def has(self, image: str) -> bool:
        return subprocess.run([*self.words, "inspect", "--type", "image", image], capture_output=True).returncode == 0

    @contextmanager
    def container(self, image: str) -> Iterator[Container]:
        name = self("from", "--pull-never", image)
        try:
            yield Container(self, name, json.loads(self("inspect", name))["OCIv1"]["config"])
        finally:
            self("rm", name)


class Container(NamedTuple):
    """A container of an image; config: what the image says of how to start it."""

    store: Store
    name: str
    config: Mapping[str, Any]

    def argv(self, *words: str, mounts: Mapping[Path, str] | None = None) -> list[str]:
        """A command in it, as its own user."""
        volumes = [word for source, target in (mounts or {}).items() for word in ("-v", f"{source}:{target}:ro")]
        return [*self.store.words, "run", "--isolation", "chroot", *volumes, self.name, "--", *words]

    def entry(self, *arguments: str, mounts: Mapping[Path, str] | None = None) -> list[str]:
        """Its entry point with these arguments."""
        return self.argv(*self.config["Entrypoint"], *arguments, mounts=mounts)

    def says(self, *words: str) -> str:
        """What a command prints that must succeed."""
        done = subprocess.run(self.argv(*words), text=True, capture_output=True, check=False)
        check(done.returncode == 0, f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
        return done.stdout.strip()


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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = project["project"]["optional-dependencies"]
    wanted = sorted({each for extra in EXTRAS[name].split(",") for each in optional[extra]})
    wanted += [*project["project"]["dependencies"], *project["build-system"]["requires"], SBOM_TOOL, _FOR_ITS_PYTHON]
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


def build(store: Store, name: str, pip_conf: Path) -> float:
    """Builds it; returns the seconds it took."""
    command = [*store.words, "bud", "--isolation", "chroot", "--pull-never", "--quiet"]
    made = Build(command, "check", "localhost", revision(), pip_conf=pip_conf, wheels=WHEELS)
    base_image = TORCH_BASE if name == "aim-trainer" else BASE
    argv = made.argv(name, base_image, {"EXTRAS": EXTRAS[name], "BUILD_PACKAGES": "", "WITHOUT": ""})
    started = time.monotonic()
    with (WORK / f"{name}.log").open("w") as log:
        code = subprocess.run(argv, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
    check(code == 0, f"{name}: the build failed: {WORK / name}.log")
    return time.monotonic() - started


def inspect(name: str, container: Container) -> int:
    """What holds for all images. Returns how many components its SBOM names."""
    user = container.says("id", "--user")
    check(user == "10001", f"{name}: runs as {user}")
    check("PYTHONSAFEPATH=1" in container.config["Env"], f"{name}: PYTHONSAFEPATH is not set")
    labels = container.config["Labels"]
    check(labels["org.opencontainers.image.title"] == name.removesuffix("-cpu"), f"{name}: labels say {labels}")
    left = container.says("python3", "-c", _LEFT_BEHIND)
    check(not left, f"{name}: left behind by the build: {left}")
    sbom = json.loads(container.says("cat", "/opt/aim/sbom.cdx.json"))
    check(sbom["bomFormat"] == "CycloneDX", f"{name}: no CycloneDX document")
    pins = dict(line.split("==") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    brought = {normalized(each) for each in container.says("/usr/bin/python3", "-c", _DISTRIBUTIONS).split()}
    for component in sbom["components"]:
        at = normalized(component["name"])
        pinned = None if at in brought else pins.get(at)
        is_pinned = pinned is None or component["version"].partition("+")[0] == pinned
        check(is_pinned, f"{name}: {component['name']} {component['version']} is not the lock's {pinned}")
    return len(sbom["components"])


_IMPORT_ALL = """
import importlib, pkgutil, aim_operator
found = [m.name for m in pkgutil.walk_packages(aim_operator.__path__, "aim_operator.") if "__main__" not in m.name]
print(len([importlib.import_module(name) for name in found]))
"""
# What the base has, and keeps.
_DISTRIBUTIONS = "from importlib.metadata import distributions as found; print(*(each.name for each in found()))"
# Files of the build's mounts: certificates, pip's configuration, wheels.
_LEFT_BEHIND = """
from pathlib import Path
for name in ("/etc/pip.conf", "/run/secrets/ca.pem", "/wheels", "/src", "/root/.cache/pip"):
    try:
        path = Path(name)
        if path.is_dir() and any(path.iterdir()) or path.is_file() and path.stat().st_size:
            print(name)
    except PermissionError:
        pass
"""


@contextmanager
def started(container: Container, port: int, path: str, *arguments: str, **options: Any) -> Iterator[float]:
    """Its entry point, running; gives the seconds until `path` answered 200. Ends it by SIGTERM."""
    begun = time.monotonic()
    log = WORK / f"{container.name}.log"
    with log.open("w") as file:
        argv = container.entry(*arguments, **options)
        process = subprocess.Popen(argv, stdout=file, stderr=file, start_new_session=True)
    try:
        while ask(port, "GET", path)[0] != 200:
            check(process.poll() is None, f"{container.name}: ended with exit {process.returncode}: {log}")
            check(time.monotonic() - begun < READY_S, f"{container.name}: not ready after {READY_S} s")
            time.sleep(0.1)
        yield time.monotonic() - begun
    finally:
        # Both: buildah, and what it started in the chroot.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def ask(port: int, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """Status and body of an answer; 0 where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        sent = json.dumps(body) if body else None
        connection.request(method, path, sent, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def free_ports(count: int) -> list[int]:
    """Of this machine: a chroot has the host's network."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def call_servers(runtime: Container, guardrail: Container) -> str:
    """A chat on the runtime, and the same through the guardrail, which lets no secret pass."""
    ports = free_ports(4)
    ready = "/v2/models/smollm2/ready"

    def listens(at: int) -> list[str]:
        name = ["--model_name", "smollm2", "--host", "127.0.0.1"]
        return [*name, "--http_port", str(ports[at]), "--grpc_port", str(ports[at + 1])]

    model = {"mounts": {MODEL: "/mnt/models"}}
    before = ["--predictor_host", f"127.0.0.1:{ports[0]}"]
    with (
        started(runtime, ports[0], ready, "--model_dir", "/mnt/models", *listens(0), **model) as first,
        started(guardrail, ports[2], ready, *before, *listens(2)) as second,
    ):
        for port in (ports[0], ports[2]):
            status, text = chat(port, "What is a GPU?")
            check(status == 200 and "completion_tokens" in text, f"chat: {status} {text}")
        status, text = chat(ports[2], _SECRET)
        check(status == 400 and "content_filter" in text, f"guardrail: a secret was answered by {status} {text}")
    return f"runtime ready in {first:.1f} s, guardrail in {second:.1f} s; a chat each, a secret refused"


def chat(port: int, says: str) -> tuple[int, str]:
    """An answer of eight tokens."""
    messages = [{"role": "user", "content": says}]
    return ask(port, "POST", "/v1/chat/completions", {"model": "smollm2", "messages": messages, "max_tokens": 8})


def call_trainer(container: Container) -> str:
    """It reads the sample's every row, and its torch is the base's."""
    mounts = {ROOT / "docs/samples": "/workspace/docs/samples", MODEL: "/workspace/.models/smollm2"}
    argv = container.entry("validate", "docs/samples/finetuning/job.yaml", mounts=mounts)
    done = subprocess.run(argv, text=True, capture_output=True, check=False)
    check(done.returncode == 0, f"aim-trainer validate: exit {done.returncode}: {done.stderr[-400:]}")
    torch = container.says("python", "-c", "import torch; print(torch.__version__, torch.__file__)")
    check("/opt/aim" not in torch, f"aim-trainer: the base's torch was replaced: {torch}")
    return f"{' '.join(done.stdout.split())[:60]}; torch {torch.split()[0]} is the base's"


def call_operator(container: Container) -> str:
    """It starts and says what it takes, and nothing that it imports later is missing."""
    done = subprocess.run(container.entry("--help"), text=True, capture_output=True, check=False)
    check(done.returncode == 0, f"aim-operator --help: exit {done.returncode}: {done.stderr[-400:]}")
    modules = container.says("python", "-c", _IMPORT_ALL)
    return f"--help answers, {modules} modules import"


def call(store: Store, names: Sequence[str]) -> dict[str, str]:
    """What each image did, by its name. The runtime's is called with the guardrail's in front of it."""
    found: dict[str, str] = {}
    alone: Mapping[str, Callable[[Container], str]] = {"aim-trainer": call_trainer, "aim-operator": call_operator}
    for name in names:
        if name in alone:
            with store.container(f"localhost/{name}:check") as container:
                found[name] = alone[name](container)
    if {"aim-runtime-cpu", "aim-guardrail"} <= set(names):
        with (
            store.container("localhost/aim-runtime-cpu:check") as runtime,
            store.container("localhost/aim-guardrail:check") as guardrail,
        ):
            found["aim-guardrail"] = call_servers(runtime, guardrail)
    return found


def mebibytes(store: Store, name: str) -> float:
    """Of the image's file system, its base included."""
    with store.container(name) as container:
        mounted = Path(store("mount", container.name))
        used = subprocess.run(["du", "-sx", "--block-size=1", mounted], text=True, stdout=subprocess.PIPE, check=True)
        store("umount", container.name, stderr=subprocess.DEVNULL)
    return int(used.stdout.split()[0]) / 2**20


def main() -> int:
    """Exits 1 with one line where an image does not build, start or do what it should."""
    parser = argparse.ArgumentParser(prog="image_check", description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"some of: {', '.join(EXTRAS)} (default: all)")
    asked = parser.parse_args()
    names = asked.name or [name for name in EXTRAS if name in IMAGES]
    try:
        return run(names)
    except Failed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1


def run(names: Sequence[str]) -> int:
    """Builds and calls them; prints a row for each."""
    check(sys.version.startswith(_DEBIAN[1]), f"the wheels are for Python {_DEBIAN[1]}, and this is {sys.version}")
    missing = [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]
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
    pip_conf = WORK / "pip.conf"
    pip_conf.write_text("[global]\nno-index = true\n", encoding="utf-8")
    print(f"    {time.monotonic() - begun:.0f} s", flush=True)
    for name in names:
        took = build(store, name, pip_conf)
        with store.container(f"localhost/{name}:check") as container:
            components = inspect(name, container)
        size = mebibytes(store, f"localhost/{name}:check")
        print(f"{name:16} built in {took:4.0f} s  {size:6.0f} MiB  {components:3} components", flush=True)
    for name, did in call(store, names).items():
        print(f"{name:16} {did}", flush=True)
    store("rmi", "--prune")
    print(f"==> {len(names)} images in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
