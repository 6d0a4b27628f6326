"""What one request remembers, its prompt and its answers together."""

from __future__ import annotations

import hashlib
import re
import secrets


class Session:
    """What one request remembers: the number of each redacted value. Values are kept as keyed digests only."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._numbers: dict[str, dict[bytes, int]] = {}

    def placeholder(self, label: str, value: str) -> str:
        """`<EMAIL_ADDRESS_1>`: the same value, however it is spaced, gets the same number."""
        canonical = value if label == "SECRET" else re.sub(r"[-\s.()]", "", value).casefold()
        digest = hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), key=self._key, digest_size=16).digest()
        numbers = self._numbers.setdefault(label, {})
        return f"<{label}_{numbers.setdefault(digest, len(numbers) + 1)}>"
