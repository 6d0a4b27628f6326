"""Where spans go, by flag and by OpenTelemetry's own variables. Imports nothing of OpenTelemetry."""

from __future__ import annotations

import os
from collections.abc import Mapping

_TRACES_PATH = "/v1/traces"


def not_installed(url: str, library: str | None) -> str:
    """What is wrong where spans are to go to ``url`` and a library that sends them is not there."""
    return (
        f"spans are to go to {url} (--otlp_endpoint, OTEL_EXPORTER_OTLP_ENDPOINT) and {library} is not "
        "installed: install aim-kserve[tracing], or leave the endpoint out"
    )


def endpoint(flag: str | None, env: Mapping[str, str] = os.environ) -> str | None:
    """The URL that spans go to, None: nowhere. As OpenTelemetry's variables say, the flag before them: the traces'
    own variable is taken as it is, what is for all signals gets ``/v1/traces``.
    https://opentelemetry.io/docs/specs/otel/protocol/exporter/#endpoint-urls-for-otlphttp
    """
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    if not flag and env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return env["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
    base = (flag or env.get("OTEL_EXPORTER_OTLP_ENDPOINT") or "").rstrip("/")
    if not base:
        return None
    return base if base.endswith(_TRACES_PATH) else base + _TRACES_PATH
