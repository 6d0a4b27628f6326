"""What an engine's process and ours say to each other: frames of typed messages over one stream socket.

A frame is 4 bytes of length (big endian) and that many bytes of MessagePack: a list of messages, all that were ready in
one pass of the sender's event loop. So the tokens of all sequences of an engine's step cost one write, one read and one
wake-up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import EngineSpec, EngineStats
from aim_runtime.fields import Fields

#: Larger than any body that is let in; a longer length is garbage.
FRAME_BYTES_AT_MOST = 256 * 2**20
#: What may be under way of one stream's chunks; then that stream waits for its reader, and no other.
WINDOW_BYTES = 256 * 1024
_HEAD = 4


class Message(msgspec.Struct, array_like=True, gc=False):
    """Something that one side tells the other. ``call`` numbers a request; the numbers are ours."""


# --- to the engine's process ------------------------------------------------------------------------------------------


class Start(Message, tag=1):
    """Which engine to build. Before its library is imported, the process binds itself to ``cpus`` and limits its
    anonymous memory; ``parent`` is whose end it does not outlive. ``log_levels``: logger ("": the root) → level."""

    spec: EngineSpec
    parent: int
    cpus: frozenset[int] | None = None
    memory_bytes: int | None = None
    log_levels: dict[str, str] = {}


class Ask(Message, tag=2):
    """One request, as in ``engines.base``."""

    call: int
    operation: str
    body: dict[str, Any]
    request_id: str
    headers: dict[str, str]
    priority: int
    timeout_s: float | None


class Abort(Message, tag=3):
    """Nobody waits for this answer any more."""

    call: int


class Credit(Message, tag=4):
    """So many bytes of a stream's chunks have been read."""

    call: int
    bytes_read: int


class LoadAdapter(Message, tag=5):
    call: int
    name: str
    path: str


class UnloadAdapter(Message, tag=6):
    call: int
    name: str


class Close(Message, tag=7):
    """Free everything and end."""


# --- from the engine's process ----------------------------------------------------------------------------------------

#: A request's Usage so far, its fields in their order.
Spent = tuple[int, int, int, float | None, float | None]
NOTHING: Spent = (0, 0, 0, None, None)


class Loaded(Message, tag=20):
    """What the loaded engine has, as in ``engines.base.Engine``."""

    name: str
    version: str
    operations: tuple[str, ...]
    requests: dict[str, Fields | None]
    adapters: tuple[str, ...]
    max_model_len: int
    takes_adapters: bool
    parks: bool


class LoadFailed(Message, tag=21):
    message: str


class Beat(Message, tag=22):
    """How the engine is getting on; sent at least every ``child.BEAT_S``, and with what streams bring."""

    healthy: bool
    stats: EngineStats


class Answer(Message, tag=23):
    """A whole answer; ``ignored`` are fields the engine found to be unknown."""

    call: int
    body: dict[str, Any]
    spent: Spent
    ignored: list[str]


class Opened(Message, tag=24):
    """The request was accepted: its answer is a stream."""

    call: int
    ignored: list[str]


class Chunks(Message, tag=25):
    call: int
    chunks: list[bytes]
    spent: Spent


class Ended(Message, tag=26):
    """A stream has ended, or an adapter's loading: the names that are served now."""

    call: int
    adapters: tuple[str, ...] | None = None


class Dropped(Message, tag=28):
    """After an Abort: nothing of the request is left in the engine."""

    call: int


class Failed(Message, tag=27):
    """A ServingError, as ``errors`` puts it into words."""

    call: int
    kind: str
    message: str
    status: int
    error_type: str
    param: str | None
    code: str | None
    retry_after_s: float | None
    headers: dict[str, str]
    spent: Spent


ToEngine = Start | Ask | Abort | Credit | LoadAdapter | UnloadAdapter | Close
FromEngine = Loaded | LoadFailed | Beat | Answer | Opened | Chunks | Ended | Failed | Dropped


class Garbage(Exception):
    """The other side does not speak our language: one line."""


class Unread(NamedTuple):
    """In the place of a message for which there was no memory."""

    call: int


class _Head(msgspec.Struct, array_like=True, gc=False):
    """What every message with a call begins with; the rest is skipped, not built."""

    tag: int
    call: int


_heads = msgspec.msgpack.Decoder(list[_Head])
_encoder = msgspec.msgpack.Encoder(enc_hook=str)  # a Path


def encode(messages: list[Any]) -> bytearray:
    """One frame.

    Raises:
        BadRequest: what a body holds cannot be sent: an integer beyond 64 bits, text that is no Unicode, a depth that
            nobody needs, or too much.
    """
    frame = bytearray(_HEAD)
    try:
        _encoder.encode_into(messages, frame, _HEAD)
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"the body cannot be passed on to the engine: {error}") from error
    size = len(frame) - _HEAD
    if size > FRAME_BYTES_AT_MOST:
        raise BadRequest(f"the body is {size} bytes for the engine, at most {FRAME_BYTES_AT_MOST} can be passed on")
    frame[:_HEAD] = size.to_bytes(_HEAD, "big")
    return frame


class Reader:
    """Takes bytes as they come, gives the messages of every frame that is complete.

    Args:
        kind: the union of messages that may come.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[kind], dec_hook=lambda kind, text: kind(text))  # a Path
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Raises Garbage. A frame that comes in one piece, as nearly all do, is not copied."""
        buffer: bytes | bytearray = data
        if self._rest:
            self._rest += data
            buffer = self._rest
        messages: list[Any] = []
        at, end = 0, len(buffer)
        with memoryview(buffer) as view:
            while end - at >= _HEAD:
                size = int.from_bytes(view[at : at + _HEAD], "big")
                if size > FRAME_BYTES_AT_MOST:
                    raise Garbage(f"a frame of {size} bytes, {FRAME_BYTES_AT_MOST} are the most")
                if end - at - _HEAD < size:
                    break
                messages += self._messages(view[at + _HEAD : at + _HEAD + size])
                at += _HEAD + size
        if buffer is self._rest:
            del self._rest[:at]  # nothing is copied while a large frame comes in pieces
        elif at < end:
            self._rest = bytearray(data[at:])
        return messages

    def _messages(self, frame: memoryview) -> list[Any]:
        try:
            messages: list[Any] = self._decoder.decode(frame)
        except MemoryError:  # a body of many small values: its own call fails, not whoever else is served
            return [Unread(head.call) for head in _heads.decode(frame)]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Garbage(f"a frame that is no list of messages: {error}") from error
        return messages
