"""From a job's sources to tokens on disk: divided, tokenised once, found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import tiny_models
from aim_trainer.data import encode
from aim_trainer.data import prepare as preparation
from aim_trainer.data.batches import Batches
from aim_trainer.data.prepare import Prepared, prepare
from aim_trainer.data.survey import held_out
from aim_trainer.data.tokens import Tokens
from aim_trainer.errors import DataError, JobError
from aim_trainer.job.job import FineTuningJob

Tiny = Callable[[str], Path]


def job(*, template: str = "chat", max_seq_length: int = 256, **dataset: Any) -> FineTuningJob:
    spec = {
        "baseModel": {"modelId": "tiny"},
        "template": template,
        "dataset": dataset,
        "hyperparameters": {"maxSeqLength": max_seq_length},
    }
    made = {"apiVersion": "aim.amd.com/v1alpha1", "kind": "FineTuningJob", "metadata": {"name": "a"}, "spec": spec}
    return FineTuningJob.model_validate(made)


def chats(file: Path, count: int, seed: int = 0, extra: list[Any] | None = None) -> str:
    rows = [{"messages": turns} for turns in tiny_models.conversations(count, seed)] + (extra or [])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows(directory: Path) -> list[tuple[int, ...]]:
    tokens = Tokens(directory)
    return [tuple(tokens[place].tokens.tolist()) for place in range(len(tokens))]


def test_rows_are_tokenised_with_their_masks_and_described(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny("llama")
    prepared = prepare(job(source=chats(tmp_path / "a.jsonl", 100)), directory, tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = Tokens(prepared.train)
    texts = {json.dumps(turns) for turns in tiny_models.conversations(100)}
    for place in range(len(tokens)):
        row = tokens[place]
        turns = re_read(tokenizer.decode(row.tokens))
        assert json.dumps(turns) in texts
        said = tokenizer.decode(row.tokens[row.trained == 1])
        assert said == "".join(f"{turn['content']}<|im_end|>" for turn in turns if turn["role"] == "assistant")
    told = prepared.statistics
    distinct = len(texts)
    assert told.rows + told.validation_rows <= 100
    assert told.validation_rows == max(1, round(0.05 * distinct))
    assert told.tokens == sum(tokens.lengths())
    assert told.lengths.max == max(tokens.lengths())
    assert told.lengths.p50 <= told.lengths.p95 <= told.lengths.p99_9 <= told.lengths.max
    assert 0 < told.trained_share < 1
    assert told.duplicates == 100 - distinct
    assert (told.masks, told.sources[0].format, told.sources[0].rows) == ("marked", "conversation", 100)


def re_read(text: str) -> list[dict[str, str]]:
    parts = [part.removeprefix("<|im_start|>") for part in text.split("<|im_end|>\n") if part]
    return [dict(zip(("role", "content"), part.split("\n", 1), strict=True)) for part in parts]


def test_what_is_held_out_is_never_trained_on_even_where_it_is_there_twice(tiny: Tiny, tmp_path: Path) -> None:
    turns = tiny_models.conversations(60)
    source = chats(tmp_path / "a.jsonl", 60, extra=[{"messages": t, "id": n} for n, t in enumerate(turns)])
    for seed in range(3):
        prepared = prepare(job(source=source, validation={"share": 0.3, "seed": seed}), tiny("llama"), tmp_path / "d")
        assert prepared.validation is not None
        train, held = rows(prepared.train), rows(prepared.validation)
        assert not set(train) & set(held)
        assert len(held) == len(set(held)) == round(0.3 * len({*train, *held}))
    own = chats(tmp_path / "own.jsonl", 20)
    prepared = prepare(job(source=source, validation={"source": own}), tiny("llama"), tmp_path / "d")
    assert prepared.validation is not None
    assert len(rows(prepared.validation)) == 20
    assert not set(rows(prepared.train)) & set(rows(prepared.validation))
    assert prepared.statistics.held_out >= 40


def test_a_row_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 2000).astype(np.uint64)
    before, after = held_out(hashes[:1000], 0.1, 7), held_out(hashes, 0.1, 7)[:1000]
    assert before.sum() == 100
    assert (before != after).mean() < 0.04, "only at the threshold"
    assert held_out(hashes[:1], 0.5, 0).tolist() == [False]
    assert (held_out(hashes, 0.1, 7) != held_out(hashes, 0.1, 8)).any()


def test_duplicates_are_kept_dropped_or_refused(tiny: Tiny, tmp_path: Path) -> None:
    row = {"messages": tiny_models.conversations(1, seed=9)[0]}
    source = chats(tmp_path / "a.jsonl", 1, extra=[row, {**row, "id": 1}])

    def with_policy(policy: str) -> Prepared:
        return prepare(job(source=source, duplicates=policy, validation={"share": 0}), tiny("llama"), tmp_path / "d")

    assert with_policy("keep").statistics.rows == 3
    dropped = with_policy("drop").statistics
    assert (dropped.rows, dropped.duplicates, dropped.duplicates_removed) == (2, 1, True)
    with pytest.raises(DataError) as caught:
        with_policy("refuse")
    assert str(caught.value).startswith(f"{source}:3: says what {source}:2 says; set dataset.duplicates to")


def test_rows_that_are_too_long_are_refused_dropped_or_cut_and_counted(tiny: Tiny, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "stones " * 200}]}
    late = {"messages": [{"role": "user", "content": "stones " * 200}, {"role": "assistant", "content": "a"}]}
    source = chats(tmp_path / "a.jsonl", 5, extra=[long, late])

    def with_policy(policy: str) -> Prepared:
        made = job(source=source, overLong=policy, max_seq_length=100, validation={"share": 0})
        return prepare(made, tiny("llama"), tmp_path / "d")

    with pytest.raises(DataError) as caught:
        with_policy("refuse")
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{source}:6: ")
    assert "tokens, hyperparameters.maxSeqLength is 100; raise it, or set dataset.overLong to drop or truncate" in first
    assert second.startswith(f"{source}:7: ")
    assert not list((tmp_path / "d").rglob("*.bin")), "nothing half-written stays"
    dropped = with_policy("drop").statistics
    assert (dropped.rows, dropped.dropped, dropped.truncated) == (5, 2, 0)
    cut = with_policy("truncate").statistics
    assert (cut.rows, cut.truncated, cut.untrained, cut.lengths.max) == (6, 1, 1, 100)
    rules: dict[str, Any] = {"validation": {"source": source}, "overLong": "drop", "max_seq_length": 100}
    with pytest.raises(DataError, match="validation has them all"):
        prepare(job(source=source, **rules), tiny("llama"), tmp_path / "d")
    others = chats(tmp_path / "o.jsonl", 3, seed=4)
    told = prepare(job(source=others, **rules), tiny("llama"), tmp_path / "d").statistics
    assert (told.validation_rows, told.validation_dropped) == (5, 2)


def test_the_same_job_is_tokenised_once_and_a_changed_one_anew(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    batch = encode.Encoder._encodings
    monkeypatch.setattr(
        encode.Encoder, "_encodings", lambda self, texts: [encoded.append(len(texts)), batch(self, texts)][1]
    )
    source = chats(tmp_path / "a.jsonl", 20)
    first = prepare(job(source=source), tiny("llama"), tmp_path / "d")
    assert sum(encoded) == 20
    assert prepare(job(source=source), tiny("llama"), tmp_path / "d") == first
    assert sum(encoded) == 20, "found again"
    moved = chats(tmp_path / "b.jsonl", 20)
    assert prepare(job(source=moved), tiny("llama"), tmp_path / "d").digest == first.digest, (
        "the rows count, not the name"
    )
    changed = [
        job(source=source, trainOn="all"),
        job(source=source, max_seq_length=200),
        job(source=source, packing=True),
    ]
    digests = [prepare(one, tiny("llama"), tmp_path / "d").digest for one in changed]
    assert len({first.digest, *digests}) == 3, "packing is done when batches are made"
    assert prepare(job(source=source), tiny("qwen3"), tmp_path / "d").digest == first.digest, "the same tokenizer"


@pytest.mark.parametrize("damage", ["tokens.bin", "trained.bin", "ends.bin", "about.json"])
def test_a_damaged_cache_is_made_anew(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    wanted = job(source=chats(tmp_path / "a.jsonl", 20))
    first = prepare(wanted, tiny("llama"), tmp_path / "d")
    good = (first.train / damage).read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    (first.train / damage).write_bytes(bad if damage != "about.json" else good[:-20])
    assert prepare(wanted, tiny("llama"), tmp_path / "d") == first
    assert (first.train / damage).read_bytes() == good


def test_one_that_is_overtaken_takes_what_the_other_made(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(source=chats(tmp_path / "a.jsonl", 20))
    put, others = preparation._put, list[Prepared]()

    def overtaken(part: Path, place: Path) -> None:
        if not others:
            monkeypatch.setattr(preparation, "_put", put)
            others.append(prepare(wanted, tiny("llama"), tmp_path / "d"))
        put(part, place)

    monkeypatch.setattr(preparation, "_put", overtaken)
    assert prepare(wanted, tiny("llama"), tmp_path / "d") == others[0]
    assert len(rows(others[0].train)) > 15
    assert not list((tmp_path / "d").rglob("*.part"))


def test_sources_are_mixed_by_weight(tiny: Tiny, tmp_path: Path) -> None:
    sources = [
        {"uri": chats(tmp_path / "a.jsonl", 10)},
        {"uri": chats(tmp_path / "b.jsonl", 20, seed=5), "weight": 0.5},
    ]
    prepared = prepare(job(sources=sources, validation={"share": 0}), tiny("llama"), tmp_path / "d")
    tokens = Tokens(prepared.train)
    assert tokens.about["shares"] == [[10, 1.0], [20, 0.5]]
    batches = Batches(tokens, seed=0, global_batch=4, micro_batch=4, max_seq_length=256)
    assert batches.sequences_per_epoch == 20


def test_code_goes_on_where_the_prompt_ends_and_stops(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "code.jsonl"
    file.write_text(
        '{"prompt": "def f(x):\\n", "completion": "    return x\\n"}\n{"prompt": "", "completion": "x = 1"}\n'
    )
    prepared = prepare(job(template="code", source=str(file), validation={"share": 0}), tiny("llama"), tmp_path / "d")
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    row = Tokens(prepared.train)[0]
    assert tokenizer.decode(row.tokens) == "def f(x):\n    return x\n<|im_end|>"
    assert tokenizer.decode(row.tokens[row.trained == 1]).lstrip() == "return x\n<|im_end|>"
    assert prepared.statistics.masks == "plain"


def test_a_classification_has_labels_and_nothing_trained(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "c.csv"
    file.write_text("text,label\nBuy stones!,spam\nWhere is Ada?,ham\n")
    made = job(template="classification", source=str(file), labels=["ham", "spam"], validation={"share": 0})
    tokens = Tokens(prepare(made, tiny("llama"), tmp_path / "d").train)
    assert [tokens[place].label for place in range(2)] == [1, 0]
    assert tokens.trained_tokens() == 0


def test_all_or_nothing_trained_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    everything = (
        "{% generation %}{% for m in messages if m['role'] == 'assistant' %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}{% endgeneration %}"
    )
    template = tmp_path / "t.jinja"
    template.write_text(everything)
    source = chats(tmp_path / "a.jsonl", 3)
    with pytest.raises(DataError, match="100 % of the tokens are trained, though trainOn is assistant"):
        prepare(job(source=source, chatTemplate=str(template)), tiny("llama"), tmp_path / "d")
    template.write_text(
        "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}{% generation %}{% endgeneration %}"
    )
    with pytest.raises(JobError, match="chat template"):
        prepare(job(source=source, chatTemplate=str(template)), tiny("llama"), tmp_path / "d")
    with pytest.raises(DataError, match="no row is left to train on"):
        prepare(job(source=source, max_seq_length=8, overLong="drop"), tiny("llama"), tmp_path / "d")


def test_an_answer_whose_first_token_begins_in_the_prompt_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Nothing is marked, and the blank before the answer is one token with its first word: no prompt ends like that."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
    )
    with pytest.raises(DataError) as caught:
        prepare(job(source=chats(tmp_path / "a.jsonl", 1), chatTemplate=str(template)), tiny("llama"), tmp_path / "d")
    assert "a.jsonl:1: messages: an answer's first token begins before the answer" in str(caught.value)


def test_all_bad_rows_are_told_of_before_anything_is_tokenised(tmp_path: Path) -> None:
    source = chats(tmp_path / "a.jsonl", 2, extra=[{"messages": []}, {"messages": 3}])
    with pytest.raises(DataError) as caught:
        prepare(job(source=source), tmp_path / "no model here", tmp_path / "d")
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [f"{source}:3", f"{source}:4"]


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="has no tokenizer that can be read"):
        prepare(job(source=chats(tmp_path / "a.jsonl", 2)), tmp_path, tmp_path / "d")
