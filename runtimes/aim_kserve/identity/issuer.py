"""One issuer of tokens: its keys, followed, and the tokens they verify."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aim_kserve.identity.caller import Verified
from aim_kserve.identity.files import Follower
from aim_kserve.identity.jwks import FETCH_TIMEOUT_S, Jwks
from aim_kserve.identity.tokens import Tokens, UnknownKey
from aim_kserve.identity_settings import IdentitySettings


class Issuer:
    """Has its keys when it is made; ``follower`` is to be started. ``changed``: called after its keys have been read
    again, by the thread that did.

    Raises:
        StartupError: there are no keys.
    """

    def __init__(self, settings: IdentitySettings, changed: Callable[[], None] = lambda: None) -> None:
        self._jwks = Jwks(
            settings.jwt_jwks or "",
            settings.jwt_algorithms,
            refresh_s=settings.jwt_refresh_s,
            cooldown_s=settings.jwt_cooldown_s,
            cache=settings.jwks_cache,
            changed=changed,
        )
        self._jwks.start()
        self.follower = Follower("identity-jwks", self._jwks.look)
        self._jwks.wake = self.follower.wake
        self._tokens = Tokens(settings, lambda: self._jwks.keys)

    @property
    def is_ok(self) -> bool:
        """Whether the keys are what the issuer says now."""
        return self._jwks.is_ok

    async def verified(self, token: str) -> Verified:
        """Who the token says it is. An issuer that has just begun to use a new key is asked for it, once per cooldown.

        Raises:
            Unauthorized: the token is not valid here.
        """
        try:
            return self._tokens.verified(token)
        except UnknownKey:
            asked = self._jwks.ask()
            if asked is None:
                raise
        await asyncio.wait([asyncio.wrap_future(asked)], timeout=2 * FETCH_TIMEOUT_S)
        return self._tokens.verified(token)
