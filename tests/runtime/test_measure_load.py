"""What `aim-runtime measure` asks, and when: distributions, arrivals, prompts, traces."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_runtime.measure.arrivals import OnOff, on_off, poisson
from aim_runtime.measure.errors import MeasureError
from aim_runtime.measure.lengths import lengths
from aim_runtime.measure.options import parse
from aim_runtime.measure.prompts import Prompts, word_list
from aim_runtime.measure.trace import parse_trace

URL = ("--url", "http://127.0.0.1:1")


@given(st.integers(0, 2**31), st.floats(0.5, 200))
@settings(max_examples=30, deadline=None)
def test_arrivals_are_seeded_rising_and_within_their_time(seed: int, rate: float) -> None:
    for made in (
        [list(poisson(rate, 10, random.Random(seed))) for _ in range(2)],
        [list(on_off(rate, OnOff(1.5, 0.5), 10, random.Random(seed))) for _ in range(2)],
    ):
        assert made[0] == made[1]
        assert made[0] == sorted(made[0])
        assert all(0 < at < 10 for at in made[0])


def test_poisson_arrivals_have_the_rate_and_the_spread_of_poisson() -> None:
    times = list(poisson(50, 400, random.Random(7)))
    assert abs(len(times) - 20_000) < 4 * 20_000**0.5
    per_second = [0] * 400
    for at in times:
        per_second[int(at)] += 1
    mean = sum(per_second) / 400
    variance = sum((count - mean) ** 2 for count in per_second) / 399
    assert 0.75 < variance / mean < 1.25  # of a Poisson process 1; of even spacing 0


def test_bursts_keep_the_mean_rate_and_leave_the_pauses_empty() -> None:
    times = list(on_off(20, OnOff(2, 3), 500, random.Random(3)))
    assert all(at % 5 < 2 for at in times)
    assert abs(len(times) - 10_000) < 4 * 10_000**0.5


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_lengths_are_of_their_distribution(seed: int) -> None:
    source = random.Random(seed)
    assert lengths("constant:7", "x").draw(source) == 7
    assert all(3 <= lengths("uniform:3:5", "x").draw(source) <= 5 for _ in range(20))
    drawn = sorted(lengths("lognormal:200:0.8", "x").draw(source) for _ in range(999))
    assert 150 < drawn[499] < 260  # its median: 200


def test_lengths_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text("5\n\n9\n")
    drawn = {lengths(f"file:{file}", "x").draw(random.Random(seed)) for seed in range(50)}
    assert drawn == {5, 9}


@pytest.mark.parametrize(
    "text",
    ["", "constant", "constant:0", "constant:1.5", "constant:nan", "uniform:5:3", "uniform:1", "lognormal:9:-1", "x:1"],
)
def test_a_length_that_is_none_names_the_flag_and_the_value(text: str) -> None:
    with pytest.raises(MeasureError, match=rf"--prompt-tokens {text}: no length in tokens: ") as refused:
        lengths(text, "prompt-tokens")
    assert refused.value.exit_code == 2


def test_prompts_are_seeded_their_own_and_as_long_as_asked() -> None:
    one, other = Prompts(1, tokens_per_word=1.0), Prompts(1, tokens_per_word=1.0)
    texts = [one.make(40) for _ in range(50)]
    assert texts == [other.make(40) for _ in range(50)]
    assert one.digest == other.digest
    assert len(set(texts)) == 50
    assert {len(text.split()) for text in texts} == {40}
    assert Prompts(2, tokens_per_word=1.0).make(40) != texts[0]
    assert len(Prompts(1, tokens_per_word=2.0).make(40).split()) == 20
    assert len(word_list()) == len(set(word_list()))


def test_prompts_share_the_starts_they_are_told_to() -> None:
    prompts = Prompts(1, tokens_per_word=1.0)
    a, b, other = prompts.make(30, (("p", 20),)), prompts.make(25, (("p", 20),)), prompts.make(30, (("q", 20),))
    assert a.split()[:20] == b.split()[:20] != other.split()[:20]
    assert a.split()[20:25] != b.split()[20:25]
    assert len(prompts.make(10, (("p", 20),)).split()) == 10


def test_traces_of_three_kinds_are_read() -> None:
    ours = {"t": 2.5, "prompt_tokens": 90, "output_tokens": 7, "prefix": "a", "prefix_tokens": 64}
    mooncake = {"timestamp": 4500, "input_length": 700, "output_length": 9, "hash_ids": [1, 2]}
    burst = {"Timestamp": 1.0, "Request tokens": 5, "Response tokens": 6, "Model": "m", "Total tokens": 11}
    found = parse_trace(map(json.dumps, (ours, mooncake, burst)), "trace")
    assert [(each.at_s, each.prompt_tokens, each.output_tokens) for each in found] == [
        (0.0, 5, 6),
        (1.5, 90, 7),
        (3.5, 700, 9),
    ]
    assert found[1].blocks == (("a", 64),)
    assert found[2].blocks == (("1", 512), ("2", 512))


GOOD = '{"t": 0, "prompt_tokens": 1, "output_tokens": 1}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "a list, not a mapping"),
        ('{"t": 0, "prompt_tokens": 1}', "output_tokens or output_length or Response tokens: missing"),
        ('{"t": 0, "timestamp": 0, "prompt_tokens": 1, "output_tokens": 1}', "more than one given"),
        ('{"t": -1, "prompt_tokens": 1, "output_tokens": 1}', "t: -1 is no time"),
        ('{"t": NaN, "prompt_tokens": 1, "output_tokens": 1}', "t: nan is no time"),
        ('{"t": true, "prompt_tokens": 1, "output_tokens": 1}', "t: True is no time"),
        ('{"t": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens: 0 is no number of tokens"),
        ('{"t": 0, "prompt_tokens": 1, "output_tokens": "9"}', "output_tokens: '9' is no number of tokens"),
        ('{"t": 0, "prompt_tokens": 1, "output_tokens": 1, "turns": 3}', "turns: unknown field"),
        ('{"t": 0, "prompt_tokens": 1, "output_tokens": 1, "prefix": "a"}', "prefix: needs prefix_tokens"),
        (
            '{"t": 0, "prompt_tokens": 1, "output_tokens": 1, "prefix": "a", "prefix_tokens": 2}',
            "tokens: 2 is more",
        ),
        ('{"t": 0, "prompt_tokens": 1, "output_tokens": 1, "hash_ids": {}}', "hash_ids: not a list"),
        ("[" * 100_000, "line.jsonl:2: "),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(line: str, says: str) -> None:
    with pytest.raises(MeasureError, match=r"^line.jsonl:2: ") as refused:
        parse_trace([GOOD, line, GOOD], "line.jsonl")
    assert says in str(refused.value)
    assert refused.value.exit_code == 2


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_whatever_a_line_is_it_is_read_or_refused(line: str) -> None:
    with suppress(MeasureError):
        parse_trace([GOOD, line], "t")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--url"),
        (("--url", "ftp://x"), "--url ftp://x: give http://HOST:PORT"),
        (("--url", "http://u:secret@x"), "--url …: give an address alone"),
        ((*URL, "--rates", "0"), "--rates 0: '0' is no number above 0"),
        ((*URL, "--rates", "1,nan"), "--rates 1,nan: 'nan' is no number above 0"),
        ((*URL, "--concurrency", "1.5"), "--concurrency 1.5: '1.5' is no whole number"),
        ((*URL, "--rates", "1", "--concurrency", "1"), "--concurrency 1: give --rates"),
        ((*URL, "--trace", "x", "--arrivals", "closed"), "--trace x: a trace is an open loop"),
        ((*URL, "--slo-ttft-ms", "-1"), "--slo-ttft-ms: '-1' is no number above 0"),
        ((*URL, "--ratess", "1"), "unrecognized arguments: --ratess 1"),
        ((*URL, "--precision", "fp5"), "--precision: invalid choice: 'fp5'"),
    ],
)
def test_a_wrong_flag_is_one_line(flags: tuple[str, ...], says: str) -> None:
    with pytest.raises(MeasureError) as refused:
        parse(flags)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_evidence_does_not_say_where_the_server_is() -> None:
    flags = (*URL, "--api-key-file=/secrets/key", "--output", "/home/me", "--seed", "7")
    assert parse((*URL, "--seed", "7")).command == "aim-runtime measure --url '…' --seed 7"
    kept = parse(flags).command
    assert "--seed 7" in kept
    assert not any(word in kept for word in ("127.0.0.1", "/secrets", "/home"))
