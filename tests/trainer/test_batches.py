"""Which rows a step is made of."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_trainer.data.batches import UNTRAINED, Batch, Batches, Share, drawn
from aim_trainer.data.packing import best_fit_decreasing
from aim_trainer.data.tokens import Row, Tokens, write_tokens

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def on_disk(lengths: list[int], labels: list[int] | None = None) -> Tokens:
    """Row i is i + 1 over and over, so that a batch tells whose tokens it has; all but the first two are trained."""
    rows = []
    for number, length in enumerate(lengths):
        trained = np.ones(length, np.uint8)
        trained[:2] = 0
        label = None if labels is None else labels[number]
        rows.append(Row(np.full(length, number + 1, np.int32), trained, label))
    with tempfile.TemporaryDirectory() as directory:
        write_tokens(Path(directory), rows, {})
        return Tokens(Path(directory))


def rows_in(batch: Batch) -> list[int]:
    """Whose tokens a batch has: a row begins where the positions do; 0 is padding."""
    return [int(token) - 1 for token in batch.input_ids[batch.position_ids == 0] if token]


def seen(batches: list[Batches], steps: range) -> list[list[int]]:
    """Rows of each step, over all ranks, in no order."""
    return [
        sorted(row for of_rank in batches for batch in of_rank.of(step) for row in rows_in(batch)) for step in steps
    ]


def ranks(tokens: Tokens, world_size: int, **settings: object) -> list[Batches]:
    given_ = {"seed": 1, "global_batch": 8, "micro_batch": 2, "max_seq_length": 48, **settings}
    return [Batches(tokens, world_size=world_size, rank=rank, **given_) for rank in range(world_size)]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_each_row_is_seen_once_in_an_epoch(
    lengths: list[int], world_size: int, micro_batch: int, global_batch: int, packing: bool
) -> None:
    tokens = on_disk(lengths)
    all_ranks = ranks(tokens, world_size, micro_batch=micro_batch, global_batch=global_batch, packing=packing)
    steps = all_ranks[0].steps_per_epoch
    for epoch in range(2):
        rows = [row for step in seen(all_ranks, range(epoch * steps, (epoch + 1) * steps)) for row in step]
        # What only fills up shows a row's first two tokens, untrained: leave those out by counting what is trained.
        trained = sum(
            b.trained_tokens for r in all_ranks for s in range(epoch * steps, (epoch + 1) * steps) for b in r.of(s)
        )
        assert set(rows) == set(range(len(lengths)))
        assert trained == sum(lengths) - 2 * len(lengths)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_a_step_has_the_same_rows_on_any_number_of_workers(
    lengths: list[int], global_batch: int, packing: bool
) -> None:
    tokens = on_disk(lengths)
    alone = ranks(tokens, 1, global_batch=global_batch, packing=packing)
    steps = range(alone[0].steps_per_epoch * 2)
    for world_size in (2, 3):
        several = ranks(tokens, world_size, global_batch=global_batch, packing=packing)
        for step in steps:
            trained = [sum(b.trained_tokens for r in some for b in r.of(step)) for some in (alone, several)]
            assert trained[0] == trained[1] == alone[0].trained_tokens(step)
            tokens_seen = [
                Counter(t for r in some for b in r.of(step) for t in b.labels[b.labels != UNTRAINED].tolist())
                for some in (alone, several)
            ]
            assert tokens_seen[0] == tokens_seen[1]
            assert len({len(of_rank.of(step)) for of_rank in several}) == 1, "every worker takes part in every turn"


def test_another_seed_and_another_epoch_bring_another_order() -> None:
    tokens = on_disk([5] * 50)
    first, again, other = (
        Batches(tokens, seed=s, global_batch=50, micro_batch=50, max_seq_length=8) for s in (1, 1, 2)
    )
    order = [rows_in(first.of(0)[0]), rows_in(again.of(0)[0]), rows_in(other.of(0)[0]), rows_in(first.of(1)[0])]
    assert order[0] == order[1]
    assert order[0] != order[2]
    assert order[0] != order[3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 4)), min_size=1, max_size=4))
def test_a_row_is_seen_as_often_as_it_weighs(given_shares: list[tuple[int, float]]) -> None:
    shares = [Share(*share) for share in given_shares]
    epochs = 6
    counts = Counter(int(row) for epoch in range(epochs) for row in drawn(shares, 3, epoch))
    assert len({len(drawn(shares, 3, epoch)) for epoch in range(epochs)}) == 1
    first = 0
    for share in shares:
        expected = epochs * max(1, round(share.weight * share.rows)) / share.rows
        of_share = [counts[row] for row in range(first, first + share.rows)]
        assert max(of_share) - min(of_share) <= 1
        assert min(of_share) <= expected <= max(of_share)
        first += share.rows


def test_a_weight_of_a_third_still_has_as_many_steps_in_each_epoch_when_packed() -> None:
    tokens = on_disk([3, 30, 17, 9, 40, 22, 5] * 6)
    batches = Batches(
        tokens, seed=0, global_batch=2, micro_batch=1, max_seq_length=48, packing=True, shares=[Share(42, 1 / 3)]
    )
    rows = Counter(
        row for step in range(3 * batches.steps_per_epoch) for batch in batches.of(step) for row in rows_in(batch)
    )
    assert rows == Counter(range(42))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=80))
def test_packing_is_best_fit_decreasing_and_leaves_nothing_out(lengths: list[int]) -> None:
    groups = best_fit_decreasing(lengths, 64)
    assert sorted(position for group in groups for position in group) == list(range(len(lengths)))
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in left if room >= length]
        if fitting:
            left.remove(min(fitting))
        left.append((min(fitting) if fitting else 64) - length)
    assert sorted(64 - sum(lengths[position] for position in group) for group in groups) == sorted(left)


def test_a_row_that_no_sequence_can_hold_is_named() -> None:
    with pytest.raises(ValueError, match="65 tokens does not fit into 64"):
        best_fit_decreasing([3, 65], 64)


def test_a_packed_row_starts_at_position_zero_and_is_not_predicted_by_its_neighbour() -> None:
    tokens = on_disk([4, 3])
    (batch,) = Batches(tokens, seed=0, global_batch=1, micro_batch=1, max_seq_length=8, packing=True).of(0)
    assert batch.attention_mask is None
    assert batch.input_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.labels.tolist() == [[-100, -100, 1, 1, -100, -100, 2]]


def test_a_first_token_is_never_a_label_even_where_all_is_trained(tmp_path: Path) -> None:
    write_tokens(tmp_path, [Row(np.array([7, 8], np.int32), np.ones(2, np.uint8))], {})
    batches = Batches(Tokens(tmp_path), seed=0, global_batch=1, micro_batch=1, max_seq_length=8)
    assert batches.of(0)[0].labels.tolist() == [[-100, 8]]
    assert batches.trained_tokens(0) == batches.of(0)[0].trained_tokens == 1


def test_padding_is_masked_and_untrained() -> None:
    tokens = on_disk([2, 4])
    (batch,) = Batches(tokens, seed=0, global_batch=2, micro_batch=2, max_seq_length=8, pad_id=9).of(0)
    assert batch.input_ids.tolist() == [[2, 2, 2, 2], [1, 1, 9, 9]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 2, 2], [-100] * 4]


def test_a_classification_has_classes_and_no_labels() -> None:
    tokens = on_disk([4, 3, 2], labels=[2, 0, 1])
    workers = ranks(tokens, 4, global_batch=3, micro_batch=1)
    batches = [batch for of_rank in workers for batch in of_rank.of(0)]
    classes = [int(c) for batch in batches if batch.classes is not None for c in batch.classes]
    assert sorted(classes) == [UNTRAINED, 0, 1, 2]
    assert sum(batch.trained_tokens for batch in batches) == workers[0].trained_tokens(0) == 3
    assert all((batch.labels == UNTRAINED).all() for batch in batches)


def test_shares_that_do_not_fit_the_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="shares tell of 3 rows, there are 2"):
        Batches(on_disk([2, 2]), seed=0, global_batch=1, micro_batch=1, max_seq_length=8, shares=[Share(3)])
