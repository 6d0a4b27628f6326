"""What the transformer is told: flags, ``AIM_*`` variables, annotations (see aim_kserve.settings)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from aim_guardrail.credentials import Mode
from aim_guardrail.detectors.traffic import TrafficOptions
from aim_guardrail.policy import (
    Policy,
    PolicyError,
    PolicySet,
    beside,
    load_policies,
    parse_policy,
    shipped_names,
    shipped_policy,
)
from aim_kserve.identity.key_file import read_key
from aim_kserve.settings import ServerSettings

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?")

_OF_PREDICTORS = frozenset(
    ["predictor_protocol", "protocol", "predictor_grpc_host", "predictor_use_ssl", "enable_predictor_health_check"]
)

Protocol = Literal["v1", "v2", "grpc-v2"]


class GuardrailSettings(ServerSettings):
    """Settings of ``python -m aim_guardrail``. The ``predictor_*`` flags are KServe's, by KServe's names."""

    HEADINGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "the policy": ("policy", "guardrails", "shadow_policy", "shadow_sample", "policy_poll_seconds"),
        "limits of traffic": ("redis_url", "redis_timeout_ms", "limit_replicas", "geo_database"),
        "what is remembered": ("verdict_cache_entries", "verdict_cache_ttl_seconds"),
        "the audit": ("audit_file", "audit_key_file", "audit_overflow", "audit_queue", "audit_tenant", "audit_excerpt"),
        "the predictor": (
            *("predictor_host", "predictor_protocol", "protocol", "predictor_grpc_host", "predictor_use_ssl"),
            *("predictor_request_timeout_seconds", "predictor_connect_timeout_seconds", "predictor_request_retries"),
            *("enable_predictor_health_check", "predictor_health_cache_seconds"),
            *("predictor_credentials", "predictor_api_key_file"),
        ),
        "Envoy": ("ext_proc_port",),
    }

    predictor_host: str | None = Field(
        None, description="HOST[:PORT] of the predictor; KServe's controller gives it. Without: /filter alone is served"
    )
    predictor_protocol: Protocol = Field(
        "v1",
        description="v1, v2: HTTP, calls go on in the protocol they came in; grpc-v2: predictor_host speaks gRPC only",
    )
    protocol: Protocol | None = Field(None, description="KServe's deprecated name of predictor_protocol")
    predictor_grpc_host: str | None = Field(
        None, description="HOST:PORT that gRPC calls go to; default: they go to predictor_host as V2 REST"
    )
    predictor_use_ssl: bool = Field(False, description="speak TLS with the predictor")
    predictor_request_timeout_seconds: float = Field(
        600, gt=0, description="longest silence of the predictor, before its answer and within it; then 504"
    )
    predictor_connect_timeout_seconds: float = Field(
        1.5, gt=0, description="longest time to connect to the predictor, name look-up included; then 503"
    )
    predictor_request_retries: int = Field(0, ge=0, le=10, description="further tries to connect to the predictor")
    enable_predictor_health_check: bool = Field(
        False, description="ready only while the predictor's model is ready, too"
    )
    predictor_health_cache_seconds: float = Field(1, ge=0, description="how long the predictor's readiness is believed")
    predictor_credentials: Mode = Field(
        "strip",
        description="what becomes of a client's credential (authorization, x-api-key, api-key): strip: it ends here; "
        "forward: it goes on, to a runtime of ours that verifies it, too",
    )
    predictor_api_key_file: Path | None = Field(
        None,
        description="file of the transformer's own key, a bearer token for what it asks itself (readiness, tensors) "
        "and, with strip, in the client's place; read anew when it changes",
    )
    ext_proc_port: int | None = Field(
        None, ge=1, le=65535, description="serve Envoy's external processing (ext_proc) on this port, too"
    )
    policy: Path | None = Field(
        None,
        description="policy file, or a directory of them (one for each tenant, one for everybody else), read anew when "
        "it changes; or a shipped policy's name (`aim-guardrail catalog`); default: chat",
        json_schema_extra={"annotation": "guardrail-policy"},
    )
    guardrails: str | None = Field(
        None,
        description="a policy in place: YAML list of type/action/threshold, applied to prompts and answers",
        json_schema_extra={"annotation": "guardrails"},
    )

    shadow_policy: Path | None = Field(
        None, description="file of a candidate, judged beside the policy in force: nothing comes of it but counts"
    )
    shadow_sample: float = Field(1, ge=0, le=1, description="the share of requests that candidates judge")
    policy_poll_seconds: float = Field(1, gt=0, le=3600, description="how often the policies' files are looked at")

    redis_url: str | None = Field(
        None,
        pattern=r"^(rediss?|unix)://.+",
        description="redis://HOST:PORT/DB, rediss:// or unix://: where replicas count together and share verdicts; by "
        "the variable, if it holds a password; default: each is alone",
    )
    redis_timeout_ms: int = Field(100, ge=1, le=10_000, description="longest wait for Redis, milliseconds")
    limit_replicas: int | None = Field(
        None,
        ge=1,
        description="how many replicas share the limits: while Redis is away each gives that share of them; default: "
        "the policy's on_error decides",
    )
    geo_database: Path | None = Field(
        None,
        description="MaxMind database of countries (.mmdb), for policies that limit them; read anew when it changes",
    )

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="collector that gets spans of requests by OTLP/HTTP, http://HOST:4318; "
        "default: what OTEL_EXPORTER_OTLP_ENDPOINT says, else none",
    )
    verdict_cache_entries: int = Field(
        10_000, ge=0, le=10_000_000, description="verdicts of batch detectors that are remembered in memory; 0: none"
    )
    verdict_cache_ttl_seconds: int = Field(300, ge=1, le=86_400, description="how long each is, in Redis, too")
    audit_file: Path | None = Field(
        None, description="file that gets a line for each decision, chained to the one before; default: no audit"
    )
    audit_key_file: Path | None = Field(
        None, description="file of a key: content is told by its HMAC, and nobody without the key can mend the chain"
    )
    audit_overflow: Literal["drop", "block", "refuse"] = Field(
        "drop",
        description="while the audit cannot be written fast enough: drop: lines are lost, and counted; block: requests "
        "wait; refuse: requests are refused (503)",
    )
    audit_queue: int = Field(10_000, ge=2, le=1_000_000, description="lines that may wait to be written")
    audit_excerpt: int = Field(
        0,
        ge=0,
        le=10_000,
        description="characters of its texts that a line has, what was found in them masked; 0: none",
    )
    audit_tenant: Literal["hash", "plain"] = Field("hash", description="how the audit names tenants")

    @field_validator("redis_url")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        try:
            parts = urlsplit(value or "")
            parts.port  # noqa: B018  it is read here, and refused
        except ValueError:
            raise ValueError("its port is no number up to 65535: give redis://HOST:PORT/DB") from None
        if parts.query:
            raise ValueError("options after ? are not taken: give redis://HOST:PORT/DB alone")
        if parts.scheme != "unix" and not re.fullmatch(r"(/\d{0,5})?", parts.path):
            raise ValueError("its database is no number: give redis://HOST:PORT/DB")
        return value

    @field_validator("predictor_host", "predictor_grpc_host")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        match = _ADDRESS.fullmatch(value) if value is not None else None
        if value is not None and (match is None or not 0 < int(match["port"] or 80) < 65536):
            raise ValueError("must be HOST or HOST:PORT, without scheme and path")
        return value

    @field_validator("predictor_api_key_file", "audit_key_file")
    @classmethod
    def _holds_a_key(cls, file: Path | None) -> Path | None:
        if file is not None:
            read_key(file)
        return file

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.predictor_host is None and self.model_fields_set & _OF_PREDICTORS:
            given = min(self.model_fields_set & _OF_PREDICTORS)
            raise ValueError(f"{given} is of a predictor, and there is no predictor_host: give it, or drop {given}")
        if self.audit_key_file is not None and self.audit_file is None:
            raise ValueError("audit_key_file is the key of an audit: give audit_file, too, or leave it out")
        if self.policy is not None and self.guardrails is not None:
            raise ValueError("policy and guardrails are both given: give one")
        if self.protocol is not None and self.protocol != self.speaks and "predictor_protocol" in self.model_fields_set:
            raise ValueError(f"protocol {self.protocol} and predictor_protocol {self.speaks} differ: drop the former")
        return self

    @property
    def speaks(self) -> Protocol:
        """The predictor's protocol, by whichever of KServe's two names it was given."""
        if self.protocol is not None and "predictor_protocol" not in self.model_fields_set:
            return self.protocol
        return self.predictor_protocol

    @property
    def policy_paths(self) -> list[Path]:
        """Where policies are read from, and read anew when that changes."""
        policy = None if self._shipped else self.policy
        return [path for path in (policy, self.shadow_policy) if path is not None]

    def read_policies(self) -> PolicySet:
        """The policies these settings name, as their files say now.

        Raises:
            PolicyError: one line: file (or annotation), line, key, what is wrong, the remedy.
        """
        if self.policy is not None and self._shipped is None:
            policies = load_policies(self.policy, self.shadow_policy)
        else:
            policies = beside(self._in_place(), self.shadow_policy)
        if self.geo_database is None:
            for policy in policies:
                _needs_no_countries(policy)
        return policies

    @property
    def _shipped(self) -> str | None:
        """The shipped policy that is named in a file's place."""
        name = str(self.policy)
        return name if name in shipped_names() and not Path(name).exists() else None

    def _in_place(self) -> Policy:
        if self.guardrails is None:
            return shipped_policy(self._shipped or "chat")
        # Line 1 is the annotation's own: `aim.amd.com/guardrails: |`.
        source = f"prompt: &rules\n{self.guardrails}\nanswer: *rules\nversion: 2\nname: guardrails\n"
        return parse_policy(source, origin="aim.amd.com/guardrails")


def _needs_no_countries(policy: Policy) -> None:
    """Raises PolicyError: it does, and nothing is known of them."""
    for rule in policy.rules("prompt"):
        if isinstance(rule.options, TrafficOptions) and rule.options.countries is not None:
            raise PolicyError(
                f"policy {policy.name!r}: {rule.name} limits countries, of which nothing is known: give --geo_database "
                "FILE (.mmdb)"
            )
