"""`aim-operator`: runs until it is told to stop; exits 1 with one line where it cannot start, or stops leading."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .run import run
from .settings import Settings, SettingsError, own_identity, own_namespace

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_GIVEN = Settings()


def _option(name: str, says: str) -> Any:
    return typer.Option(f"--{name}", help=says, envvar=f"AIM_OPERATOR_{name.upper().replace('-', '_')}")


@app.command()
def operator(
    namespace: Annotated[str | None, _option("namespace", "where its lease is; default: its pod's, aim-system")] = None,
    watched: Annotated[list[str] | None, _option("watched", "a namespace to keep, again for more; all")] = None,
    identity: Annotated[str | None, _option("identity", "this process among its replicas; default: host_pid")] = None,
    host: Annotated[str, _option("host", "address to listen on")] = _GIVEN.host,
    http_port: Annotated[int, _option("http-port", "port of /healthz, /readyz, /metrics")] = _GIVEN.http_port,
    webhook_port: Annotated[int, _option("webhook-port", "port of the webhooks, HTTPS")] = _GIVEN.webhook_port,
    certificates: Annotated[
        Path | None, _option("certificates", "folder with tls.crt, tls.key, ca.crt; default: no webhooks")
    ] = None,
    webhook_host: Annotated[
        str | None, _option("webhook-host", "write the webhook configurations, naming this host; default: no")
    ] = None,
    leader_election: Annotated[
        bool, typer.Option(help="one replica alone changes things", envvar="AIM_OPERATOR_LEADER_ELECTION")
    ] = True,
    lease_duration: Annotated[
        float, _option("lease-duration", "seconds until another may lead")
    ] = _GIVEN.lease_duration_s,
    renew_deadline: Annotated[
        float, _option("renew-deadline", "seconds a leader tries to renew")
    ] = _GIVEN.renew_deadline_s,
    retry_period: Annotated[float, _option("retry-period", "seconds between tries")] = _GIVEN.retry_period_s,
    policy_poll: Annotated[
        float, _option("policy-poll", "seconds between looks at which policies run")
    ] = _GIVEN.policy_poll_s,
    audit_log: Annotated[
        Path | None, _option("audit-log", "file for lines that say who changed what; default: stdout")
    ] = None,
    image: Annotated[str, _option("image", "of pods that read a node back; default: this pod's own")] = _GIVEN.image,
    guardrail_image: Annotated[
        str, _option("guardrail-image", "put into pods; default: aim-guardrail of this release, without a registry")
    ] = _GIVEN.guardrail_image,
    gpu_namespace: Annotated[str, _option("gpu-namespace", "where the GPU operator runs")] = _GIVEN.gpu_namespace,
    dcm_config_map: Annotated[
        str, _option("dcm-config-map", "the Device Config Manager's profiles (DeviceConfig: configManager.config)")
    ] = _GIVEN.dcm_config_map,
    report_port: Annotated[
        int, _option("report-port", "port that pods of fine-tuning jobs tell, HTTPS")
    ] = _GIVEN.report_port,
    report_url: Annotated[str, _option("report-url", "that port, as those pods reach it")] = _GIVEN.report_url,
    log_level: Annotated[str, _option("log-level", "DEBUG, INFO, WARNING or ERROR")] = _GIVEN.log_level,
) -> None:
    """Webhooks for InferenceServices that use our runtimes, and the controllers of our own resources."""
    settings = Settings(
        namespace=namespace or own_namespace(),
        watched=tuple(watched or ()),
        identity=identity or own_identity(),
        host=host,
        http_port=http_port,
        webhook_port=webhook_port,
        certificates=certificates,
        webhook_host=webhook_host,
        leader_election=leader_election,
        lease_duration_s=lease_duration,
        renew_deadline_s=renew_deadline,
        retry_period_s=retry_period,
        policy_poll_s=policy_poll,
        audit_log=audit_log,
        image=image,
        guardrail_image=guardrail_image,
        gpu_namespace=gpu_namespace,
        dcm_config_map=dcm_config_map,
        report_port=report_port,
        report_url=report_url,
        log_level=log_level,
    )
    try:
        run(settings.checked())
    except SettingsError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
