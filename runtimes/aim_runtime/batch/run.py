"""A batch on its way: lines go out as the pace allows, answers are written as they come, refusals go out again.

In memory are the requests on their way and those that wait to be sent again, together no more than ``most`` lines.
"""

from __future__ import annotations

import asyncio
import heapq
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import orjson

from aim_kserve.errors import ServingError
from aim_runtime.engines.openai_server.connection import Connection

from .answers import Answers
from .lines import Line, shown
from .pace import Pace

#: The server has no room now: it is asked until it has.
_NO_ROOM = (429, 503)
#: Perhaps only this once, or because of the request itself: tried so often.
_MAYBE, _TRIES = (408, 409, 425, 500, 502, 504), 5
_BACKOFF_S = 1.0
_LONGEST_RETRY_AFTER_S = 600.0
_TICK_S = 1.0


class Stopped(Exception):
    """The batch cannot go on. What was answered is kept; one line."""


@dataclass(slots=True, order=True)
class _Asked:
    """``tries``: those that ended in what may be the request's own fault."""

    due_s: float
    number: int
    line: Line = field(compare=False)
    tries: int = field(default=0, compare=False)
    sent_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    request_id: str
    body: bytes
    retry_after_s: float | None


class Batch:
    """Args:
    lines: those to be asked.
    answers: where they go.
    connection: to the server.
    pace: how many at once.
    most: lines in memory.
    patience_s: for so long the server may be out of reach.
    report: called once a second.
    """

    def __init__(
        self,
        lines: Iterator[Line],
        answers: Answers,
        connection: Connection,
        pace: Pace,
        *,
        most: int,
        patience_s: float,
        report: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lines, self._answers, self._connection, self._pace = lines, answers, connection, pace
        self._most, self._patience_s, self._report, self._clock = most, patience_s, report, clock
        self._numbers = count()
        self._again: list[_Asked] = []
        self._running: dict[asyncio.Task[_Answer | ServingError], _Asked] = {}
        self._all_read = False
        self._ticked_s = clock()
        self._away_since_s: float | None = None
        self._synced = answers.count

    async def run(self) -> None:
        """Until every line has its answer.

        Raises:
            Stopped: the server refuses the key, or has been out of reach for too long.
            OSError: an answer could not be written.
            BatchError: the lines are not those that were checked any more.
        """
        try:
            while self._running or self._again or not self._all_read:
                self._send()
                await self._wait()
                for task in [task for task in self._running if task.done()]:
                    self._settle(self._running.pop(task), task.result())
                await self._tick()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            await asyncio.to_thread(self._answers.sync)

    def _send(self) -> None:
        """All that may be sent now."""
        while self._pace.room(len(self._running)) and (asked := self._next()):
            asked.sent_s = self._clock()
            self._running[asyncio.create_task(self._ask(asked.line))] = asked

    def _next(self) -> _Asked | None:
        if self._again and self._again[0].due_s <= self._clock():
            return heapq.heappop(self._again)
        if self._all_read or len(self._running) + len(self._again) >= self._most:
            return None
        line = next(self._lines, None)
        self._all_read = line is None
        return None if line is None else _Asked(0.0, next(self._numbers), line)

    async def _ask(self, line: Line) -> _Answer | ServingError:
        request_id = f"batch-{uuid.uuid4().hex}"
        try:
            answer = await self._connection.post(
                line.url, bytes(line.body), {"x-qos-priority": "low", "x-request-id": request_id}
            )
            try:
                return _Answer(answer.status, request_id, await answer.read(), _seconds(answer.retry_after))
            finally:
                answer.release()
        except ServingError as error:
            return error

    async def _wait(self) -> None:
        """Until something has been answered, or may be sent."""
        due_s = self._again[0].due_s - self._clock() if self._again else 0.0
        wait_s = min(each for each in (_TICK_S, self._pace.pause_s(), due_s) if each > 0)
        if self._running:
            await asyncio.wait(self._running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        elif self._again or not self._all_read:
            await asyncio.sleep(wait_s)

    def _settle(self, asked: _Asked, answer: _Answer | ServingError) -> None:
        if isinstance(answer, ServingError):
            self._failed(asked, answer)
            return
        self._away_since_s = None
        if answer.status == 401:
            raise Stopped(f"the server refuses the key (401): give --api-key-file a valid one ({_text(answer.body)})")
        if answer.status in _NO_ROOM and not _for_good(answer):
            self._pace.refused(asked.sent_s, answer.retry_after_s)
            self._ask_again(asked, 0.0)
        elif answer.status in _MAYBE and asked.tries + 1 < _TRIES:
            self._try_again(asked)
        elif 200 <= answer.status < 300:
            self._answered(asked, answer)
        else:
            self._pace.answered()
            self._answers.add(asked.line.custom_id, answer.status, answer.request_id, answer.body)

    def _answered(self, asked: _Asked, answer: _Answer) -> None:
        """With success, as its status has it: what stands in the body may be something else."""
        said = _object(answer.body)
        if said is not None:
            error = said.get("error")
            found = {"code": "error_in_answer", "message": shown(_message(error))} if error else None
            self._pace.answered()
            self._answers.add(asked.line.custom_id, answer.status, answer.request_id, answer.body, found)
        elif asked.tries + 1 < _TRIES:
            self._try_again(asked)
        else:
            message = f"{answer.status}, but no JSON object: {shown(_text(answer.body))}"
            self._answers.add_failure(asked.line.custom_id, "no_answer", message)

    def _failed(self, asked: _Asked, error: ServingError) -> None:
        """No answer. A server that cannot be reached is away; one that breaks off may do so because of the request."""
        if error.code == "engine_unreachable":
            if self._away_since_s is None:
                self._away_since_s = self._clock()
            if self._clock() - self._away_since_s > self._patience_s:
                raise Stopped(f"{error.message.partition(': ask again')[0]}, for {self._patience_s:g} s")
            self._pace.refused(asked.sent_s, None)
            self._ask_again(asked, 0.0)
            return
        self._away_since_s = None
        if asked.tries + 1 < _TRIES:
            self._try_again(asked)
        else:
            self._answers.add_failure(asked.line.custom_id, "connection_error", error.message)

    def _try_again(self, asked: _Asked) -> None:
        self._ask_again(asked, _BACKOFF_S * 2.0**asked.tries)
        asked.tries += 1

    def _ask_again(self, asked: _Asked, after_s: float) -> None:
        asked.due_s = self._clock() + after_s
        heapq.heappush(self._again, asked)

    async def _tick(self) -> None:
        if self._clock() - self._ticked_s < _TICK_S:
            return
        self._ticked_s = self._clock()
        self._report()
        if self._answers.count > self._synced:
            self._synced = self._answers.count
            await asyncio.to_thread(self._answers.sync)


def _seconds(retry_after: str | None) -> float | None:
    """A date is left to our own backing off."""
    return min(float(retry_after), _LONGEST_RETRY_AFTER_S) if retry_after and retry_after.isdecimal() else None


def _for_good(answer: _Answer) -> bool:
    """It is larger than what it may ever have: no wait helps."""
    return answer.retry_after_s is None and b'"too_large"' in answer.body


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _text(body: bytes) -> str:
    return " ".join(body[:300].decode("utf-8", "replace").split())
