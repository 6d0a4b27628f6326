"""What a server has: its models, its version, its operations. Asked once it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from aim_kserve.errors import ServingError
from aim_runtime.engines.base import ModelLoadError

from .connection import Connection

PROBE_TIMEOUT_S = 10.0
#: What OpenAI's API and vLLM's have; a server may have more, which ``--server_operations`` names.
KNOWN = (
    "chat/completions",
    "completions",
    "embeddings",
    "responses",
    "tokenize",
    "detokenize",
    "score",
    "rerank",
    "classify",
    "pooling",
)
#: Where a server does not tell: what every one has.
USUAL = ("chat/completions", "completions")


@dataclass(frozen=True, slots=True)
class Found:
    """model: the name to ask the server for. max_model_len: 0 where it does not tell. paths: operation → URL path."""

    model: str
    adapters: tuple[str, ...]
    max_model_len: int
    version: str
    paths: Mapping[str, str]


async def discover(connection: Connection, *, model: str | None, operations: Sequence[str] = ()) -> Found:
    """Ask the server that answers at ``connection`` what it has.

    Args:
        model: its model to use; None takes the only one (adapters do not count).
        operations: what it has; none asks it.

    Raises:
        ModelLoadError: it has no list of models, not that model, or several to choose from.
    """
    cards = await _cards(connection)
    card = _chosen(cards, model, connection.base_url)
    adapters = tuple(str(other["id"]) for other in cards if other.get("parent") == card["id"])
    length = card.get("max_model_len") or (card.get("meta") or {}).get("n_ctx")  # vLLM, SGLang; llama-server
    paths = {name: f"/v1/{name}" for name in operations} or await _paths(connection)
    return Found(str(card["id"]), adapters, length if isinstance(length, int) else 0, await _version(connection), paths)


async def _cards(connection: Connection) -> list[Mapping[str, Any]]:
    where = f"{connection.base_url}/v1/models"
    try:
        status, body = await connection.get("/v1/models", PROBE_TIMEOUT_S)
    except ServingError as error:
        raise ModelLoadError(f"{where}: {error.message}") from error
    if status in (401, 403):
        raise ModelLoadError(f"{where}: {status}: the server wants a key: give --server_key_file")
    cards = (_json(body) or {}).get("data") if status == 200 else None
    if not isinstance(cards, list):
        raise ModelLoadError(f"{where}: {status} and no list of models: this is no server of OpenAI's API")
    return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]


def _chosen(cards: list[Mapping[str, Any]], model: str | None, where: str) -> Mapping[str, Any]:
    names = [str(card["id"]) for card in cards]
    if model is not None:
        found = next((card for card in cards if card["id"] == model), None)
        if found is None:
            raise ModelLoadError(f"{where} does not have the model {model!r}; it has: {', '.join(names) or 'none'}")
        return found
    bases = [card for card in cards if card.get("parent") is None]
    if len(bases) != 1:
        has = ", ".join(names) or "none"
        raise ModelLoadError(f"{where} has {len(bases)} models ({has}): choose one with --server_model")
    return bases[0]


async def _paths(connection: Connection) -> Mapping[str, str]:
    """By its OpenAPI document (vLLM, SGLang and whatever else is made with FastAPI)."""
    document = await _asked(connection, "/openapi.json")
    described = document.get("paths") if document else None
    posted = {path for path, verbs in (described or {}).items() if isinstance(verbs, dict) and "post" in verbs}
    places = {name: next((path for path in (f"/v1/{name}", f"/{name}") if path in posted), None) for name in KNOWN}
    found = {name: path for name, path in places.items() if path is not None}
    return found if "completions" in found or "chat/completions" in found or "embeddings" in found else _usual()


def _usual() -> Mapping[str, str]:
    return {name: f"/v1/{name}" for name in USUAL}


async def _version(connection: Connection) -> str:
    """vLLM, and this runtime, say it at ``/version``; SGLang and llama-server among their settings."""
    for path, name in _VERSIONS:
        said = (await _asked(connection, path) or {}).get(name)
        if isinstance(said, str):
            return said
    return ""


_VERSIONS = (
    ("/version", "version"),
    ("/server_info", "version"),
    ("/get_server_info", "version"),
    ("/props", "build_info"),
)


async def _asked(connection: Connection, path: str) -> Mapping[str, Any] | None:
    """A JSON object, or None: what a server does not have does not stop it from being used."""
    try:
        status, body = await connection.get(path, PROBE_TIMEOUT_S)
    except ServingError:
        return None
    return _json(body) if status == 200 else None


def _json(body: bytes) -> Mapping[str, Any] | None:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
