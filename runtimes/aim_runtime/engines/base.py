"""The Engine protocol: OpenAI JSON in, OpenAI JSON out.

An engine is the only thing that knows its library. The server above it knows routes, headers, metrics and
errors, and nothing about tokens; an engine knows nothing about HTTP. Bodies arrive *as received*: an engine
reads the fields it needs and refuses, by name, those it cannot honour.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from aim_kserve.errors import Unavailable
from aim_kserve.identity.identifiers import CREDENTIAL_HEADERS
from aim_kserve.shortcut import Shortcut
from aim_runtime.fields import Fields

Json = dict[str, Any]

#: A streamed answer: each item is one complete OpenAI chunk, JSON-encoded, without SSE framing and without
#: ``[DONE]`` (the server adds both). An item that starts with ``event: `` is a named event (the responses API):
#: its lines are complete but for the blank one that ends it. A ServingError raised on the way becomes the
#: stream's last event. Closing the generator (``aclose``) aborts the request in the engine.
Stream = AsyncGenerator[bytes, None]


@dataclass(slots=True)
class Usage:
    """Tokens of one request, filled in by the engine as it goes; read by the server for metrics, logs and traces.

    ``queue_s``, ``prefill_s``: seconds until it had a slot, and from there to its first token; of the first where it
    has several sequences. None: not there yet, or the engine cannot tell.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None

    def clear(self) -> None:
        """Forget what a call has counted that is made again."""
        fresh = Usage()
        for name in fresh.__slots__:
            setattr(self, name, getattr(fresh, name))


def _nobody() -> None:
    """Nobody wants to know."""


