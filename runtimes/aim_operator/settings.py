"""What the operator is told: flags and ``AIM_OPERATOR_*`` variables."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

#: Where a pod finds the namespace it runs in.
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
#: What cert-manager and `kubectl create secret tls` call the files.
CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"


class SettingsError(Exception):
    """A setting is wrong. The message is one line: its name, its value and what is allowed."""


class Settings(NamedTuple):
    """All of them. Times are seconds.

    namespace: where the operator runs, and its lease is; watched: namespaces whose objects it keeps, empty: all;
    identity: this process among its replicas; certificates: a folder with tls.crt, tls.key and ca.crt, None: no
    webhooks are served; webhook_host: under which the API server reaches this very process, for a webhook
    configuration that it writes itself (None: manifests/operator has one); policy_poll_s: how
    often pods are asked which policies they run; audit_log: None: stdout; image: reads a node back, empty: our pod's;
    guardrail_image: is put into pods, empty: `aim-guardrail` of this release, without a registry; gpu_namespace,
    dcm_config_map: of the GPU operator's Device Config Manager; report_port, report_url: where pods of fine-tuning
    jobs tell how far they are, and the name they know it by.
    """

    namespace: str = "aim-system"
    watched: tuple[str, ...] = ()
    identity: str = "aim-operator"
    host: str = "0.0.0.0"
    http_port: int = 8080
    webhook_port: int = 9443
    certificates: Path | None = None
    webhook_host: str | None = None
    leader_election: bool = True
    lease_duration_s: float = 15
    renew_deadline_s: float = 10
    retry_period_s: float = 2
    policy_poll_s: float = 15
    audit_log: Path | None = None
    image: str = ""
    guardrail_image: str = ""
    gpu_namespace: str = "kube-amd-gpu"
    dcm_config_map: str = "default-dcm-config"
    report_port: int = 9444
    report_url: str = "https://aim-operator.aim-system.svc:9444"
    log_level: str = "INFO"

    def checked(self) -> Settings:
        """These, if they can hold. Raises SettingsError."""
        if not self.retry_period_s < self.renew_deadline_s < self.lease_duration_s:
            raise SettingsError(
                f"--renew-deadline {self.renew_deadline_s:g}: must lie between --retry-period {self.retry_period_s:g} "
                f"and --lease-duration {self.lease_duration_s:g}: else two replicas lead at once"
            )
        for name in (CERTIFICATE, KEY, AUTHORITY) if self.certificates else ():
            if not (file := Path(self.certificates or "", name)).is_file():
                raise SettingsError(
                    f"--certificates {self.certificates}: {file} is missing: cert-manager writes all three"
                )
        if self.webhook_host and self.certificates is None:
            raise SettingsError(f"--webhook-host {self.webhook_host}: webhooks need --certificates FOLDER")
        return self


def own_namespace() -> str:
    """Of this pod; `aim-system` where it is none."""
    try:
        return _OWN_NAMESPACE.read_text(encoding="utf-8").strip()
    except OSError:
        return "aim-system"


def own_identity() -> str:
    """No other replica's: a pod's name is its host's; several processes of one host differ by number."""
    return f"{socket.gethostname()}_{os.getpid()}"
