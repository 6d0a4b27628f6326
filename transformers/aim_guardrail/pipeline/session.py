"""What one request remembers, its prompt and its answers together."""

from __future__ import annotations

import hashlib
import re
import secrets

from aim_guardrail.pipeline.vault import Vault

_SPACING = re.compile(r"[-\s.()]")


class Session:
    """What one request remembers: the number of each redacted value. Values are kept as keyed digests only, but for
    those in the vault.

    Attributes:
        vault: what the placeholders of rules with `restore` stand for.
    """

    def __init__(self) -> None:
        self.vault = Vault()
        self._key = b""  # made for the first value: most requests have none
        self._numbers: dict[str, dict[bytes, int]] = {}
        self._last: dict[str, int] = {}  # number given, by label

    def placeholder(self, label: str, value: str, original: str | None = None) -> str:
        """`<EMAIL_ADDRESS_1>`: the same value, however it is spaced, gets the same number.

        Args:
            value: folded (`aim_guardrail.text`).
            original: as it stood in the prompt, where it is to be restored; then as it is spelt counts, too.
        """
        canonical = value if label == "SECRET" else _SPACING.sub("", value).casefold()
        name = self._name(label, canonical if original is None else f"{canonical}\0{original}")
        if original is not None:
            self.vault.keep(name, original)
        return name

    def _name(self, label: str, canonical: str) -> str:
        self._key = self._key or secrets.token_bytes(16)
        digest = hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), key=self._key, digest_size=16).digest()
        numbers = self._numbers.setdefault(label, {})
        number = numbers.get(digest)
        if number is None:
            number = self._last.get(label, 0) + 1
            while self.vault.is_taken(f"<{label}_{number}>"):
                number += 1
            numbers[digest] = self._last[label] = number
        return f"<{label}_{number}>"


def placeholder_end(text: str, start: int, label: str) -> int:
    """Where the placeholder of that label that begins at ``start`` ends in ``text``."""
    return text.index(">", start + len(f"<{label}_")) + 1
