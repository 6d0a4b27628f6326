"""Continuous batching: one thread, one context, all sequences advance together.

While every slot is taken, a sequence that is more urgent takes the slot of the least urgent one, which is parked. Each
step computes what ``batch_plan`` plans (one batch; if deterministic, several), samples from it, and
hands ``deliveries`` what is new.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aim_kserve.errors import ServingError, Unavailable
from aim_runtime.engines.base import EngineStats

from .adapters import Adapter
from .batch_plan import BatchPlan, Entry
from .bindings import NO_KV_SLOT, LlamaContext, LlamaModel
from .chooser import Chooser
from .deliveries import Deliveries
from .parking import Parking
from .progress import Progress
from .sampling import Logits, NoToken
from .sequence import Delta, Sequence
from .slots import Slot, Slots
from .turns import Turns

logger = logging.getLogger("aim.engine.llama_cpp")

_WAKE = None


@dataclass(frozen=True, eq=False, slots=True)
class Errand:
    """Work that only the decode thread may do, once no sequence needs ``after`` any more."""

    work: Callable[[], Any]
    after: Adapter | None
    result: concurrent.futures.Future[Any] = field(default_factory=concurrent.futures.Future)

    def run(self) -> None:
        try:
            self.result.set_result(self.work())
        except Exception as error:  # noqa: BLE001  the thread goes on; whoever asked for it is told
            self.result.set_exception(error)


class Scheduler:
    """Runs sequences on a context.

    Args:
        model: the vocabulary.
        context: taken over; closed by ``close``.
        slots: sequences that run at once.
        max_waiting: sequences that may wait beyond those.
        parked_memory_bytes: host memory for what parked sequences had computed.
        deterministic: an answer is the same to the bit (see ``exact``); the context has a stream per slot.
    """

    def __init__(
        self,
        model: LlamaModel,
        context: LlamaContext,
        *,
        slots: int,
        max_waiting: int,
        parked_memory_bytes: int,
        deterministic: bool = False,
    ) -> None:
        self._model = model
        self._chooser = Chooser(model)
        self._context = context
        self._slots = Slots(slots, context, keeps_prefixes=model.keeps_prefixes, exact=deterministic)
        self._parking = Parking(context, parked_memory_bytes)
        self._slot_count = slots
        self.capacity = slots + max_waiting
        self._inbox: queue.SimpleQueue[Sequence | Errand | None] = queue.SimpleQueue()
        self._arrivals = itertools.count(1)
        # Written by one side each, so that their difference needs no lock.
        self._submitted = 0
        self._finished = 0
        self._waiting: list[Sequence] = []
        self._errands: list[Errand] = []
        self._turns = Turns()
        self._deliveries = Deliveries()
        self._plan = BatchPlan(context.batch.room, deterministic=deterministic)
        self._running = self._parked = 0
        self._kv_usage = 0.0
        self._progress = Progress()
        self._gate = threading.Lock()  # between the last submission and the end of the thread
        self._over = False
        self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="llama-decode", daemon=True)

    # -- the event loop's side ---------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._over

    @property
    def stalled_s(self) -> float:
        """Seconds since the thread last went on with the work it has."""
        return self._progress.stalled_s

    @property
    def unanswered(self) -> bool:
        """Whether a request still waits for (the rest of) its answer."""
        return self._deliveries.outstanding

    @property
    def in_flight(self) -> int:
        """Sequences that run or wait."""
        return self._submitted - self._finished

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue the choices of one request, all or none.

        Raises:
            Unavailable: the queue is full, or the decode thread has ended.
        """
        with self._gate:
            if not self.alive:
                raise Unavailable(f"the engine has stopped: {self.failure or 'it was closed'}")
            self._check_room(len(sequences))
            self._submitted += len(sequences)
            for sequence in sequences:
                sequence.arrival = next(self._arrivals)
                self._deliveries.expect(sequence)
                self._inbox.put(sequence)

    def cancel(self, sequences: list[Sequence]) -> None:
        """Stop these; their slots are free after the step that is running."""
        for sequence in sequences:
            sequence.cancelled = True
        self._inbox.put(_WAKE)

    def between_steps(self, work: Callable[[], Any], *, after: Adapter | None = None) -> concurrent.futures.Future[Any]:
        """Have the decode thread do ``work``, at once or when the sequences that use ``after`` have ended. The future
        holds what it returns or raises, or Unavailable where the thread has ended."""
        errand = Errand(work, after)
        with self._gate:
            if self.alive:
                self._inbox.put(errand)
            else:
                errand.result.set_exception(Unavailable("the engine has stopped"))
        return errand.result

    def release(self, adapter: Adapter) -> None:
        """Free an adapter. Only in the decode thread, once no sequence uses it."""
        self._context.release(adapter.lora)

    def stats(self) -> EngineStats:
        waiting = max(0, self.in_flight - self._running)
        return EngineStats(
            *(self._running, waiting, self._slot_count, self._kv_usage),
            kv_tokens_total=self._context.cells,
            parked=min(self._parked, waiting),
        )

    def give_up(self, reason: str) -> None:
        """Tell every request that no answer comes, while the thread stands still. It goes on without them."""
        self._deliveries.give_up(reason)

    def stop(self, timeout_s: float) -> bool:
        """End the thread; what is left hears that the engine is shutting down. Blocks for up to a step.

        False when the thread has not ended in ``timeout_s``: it still uses the model and the context.
        """
        self._stopping = True
        self._inbox.put(_WAKE)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Free the context. Only once ``stop`` has said that the thread has ended."""
        self._context.close()

    def _check_room(self, count: int) -> None:
        if self.in_flight + count > self.capacity:
            raise Unavailable(
                f"{self.in_flight} sequences are running or waiting and {self.capacity} may: retry later",
                code="queue_full",
            )

    # -- the decode thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_in()
                self._drop_cancelled()
                self._run_errands()
                self._admit()
                self._step()
                self._flush()
        except BaseException as error:
            # The edge of the thread: whatever ended it, every request must hear of it.
            logger.exception("the decode thread has ended")
            self.failure = error
        self._abandon(f"the engine has stopped: {self.failure or 'it is shutting down'}")

    def _take_in(self) -> None:
        """Move what arrived to the waiting list; block while there is nothing else to do."""
        block = not self._waiting and not self._slots.busy and not self._errands
        if block:
            self._progress.rest()
        while True:
            try:
                arrived = self._inbox.get(block=block)
            except queue.Empty:
                return
            finally:
                self._progress.advance()
            if isinstance(arrived, Errand):
                self._errands.append(arrived)
            elif arrived is not _WAKE:
                bisect.insort(self._waiting, arrived, key=lambda s: s.order)
            block = False

    def _drop_cancelled(self) -> None:
        for slot in self._slots.busy:
            if slot.running.cancelled:
                self._end(slot, Delta(slot.running.choice, finish_reason="abort"))
        if any(sequence.cancelled for sequence in self._waiting):
            for sequence in [s for s in self._waiting if s.cancelled]:
                self._waiting.remove(sequence)
                self._conclude(sequence, Delta(sequence.choice, finish_reason="abort"))

    def _run_errands(self) -> None:
        """Those that need not wait (any longer): whoever uses their adapter was submitted before them."""
        if not self._errands:
            return
        used = {s.adapter for s in (*(slot.running for slot in self._slots.busy), *self._waiting)} - {None}
        due = [errand for errand in self._errands if errand.after not in used]
        self._errands = [errand for errand in self._errands if errand.after in used]
        for errand in due:
            errand.run()

    def _admit(self) -> None:
        for sequence in [s for s in self._waiting if s.may_start]:
            if not (self._start(sequence) or self._start_instead(sequence)):
                return

    def _start(self, sequence: Sequence) -> bool:
        """Seat a waiting sequence. False when there is no room for it yet."""
        slot = self._slots.seat(sequence, self._parking.kept(sequence))
        if slot is None:
            return False
        self._waiting.remove(sequence)
        self._parking.forget(sequence)
        sequence.place(slot.cached)
        return True

    def _start_instead(self, sequence: Sequence) -> bool:
        """Seat it in the place of less urgent ones, the least urgent first. Equals never make way for each other."""
        less_urgent = [slot for slot in self._slots.busy if slot.running.priority > sequence.priority]
        if not less_urgent or not self._slots.fits(sequence, without=less_urgent):
            return False
        for slot in sorted(less_urgent, key=lambda slot: slot.running.order, reverse=True):
            self._park(slot)
            if self._start(sequence):
                return True
        return False

    def _park(self, slot: Slot) -> None:
        """Its sequence waits, at its place, and goes on later where it is now."""
        sequence = slot.running
        self._parking.put(sequence, slot.number, slot.cached)
        self._slots.leave(slot)
        bisect.insort(self._waiting, sequence, key=lambda s: s.order)

    def _step(self) -> None:
        turn = self._turns.next(self._slots.busy)
        for entries in self._plan.batches(turn.slots, turn.groups):
            self._compute([entry for entry in entries if entry.slot.sequence is not None])
            self._flush()

    def _compute(self, entries: list[Entry]) -> None:
        """One batch, and what is sampled from it. Those that an earlier batch of the step has ended are left out."""
        if not entries:
            return
        began = time.thread_time()
        code = self._decode(entries)
        while code == NO_KV_SLOT and self._make_room(entries) and entries:
            code = self._decode(entries)
        if code != 0:
            self._decode_one_by_one(entries)
        else:
            self._progress.advance()
            self._plan.learn(sum(entry.count for entry in entries), time.thread_time() - began)
            self._sample_all(entries)

    def _decode(self, entries: list[Entry]) -> int:
        """Compute ``entries``, all of the same weights, as one batch; on success they are in the cache."""
        adapter = entries[0].slot.running.adapter
        self._context.use(adapter.lora if adapter else None)
        batch = self._context.batch
        batch.clear()
        for entry in entries:
            slot = entry.slot
            tokens = slot.running.tokens[slot.cached : slot.cached + entry.count]
            entry.index = batch.add(
                tokens, slot.cached, slot.number, wants_logits=entry.completes, of_all=slot.running.scoring
            )
        return self._context.decode()

    def _make_room(self, entries: list[Entry]) -> bool:
        """Free cache cells: idle prefixes first, then the least urgent sequence, which goes on later."""
        if self._slots.evict():
            return True
        busy = self._slots.busy
        if len(busy) < 2:
            return False
        victim = max(busy, key=lambda slot: slot.running.order)
        logger.info("the KV cache is full: a sequence of %d tokens is put back", victim.running.length)
        self._park(victim)
        self._slots.empty(victim)
        entries[:] = [entry for entry in entries if entry.slot is not victim]
        return True

    def _decode_one_by_one(self, entries: list[Entry]) -> None:
        """After a failed batch: find the sequences that fail, end those, go on with the rest."""
        self._slots.restore(entry.slot for entry in entries)
        for entry in entries:
            code = self._decode([entry])
            if code == 0:
                self._sample_all([entry])
                continue
            logger.error("llama_decode failed with %d on a sequence of %d tokens", code, entry.slot.running.length)
            self._slots.restore([entry.slot])
            message = f"the engine could not compute this request (llama_decode: {code})"
            self._end(entry.slot, entry.slot.running.delta(error=ServingError(message, code="decode_failed")))

    def _sample_all(self, entries: list[Entry]) -> None:
        for entry in entries:
            completes = entry.completes
            self._score_prompt(entry)
            entry.slot.cached += entry.count
            if completes:
                self._sample(entry.slot, self._context.logits(entry.index))

    def _score_prompt(self, entry: Entry) -> None:
        """Keep what the entry's rows tell of the prompt's tokens, where the request asks for it."""
        scores, first = entry.slot.running.scores, entry.index - entry.count + 1
        if scores is not None and entry.slot.running.scoring:
            scores.add(
                entry.slot.cached,
                lambda offset: self._context.logits(first + offset),
                entry.count,
                lambda token: self._model.piece(token, special=True),
            )

    def _sample(self, slot: Slot, logits: Logits) -> None:
        sequence = slot.running
        self._progress.advance()
        try:
            self._advance(slot, logits)
        except ServingError as error:  # it says itself what is wrong with the request
            self._end(slot, sequence.delta(error=error))
        except Exception as error:
            # The edge of one sequence: whatever its sampling, grammar or text did wrong, the others go on.
            logger.exception("a sequence of %d tokens has failed", sequence.length)
            reason = f": {error}" if isinstance(error, NoToken) else "; the server's log has the cause"
            if not sequence.finished:
                refusal = ServingError(f"the answer broke off{reason}", code="sampling_failed")
                self._end(slot, sequence.delta(error=refusal))

    def _advance(self, slot: Slot, logits: Logits) -> None:
        """Choose a sequence's next token and tell what it adds to the answer."""
        sequence = slot.running
        if sequence.generated >= sequence.generation.max_tokens:  # 0: only the prompt was asked for
            self._finish(slot, sequence.delta(), "length")
            return
        token, logprob = self._chooser.choose(sequence, logits)
        if token is not None:
            sequence.append(token)
            slot.tokens = sequence.tokens
        if token is None or self._chooser.ends(sequence, token):
            self._finish(slot, sequence.delta(), "stop")
            return
        piece = self._model.piece(token, special=token in sequence.generation.shown)
        shown = sequence.text.push(piece, logprob)
        delta = sequence.delta(text=shown.text, logprobs=shown.logprobs)
        if sequence.text.stopped:
            self._finish(slot, delta, "stop")
        elif sequence.generated >= sequence.generation.max_tokens:
            self._finish(slot, delta, "length")
        else:
            self._deliveries.add(sequence, delta)

    def _finish(self, slot: Slot, delta: Delta, reason: str) -> None:
        rest = slot.running.text.finish()
        delta.text += rest.text
        delta.logprobs += rest.logprobs
        delta.finish_reason = reason
        self._end(slot, delta)

    def _end(self, slot: Slot, delta: Delta) -> None:
        sequence = slot.running
        self._slots.leave(slot)
        self._conclude(sequence, delta)

    def _conclude(self, sequence: Sequence, delta: Delta) -> None:
        sequence.finished = True
        self._chooser.forget(sequence)
        self._parking.forget(sequence)
        self._finished += 1
        self._deliveries.add(sequence, delta)

    def _flush(self) -> None:
        """Publish figures and hand over the step's deltas: one call into each event loop per step."""
        busy = self._slots.busy
        self._running, self._parked = len(busy), len(self._parking)
        self._kv_usage = min(1.0, self._slots.cells_in_use / self._context.cells)
        self._deliveries.flush()

    def _abandon(self, reason: str) -> None:
        """Tell every request that no answer comes, and take no more."""
        with self._gate:
            self._over = True
            arrived = list(iter(self._poll, None))
        running = [slot.running for slot in self._slots.busy]
        for sequence in [*running, *self._waiting, *arrived]:
            self._conclude(sequence, sequence.delta(error=Unavailable(reason)))
        for errand in self._errands:
            errand.result.set_exception(Unavailable(reason))
        self._waiting, self._errands = [], []
        self._flush()
        self._progress.rest()

    def _poll(self) -> Sequence | None:
        while True:
            try:
                arrived = self._inbox.get_nowait()
            except queue.Empty:
                return None
            if isinstance(arrived, Errand):
                self._errands.append(arrived)
            elif arrived is not _WAKE:
                return arrived
