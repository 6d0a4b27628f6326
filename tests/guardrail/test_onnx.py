"""The ONNX runtime: a Hugging Face directory's scores over whole texts, in batches that no row can tell."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_guardrail.detectors.onnx import Batches, ModelError, Overloaded, TextClassifier, windows
from aim_guardrail.detectors.onnx.graph import Graph
from aim_guardrail.detectors.onnx.windows import PIECE_CHARS, TokenizerWindows, pieces, spans
from tiny_onnx import classifier

WEIGHTS = {"nice": (1.0, -2.0), "awful": (-1.0, 2.0), "kill": (-0.2, 5.0), "hello": (0.31, 0.17)}


def soon() -> float:
    return time.monotonic() + 20


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


async def alone(model: TextClassifier, text: str) -> list[tuple[str, float]]:
    ((*scores,),) = await model.classify([text], soon())
    return [(score.label, score.score) for score in scores]


@pytest.fixture
async def model(tmp_path: Path) -> AsyncIterator[TextClassifier]:
    model = TextClassifier.read(classifier(tmp_path / "m", WEIGHTS))
    yield model
    await model.close()


async def test_scores_are_the_models_own_with_their_labels(model: TextClassifier) -> None:
    scores = dict(await alone(model, "You are AWFUL and hello"))
    assert scores == {"fine": pytest.approx(sigmoid(-0.69)), "toxic": pytest.approx(sigmoid(2.17))}


async def test_one_label_excludes_the_others_where_the_directory_says_so(tmp_path: Path) -> None:
    for problem, first in (("single_label_classification", 1 / (1 + np.exp(3))), (None, 1 / (1 + np.exp(3)))):
        model = TextClassifier.read(classifier(tmp_path / str(problem), WEIGHTS, problem_type=problem))
        scores = await alone(model, "awful")
        assert [score for _, score in scores] == [pytest.approx(first), pytest.approx(1 - first)]
        await model.close()


async def test_one_output_is_a_probability_of_its_own(tmp_path: Path) -> None:
    model = TextClassifier.read(classifier(tmp_path, {"awful": [2.0]}, ["toxic"], problem_type=None))
    assert await alone(model, "awful") == [("toxic", pytest.approx(sigmoid(2)))]
    await model.close()


@pytest.mark.parametrize("at", [0, 13, 14, 500, 20_000, 39_999])
async def test_no_word_of_a_long_text_escapes_and_its_window_is_told(model: TextClassifier, at: int) -> None:
    words = ["some", "more"] * 20_000
    words[at] = "kill"
    text = " ".join(words)
    ((_, toxic),) = await model.classify([text], soon())
    assert toxic.score == pytest.approx(sigmoid(5))
    assert "kill" in text[toxic.start : toxic.end]
    assert toxic.end - toxic.start < 14 * 5


async def test_spans_are_code_points_of_the_text_as_given(model: TextClassifier) -> None:
    text = "🙂 é " * 40 + "kill " + "ß ü " * 40
    ((_, toxic),) = await model.classify([text], soon())
    assert "kill" in text[toxic.start : toxic.end]


@pytest.mark.parametrize("tokens", [0, 1, 9, 10, 11, 12, 18, 19, 1000])
def test_windows_cover_every_token_and_overlap(tokens: int) -> None:
    found = list(spans(tokens, 10))
    assert sorted({at for start, end in found for at in range(start, end)}) == list(range(tokens))
    assert all(end - start == min(10, tokens) for start, end in found)
    assert all(later[0] <= sooner[1] - 2 for sooner, later in pairwise(found))


async def test_what_stands_across_two_pieces_of_a_long_text_is_in_one_window(tmp_path: Path) -> None:
    windower = TokenizerWindows(classifier(tmp_path, WEIGHTS) / "tokenizer.json", 16)
    filler = "some " * (PIECE_CHARS // 5)
    text = filler[: PIECE_CHARS - 6] + " you are awful " + filler
    assert any("you are awful" in text[window.start : window.end] for window in windower.windows(text))


async def test_a_text_without_a_token_has_no_scores(model: TextClassifier) -> None:
    assert await model.classify(["", " \n", "\ud800 hello"], soon()) == [
        [],
        [],
        [*(await model.classify(["\ud800 hello"], soon()))[0]],
    ]
    assert await model.classify([], soon()) == []


async def test_a_text_cannot_bring_special_tokens_of_its_own(tmp_path: Path) -> None:
    """What a text calls [SEP] is a text: else it could end itself where it likes."""
    windower = TokenizerWindows(classifier(tmp_path, WEIGHTS) / "tokenizer.json", 16)
    for word in ("[SEP]", "[CLS]", "[PAD]"):
        (window,) = windower.windows(f"hello {word} awful")
        assert [at for at, token in enumerate(window.ids) if token in (0, 2, 3)] == [0, len(window.ids) - 1]


# --- neighbours -------------------------------------------------------------------------------------------------------

NEIGHBOURS = [
    "kill kill kill kill",
    "nice nice nice nice",
    "awful some more hello",
    "hello hello hello hello",
    "some " * 11,
]
WATCHED = "hello you are nice"


@pytest.mark.parametrize("quantised", [False, True])
async def test_a_verdict_never_depends_on_neighbours(tmp_path: Path, quantised: bool) -> None:
    """Alone, in one call with others, and beside other calls: the very same numbers."""
    model = TextClassifier.read(classifier(tmp_path, WEIGHTS, quantised=quantised))
    expected = await alone(model, WATCHED)
    together = (await model.classify([*NEIGHBOURS, WATCHED, *NEIGHBOURS], soon()))[len(NEIGHBOURS)]
    assert [(score.label, score.score) for score in together] == expected
    for found in await asyncio.gather(*(alone(model, text) for text in [*NEIGHBOURS, WATCHED] * 20)):
        beside = found
    assert beside == expected
    await model.close()


async def test_dynamic_quantisation_is_noticed_and_would_have_mattered(tmp_path: Path) -> None:
    """Without this the test above could not fail."""
    graph = Graph(classifier(tmp_path, WEIGHTS, quantised=True) / "model.onnx")
    windower = TokenizerWindows(tmp_path / "tokenizer.json", 16)
    rows = [next(windower.windows(text)).ids for text in (WATCHED, NEIGHBOURS[0])]
    assert graph.mixes_rows
    both, single = graph.run({"input_ids": np.stack(rows)})[0], graph.run({"input_ids": rows[0][None]})[0]
    assert abs(both - single).max() > 0.01
    assert not Graph(classifier(tmp_path / "plain", WEIGHTS) / "model.onnx").mixes_rows


# --- batches ----------------------------------------------------------------------------------------------------------


class Watched:
    """A model that notes its batches, and waits where it is told to. It answers each row with its sum."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.may_go = threading.Event()
        self.has_begun = threading.Event()
        self.may_go.set()

    def __call__(self, rows: Any) -> Sequence[Any]:
        self.has_begun.set()
        assert self.may_go.wait(20)
        self.batches.append(rows.tolist())
        if (rows == 666).any():
            raise ArithmeticError("the beast")
        return [row.sum(keepdims=True) for row in rows]

    async def held(self, batches: Batches) -> asyncio.Task[Any]:
        """The model is busy with one row until `may_go` is set."""
        self.may_go.clear()
        self.has_begun.clear()
        task = asyncio.ensure_future(ask(batches, [[0]]))
        assert await asyncio.to_thread(self.has_begun.wait, 20)
        return task


