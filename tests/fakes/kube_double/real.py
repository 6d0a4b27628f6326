"""A real API server for the tests marked `cluster`: etcd and kube-apiserver, as Kubernetes' envtest has them.

    export KUBEBUILDER_ASSETS=$(setup-envtest use -p path 1.35)
    pytest -m cluster tests/operator tests/manifests

A server of its own for each test or file, gone with it. There is no controller beside it: nothing collects what is
owned, schedules or runs; tests that need one are not marked. A cluster of yours (kind) is nothing for these tests: they
make KServe's definitions and delete nothing.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from ports import free_ports

#: How long a server may take to be ready, seconds.
_PATIENCE_S = 120


class RealServer(NamedTuple):
    """url: plain HTTP to it (kubectl proxy); kubeconfig: of its administrator; restart: it ends and is there again, and
    remembers no change: who watches from before is told 410."""

    url: str
    kubeconfig: Path
    restart: Callable[[], None]


@contextmanager
def real_server(assets: Path, folder: Path) -> Iterator[RealServer]:
    """Both programs, ready, and ended."""
    client, peer, secure = free_ports(3)
    etcd = [
        str(assets / "etcd"),
        *(f"--data-dir={folder / 'etcd'}", f"--listen-client-urls=http://127.0.0.1:{client}"),
        *(f"--advertise-client-urls=http://127.0.0.1:{client}", f"--listen-peer-urls=http://127.0.0.1:{peer}"),
        "--unsafe-no-fsync",
    ]
    with ExitStack() as ended:
        ended.enter_context(_running(etcd, folder / "etcd.log"))
        command = _api_server(assets, folder, client, secure)
        runs = ended.enter_context(ExitStack())

        def start() -> None:
            runs.close()
            runs.enter_context(_running(command, folder / "kube-apiserver.log"))
            _wait_ready(f"https://127.0.0.1:{secure}/readyz")

        start()
        kubeconfig = _kubeconfig(folder, secure)
        yield RealServer(ended.enter_context(_proxy(kubeconfig)), kubeconfig, start)


def _api_server(assets: Path, folder: Path, etcd: int, secure: int) -> list[str]:
    key = rsa.generate_private_key(65537, 2048)
    pem, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    signing = folder / "service-accounts.key"
    signing.write_bytes(key.private_bytes(pem, plain, serialization.NoEncryption()))
    tokens = folder / "tokens.csv"
    tokens.write_text('test,kubernetes-admin,1,"system:masters"\n', encoding="utf-8")
    return [
        str(assets / "kube-apiserver"),
        *(f"--etcd-servers=http://127.0.0.1:{etcd}", f"--secure-port={secure}", "--bind-address=127.0.0.1"),
        *(f"--cert-dir={folder}", f"--token-auth-file={tokens}", "--authorization-mode=RBAC"),
        *("--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={signing}"),
        *(f"--service-account-signing-key-file={signing}", "--service-cluster-ip-range=10.0.0.0/24"),
        # Nobody makes accounts' tokens here, nor takes the taint off a new node; owners are checked as OpenShift does.
        "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
        "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
    ]


def _kubeconfig(folder: Path, port: int) -> Path:
    name = "envtest"
    body = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": name, "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}}
        ],
        "users": [{"name": name, "user": {"token": "test"}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "default"}}],
        "current-context": name,
    }
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(body), encoding="utf-8")
    return file


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[None]:
    with log.open("ab") as told:
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def _proxy(kubeconfig: Path) -> Iterator[str]:
    command = ["kubectl", "--kubeconfig", str(kubeconfig), "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
            if found is None:
                raise AssertionError("kubectl proxy does not say where it listens")
            yield f"http://{found[0]}"
        finally:
            process.kill()


def _wait_ready(url: str) -> None:
    """Asked again until it is: it has no other way to say so."""
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        try:
            if httpx.get(url, verify=False, headers={"Authorization": "Bearer test"}).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} was not ready within {_PATIENCE_S} s: see kube-apiserver.log beside its kubeconfig")
