"""A signed token (JWT) becomes a Caller: signature, issuer, audience and time as the settings pin them.

Nothing of the token decides how it is verified: algorithms come from the settings, a key verifies with its own only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

import jwt
from jwt import exceptions

from aim_kserve.errors import Unauthorized
from aim_kserve.identity.caller import Caller, QosClass, Scope, Verified
from aim_kserve.identity.identifiers import JWT
from aim_kserve.identity.jwks import KeySet
from aim_kserve.identity_settings import IdentitySettings

MAX_NAME, MAX_MODELS = 128, 100

_WRONG: tuple[tuple[type[Exception], str, str], ...] = (
    (exceptions.ExpiredSignatureError, "expired_token", "the token has expired (exp): get a new one"),
    (exceptions.ImmatureSignatureError, "early_token", "the token is not valid yet (nbf, iat): is a clock wrong?"),
    (exceptions.InvalidAudienceError, "wrong_audience", "the token is for another audience (aud): ask for one for us"),
    (exceptions.InvalidIssuerError, "wrong_issuer", "the token is of an issuer (iss) that is not taken here"),
    (exceptions.InvalidSignatureError, "wrong_signature", "the token's signature is not its issuer's"),
    (exceptions.InvalidAlgorithmError, "wrong_algorithm", "the token is signed with an algorithm not taken here (alg)"),
)


class UnknownKey(Unauthorized):
    """The token names a key that the issuer had not published when it was asked last."""

    def __init__(self) -> None:
        super().__init__("the token is signed with a key that its issuer does not publish (kid)", code="unknown_key")


class Tokens:
    """Verifies tokens by the keys that ``keys()`` says count now."""

    def __init__(self, settings: IdentitySettings, keys: Callable[[], KeySet]) -> None:
        self._settings, self._keys = settings, keys
        self._required = {"require": ["exp", "iss", "aud"]}

    def verified(self, token: str) -> Verified:
        """Who the token says it is.

        Raises:
            UnknownKey: its key is not among those that count.
            Unauthorized: it is not valid here; says why, never the token.
        """
        claims = self._claims(token, self._keys())
        return Verified(caller_of(claims, self._settings), claims["exp"] + self._settings.jwt_leeway_s)

    def _claims(self, token: str, keys: KeySet) -> dict[str, Any]:
        try:
            return self._decoded(token, keys)
        except exceptions.MissingRequiredClaimError as error:
            raise Unauthorized(f"the token lacks the claim {error.claim}", code="wrong_claims") from None
        except exceptions.PyJWTError as error:
            for kind, code, message in _WRONG:
                if isinstance(error, kind):
                    raise Unauthorized(message, code=code) from None
            raise Unauthorized("the token is malformed", code="malformed_token") from None
        except (ValueError, TypeError, OverflowError, RecursionError):  # of numbers and depths that JSON lets through
            raise Unauthorized("the token is malformed", code="malformed_token") from None

    def _decoded(self, token: str, keys: KeySet) -> dict[str, Any]:
        header = jwt.get_unverified_header(token)
        algorithm, kid = str(header.get("alg")), header.get("kid")
        if algorithm not in self._settings.jwt_algorithms:
            raise exceptions.InvalidAlgorithmError
        key = keys.find(kid, algorithm)
        if key is None and kid in keys.ids:
            raise exceptions.InvalidAlgorithmError
        if key is None:
            raise UnknownKey
        claims = jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            audience=self._settings.jwt_audience,
            issuer=self._settings.jwt_issuer,
            leeway=self._settings.jwt_leeway_s,
            options=cast(Any, self._required),
        )
        claims["exp"] = float(claims["exp"])  # JSON has integers that are too large for one
        return claims


def caller_of(claims: dict[str, Any], settings: IdentitySettings) -> Caller:
    """Whom verified claims speak of. Raises Unauthorized: a claim is missing, or not what it should be."""
    tenant = claim(claims, settings.jwt_tenant_claim)
    if not (isinstance(tenant, str) and 0 < len(tenant) <= MAX_NAME and tenant.isprintable()):
        raise _wrong(settings.jwt_tenant_claim, f"must be a text of 1 to {MAX_NAME} characters")
    qos_class = claim(claims, settings.jwt_class_claim)
    if qos_class is not None and qos_class not in get_args(QosClass):
        raise _wrong(settings.jwt_class_claim or "", f"must be one of {', '.join(get_args(QosClass))}")
    subject = claims.get("sub")
    name = subject if isinstance(subject, str) and subject.isprintable() else tenant
    models = None if settings.jwt_models_claim is None else _words(claim(claims, settings.jwt_models_claim))
    return Caller(f"{JWT}:{name:.{MAX_NAME}}", tenant, _scopes(claims, settings), qos_class, models)


def claim(claims: dict[str, Any], name: str | None) -> Any:
    """The claim of that name, else what ``a.b`` finds: ``b`` within ``a``. None where there is none."""
    if name is None or name in claims:
        return claims.get(name) if name is not None else None
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _scopes(claims: dict[str, Any], settings: IdentitySettings) -> frozenset[Scope]:
    words = _words(claim(claims, settings.jwt_scope_claim))
    prefix = settings.jwt_scope_prefix
    ours = frozenset(scope for scope in get_args(Scope) if f"{prefix}{scope}" in words)
    return ours or frozenset(settings.jwt_default_scopes)


def _words(value: Any) -> tuple[str, ...]:
    """A list of texts, or a text of words (RFC 8693: ``scope``); nothing where it is neither."""
    items = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(item for item in items[:MAX_MODELS] if isinstance(item, str))


def _wrong(name: str, what: str) -> Unauthorized:
    return Unauthorized(f"the token's claim {name!r} {what}", code="wrong_claims")
