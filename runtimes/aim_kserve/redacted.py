"""No API key, token or address's password is ever told: not where people put one by mistake, in a path, a model's name,
a request's id."""

from __future__ import annotations

import re

#: What is shorter holds none, and is not looked through: this is asked for every line of the access log.
_SHORTEST = 64
#: The secret half of an API key, whatever became of the rest on its way (``aim%5Fid%5F…``); a JWT (RFC 7519), whose
#: header is JSON, so that it begins with ``{"`` in Base64; an address's user and password. Each begins with a literal,
#: which is ten times as fast.
_SECRETS = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        r"(_)[0-9A-Fa-f]{64}",
        r"(%5[Ff])[0-9A-Fa-f]{64}",
        r"(eyJ)[\w-]{6,}\.[\w-]{6,}(?:\.[\w-]*)?",
        r"(://)[^/?#@\s]{1,512}(?=@)",
    )
)


def redacted(text: str) -> str:
    """``text``, with ``***`` for what looks like the secret of a credential."""
    if len(text) < _SHORTEST:
        return text
    for secret in _SECRETS:
        text = secret.sub(r"\1***", text)
    return text
