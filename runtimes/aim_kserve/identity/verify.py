"""From a request's headers to its Caller: which credential it has, and who verifies it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge

from aim_kserve.errors import Forbidden, Unauthorized
from aim_kserve.identity.caller import Caller, Scope
from aim_kserve.identity.files import Follower
from aim_kserve.identity.identifiers import JWT, NOBODY, RESERVED, UNKNOWN
from aim_kserve.identity.key_source import KeySource
from aim_kserve.identity.keys import PREFIX
from aim_kserve.identity_settings import IdentitySettings

if TYPE_CHECKING:
    from aim_kserve.identity.issuer import Issuer

MAX_CREDENTIAL_BYTES = 8192

_HEADERS = frozenset((b"authorization", b"x-api-key", b"api-key"))
_REQUESTS = Counter(
    "aim_identity_requests",
    "Requests by whose credential came with them and what became of it",
    ["credential", "outcome"],
)
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

    def start(self) -> None:
        """Read what is verified by, and follow it from now on. Blocks for as long as an issuer takes, or 5 s.

        Raises:
            StartupError: it cannot be read, is wrong, or would let nobody in.
        """
        if self._settings.api_keys is not None:
            keys = self._keys = KeySource(self._settings.api_keys, _counts.keep)
            _SOURCE_OK.labels("api_keys").set_function(lambda: keys.is_ok)
            self._followers.append(Follower("identity-keys", keys.look))
        if self._settings.jwt_issuer is not None:
            from aim_kserve.identity.issuer import Issuer  # cryptography: only tokens need it

            issuer = self._issuer = Issuer(self._settings)
            _SOURCE_OK.labels("jwks").set_function(lambda: issuer.is_ok)
            self._followers.append(issuer.follower)
        for follower in self._followers:
            follower.start()

    def stop(self) -> None:
        """Follow no more."""
        for follower in self._followers:
            follower.stop()

    async def admit(
        self, headers: Iterable[tuple[bytes, bytes]], scopes: frozenset[Scope], fields: dict[str, Any]
    ) -> Caller:
        """Who asks, if they may; counted. ``fields``: of the access log, which is told the credential's id and tenant.

        Raises:
            Unauthorized: there is no credential, or it does not count.
            Forbidden: it lacks one of ``scopes``.
        """
        name = UNKNOWN
        try:
            caller = await self._caller(credential(headers))
            name = JWT if caller.credential_id.startswith(f"{JWT}:") else caller.credential_id
            fields["key"], fields["tenant"] = caller.credential_id, caller.tenant
            _check(caller, scopes)
        except Unauthorized as error:
            if error.credential_id is not None:
                name = fields["key"] = error.credential_id
            _counts.add(NOBODY if error.code == "missing_credential" else name, str(error.code))
            raise
        except Forbidden as error:
            _counts.add(name, str(error.code))
            raise
        _counts.add(name, "admitted")
        return caller

    async def _caller(self, text: str) -> Caller:
        if text.startswith(PREFIX):
            if self._keys is not None:
                return self._keys.caller(text)
            raise Unauthorized("API keys are not taken here: send a token", code="invalid_api_key")
        if self._issuer is not None:
            return await self._issuer.caller(text)
        raise Unauthorized(f"this is no API key of ours: one begins with {PREFIX}", code="invalid_api_key")


def credential(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The key or token of a request; names of headers in lower case.

    Raises:
        Unauthorized: there is none, or two that differ, or one too long.
    """
    found = ""
    for name, value in headers:
        if name not in _HEADERS:
            continue
        text = _text(name, value)
        if found and text and text != found:
            raise Unauthorized(
                "two credentials that differ: send one, as authorization: Bearer or x-api-key", code="two_credentials"
            )
        found = found or text
    if not found:
        raise Unauthorized(
            "a credential is missing: send authorization: Bearer and an API key or token", code="missing_credential"
        )
    return found


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


class _Counts:
    """Requests by credential: of keys that are in the file, and of nobody else's making."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, str], Counter] = {}

    def add(self, credential_id: str, outcome: str) -> None:
        at = credential_id, outcome
        child = self._children.get(at)
        if child is None:
            child = self._children[at] = _REQUESTS.labels(*at)
        child.inc()

    def keep(self, ids: frozenset[str]) -> None:
        """Keys that have left the file take their series along. From any thread."""
        for at in [at for at in list(self._children) if at[0] not in ids | RESERVED]:
            self._children.pop(at, None)
            _REQUESTS.remove(*at)


_counts = _Counts()
