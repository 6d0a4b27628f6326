"""The stages behind the inline one, for a stream: its frames wait, in order, until every window of text that they have
a part in is proven.

Windows are judged side by side while the stream goes on, as many at once as `_MOST_AT_ONCE`; what comes when twice as
many wait, waits at the predictor. Where a window is not judged in time, or its detector fails, the policy decides.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Hashable
from dataclasses import dataclass, field
from typing import Any

from aim_guardrail.detectors.base import Finding, Passage
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.blocked import Blocked
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import Verdict, settle
from aim_guardrail.streams.frame import Frame, Piece, Said, Whole
from aim_guardrail.streams.windows import Track, Window
from aim_guardrail.text import Text
from aim_kserve.errors import UpstreamFailed

_MOST_AT_ONCE = 8
_MOST_WAITING = 2 * _MOST_AT_ONCE
_MOST_HELD_BYTES = 2**20
_MOST_BUFFERED_BYTES = 2**24
#: Frames without a piece of a text after which it is judged as far as it goes: another is being said.
_SILENT_FRAMES = 8
#: How often a stream of which nothing may be shown yet gives a sign of life, and what it is.
_HEARTBEAT_S = 2.0
HEARTBEAT = b":\n\n"


@dataclass(slots=True)
class _Held:
    """A frame that waits."""

    frame: Frame
    size: int
    pieces: list[tuple[Piece, Track, int, int]] = field(default_factory=list)
    wholes: list[asyncio.Task[bool]] = field(default_factory=list)

    @property
    def is_proven(self) -> bool:
        pieces = all(end <= track.proven for _, track, _, end in self.pieces)
        return pieces and all(task.done() and task.exception() is None for task in self.wholes)


class Behind:
    """``put`` frames, ``end`` them; ``shown`` gives what may be sent. ``close`` in the end.

    Args:
        mode: `holdback`, `buffer` or `observe`: see `policy.StreamRules`.
    """

    def __init__(self, screening: Screening, metrics: Metrics, mode: str) -> None:
        self._screening = screening
        self._metrics = metrics
        self._stages = screening.guard.stages
        self._judges = self._stages.watches("answer")
        self._is_buffer, self._observes = mode == "buffer", mode == "observe"
        hold_ms = screening.guard.policy.stream.max_hold_ms
        self._hold_s = None if hold_ms is None else hold_ms / 1000
        self._frames: deque[_Held] = deque()
        self._held_bytes = 0
        self._tracks: dict[tuple[Hashable, ...], Track] = {}
        self._waiting: list[tuple[Track, Window, asyncio.Task[list[Finding]]]] = []  # of each track in its order
        self._wholes: set[asyncio.Task[bool]] = set()
        self._at_once = asyncio.Semaphore(_MOST_AT_ONCE)
        self._changed, self._progress = asyncio.Event(), asyncio.Event()
        self._beat_s = time.monotonic() + _HEARTBEAT_S
        self._turn = 0
        self._ended = False
        self._error: BaseException | None = None

    # --- in -------------------------------------------------------------------------------------------------------

    def put(self, frame: Frame, said: Said, *, is_sent: bool = False) -> None:
        """One more frame; ``is_sent``: it is only judged, not sent.

        Raises:
            UpstreamFailed: there is more than may be buffered.
        """
        self._turn += 1
        frame.raw = frame.encoded()
        held = _Held(frame, len(frame.raw))
        now_s = time.monotonic()
        for piece in said.pieces:
            track = self._track(piece.key)
            track.turn = self._turn
            held.pieces.append((piece, track, *track.push(piece.text, now_s)))
        if self._judges:
            held.wholes = [self._start(self._judge_whole(whole, held.size)) for whole in said.wholes]
            self._wholes.update(held.wholes)
        if not is_sent:
            self._frames.append(held)
            self._held_bytes += held.size
            if self._is_buffer and self._held_bytes > _MOST_BUFFERED_BYTES:
                raise UpstreamFailed(
                    f"the predictor's streamed answer is larger than the {_MOST_BUFFERED_BYTES} bytes that are "
                    "buffered: shorten it, or use another stream.mode",
                    code="answer_too_large",
                )
        self._cut_windows(said.ends)
        self._changed.set()

    def end(self, error: BaseException | None = None) -> None:
        """No more frames will come; ``error``: why, where that was not their end."""
        self._ended, self._error = True, error
        self._cut_all()
        self._changed.set()

    async def room(self) -> None:
        """Wait until more may come: what is held, and what is being judged, is bounded."""
        while not self._ended and self._is_full:
            if not self._waiting and not self._wholes:
                self._cut_all()  # what is held waits for text, and there is too much of it to go on waiting
            self._changed.set()
            self._progress.clear()
            await self._progress.wait()

    @property
    def _is_full(self) -> bool:
        judging = len(self._waiting) + len(self._wholes)
        return judging >= _MOST_WAITING or (self._held_bytes > _MOST_HELD_BYTES and not self._is_buffer)

    # --- out ------------------------------------------------------------------------------------------------------

    async def shown(self) -> AsyncIterator[bytes]:
        """What may be sent, as soon as it may be.

        Raises:
            Blocked: a finding blocks, or a piece that came was blocked. ``unsent`` is not to be sent then.
            Unavailable: a detector failed or was late, and the policy fails closed.
            BaseException: what the stream was said to have ended with, once all before it has been sent.
        """
        while True:
            failure = self._settle() or (self._error if self._is_buffer or isinstance(self._error, Blocked) else None)
            if out := self._release():
                self._beat_s = time.monotonic() + _HEARTBEAT_S
                yield out
            self._progress.set()
            if failure is not None:
                raise failure
            if self._ended and not self._frames and not self._waiting and not self._wholes:
                if self._error is not None:
                    raise self._error
                return
            await self._wait()
            if self._is_buffer and time.monotonic() >= self._beat_s:
                self._beat_s = time.monotonic() + _HEARTBEAT_S
                yield HEARTBEAT

    @property
    def unsent(self) -> list[Frame]:
        """The frames that wait."""
        return [held.frame for held in self._frames]

    async def close(self) -> None:
        """Give up what is being judged."""
        tasks = [*(task for _, _, task in self._waiting), *self._wholes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self) -> None:
        """Wait for anything to change, for text to have waited long enough, or until a sign of life is due."""
        due_s = self._beat_s if self._is_buffer else self._late_s
        try:
            async with asyncio.timeout(None if due_s is None else max(0.0, due_s - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            self._cut_late()
        self._changed.clear()

    @property
    def _late_s(self) -> float | None:
        """When a text has waited for half of the time that it may: the other half is for judging it."""
        if self._hold_s is None or not (waiting := self._open):
            return None
        return min(track.since_s for track in waiting) + self._hold_s / 2

    def _release(self) -> bytes:
        """What stands at the head of the queue and is proven; of what is buffered, all or nothing."""
        out = []
        if self._is_buffer and (not self._ended or self._error or self._waiting or self._wholes):
            return b""
        while self._frames and self._frames[0].is_proven:
            held = self._frames.popleft()
            self._held_bytes -= held.size
            out.append(self._rewritten(held))
        return b"".join(out)

    def _rewritten(self, held: _Held) -> bytes:
        """A frame as it may be sent."""
        texts: dict[tuple[int, str | int], list[str]] = {}
        changed = any(task.result() for task in held.wholes)
        for piece, track, start, _ in held.pieces:
            shown = track.shown(start, piece.text)
            changed = changed or shown != piece.text
            together = texts.setdefault((id(piece.holder), piece.name), [])
            together.append(shown)
            piece.holder[piece.name] = "".join(together)
        if changed:
            held.frame.raw = None
        held.frame.restore(self._screening.session.vault)
        return held.frame.encoded()

    # --- judged ---------------------------------------------------------------------------------------------------

    @property
    def _open(self) -> list[Track]:
        """Texts of which no window has the end."""
        return [track for track in self._tracks.values() if track.is_open]

    def _track(self, key: tuple[Hashable, ...]) -> Track:
        track = self._tracks.get(key)
        if track is None:
            track = self._tracks[key] = Track(is_whole=self._is_buffer)
        return track

    def _cut_windows(self, ends: list[Hashable]) -> None:
        """Start on what is complete: windows that are full, texts that end, or that are not gone on with."""
        for key, track in list(self._tracks.items()):
            over = key[0] in ends
            if over or self._turn - track.turn >= _SILENT_FRAMES or track.turn == self._turn:
                self._begin(track, ends=over or (track.turn != self._turn and not self._is_buffer))
            if over:
                del self._tracks[key]

    def _cut_all(self) -> None:
        for track in self._tracks.values():
            self._begin(track, ends=True)

    def _cut_late(self) -> None:
        if self._is_buffer or self._hold_s is None:
            return
        for track in self._open:
            if track.since_s <= time.monotonic() - self._hold_s / 2:
                self._begin(track, ends=True)

    def _begin(self, track: Track, *, ends: bool) -> None:
        for window in track.cut(ends=ends) if track.is_open else ():
            if not self._judges:
                track.proven = window.proven_to
            else:
                self._waiting.append((track, window, self._start(self._judge(window))))

    def _start(self, judging: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(judging)
        task.add_done_callback(lambda _: self._changed.set())
        return task

    async def _judge(self, window: Window) -> list[Finding]:
        """What is found in a window."""
        if not window.text.strip():
            return []
        held_s = self._hold_s if self._hold_s is not None else self._screening.guard.policy.budget_s
        began_s = window.since_s if self._hold_s is not None else time.monotonic()
        async with self._at_once:
            passages = [Passage(window.text, "answer", "assistant")]
            judgement = await self._screening.ask_stages("answer", passages, began_s + held_s)
        return list(judgement.findings[0])

    async def _judge_whole(self, whole: Whole, size: int) -> bool:
        """Judge what comes whole, in its place; True if it is another now."""
        async with self._at_once:
            if whole.name is None:
                return await self._screening.screen_behind("answer", whole.holder, whole.place, size)
            key = whole.name if type(whole.name) is str else ""
            box = {key: whole.holder[whole.name]}
            changed = await self._screening.screen_behind("answer", box, whole.place.under(key), size)
            whole.holder[whole.name] = box[key]
            return changed

    def _settle(self) -> BaseException | None:
        """Take in what has been judged; what ends the stream, if anything does: a block, or else a failure."""
        ends: list[BaseException] = []
        for whole in [task for task in self._wholes if task.done()]:
            self._wholes.discard(whole)
            ends += [error] if (error := whole.exception()) else []
        pending, still = set[int](), []
        for track, window, task in self._waiting:
            error = task.exception() if task.done() else None
            verdict = settle(task.result()) if task.done() and error is None else None
            if verdict is not None and verdict.blocked:
                self._note(track, window, verdict)
                error = Blocked("the answer", verdict)
            ends += [error] if error else []
            if verdict is None or error or id(track) in pending:
                pending.add(id(track))
                still.append((track, window, task))
            else:
                self._apply(track, window, verdict)
        self._waiting = still
        return min(ends, key=lambda error: not isinstance(error, Blocked), default=None)

    def _apply(self, track: Track, window: Window, verdict: Verdict) -> None:
        """A window is judged, and so are all before it."""
        self._metrics.hold_seconds.observe(time.monotonic() - window.since_s)
        self._note(track, window, verdict)
        for finding in verdict.findings:
            if finding.action == "redact":
                value = Text(window.text[finding.start : finding.end]).scan
                placeholder = self._screening.session.placeholder(finding.label, value)
                track.hide(window.start + finding.start, window.start + finding.end, placeholder)
        track.proven = window.proven_to

    def _note(self, track: Track, window: Window, verdict: Verdict) -> None:
        """Count what a window came to, but for what the one before it had as well."""
        first = window.start
        new = [f for f in verdict.findings if track.counts(f.label, first + f.start, first + f.end)]
        if new:
            self._screening.note("answer", settle(new))
