"""Micro-batches: rows of many callers through one model, by a few threads of its own, never on the event loop.

A batch is what has come while the threads were busy; nobody waits for it to fill. Callers take turns, a batch at a
time, so a long text does not hold up a short one. Only rows of one shape share a batch, so none is padded for another.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors.batch_counts import BATCH_COUNTS

Row = NDArray[Any]
Floats = NDArray[np.float32]

BATCH_ROWS = 16
BATCH_CELLS = 2048
"""Numbers in a batch of several rows: one of four windows of 512 tokens, so that none takes long once it has begun."""

WAITING = 4096
_LOOKED_AT = 64  # waiting callers, for rows of the same shape


class Overloaded(RuntimeError):
    """More callers wait for a model than could ever be answered in time."""


class _Ask:
    """One caller: its rows, once they are prepared, and what has come back."""

    __slots__ = ("answers", "at", "deadline_s", "future", "missing", "prepare", "rows")

    def __init__(self, prepare: Callable[[], Sequence[Row]], deadline_s: float) -> None:
        self.prepare = prepare
        self.deadline_s = deadline_s
        self.future: Future[list[Floats]] = Future()
        self.rows: Sequence[Row] | None = None
        self.answers: list[Floats] = []
        self.at = 0  # the next row that no batch has taken
        self.missing = 0

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more: it was cancelled, failed, or is late (which its caller is told)."""
        if not self.future.done() and time.monotonic() >= self.deadline_s:
            self.fail(TimeoutError("the model was not asked in time"))
        return self.future.done()

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # cancelled meanwhile
            self.future.set_exception(error)

    def finish(self) -> None:
        with suppress(InvalidStateError):
            self.future.set_result(self.answers)


class Batches:
    """The rows that wait for one model, and the threads that run it.

    Args:
        run: rows of one shape, stacked, to an answer for each; in a thread.
        rows: most rows in a batch; 1 where a row's answer depends on those beside it.
        threads: how many batches run at once.
    """

    def __init__(
        self, run: Callable[[Row], Sequence[Floats]], *, rows: int = BATCH_ROWS, threads: int = 1, name: str = "onnx"
    ) -> None:
        self._run = run
        self._rows = rows
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: deque[_Ask] = deque()
        self._busy = 0
        self._is_closed = False
        BATCH_COUNTS.watch(self)

    @property
    def waiting(self) -> int:
        """How many callers wait."""
        return len(self._waiting)

    async def answers(self, prepare: Callable[[], Sequence[Row]], deadline_s: float) -> list[Floats]:
        """The answer to each row that ``prepare`` makes, which runs in a thread, too.

        A row whose deadline (by ``time.monotonic``) has passed, or whose caller was cancelled, is not begun.

        Raises:
            TimeoutError: the deadline passed before a row's turn came.
            Overloaded: too many wait already.
            Exception: whatever ``prepare`` or the model raised.
        """
        ask = _Ask(prepare, deadline_s)
        with self._lock:
            if self._is_closed or len(self._waiting) >= WAITING:
                raise Overloaded("the model is closed" if self._is_closed else f"{WAITING} callers wait for the model")
            self._waiting.append(ask)
            if self._busy < self._threads:
                self._busy += 1
                self._pool.submit(self._work)
        return await asyncio.wrap_future(ask.future)

    def close(self) -> None:
        """Take no more rows. Who waits is told, what runs comes to its end."""
        with self._lock:
            self._is_closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
        for ask in waiting:
            ask.fail(Overloaded("the model is closed"))
        self._pool.shutdown(wait=False)

    def _work(self) -> None:
        """In a thread: turn after turn until nobody waits."""
        while (ask := self._next()) is not None:
            if ask.rows is None:
                self._prepare(ask)
            else:
                self._answer(self._batch(ask))

    def _next(self) -> _Ask | None:
        with self._lock:
            while self._waiting:
                ask = self._waiting.popleft()
                if not ask.is_over:
                    return ask
            self._busy -= 1
            return None

    def _prepare(self, ask: _Ask) -> None:
        try:
            ask.rows = rows = ask.prepare()
        except Exception as error:  # noqa: BLE001 - the edge of third-party engines: its caller is told
            return ask.fail(error)
        if not rows:
            return ask.finish()
        ask.answers = [np.empty(0, np.float32)] * len(rows)
        ask.missing = len(rows)
        with self._lock:
            if self._is_closed:
                return ask.fail(Overloaded("the model is closed"))
            return self._waiting.append(ask)

    def _batch(self, first: _Ask) -> list[tuple[_Ask, int]]:
        """The first caller's next rows, and those of others that have the same shape."""
        assert first.rows is not None
        shape = first.rows[first.at].shape
        most = max(1, min(self._rows, BATCH_CELLS // max(1, first.rows[first.at].size)))
        with self._lock:
            batch = list[tuple[_Ask, int]]()
            for ask in (first, *(self._waiting[at] for at in range(min(_LOOKED_AT, len(self._waiting))))):
                while (
                    len(batch) < most
                    and not ask.future.done()
                    and ask.rows
                    and ask.at < len(ask.rows)
                    and ask.rows[ask.at].shape == shape
                ):
                    batch.append((ask, ask.at))
                    ask.at += 1
            if first.at < len(first.rows) and not self._is_closed:
                self._waiting.append(first)
            for ask in {ask for ask, _ in batch if ask is not first and ask.rows and ask.at == len(ask.rows)}:
                self._waiting.remove(ask)
        return batch

    def _answer(self, batch: list[tuple[_Ask, int]]) -> None:
        outcomes = self._outcomes([ask.rows[at] for ask, at in batch if ask.rows])
        for (ask, at), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                ask.fail(outcome)
                continue
            with self._lock:
                ask.answers[at] = outcome
                ask.missing -= 1
                last = not ask.missing
            if last:
                ask.finish()

    def _outcomes(self, rows: list[Row]) -> Sequence[Floats | Exception]:
        """Answers, or why there is none. Where a batch fails, each row is asked alone: no row fails for another."""
        BATCH_COUNTS.add(len(rows))
        try:
            answers = self._run(np.stack(rows))
            if len(answers) != len(rows):
                raise ValueError(f"the model gave {len(answers)} answers to {len(rows)} rows")
            return answers
        except Exception as error:  # noqa: BLE001 - the edge of third-party engines: its caller is told
            return [error] if len(rows) == 1 else [self._outcomes([row])[0] for row in rows]