async def ask(batches: Batches, rows: list[list[int]], deadline_s: float | None = None) -> list[int]:
    answers = await batches.answers(lambda: [np.array(row) for row in rows], deadline_s or soon())
    return [int(answer[0]) for answer in answers]


async def waiting(batches: Batches, number: int) -> None:
    async with asyncio.timeout(20):
        while batches.waiting < number:  # noqa: ASYNC110 - threads change it
            await asyncio.sleep(0.001)


async def test_a_row_goes_at_once_where_nobody_waits_and_what_waits_goes_together() -> None:
    model = Watched()
    batches = Batches(model)
    assert await ask(batches, [[1, 2]]) == [3]
    first = await model.held(batches)
    others = [asyncio.ensure_future(ask(batches, [[at, at]])) for at in range(40)]
    await waiting(batches, 40)
    model.may_go.set()
    assert await asyncio.gather(*others) == [[2 * at] for at in range(40)]
    assert await first == [0]
    assert [len(batch) for batch in model.batches] == [1, 1, 16, 16, 8]


async def test_only_rows_of_one_shape_share_a_batch() -> None:
    model = Watched()
    batches = Batches(model)
    await model.held(batches)
    others = [asyncio.ensure_future(ask(batches, [[1] * (1 + at % 3)])) for at in range(9)]
    await waiting(batches, 9)
    model.may_go.set()
    assert await asyncio.gather(*others) == [[1 + at % 3] for at in range(9)]
    assert [np.shape(batch) for batch in model.batches[1:]] == [(3, 1), (3, 2), (3, 3)]


