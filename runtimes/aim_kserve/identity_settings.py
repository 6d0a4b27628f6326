"""Settings of who may ask: API keys, tokens, or both. Without any of them every route is open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

GROUP: dict[str, Any] = {"group": "who may ask"}
#: What a provider signs with a private key. HS256 and its kind would let whoever can verify sign, too.
ASYMMETRIC = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)


def _split(value: object) -> object:
    return tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value


Several = Annotated[tuple[str, ...], BeforeValidator(_split)]
Scopes = Annotated[tuple[Literal["infer", "admin", "metrics", "filter"], ...], BeforeValidator(_split)]


class IdentitySettings(BaseModel):
    """The part of ``ServerSettings`` that says who may ask."""

    api_keys: Path | None = Field(
        None,
        description="file of API keys (aim-runtime keys); every route but health is closed",
        json_schema_extra=GROUP,
    )
    jwt_issuer: str | None = Field(
        None,
        min_length=1,
        description="take tokens of this issuer (iss); every route but health is closed",
        json_schema_extra=GROUP,
    )
    jwt_audience: Several = Field(
        (), description="audiences (aud) of tokens for us, comma-separated: one of them", json_schema_extra=GROUP
    )
    jwt_jwks: str | None = Field(
        None, description="where the issuer's public keys are: its jwks_uri, or a file", json_schema_extra=GROUP
    )
    jwt_algorithms: Several = Field(
        ("RS256", "ES256", "EdDSA"), description="signatures taken, comma-separated", json_schema_extra=GROUP
    )
    jwt_tenant_claim: str = Field(
        "sub", min_length=1, description="claim that names the tenant; a.b: b within a", json_schema_extra=GROUP
    )
    jwt_class_claim: str | None = Field(
        None, min_length=1, description="claim with the highest class: high, medium or low", json_schema_extra=GROUP
    )
    jwt_scope_claim: str = Field(
        "scope", min_length=1, description="claim with the scopes: a list, or words", json_schema_extra=GROUP
    )
    jwt_scope_prefix: str = Field(
        "", description="what stands before infer, admin, metrics or filter in that claim", json_schema_extra=GROUP
    )
    jwt_default_scopes: Scopes = Field(
        (), description="scopes of a token that names none of ours, comma-separated", json_schema_extra=GROUP
    )
    jwt_models_claim: str | None = Field(
        None, min_length=1, description="claim with patterns of models; without it none", json_schema_extra=GROUP
    )
    jwt_leeway_s: float = Field(
        30, ge=0, le=60, description="seconds that clocks may differ (exp, nbf)", json_schema_extra=GROUP
    )
    jwt_refresh_s: float = Field(
        300,
        ge=1,
        le=86400,
        description="seconds after which the issuer's keys are fetched again",
        json_schema_extra=GROUP,
    )
    jwt_cooldown_s: float = Field(
        10, ge=0.1, le=3600, description="seconds between fetches, whatever they bring", json_schema_extra=GROUP
    )
    jwks_cache: Path | None = Field(
        None, description="file that keeps the last good keys, for a start without the issuer", json_schema_extra=GROUP
    )

    @property
    def asks_who(self) -> bool:
        """Whether routes are closed to those without a credential."""
        return self.api_keys is not None or self.jwt_issuer is not None

    @field_validator("jwt_algorithms")
    @classmethod
    def _are_asymmetric(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in ASYMMETRIC:
                raise ValueError(f"{name!r} is not taken: give some of {', '.join(ASYMMETRIC)}")
        if not value:
            raise ValueError(f"none is given: give some of {', '.join(ASYMMETRIC)}")
        return value

    @field_validator("jwt_jwks")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is None or "://" not in value:
            if value == "":
                raise ValueError("empty: give an URL or a file, or leave it out")
            return value
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.fragment:
            raise ValueError("must be https://HOST/PATH or a file, without a user")
        return value

    @model_validator(mode="after")
    def _is_no_half(self) -> Self:
        whole = {"jwt_issuer": self.jwt_issuer, "jwt_audience": self.jwt_audience, "jwt_jwks": self.jwt_jwks}
        given = [name for name, value in whole.items() if value]
        others = [name for name in self.model_fields_set if name.startswith(("jwt_", "jwks_")) and name not in whole]
        if (given or others) and len(given) < len(whole):
            there = ", ".join(f"--{name}" for name in (given or sorted(others)))
            lacking = ", ".join(f"--{name}" for name in whole if name not in given)
            raise ValueError(
                f"{there} without {lacking}: tokens need issuer, audience and keys, give all three or none"
            )
        if self.jwks_cache is not None and "://" not in (self.jwt_jwks or ""):
            raise ValueError("--jwks_cache is for keys from an URL: leave it out")
        return self
