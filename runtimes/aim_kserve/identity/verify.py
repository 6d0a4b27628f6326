"""From a request's headers to its Caller: which credential it has, and who verifies it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from prometheus_client import Gauge

from aim_kserve.access import RequestLog
from aim_kserve.errors import Forbidden, Unauthorized
from aim_kserve.identity.caller import Caller, Scope, Verified
from aim_kserve.identity.counts import COUNTS
from aim_kserve.identity.files import Follower
from aim_kserve.identity.identifiers import JWT, NOBODY, UNKNOWN
from aim_kserve.identity.key_source import KeySource
from aim_kserve.identity.keys import PREFIX
from aim_kserve.identity_settings import IdentitySettings

if TYPE_CHECKING:
    from aim_kserve.identity.issuer import Issuer

MAX_CREDENTIAL_BYTES = 8192
MAX_RECENT = 4096  # credentials known by their digests

_HEADERS = frozenset((b"authorization", b"x-api-key", b"api-key"))
_SOURCE_OK = Gauge(
    "aim_identity_source_ok",
    "1: what was read last of it counts; 0: it is wrong or away, and what was before counts",
    ["source"],
)


class Verifier:
    """Reads nothing before :meth:`start`."""

    def __init__(self, settings: IdentitySettings) -> None:
        self._settings = settings
        self._keys: KeySource | None = None
        self._issuer: Issuer | None = None
        self._followers: list[Follower] = []
        self._recent: dict[bytes, _Recent] = {}
        self._generation = object()  # another after keys have been read

    def start(self) -> None:
        """Read what is verified by, and follow it from now on. Blocks for as long as an issuer takes, or 5 s.

        Raises:
            StartupError: it cannot be read, is wrong, or would let nobody in.
        """
        if self._settings.api_keys is not None:
            keys = self._keys = KeySource(self._settings.api_keys, self._keys_changed)
            _SOURCE_OK.labels("api_keys").set_function(lambda: keys.is_ok)
            self._followers.append(Follower("identity-keys", keys.look))
        if self._settings.jwt_issuer is not None:
            from aim_kserve.identity.issuer import Issuer  # cryptography: only tokens need it

            issuer = self._issuer = Issuer(self._settings, self._forget)
            _SOURCE_OK.labels("jwks").set_function(lambda: issuer.is_ok)
            self._followers.append(issuer.follower)
        for follower in self._followers:
            follower.start()

    def stop(self) -> None:
        """Follow no more."""
        for follower in self._followers:
            follower.stop()

    def recall(
        self, headers: Iterable[tuple[bytes, bytes]], scopes: frozenset[Scope], log: RequestLog
    ) -> Caller | None:
        """Who asks, where that has been verified before, nothing has changed since, and they may; counted. None: ask
        :meth:`admit`. A few microseconds, a third of what that takes; of a token's signature, a thirtieth."""
        given = where = None
        for name, value in headers:
            if name in _HEADERS:
                if given is not None:
                    return None
                where, given = name, value
        if given is None or where is None:
            return None
        recent = self._recent.get(_digest(where, given))
        if recent is None or recent.generation is not self._generation or time.time() >= recent.until:
            return None
        caller = recent.caller
        if not scopes <= caller.scopes:
            return None
        log.fields["key"], log.fields["tenant"] = caller.credential_id, caller.tenant
        COUNTS.add(recent.counted)
        return caller

    async def admit(self, headers: Iterable[tuple[bytes, bytes]], scopes: frozenset[Scope], log: RequestLog) -> Caller:
        """Who asks, if they may; counted. The access log is told the credential's id and tenant.

        Raises:
            Unauthorized: there is no credential, or it does not count.
            Forbidden: it lacks one of ``scopes``.
        """
        name, generation = UNKNOWN, self._generation
        try:
            text, digest = credential(headers)
            caller, until = await self._verified(text)
            name = JWT if caller.credential_id.startswith(f"{JWT}:") else caller.credential_id
            log.fields["key"], log.fields["tenant"] = caller.credential_id, caller.tenant
            _check(caller, scopes)
        except Unauthorized as error:
            if error.credential_id is not None:
                name = log.fields["key"] = error.credential_id
            COUNTS.add((NOBODY if error.code == "missing_credential" else name, str(error.code)))
            raise
        except Forbidden as error:
            COUNTS.add((name, str(error.code)))
            raise
        counted = (name, "admitted")
        COUNTS.add(counted)
        if len(self._recent) >= MAX_RECENT:
            self._recent.clear()
        self._recent[digest] = _Recent(caller, until, generation, counted)
        return caller

    async def _verified(self, text: str) -> Verified:
        if text.startswith(PREFIX):
            if self._keys is not None:
                return self._keys.verified(text)
            raise Unauthorized("API keys are not taken here: send a token", code="invalid_api_key")
        if self._issuer is not None:
            return await self._issuer.verified(text)
        raise Unauthorized(f"this is no API key of ours: one begins with {PREFIX}", code="invalid_api_key")

    def _keys_changed(self, ids: frozenset[str]) -> None:
        COUNTS.keep(ids)
        self._forget()

    def _forget(self) -> None:
        """What is verified from now on is so by other keys; what is being verified may be by the ones before, and so is
        not remembered."""
        self._generation = object()


@dataclass(frozen=True, slots=True)
class _Recent:
    """A credential that was verified, known by its digest alone."""

    caller: Caller
    until: float
    generation: object
    counted: tuple[str, str]


def _digest(name: bytes, value: bytes) -> bytes:
    """What a header is remembered by: ``Bearer …`` means something in ``authorization`` only, and no value has a NUL.
    BLAKE2 is CPython's own: to OpenSSL's SHA-256 it takes longer to get."""
    return blake2b(value if name == b"authorization" else b"\0" + value, digest_size=32).digest()


def credential(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, bytes]:
    """The key or token of a request, and the digest of its header; names of headers in lower case.

    Raises:
        Unauthorized: there is none, or two that differ, or one too long.
    """
    found, digest = "", b""
    for name, value in headers:
        if name not in _HEADERS:
            continue
        text = _text(name, value)
        if found and text and text != found:
            raise Unauthorized(
                "two credentials that differ: send one, as authorization: Bearer or x-api-key", code="two_credentials"
            )
        if text and not found:
            found, digest = text, _digest(name, value)
    if not found:
        raise Unauthorized(
            "a credential is missing: send authorization: Bearer and an API key or token", code="missing_credential"
        )
    return found, digest


def _text(name: bytes, value: bytes) -> str:
    if len(value) > MAX_CREDENTIAL_BYTES:
        raise Unauthorized(
            f"{name.decode()}: longer than {MAX_CREDENTIAL_BYTES} bytes: no key or token is",
            code="malformed_credential",
        )
    text = value.decode("latin-1").strip()
    if name != b"authorization":
        return text
    scheme, _, rest = text.partition(" ")
    if text and scheme.lower() != "bearer":
        raise Unauthorized("authorization: must be Bearer and an API key or token", code="malformed_credential")
    return rest.strip()


def _check(caller: Caller, scopes: frozenset[Scope]) -> None:
    for scope in sorted(scopes):
        if not caller.may(scope):
            raise Forbidden(
                f"the credential {caller.credential_id!r} lacks the scope {scope}, which this route needs",
                code="insufficient_scope",
                scope=scope,
            )
