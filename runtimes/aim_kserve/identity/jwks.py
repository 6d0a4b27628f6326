"""A provider's public keys (RFC 7517): which of them verify what, where they come from, and how they stay current.

The provider may be away: what it published last goes on counting. It is asked every ``jwt_refresh_s`` seconds and when
a token names a key that is not known, but never twice within ``jwt_cooldown_s``, whatever the answer was: neither its
failure nor a flood of made-up key ids becomes a flood of requests to it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from aim_kserve.durable import write_atomically
from aim_kserve.errors import StartupError
from aim_kserve.identity.files import read_bounded, signature

logger = logging.getLogger("aim.identity")

MAX_BYTES = 1024 * 1024
MAX_KEYS = 200
FETCH_TIMEOUT_S = 5.0
#: NIST SP 800-131A's least, and what verifying may cost.
RSA_BITS = range(2048, 8192 + 1)

_BY_CURVE = {"P-256": ("ES256",), "P-384": ("ES384",), "P-521": ("ES512",), "Ed25519": ("EdDSA",)}
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
#: The public half: a provider that publishes the other by mistake shall not have it kept here.
_PUBLIC = ("kty", "kid", "use", "alg", "crv", "n", "e", "x", "y")


class JwksError(Exception):
    """The keys cannot be had: one line."""


@dataclass(frozen=True, slots=True)
class KeySet:
    """Keys by id and algorithm."""

    keys: Mapping[tuple[str | None, str], PyJWK]
    ids: frozenset[str | None]

    def find(self, kid: str | None, algorithm: str) -> PyJWK | None:
        """The key that a token names; for one that names none, the only key there is for its algorithm."""
        if kid is not None:
            return self.keys.get((kid, algorithm))
        fitting = [key for (_, name), key in self.keys.items() if name == algorithm]
        return fitting[0] if len(fitting) == 1 else None


def parse(raw: bytes, algorithms: Iterable[str]) -> KeySet:
    """The keys of a JWKS with which these algorithms verify; others in it are left alone.

    Raises:
        JwksError: it is no JWKS, or has no such key, or too many.
    """
    try:
        listed = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise JwksError("it is not JSON") from None
    listed = listed.get("keys") if isinstance(listed, dict) else None
    if not isinstance(listed, list):
        raise JwksError('it is no JWKS: an object with a list "keys"')
    if len(listed) > MAX_KEYS:
        raise JwksError(f"it has {len(listed)} keys, more than {MAX_KEYS}")
    wanted, found = frozenset(algorithms), {}
    for each in listed:
        if isinstance(each, dict) and each.get("use", "sig") == "sig":
            found.update(_keys_of({name: each[name] for name in _PUBLIC if name in each}, wanted))
    if not found:
        raise JwksError(f"it has no key for {', '.join(sorted(wanted))}")
    return KeySet(found, frozenset(kid for kid, _ in found))


def _keys_of(jwk: dict[str, Any], wanted: frozenset[str]) -> dict[tuple[str | None, str], PyJWK]:
    kid = jwk.get("kid")
    fitting = _RSA if jwk.get("kty") == "RSA" else _BY_CURVE.get(str(jwk.get("crv")), ())
    names = [name for name in fitting if name in wanted and jwk.get("alg") in (None, name)]
    if not (kid is None or isinstance(kid, str)):
        return {}
    try:
        keys = {(kid, name): PyJWK(jwk, name) for name in names}
    except (PyJWTError, ValueError, TypeError) as error:
        logger.warning("a key of the issuer is left out (kid %.80r): %.200s", kid, error)
        return {}
    return {at: key for at, key in keys.items() if getattr(key.key, "key_size", 2048) in RSA_BITS or at[1] not in _RSA}


class Jwks:
    """The keys that count now, in ``keys``; followed by whoever calls :meth:`look`.

    Args:
        source: an URL or a path.
        cache: keeps what an URL gave last.
        changed: called when ``keys`` have been read.

    Attributes:
        wake: called when somebody waits for a :meth:`look`.
    """

    keys: KeySet

    def __init__(
        self,
        source: str,
        algorithms: Iterable[str],
        *,
        refresh_s: float,
        cooldown_s: float,
        cache: Path | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_ok = True
        self.wake: Callable[[], None] = lambda: None
        self._changed = changed
        self._source, self._algorithms, self._cache = source, tuple(algorithms), cache
        self._file = None if "://" in source else Path(source)
        self._refresh_s, self._cooldown_s = refresh_s, cooldown_s
        self._lock = threading.Lock()
        self._asked: Future[None] | None = None
        self._tried_at = float("-inf")
        self._seen = signature(self._file) if self._file is not None else None

    def start(self) -> None:
        """Have keys, before the first request.

        Raises:
            StartupError: there are none: the provider is away, and so is a last good set.
        """
        try:
            self._refresh()
        except JwksError as error:
            self.is_ok = False
            self.keys = self._last_good(str(error))

    def ask(self) -> Future[None] | None:
        """Have the provider asked: what comes is done when it has answered, well or badly. None: too soon."""
        with self._lock:
            if self._asked is None:
                if time.monotonic() - self._tried_at < self._cooldown_s:
                    return None
                self._asked = Future()
            asked = self._asked
        self.wake()
        return asked

    def look(self) -> None:
        """Ask again, if it is time or somebody wants it; blocks for as long as the provider takes, or 5 s."""
        since = time.monotonic() - self._tried_at
        is_due = since >= (self._refresh_s if self.is_ok else self._cooldown_s)
        if self._asked is None and not is_due and not self._has_changed():
            return
        try:
            self._refresh()
            if not self.is_ok:
                logger.info("--jwt_jwks %s: read again, %d keys", self._source, len(self.keys.ids))
            self.is_ok = True
        except JwksError as error:
            if self.is_ok:
                logger.error("--jwt_jwks %s: %s; the keys it had last stay valid", self._source, error)
            self.is_ok = False
        finally:
            with self._lock:
                asked, self._asked = self._asked, None
            if asked is not None:
                asked.set_result(None)

    def _has_changed(self) -> bool:
        return self._file is not None and signature(self._file) != self._seen

    def _refresh(self) -> None:
        try:
            if self._file is None:
                raw = asyncio.run(fetch(self._source))
            else:
                self._seen = signature(self._file)
                raw = read_bounded(self._file, MAX_BYTES)
        except (OSError, ValueError) as error:
            raise JwksError(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from None
        finally:
            self._tried_at = time.monotonic()
        self.keys = parse(raw, self._algorithms)
        self._changed()
        self._keep(raw)

    # --- the last good set ------------------------------------------------------------------------------------------

    def _keep(self, raw: bytes) -> None:
        if self._cache is None:
            return
        kept = orjson.dumps({"version": 1, "source": self._source, "jwks": _public(raw)})
        try:
            if not self._cache.exists() or read_bounded(self._cache, 2 * MAX_BYTES) != kept:
                write_atomically(self._cache.resolve(), kept, mode=0o600)
        except (OSError, ValueError) as error:
            logger.warning(
                "--jwks_cache %s: cannot be written (%s): a start without the issuer fails", self._cache, error
            )

    def _last_good(self, reason: str) -> KeySet:
        """Raises StartupError."""
        what = f"--jwt_jwks {self._source}: {reason}"
        if self._cache is None:
            remedy = "start when it is there" if self._file is None else "give a readable JWKS"
            raise StartupError(f"{what}: {remedy}" + (", or give --jwks_cache FILE" if self._file is None else ""))
        try:
            kept = orjson.loads(read_bounded(self._cache, 2 * MAX_BYTES))
            if not isinstance(kept, dict) or kept.get("version") != 1 or kept.get("source") != self._source:
                raise ValueError("it is of another source or version")
            keys = parse(orjson.dumps(kept.get("jwks")), self._algorithms)
        except (OSError, ValueError, JwksError) as error:
            raise StartupError(
                f"{what}, and --jwks_cache {self._cache} has no last good set ({error}): start when the issuer is there"
            ) from None
        logger.warning("%s: serving with the last good set of %s", what, self._cache)
        return keys


def _public(raw: bytes) -> dict[str, Any]:
    listed = [each for each in orjson.loads(raw)["keys"] if isinstance(each, dict)]
    return {"keys": [{name: each[name] for name in _PUBLIC if name in each} for each in listed]}


async def fetch(url: str, timeout_s: float = FETCH_TIMEOUT_S) -> bytes:
    """What is at ``url``, in all within ``timeout_s``.

    Raises:
        JwksError: it does not come in time, is too large, or is not there. Redirections are not followed.
    """
    import aiohttp

    limit = aiohttp.ClientTimeout(total=timeout_s)
    headers = {"accept": "application/jwk-set+json, application/json", "accept-encoding": "identity"}
    try:
        async with (
            aiohttp.ClientSession(timeout=limit, auto_decompress=False, trust_env=True) as session,
            session.get(url, headers=headers, allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise JwksError(f"it answered {answer.status}")
            raw = bytearray()
            async for chunk in answer.content.iter_any():
                raw += chunk
                if len(raw) > MAX_BYTES:
                    raise JwksError(f"it is larger than {MAX_BYTES} bytes")
            return bytes(raw)
    except TimeoutError:
        raise JwksError(f"it did not answer within {timeout_s:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise JwksError(f"it cannot be fetched ({' '.join(str(error).split()):.200})") from None
