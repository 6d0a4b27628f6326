"""What one request remembers, its prompt and its answers together."""

from __future__ import annotations

import secrets
from hashlib import blake2b

from aim_guardrail.pipeline.vault import Vault


class Session:
    """What one request remembers: the number of each redacted value. Values are kept as keyed digests only, but for
    those in the vault.

    Attributes:
        vault: what the placeholders of rules with `restore` stand for.
    """

    def __init__(self) -> None:
        self.vault = Vault()
        self._keyed: blake2b | None = None  # made for the first value: most requests have none
        self._names: dict[tuple[str, bytes], str] = {}
        self._last: dict[str, int] = {}  # number given, by label

    def placeholder(self, label: str, value: str, original: str | None = None) -> str:
        """`<EMAIL_ADDRESS_1>`: the same value, however it is spaced, gets the same number.

        Args:
            value: folded (`aim_guardrail.text`).
            original: as it stood in the prompt, where it is to be restored; then as it is spelt counts, too.
        """
        canonical = value if label == "SECRET" else _unspaced(value).casefold()
        name = self._name(label, canonical if original is None else f"{canonical}\0{original}")
        if original is not None:
            self.vault.keep(name, original)
        return name

    def _name(self, label: str, canonical: str) -> str:
        if self._keyed is None:
            self._keyed = blake2b(key=secrets.token_bytes(16), digest_size=16)
        keyed = self._keyed.copy()
        keyed.update(canonical.encode("utf-8", "surrogatepass"))
        digest = keyed.digest()
        known = self._names.get((label, digest))
        if known is not None:
            return known
        number = self._last.get(label, 0) + 1
        while self.vault.is_taken(name := f"<{label}_{number}>"):
            number += 1
        self._names[label, digest] = name
        self._last[label] = number
        return name


def _unspaced(value: str) -> str:
    """Without whitespace, hyphens, points and brackets."""
    plain = "".join(value.split()).replace("-", "").replace(".", "")
    return plain.replace("(", "").replace(")", "")


def placeholder_end(text: str, start: int, label: str) -> int:
    """Where the placeholder of that label that begins at ``start`` ends in ``text``."""
    return text.index(">", start + len(f"<{label}_")) + 1
