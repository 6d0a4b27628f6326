"""The real operator as a process, with certificates as cert-manager would mount them."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kube_double.cluster import Cluster
from ports import free_ports

WEBHOOKS = "/apis/admissionregistration.k8s.io/v1"


class Operator:
    """A running operator. Its log is in `log`, its audit in `audit`; reports: the URL that pods of jobs tell."""

    def __init__(
        self, process: subprocess.Popen[bytes], ports: tuple[int, int, int], log: Path, audit: Path, authority: Path
    ) -> None:
        http_port, self.webhook_port, report_port = ports
        self.process, self.log, self.audit, self.authority = process, log, audit, authority
        self.url, self.reports = f"http://127.0.0.1:{http_port}", f"https://127.0.0.1:{report_port}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def operator(
    kubernetes: Cluster,
    folder: Path,
    *arguments: str,
    name: str = "operator",
    webhooks: bool = True,
    kubeconfig: Path | None = None,
) -> Iterator[Operator]:
    """Started, its webhooks registered and its controllers at work (unless another leads). Ended either way.

    kubeconfig: of an account that may not register webhooks, as in a cluster: then that is its caller's to do.
    """
    http_port, webhook_port, report_port = free_ports(3)
    log, audit = folder / f"{name}.log", folder / f"{name}-audit.jsonl"
    # What an API server on another machine calls this one; the double is on this one.
    host = os.environ.get("WEBHOOK_HOST", "127.0.0.1")
    flags = ["--host", "0.0.0.0", "--http-port", str(http_port), "--identity", name, "--audit-log", str(audit)]
    flags += ["--lease-duration", "3", "--renew-deadline", "2", "--retry-period", "0.2", "--namespace", "aim-system"]
    if webhooks:
        flags += ["--certificates", str(certificates(folder / "certificates", host))]
        flags += ["--webhook-port", str(webhook_port), "--report-port", str(report_port)]
        flags += ["--report-url", f"https://{host}:{report_port}", *([] if kubeconfig else ["--webhook-host", host])]
    if not kubernetes.exists("/api/v1/namespaces/aim-system"):
        kubernetes.create("/api/v1/namespaces", {"metadata": {"name": "aim-system"}})
    command = [sys.executable, "-W", "error::DeprecationWarning", "-m", "aim_operator", *flags, *arguments]
    with log.open("wb") as told:
        account = {"KUBECONFIG": str(kubeconfig)} if kubeconfig else {}
        environment = kubernetes.environment | account
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=subprocess.STDOUT)
    try:
        if webhooks and not kubeconfig:
            for kind in ("validatingwebhookconfigurations", "mutatingwebhookconfigurations"):
                kubernetes.wait_for(f"{WEBHOOKS}/{kind}", "aim-operator.aim.amd.com", lambda it: it.get("webhooks"))
        ports = http_port, webhook_port, report_port
        yield Operator(process, ports, log, audit, folder / "certificates/ca.crt")
    finally:
        process.kill()
        process.wait()


def certificates(folder: Path, host: str) -> Path:
    """tls.crt, tls.key and ca.crt of an authority of its own."""
    folder.mkdir(exist_ok=True)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer, subject = _name("test authority"), _name("aim-operator")
    authority = _signed(issuer, issuer, authority_key, authority_key, x509.BasicConstraints(True, None))
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        alternative = x509.DNSName(host)
    own = _signed(subject, issuer, key, authority_key, x509.SubjectAlternativeName([alternative]))
    pem, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "ca.crt").write_bytes(authority.public_bytes(pem))
    (folder / "tls.crt").write_bytes(own.public_bytes(pem))
    (folder / "tls.key").write_bytes(key.private_bytes(pem, plain, serialization.NoEncryption()))
    return folder


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    by: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        .sign(by, hashes.SHA256())
    )
