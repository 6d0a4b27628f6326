"""Whose credential the predictor gets: the client's, the transformer's own, or nobody's.

All that is sent to the predictor passes :meth:`Credentials.sent` on its last step, so that no route can forget it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from aim_kserve.identity.key_file import KeyFile

Mode = Literal["forward", "strip"]

#: Headers and gRPC metadata that carry a client's credential. Servers that speak CGI take ``_`` for ``-``.
_OF_CLIENTS = frozenset(b"authorization proxy-authorization x-api-key x_api_key api-key api_key".split())


class Credentials:
    """What goes on.

    Args:
        mode: ``strip``: no credential of a client's leaves this process; ``forward``: it does, as it came.
        own: the transformer's: of what it asks itself, and with ``strip`` sent in a client's place.
    """

    def __init__(self, mode: Mode = "strip", own: KeyFile | None = None) -> None:
        self._mode = mode
        self._own = own

    def sent(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """``headers`` (names in lower case) as the predictor gets them."""
        if self._mode == "forward":
            return list(headers)
        return [item for item in headers if item[0] not in _OF_CLIENTS] + self.own()

    def own(self) -> list[tuple[bytes, bytes]]:
        """The header of what the transformer asks itself; none where it has no key. Never of a client's request that is
        forwarded: one without a credential would get ours."""
        return [] if self._own is None else [(b"authorization", b"Bearer " + self._own.key)]

    def hidden(self) -> Hidden:
        """What keeps the key that :meth:`sent` sends now out of an answer."""
        return Hidden(self._own.key if self._own is not None and self._mode == "strip" else b"")


class Hidden:
    """Bytes in which a key is stars, as many: a predictor that repeats what it got tells no client our key.

    In pieces: :meth:`more` gives back what is certain, :meth:`rest` what is left at the end.
    """

    __slots__ = ("_held", "_key", "_stars")

    def __init__(self, key: bytes) -> None:
        self._key, self._stars, self._held = key, b"*" * len(key), b""

    def all(self, data: bytes) -> bytes:
        return data.replace(self._key, self._stars) if self._key else data

    def headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The same of each value."""
        return [(name, self.all(value)) for name, value in headers] if self._key else headers

    def more(self, data: bytes) -> bytes:
        if not self._key:
            return data
        data = self.all(self._held + data)
        cut = self._begun(data)
        self._held = data[cut:]
        return data[:cut]

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held

    def _begun(self, data: bytes) -> int:
        """Where the key may have begun at the end of ``data``; its length where not."""
        at = data.find(self._key[:1], max(0, len(data) - len(self._key) + 1))
        while at >= 0 and not self._key.startswith(data[at:]):
            at = data.find(self._key[:1], at + 1)
        return at if at >= 0 else len(data)
