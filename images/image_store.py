"""Images and containers of the check: buildah builds and mounts them, crun runs them as a pod would.

A container gets what the restricted Pod Security Standard leaves it: a user of the cluster's choice, no capability, no
new privileges; and a root file system that is read-only, as the operator's Deployment asks for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

#: As OpenShift chooses one: in group 0, and in no image's /etc/passwd.
USER = 1000650000
# crun 1.8 starts nothing where both versions of cgroups are mounted; in a mount namespace of its own there is one.
_ONE_HIERARCHY = 'umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'


class Failed(Exception):
    """One line that says which image does not do what."""


def check(holds: bool, says: str) -> None:
    """Raises Failed."""
    if not holds:
        raise Failed(says)


class Store:
    """buildah with storage of its own, below .run/: nothing else on the machine sees or loses an image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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

    def document(self, image: str) -> dict[str, Any]:
        """Configuration, history and layers of an image."""
        found: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))
        return found

    def mebibytes(self, image: str) -> float:
        """Of the image's file system, its base included."""
        with self.container(image) as made:
            used = subprocess.run(["du", "-sx", "--block-size=1", made.root], stdout=subprocess.PIPE, check=True)
        return int(used.stdout.split()[0]) / 2**20

    @contextmanager
    def container(self, image: str) -> Iterator[Container]:
        """Its file system is mounted as long as this lasts."""
        name = self("from", "--pull-never", image)
        try:
            yield Container(self, name, Path(self("mount", name)), self.document(image)["OCIv1"]["config"])
        finally:
            self("umount", name)
            self("rm", name)


class Container(NamedTuple):
    """A container of an image; config: what the image says of how to start it."""

    store: Store
    name: str
    root: Path
    config: Mapping[str, Any]

    @contextmanager
    def process(self, *words: str, output: int | Any, **options: Mapping[Any, str]) -> Iterator[Process]:
        """A command in it; killed at the end, where it is still there. options: mounts, environment."""
        bundle = self.store.folder / "bundles" / f"{self.name}-{time.monotonic_ns()}"
        bundle.mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps(specification(self, words, **options)), encoding="utf-8")
        crun = ["crun", "--cgroup-manager=disabled", "--root", str(self.store.folder / "crun"), "run"]
        crun += ["--bundle", str(bundle), "--pid-file", str(bundle / "pid"), bundle.name]
        argv = ["unshare", "--mount", "sh", "-c", _ONE_HIERARCHY, "sh", *crun]
        started = Process(subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT), bundle / "pid")
        try:
            yield started
        finally:
            started.kill()

    def says(self, *words: str, **options: Mapping[Any, str]) -> str:
        """What a command prints that must succeed."""
        with self.process(*words, output=subprocess.PIPE, **options) as process:
            told = process.crun.communicate()[0].decode(errors="replace").strip()
        code = process.crun.returncode
        check(code == 0, f"{self.name}: {' '.join(words)}: exit {code}: {told[-400:]}")
        return told

    def entry(self, *arguments: str) -> Sequence[str]:
        """Its entry point with these arguments."""
        return [*self.config["Entrypoint"], *arguments]


class Process(NamedTuple):
    """crun, and the file in which it says what process it started: number 1 of its own."""

    crun: subprocess.Popen[bytes]
    pid: Path

    def stop(self, grace_s: float) -> float:
        """SIGTERM, as a pod's end begins; the seconds it took. Raises Failed: not within grace_s, or not in order."""
        begun = time.monotonic()
        os.kill(int(self.pid.read_text()), signal.SIGTERM)
        try:
            code = self.crun.wait(grace_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.pid.parent.name}: SIGTERM did not end it within {grace_s:.0f} s") from None
        check(code in (0, 128 + signal.SIGTERM), f"{self.pid.parent.name}: exit {code} after SIGTERM")
        return time.monotonic() - begun

    def kill(self) -> None:
        """Nothing where it has ended."""
        if self.crun.poll() is None and self.pid.exists():
            os.kill(int(self.pid.read_text()), signal.SIGKILL)
        self.crun.wait()


def specification(
    container: Container,
    words: Sequence[str],
    mounts: Mapping[Path, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Of the Open Container Initiative's runtimes. mounts: read-only, host's path: path inside."""
    config = container.config
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(container.root), "readonly": True},
        "process": {
            "user": {"uid": USER, "gid": 0},
            "args": [*words],
            "env": [*config["Env"], *(f"{key}={value}" for key, value in (environment or {}).items())],
            "cwd": config["WorkingDir"],
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "ro"]},
            # Its own devices stand in /dev.
            *(
                _memory("/dev", "mode=755"),
                _memory("/dev/shm", "mode=1777", "nodev"),
                _memory("/tmp", "mode=1777", "nodev"),
            ),
            *(
                {"destination": inside, "type": "bind", "source": str(path), "options": ["bind", "ro"]}
                for path, inside in (mounts or {}).items()
            ),
        ],
        # The host's network: the check asks on 127.0.0.1.
        "linux": {"namespaces": [{"type": each} for each in ("pid", "mount", "ipc", "uts")]},
    }


def _memory(path: str, *options: str) -> dict[str, Any]:
    return {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", *options]}