async def test_a_batch_of_long_rows_is_smaller() -> None:
    model = Watched()
    batches = Batches(model)
    await ask(batches, [[1] * 512] * 9)
    assert [len(batch) for batch in model.batches] == [4, 4, 1]


async def test_a_long_text_does_not_hold_up_a_short_one() -> None:
    model = Watched()
    batches = Batches(model)
    await model.held(batches)
    long = asyncio.ensure_future(ask(batches, [[1, 1, 1]] * 160))
    await waiting(batches, 1)
    short = asyncio.ensure_future(ask(batches, [[7]]))
    await waiting(batches, 2)
    model.may_go.set()
    assert await short == [7]
    assert await long == [3] * 160
    assert [[7]] in model.batches[:4]


async def test_late_and_cancelled_rows_are_not_begun() -> None:
    model = Watched()
    batches = Batches(model)
    first = await model.held(batches)
    late = asyncio.ensure_future(ask(batches, [[13]], time.monotonic() + 0.01))
    gone = asyncio.ensure_future(ask(batches, [[14]]))
    await waiting(batches, 2)
    gone.cancel()
    await asyncio.sleep(0.05)
    model.may_go.set()
    with pytest.raises(TimeoutError, match="not asked in time"):
        await late
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert await first == [0]
    assert await ask(batches, [[15]]) == [15]
    assert model.batches == [[[0]], [[15]]]


async def test_a_row_that_fails_fails_alone() -> None:
    model = Watched()
    batches = Batches(model)
    await model.held(batches)
    tasks = [asyncio.ensure_future(ask(batches, [[value]])) for value in (1, 666, 2)]
    await waiting(batches, 3)
    model.may_go.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [found[0], found[2]] == [[1], [2]]
    assert isinstance(found[1], ArithmeticError)


async def test_too_many_callers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aim_guardrail.detectors.onnx.batches.WAITING", 2)
    model = Watched()
    batches = Batches(model)
    await model.held(batches)
    kept = [asyncio.ensure_future(ask(batches, [[1]])) for _ in range(2)]
    await waiting(batches, 2)
    with pytest.raises(Overloaded, match="2 callers wait"):
        await ask(batches, [[1]])
    model.may_go.set()
    assert await asyncio.gather(*kept) == [[1], [1]]


async def test_a_closed_model_says_so() -> None:
    model = Watched()
    batches = Batches(model)
    first = await model.held(batches)
    second = asyncio.ensure_future(ask(batches, [[1]]))
    await waiting(batches, 1)
    batches.close()
    model.may_go.set()
    with pytest.raises(Overloaded, match="closed"):
        await second
    with pytest.raises(Overloaded, match="closed"):
        await ask(batches, [[1]])
    assert await first == [0]