@dataclass(slots=True)
class Moments:
    """Who is told when something happens to a request. ``first_token``: of a stream, when the server has it."""

    first_token: Callable[[], None] = _nobody


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the server knows about a request besides its body.

    ``request_id`` is unique per request and becomes part of the answer's ``id`` (``chatcmpl-<request_id>``).
    ``priority``: lower is served first, 0 is ordinary (vLLM's convention).
    ``timeout_s``: the server ends the request after this many seconds; None is never.
    ``ignored`` is filled in by the server: the body's fields that the operation does not know.
    ``shortcut``: where an engine that reads a stream off a socket may offer its chunks.
    ``moments``: set by whoever stands between the server and the engine.
    """

    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    timeout_s: float | None = None
    usage: Usage = field(default_factory=Usage)
    ignored: list[str] = field(default_factory=list)
    shortcut: Shortcut = field(default_factory=Shortcut)
    moments: Moments = field(default_factory=Moments)

    def passed_on(self) -> dict[str, str]:
        """The headers, names in lower case, as an engine or its process gets them: without credentials."""
        lowered = ((name.lower(), value) for name, value in self.headers.items())
        return {name: value for name, value in lowered if name not in CREDENTIAL_HEADERS}


#: One operation, e.g. chat. It validates *before* it returns, so that a bad request is a 4xx and never an
#: error inside a 200 stream. It answers a dict, or a Stream when ``body["stream"]`` is true.
Operation = Callable[[Json, RequestContext], Awaitable["Json | Stream"]]


#: ``restarting``: its process has ended, or was ended, and another one loads the model. ``failed``: it never loaded.
#: ``unreachable``: it is a server elsewhere that does not answer and may come back.
State = Literal["loading", "ready", "restarting", "unreachable", "failed"]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and admission. Counts are requests, ``slots_total`` is the most that can run.

    ``kv_tokens_total``: tokens that the KV cache holds; None where the engine has none or cannot tell (yet).
    ``parked``: how many of ``waiting`` have run already and were put aside for a more urgent one (see Parks).
    """

    running: int
    waiting: int
    slots_total: int
    kv_cache_usage: float | None = None  # 0..1; None where the engine cannot tell
    stalled_s: float | None = None  # seconds without progress while there is work; None where it cannot tell
    kv_tokens_total: int | None = None
    parked: int = 0
    # Of an engine in a process of its own (``aim_runtime.supervisor``) or elsewhere; None where it runs in ours.
    state: State | None = None
    restarts: int | None = None
    last_words: str | None = None  # "its process was killed by …": one line, bounded, told to clients


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which engine serves which model, and how: all that a process needs to build it (``engines.registry``). Plain
    values, so that it can be sent to another process.

    ``options``: the engine's own settings, by the names of its flags. ``devices`` is nobody's business but the
    process's environment, which is set before the engine's library is imported.
    """

    engine: str
    model_dir: Path
    served_model_name: str
    max_model_len: int | None = None
    max_concurrency: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class EngineDied(Unavailable):
    """The engine's process ended while it had this request; ``alone``: and no other."""

    alone = False


class ModelLoadError(Exception):
    """The model cannot be loaded. The message is one line that says what is wrong and where."""


class Engine(Protocol):
    """One loaded model.

    Life: ``await load()`` once (may take minutes; must not block the event loop; raises ModelLoadError) →
    operations → ``await drain(timeout_s)`` → ``await close()``.
    """

    name: str  # "llama_cpp" | "vllm": the ``engine`` label of metrics

    @property
    def version(self) -> str:
        """Of the library, e.g. ``0.32.0``."""
        ...

    @property
    def operations(self) -> Mapping[str, Operation]:
        """URL suffix below ``/v1`` → operation: ``chat/completions``, ``completions``, ``embeddings``,
        ``responses``, ``tokenize`` …  Only what the loaded model really has. Stable after ``load``."""
        ...

    @property
    def requests(self) -> Mapping[str, Fields | None]:
        """Operation → the fields of its body, ``fields_of`` its request model (None: not known): the one list of what a
        client may ask. V1's and V2's parameters are read off it, and what it does not name is unknown. Stable after
        ``load``."""
        ...

    @property
    def adapters(self) -> tuple[str, ...]:
        """Further names for ``body["model"]``: the LoRA adapters that are loaded now (see TakesAdapters)."""
        ...

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer, in tokens."""
        ...

    async def load(self) -> None: ...

    def healthy(self) -> bool:
        """False while the engine can answer nothing: its thread or process is dead, or stands still with work to
        do (``stats().stalled_s``). Cheap: called on every probe."""
        ...

    def stats(self) -> EngineStats: ...

    async def drain(self, timeout_s: float) -> None:
        """Wait until no request is running or waiting, at most ``timeout_s``; then abort what is left."""
        ...

    async def close(self) -> None:
        """Free everything.

        Raises:
            ShutdownError: a thread of the engine does not come back; what it uses has not been freed.
        """
        ...


@runtime_checkable
class TakesAdapters(Protocol):
    """What an engine may have besides: adapters that come and go while it serves. Once begun, either is done even if
    the caller leaves."""

    async def load_adapter(self, name: str, path: Path) -> None:
        """Serve the LoRA adapter at ``path`` as ``name``. One that has the name is replaced: its requests finish with
        it, and no cached token of it is used again.

        Raises:
            BadRequest: names what is wrong with the name or the adapter; nothing has changed.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """No request gets it from now on. Returns when those that have it are done, and its memory is free.

        Raises:
            NotFound: it is not loaded.
        """
        ...


@runtime_checkable
class Parks(Protocol):
    """What an engine may have besides: a running request makes way for a more urgent one.

    ``parks``: where it is True and every slot is taken, a request whose ``context.priority`` is a smaller number takes
    the slot of a running one with a larger number (never of an equal). That one is put aside and goes on later exactly
    where it was: its answer is the same as without the pause. Stable after ``load``.
    """

    @property
    def parks(self) -> bool: ...


def parks(engine: object) -> bool:
    """Whether ``engine`` lets a running request make way (see Parks); one that does not say so does not."""
    return isinstance(engine, Parks) and engine.parks


#: Asks a loaded engine for what it must show before it gets requests. Raises ModelLoadError: it does not.
Prove = Callable[[Engine], Awaitable[None]]


@runtime_checkable
class StartsAgain(Protocol):
    """What an engine may have besides: it loads its model again by itself. ``prove``: what it asks of itself then, as
    its user did after ``load``; it is not ready before. ``on_ready``: called each time that it is."""

    prove: Prove | None
    on_ready: Callable[[], None]

    @property
    def state(self) -> State: ...
