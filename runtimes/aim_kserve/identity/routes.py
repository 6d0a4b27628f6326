"""What a credential must be for, route by route and for both processes: the one table.

Nothing is open but what stands here as open, and an unknown route is closed before it is a 404: it needs ``admin``,
because the transformer hands on what it does not know, and engines have routes that change them (``/flush_cache``,
``/update_weights_from_disk``, ``/sleep``).

Several spellings may reach one route: ``/V1//load_lora_adapter`` does at some servers behind us. A path needs what it
needs as it is written and what it needs as a lenient server would read it, and only what is open as both is open.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, get_args
from urllib.parse import unquote

from aim_kserve.identity.caller import Scope

OPEN: Final[frozenset[Scope]] = frozenset()

#: Asked by Kubernetes and by load balancers, which have no credential. A model's readiness is KServe's own probe; the
#: card of a model (``/v1/models/NAME``) tells more and is closed.
_HEALTH = re.compile(r"/|/health|/healthz|/ping|/readyz|/readyz/.+|/v2/health/(?:live|ready)|/v2/models/.+/ready")

#: Path → scope, the first that matches in full. ``/openai/v1/…`` is ``/v1/…``.
_PATTERNS: Final[tuple[tuple[str, Scope], ...]] = (
    (r"/metrics", "metrics"),
    # Triton's extensions beside the model repository change the server as that does.
    (r"/v2/repository(?:/.*)?|/v2/models/.+/trace/setting", "admin"),
    (r"(?:/openai)?/v1/(?:un)?load_lora_adapter", "admin"),
    (r"(?:/v1)?/filter(?:/.*)?|/feedback", "filter"),
    (r"(?:/openai)?/v1/.+", "infer"),
    (r"/v2|/v2/(?:models(?:/.*)?|rerank|embed)", "infer"),
    # vLLM's, beside /v1.
    (r"/(?:tokenize|detokenize|pooling|classify|score|rerank|invocations|generate)", "infer"),
    (r"/(?:version|load|docs|redoc|openapi\.json)", "infer"),
)
TABLE: Final = tuple((re.compile(pattern), scope) for pattern, scope in _PATTERNS)

#: gRPC, by the method's name: the same table.
_GRPC: Final[dict[str, Scope | None]] = {
    "ServerLive": None,
    "ServerReady": None,
    "ModelReady": None,
    "ServerMetadata": "infer",
    "ModelMetadata": "infer",
    "ModelInfer": "infer",
    "RepositoryIndex": "admin",
    "RepositoryModelLoad": "admin",
    "RepositoryModelUnload": "admin",
}
_END = re.compile(r"[?#\0]")
_SERVICE = "/inference.GRPCInferenceService/"
_CACHED_CHARACTERS = 256  # of a path: longer ones are looked up each time
MAX_CHARACTERS = 4096  # longer ones are no route's, and are not looked through: they need all there is


def needed(method: str, path: str) -> frozenset[Scope]:
    """The scopes a request needs, all of them; :data:`OPEN` (none) where it is open.

    Args:
        method: HTTP's, in capitals.
        path: ASGI's ``path``: percent signs are taken out of it once.
    """
    return _cached(method, path) if len(path) <= _CACHED_CHARACTERS else _needed(method, path)


def needed_by_grpc(method: str) -> frozenset[Scope]:
    """The same of a gRPC method: ``/package.Service/Method``."""
    scope = _GRPC.get(method.removeprefix(_SERVICE), "admin") if method.startswith(_SERVICE) else "admin"
    return OPEN if scope is None else frozenset((scope,))


def _needed(method: str, path: str) -> frozenset[Scope]:
    if len(path) > MAX_CHARACTERS:
        return frozenset(get_args(Scope))
    plain = lenient(path)
    if unquote(plain) != plain:  # and on: nobody quotes so often
        return frozenset(get_args(Scope))
    written = _scope(method, path)
    read = written if plain == path else _scope(method, plain)
    return frozenset(scope for scope in (written, read) if scope is not None)


_cached = lru_cache(4096)(_needed)


def _scope(method: str, path: str) -> Scope | None:
    if _HEALTH.fullmatch(path) and (method in ("GET", "HEAD") or (method == "POST" and path == "/ping")):
        return None
    return next((scope for pattern, scope in TABLE if pattern.fullmatch(path)), "admin")


def lenient(path: str) -> str:
    """The path as the most lenient server reads it: percent signs taken out again and again, ``\\`` for ``/``, case,
    empty segments, ``.``, ``..``, parameters (``;``) and what follows a ``?``, ``#`` or NUL ignored."""
    for _ in range(5):
        decoded = unquote(path)
        if decoded == path:
            break
        path = decoded
    path = _END.split(path, maxsplit=1)[0]
    segments: list[str] = []
    for part in path.replace("\\", "/").lower().split("/"):
        segment = part.partition(";")[0].strip()
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    return "/" + "/".join(segments)