async def test_a_text_too_long_to_be_read_in_time_is_given_up(
    model: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text as large as a body may be holds no thread beyond its deadline."""
    read: list[int] = []
    monkeypatch.setattr(
        windows, "pieces", lambda text: (read.append(at) or each for at, each in enumerate(pieces(text)))
    )
    with pytest.raises(TimeoutError):
        await model.classify(["some more " * 2_000_000], time.monotonic() + 0.3)
    assert 1 <= len(read) < 2_000_000 * 10 / PIECE_CHARS / 4
    assert await alone(model, "hello")


async def test_nothing_runs_on_the_event_loop(model: TextClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    made, run = TokenizerWindows.windows, Graph.run
    monkeypatch.setattr(TokenizerWindows, "windows", lambda *a: (threads.add(threading.current_thread()), made(*a))[1])
    monkeypatch.setattr(Graph, "run", lambda *a: (threads.add(threading.current_thread()), run(*a))[1])
    await alone(model, "hello")
    assert threads
    assert threading.main_thread() not in threads


# --- what cannot be used ----------------------------------------------------------------------------------------------


async def test_no_number_is_no_score(tmp_path: Path) -> None:
    model = TextClassifier.read(classifier(tmp_path, {"awful": (float("nan"), 0.0)}))
    with pytest.raises(ArithmeticError, match="no number"):
        await alone(model, "awful")
    assert await alone(model, "hello") == [("fine", 0.5), ("toxic", 0.5)]
    await model.close()


def broken(folder: Path, file: str, content: bytes | None) -> Path:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, r"config\.json: cannot be read"),
        ("config.json", b"{", r"config\.json: .*: mend it, or fetch it anew"),
        ("config.json", b"{}", r"config\.json: id2label does not name outputs 0, 1, …: give each its label"),
        ("config.json", b'{"id2label": {"0": "a", "2": "b"}}', "id2label does not name"),
        ("config.json", b'{"id2label": {"0": "a"}}', r"answers \[1, 2\] where config\.json names 1 labels"),
        ("config.json", b'{"id2label": {"0": "a"}, "problem_type": "seq2seq"}', "problem_type"),
        ("tokenizer.json", None, r"tokenizer\.json: cannot be read"),
        ("tokenizer.json", b"[]", r"tokenizer\.json: not a tokenizer"),
        ("model.onnx", None, r"no model\.onnx or model_quantized\.onnx in it: export the model to ONNX"),
        ("model.onnx", b"", r"model\.onnx: not a model ONNX Runtime can run"),
        ("model.onnx", b"PK\x03\x04 not a graph", r"model\.onnx: not a model ONNX Runtime can run"),
    ],
)
def test_a_broken_directory_is_one_line_that_names_the_file(tmp_path: Path, file: str, content: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        TextClassifier.read(broken(classifier(tmp_path, WEIGHTS), file, content))
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    classifier(tmp_path, WEIGHTS)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["hello"] = 4000
    with pytest.raises(ModelError, match=r"does not take the tokens of tokenizer\.json"):
        TextClassifier.read(broken(tmp_path, "tokenizer.json", json.dumps(tokens).encode()))


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such directory: give one with config\.json, tokenizer\.json and model"):
        TextClassifier.read(tmp_path / "none")


async def test_a_graph_may_lie_where_the_hub_has_it(tmp_path: Path) -> None:
    for file in ("model_quantized.onnx", "onnx/model.onnx", "onnx/model_quantized.onnx"):
        model = TextClassifier.read(classifier(tmp_path / file.replace("/", "-"), WEIGHTS, file=file))
        assert (await alone(model, "kill"))[1] == ("toxic", pytest.approx(sigmoid(5)))
        await model.close()


def test_the_digest_is_of_all_that_matters(tmp_path: Path) -> None:
    digests = set()
    for at, options in enumerate(
        [{}, {"labels": ("a", "b")}, {"max_tokens": 20}, {"quantised": True}, {"problem_type": None}]
    ):
        digests.add(TextClassifier.read(classifier(tmp_path / str(at), WEIGHTS, **options)).digest)
    assert TextClassifier.read(classifier(tmp_path / "again", WEIGHTS)).digest in digests
    assert len(digests) == 5
