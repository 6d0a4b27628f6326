"""Which rows a step is made of: a pure function of (seed, step), whatever the number of workers.

The global batch is chosen first, then dealt to workers and micro-batches, so that a run resumed on another number of
workers sees the same rows at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .packing import best_fit_decreasing
from .tokens import Row, Tokens

Ints = npt.NDArray[np.int64]
#: What cross-entropy leaves out (torch's ignore_index).
UNTRAINED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: b sequences of t tokens.

    input_ids, position_ids: (b, t). labels: (b, t), not shifted, UNTRAINED where the loss does not count; never on a
    row's first token, which nothing predicts. attention_mask: (b, t), 1 on rows and 0 on padding; None when packed:
    then position_ids start anew with each row, and rows see each other if a mask is passed or a cache is used. classes:
    (b,), of a classification; UNTRAINED for a sequence that only fills up. trained_tokens: labels that count; of a
    classification, classes that count.
    """

    input_ids: Ints
    labels: Ints
    position_ids: Ints
    attention_mask: Ints | None
    trained_tokens: int
    classes: Ints | None = None


class Share(NamedTuple):
    """Consecutive rows, each seen `weight` times in an epoch, on average."""

    rows: int
    weight: float = 1.0


class Batches:
    """global_batch: sequences of one optimizer step over all workers (packed ones, where packing); the last step of an
    epoch has what is left. shares: in the order of the rows; None: what the writer of `tokens` said
    (`about["shares"]`), else each row once. pad_id: what fills up.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        max_seq_length: int,
        packing: bool = False,
        world_size: int = 1,
        rank: int = 0,
        shares: Sequence[Share] | None = None,
        pad_id: int = 0,
    ) -> None:
        self._tokens = tokens
        self._seed = seed
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._world_size, self._rank = world_size, rank
        self._packed_to = max_seq_length if packing else None
        self._pad_id = pad_id
        self._lengths = tokens.lengths()
        given = [Share(*share) for share in tokens.about.get("shares", [])]
        self._shares = list(shares or given or [Share(len(tokens))])
        if (told := sum(share.rows for share in self._shares)) != len(tokens):
            raise ValueError(f"shares tell of {told} rows, there are {len(tokens)}")
        self._sequences = lru_cache(maxsize=2)(self._sequences_of)
        self.steps_per_epoch = -(-len(self._sequences(0)) // global_batch)

    @property
    def sequences_per_epoch(self) -> int:
        """Rows, or packed sequences, in the first epoch: what `steps_per_epoch` is counted from."""
        return len(self._sequences(0))

    def of(self, step: int) -> list[Batch]:
        """This worker's micro-batches of a step, counted from 0; as many on every worker, some perhaps untrained."""
        dealt = deal(self._global(step), self._lengths, self._world_size, self._micro_batch)
        return [self._batch(sequences) for sequences in dealt[self._rank]]

    def trained_tokens(self, step: int) -> int:
        """Trained tokens (of a classification: rows) of the whole global batch: what the summed loss is divided by."""
        rows = [self._tokens[row] for sequence in self._global(step) for row in sequence]
        return sum(1 if row.label is not None else int(np.count_nonzero(row.trained[1:])) for row in rows)

    def epoch(self, step: int) -> float:
        """How far the data has been gone through before this step."""
        return step / self.steps_per_epoch

    def _global(self, step: int) -> list[list[int]]:
        """Rows of each sequence of the step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        sequences = self._sequences(epoch)
        if -(-len(sequences) // self._global_batch) == self.steps_per_epoch:
            return sequences[index * self._global_batch : (index + 1) * self._global_batch]
        # Weights such as 0.3 bring other rows, and packed other sequences, in each epoch: as many steps share them.
        first, end = (len(sequences) * i // self.steps_per_epoch for i in (index, index + 1))
        return sequences[first:end]

    def _sequences_of(self, epoch: int) -> list[list[int]]:
        rows = drawn(self._shares, self._seed, epoch)
        if self._packed_to is None:
            return [[row] for row in rows.tolist()]
        groups = best_fit_decreasing(self._lengths[rows].tolist(), self._packed_to)
        order = _generator(self._seed, epoch, 1).permutation(len(groups))
        return [rows[groups[group]].tolist() for group in order]

    def _batch(self, sequences: list[list[int]]) -> Batch:
        rows = [[self._tokens[row] for row in sequence] for sequence in sequences] or [[_filler(self._tokens[0])]]
        if self._packed_to is None:
            return _padded([row for (row,) in rows], self._pad_id)
        return _packed(rows, self._pad_id)


def drawn(shares: Sequence[Share], seed: int, epoch: int) -> Ints:
    """Rows of an epoch in the order they are seen: (n,), n the same in every epoch.

    A share's rows come in one shuffle after another; an epoch takes the next round(weight × rows) of them. So a row of
    weight 1 is seen exactly once in each epoch, of weight 0.5 once in two, of weight 2.5 five times in two.
    """
    taken, first = [], 0
    for number, share in enumerate(shares):
        count = max(1, round(share.weight * share.rows)) if share.rows else 0
        begin, end = epoch * count, (epoch + 1) * count
        rounds = range(begin // share.rows, -(-end // share.rows)) if share.rows else range(0)
        shuffled = [_generator(seed, turn, 2, number).permutation(share.rows) for turn in rounds]
        if shuffled:
            skipped = begin - rounds.start * share.rows
            taken.append(first + np.concatenate(shuffled)[skipped : skipped + count])
        first += share.rows
    rows = np.concatenate(taken) if taken else np.empty(0, np.int64)
    return rows[_generator(seed, epoch, 0).permutation(len(rows))]


def deal(sequences: list[list[int]], lengths: Ints, world_size: int, micro_batch: int) -> list[list[list[list[int]]]]:
    """[rank][micro-batch][sequence] = rows. As many micro-batches on each rank; those of one turn are of like length,
    so that no worker waits long for another, and little is padded. The longest come first: what does not fit shows at
    once.
    """
    ordered = sorted(sequences, key=lambda rows: -sum(int(lengths[row]) for row in rows))
    turns = max(1, -(-len(ordered) // (world_size * micro_batch)))
    places = turns * world_size
    ends = [len(ordered) * place // places for place in range(places + 1)]
    chunks = [ordered[ends[place] : ends[place + 1]] for place in range(places)]
    return [[chunks[turn * world_size + rank] for turn in range(turns)] for rank in range(world_size)]


def _generator(seed: int, *which: int) -> np.random.Generator:
    return np.random.default_rng([seed, *which])


def _filler(row: Row) -> Row:
    """What a worker computes that no row was left for: it must take part in the step, and learn nothing."""
    tokens = row.tokens[:2]
    return Row(tokens, np.zeros(len(tokens), np.uint8), None if row.label is None else UNTRAINED)


def _labels(row: Row) -> Ints:
    labels = np.where(row.trained.astype(bool), row.tokens, UNTRAINED).astype(np.int64)
    labels[:1] = UNTRAINED
    return labels


def _padded(rows: list[Row], pad_id: int) -> Batch:
    longest = max(len(row.tokens) for row in rows)
    shape = (len(rows), longest)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, UNTRAINED, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        length = len(row.tokens)
        input_ids[number, :length] = row.tokens
        attention_mask[number, :length] = 1
        if row.label is None:
            labels[number, :length] = _labels(row)
    position_ids = np.broadcast_to(np.arange(longest), shape).copy()
    classes = _classes(rows)
    trained = int(np.count_nonzero((labels if classes is None else classes) != UNTRAINED))
    return Batch(input_ids, labels, position_ids, attention_mask, trained, classes)


def _classes(rows: list[Row]) -> Ints | None:
    labels = [row.label for row in rows if row.label is not None]
    return np.asarray(labels, np.int64) if labels else None


def _packed(sequences: list[list[Row]], pad_id: int) -> Batch:
    longest = max(sum(len(row.tokens) for row in rows) for rows in sequences)
    shape = (len(sequences), longest)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, UNTRAINED, np.int64)
    position_ids = np.empty(shape, np.int64)
    for number, rows in enumerate(sequences):
        end = 0
        for row in rows:
            first, end = end, end + len(row.tokens)
            input_ids[number, first:end] = row.tokens
            labels[number, first:end] = _labels(row)
            position_ids[number, first:end] = np.arange(end - first)
        # What fills up is one more row, that nothing is learnt of.
        position_ids[number, end:] = np.arange(longest - end)
    return Batch(input_ids, labels, position_ids, None, int(np.count_nonzero(labels != UNTRAINED)))
