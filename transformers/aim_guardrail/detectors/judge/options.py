"""What a policy says of a judge's model: where it runs, and how much it takes. Cheap to import."""

from __future__ import annotations

import hashlib

from pydantic import Field, field_validator, model_validator

from aim_guardrail.detectors.endpoint import Endpoint, base_url
from aim_guardrail.detectors.family import Options

CHARS_PER_TOKEN = 2
"""How many characters a token is taken for: English has about 4, so that what is estimated to fit does. Where a server
gets more than it takes all the same, it refuses (400), which is an error and never a pass."""


class JudgeOptions(Options):
    """A model on a server (`endpoint`, `model`), or in this process (`path`).

    Attributes:
        endpoint, model, api_key_file, ca_file: as of `Endpoint`.
        path: a GGUF file, run by llama.cpp in a thread of this process.
        threads: how many of them compute with `path`; by default all cores.
        context_tokens: how much the model takes at once, question and answer together.
    """

    endpoint: str | None = None
    model: str | None = Field(default=None, min_length=1, max_length=512)
    api_key_file: str | None = Field(default=None, min_length=1)
    ca_file: str | None = Field(default=None, min_length=1)
    path: str | None = Field(default=None, min_length=1)
    threads: int | None = Field(default=None, ge=1, le=1024)
    context_tokens: int = Field(default=8192, ge=1024, le=1_048_576)

    @field_validator("endpoint")
    @classmethod
    def _is_a_base_url(cls, value: str | None) -> str | None:
        return None if value is None else base_url(value)

    @model_validator(mode="after")
    def _runs_somewhere(self) -> JudgeOptions:
        if (self.endpoint is None) == (self.path is None):
            raise ValueError("a judge runs at an endpoint or from a path: give one of them")
        of_servers = [name for name in ("model", "api_key_file", "ca_file") if getattr(self, name) is not None]
        if self.path is not None and of_servers:
            raise ValueError(f"{of_servers[0]} is a server's: remove it, or give endpoint in place of path")
        if self.endpoint is not None and self.model is None:
            raise ValueError("model is missing: give the name that the endpoint serves it by")
        if self.endpoint is not None and self.threads is not None:
            raise ValueError("threads are for path: remove them")
        return self

    @property
    def server(self) -> Endpoint:
        """Where it is served; only where `endpoint` is given."""
        given = {name: getattr(self, name) for name in ("endpoint", "model", "api_key_file", "ca_file")}
        return Endpoint.model_validate(given)

    @property
    def digest(self) -> str:
        """Changes with anything that is said here."""
        return hashlib.blake2b(self.model_dump_json().encode(), digest_size=8).hexdigest()

    def room(self, taken_chars: int, answer_tokens: int) -> int:
        """How many characters of text a question has room for beside `taken_chars` of our own.

        Raises:
            ValueError: hardly any.
        """
        room = (self.context_tokens - answer_tokens) * CHARS_PER_TOKEN - taken_chars
        if room < _LEAST_ROOM:
            raise ValueError(f"context_tokens {self.context_tokens} leave no room for a text: raise them")
        return room


_LEAST_ROOM = 512
