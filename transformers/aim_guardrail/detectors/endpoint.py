"""What a policy says of a model that is asked elsewhere. Cheap to import: `remote` is what asks."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator

from aim_guardrail.detectors.family import Options


class Endpoint(Options):
    """A model behind an OpenAI-compatible server.

    Attributes:
        endpoint: the server's base URL as its clients take it, e.g. ``http://guard:8080/v1``.
        model: the name it is served by.
        api_key_file: a file that holds the key alone; read anew when it changes.
        ca_file: PEM certificates that the server's must lead to, in place of the system's.
    """

    endpoint: str
    model: str = Field(min_length=1, max_length=512)
    api_key_file: str | None = Field(default=None, min_length=1)
    ca_file: str | None = Field(default=None, min_length=1)

    @field_validator("endpoint")
    @classmethod
    def _is_a_base_url(cls, value: str) -> str:
        return base_url(value)


def base_url(value: str) -> str:
    """A base URL without the slash at its end.

    Raises:
        ValueError: it is none.
    """
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not value.isprintable():
        raise ValueError(f"{value[:80]!r} is no address of a server: give http://HOST[:PORT]/v1 or https://…")
    return _bare(value, parts)


def _bare(value: str, parts: SplitResult) -> str:
    if "@" in parts.netloc:
        raise ValueError("an endpoint holds no credentials: put the key in a file and name it as api_key_file")
    if parts.query or parts.fragment or " " in value:
        raise ValueError(f"{value[:80]!r} holds more than a base URL: leave out blanks, '?' and '#' and what follows")
    return value.rstrip("/")
