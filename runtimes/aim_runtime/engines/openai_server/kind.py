"""Settings of a server that is already there, or that one command starts."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from aim_runtime.engines.base import Engine, EngineSpec
from aim_runtime.engines.kind import EngineKind, EngineSettings


def _words(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


def _names(value: object) -> object:
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


class ServerAnswers(EngineSettings):
    """What every foreign server has, whoever starts it."""

    max_waiting: int = Field(256, ge=0, description="requests that may wait for a slot; one more is a 503")
    server_start_timeout: float = Field(
        600, gt=0, description="seconds the engine's server may take until it answers; then the start has failed"
    )
    server_timeout: float = Field(600, gt=0, description="longest wait for the next byte of an answer, seconds")


class OpenAIServerSettings(ServerAnswers):
    server_url: str | None = Field(None, description="of a server that speaks OpenAI's API, without /v1")
    server_command: Annotated[list[str] | None, BeforeValidator(_words)] = Field(
        None,
        description="starts such a server on 127.0.0.1: {port}, {model_dir} and {model_name} are filled in",
    )
    server_model: str | None = Field(None, description="the server's name of the model; default: the only one it has")
    server_operations: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="what the server has, e.g. chat/completions,embeddings; default: what it says"
    )
    server_key_file: Path | None = Field(None, description="file with the server's API key, sent as bearer token")

    @field_validator("server_url")
    @classmethod
    def _is_a_base(cls, url: str | None) -> str | None:
        if url is None:
            return None
        url = url.rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise ValueError("give http://HOST:PORT or https://HOST")
        return url

    @field_validator("server_key_file")
    @classmethod
    def _is_readable(cls, file: Path | None) -> Path | None:
        try:
            if file is not None:
                file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot be read ({error}): give a readable text file") from error
        return file

    @model_validator(mode="after")
    def _is_one_server(self) -> Self:
        if (self.server_url is None) == (self.server_command is None):
            raise ValueError("the openai_server engine needs --server_url or --server_command, and not both")
        return self


def create(spec: EngineSpec, settings: OpenAIServerSettings) -> Engine:
    from .engine import OpenAIServerEngine
    from .process import ServerProcess

    process = None
    url = settings.server_url
    if settings.server_command is not None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        filled = {"port": port, "model_dir": spec.model_dir, "model_name": spec.served_model_name}
        process = ServerProcess([_fill(word, filled) for word in settings.server_command])
    assert url is not None
    return OpenAIServerEngine(
        url,
        served_model_name=spec.served_model_name,
        model=settings.server_model,
        operations=settings.server_operations,
        max_model_len=spec.max_model_len,
        most=spec.max_concurrency,
        max_waiting=settings.max_waiting,
        silence_timeout_s=settings.server_timeout,
        start_timeout_s=settings.server_start_timeout,
        key_file=settings.server_key_file,
        process=process,
    )


def _fill(word: str, values: dict[str, object]) -> str:
    """Only our own names: a command line may hold braces of its own (JSON)."""
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", str(value))
    return word


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


KIND = EngineKind(OpenAIServerSettings, create)
