"""The page of a run: whole by itself, right, and safe whatever stands in a job, in rows and in answers."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("jinja2")

from aim_trainer.data.tokens import Row, write_tokens
from aim_trainer.metrics.json_lines import JsonLines
from aim_trainer.metrics.records import Evaluation, Note, Saved, Step
from aim_trainer.report.chart import Chart, bars, draw, nice_ticks
from aim_trainer.report.series import Point, Series
from aim_trainer.report.write import write_report
from aim_trainer.run_directory import RunDirectory

JOB = """\
apiVersion: aim.amd.com/v1alpha1
kind: FineTuningJob
metadata: {name: support-bot}
spec:
  baseModel: {modelId: "MODEL"}
  dataset: {source: chats.jsonl}
  hyperparameters: {learningRate: 0.0005}
"""
EVALUATION: dict[str, Any] = {
    "base": {"eval_loss": 2.5, "exact_match": 0.125},
    "tuned": {"eval_loss": 1.25, "exact_match": 0.625},
    "n": {"eval_loss": 40, "exact_match": 8},
    "gates": [
        {"metric": "eval_loss", "bound": "max", "limit": 1.5, "value": 1.25, "passed": True},
        {"metric": "exact_match", "bound": "minDelta", "limit": 0.75, "value": 0.5, "passed": False},
        {"metric": "guardrail_blocked", "bound": "max", "limit": 0, "value": None, "passed": False, "reason": "TEXT"},
    ],
    "samples": [{"prompt": "TEXT", "wanted": "TEXT", "base": "TEXT", "tuned": "TEXT", "blocked": True}],
    "regressions": [{"prompt": "TEXT", "wanted": "TEXT", "base": "TEXT", "tuned": "TEXT", "tuned_holds": False}],
    "unmeasured": {"guardrail_blocked": "TEXT"},
}


def step(at: int, steps: int, loss: float = 2.0) -> Step:
    return Step(at, steps, at / 10, loss, 1e-4, 0.5, 1000, 300, 0.5, 1.0)


def made(folder: Path, steps: int = 40, text: str = "plain", model: str = "org/model") -> RunDirectory:
    """A run with all there can be; `text` wherever somebody else's text may stand."""
    run = RunDirectory(folder)
    run.job.write_text(JOB.replace("MODEL", model))
    metrics = JsonLines(run.metrics)
    metrics.tell(Note("started", text))
    metrics.tell(Evaluation(0, {"eval_loss": 2.5}))
    for at in range(1, steps + 1):
        metrics.tell(step(at, steps, 1 + 1 / at))
    metrics.tell(Evaluation(steps, {"eval_loss": 1.25}))
    metrics.tell(Saved(steps, "file:///somewhere", 1024, 0.5))
    metrics.tell(Note("resumed", text, {"step": 20}))
    metrics.tell(Note("retried", text))
    metrics.tell(Note("done", text, {"uri": text, "digest": "sha256:abc"}))
    run.evaluation.write_text(json.dumps(EVALUATION).replace('"TEXT"', json.dumps(text)))
    rows = [Row(np.zeros(4 + each, np.int32), np.ones(4 + each, np.uint8)) for each in range(20)]
    statistics = {
        "duplicates": 3,
        "dropped": 0,
        "masks": "trl",
        "trained_tokens": 67,
        "trained_share": 0.25,
        "sources": [{"uri": text, "format": text, "rows": 20, "weight": 1.0, "ignored": [text]}],
    }
    write_tokens(run.data / "train/abcdef", rows, {"statistics": statistics})
    return run


class Seen(HTMLParser):
    """Elements that a browser would make, and the text in them."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"] and self.open[-1:] != ["script"]:
            self.text += f" {data}"

    def cells(self) -> str:
        return " ".join(self.text.split())


def test_the_page_says_what_the_run_says(tmp_path: Path) -> None:
    run = made(tmp_path)
    assert write_report(run) == run.report
    seen = Seen(run.report.read_text())
    assert seen.open == []
    said = seen.cells()
    for part in (
        "support-bot",
        "LoRA of org/model · chat",
        "2 of 3 gates failed",
        "Held-out loss 1.25 base 2.5, 50% less",
        "Steps 40 of 40, 4 epochs",
        "Tokens 40 k 12 k of them trained",
        "Exact match 12.5 % 62.5 % +50.0 points 8",
        "Held-out loss at most 1.5 1.25 kept",
        "Exact match change at least 75.0 points 50.0 points failed",
        "Blocked by the guardrail at most 0.0 % unknown failed plain",
        "guardrail_blocked was not measured: plain",
        "0 of 1 answered as they must be",
        "training rows 20",
        "tokens of a row 13 in the middle, 22 at 95 %, 23 at most",
        "trained tokens 67 (25.0%), told by TRL's training template",
        "duplicates 3 rows: say what an earlier row says",
        "source plain: 20 rows, plain; fields that nobody reads: plain",
        "Published uri plain digest sha256:abc",
        "learningRate 0.0005",
    ):
        assert part in said
    kinds = [tag for tag, _ in seen.elements]
    assert kinds.count("circle") == 2 + 1, "two evaluations and the legend's"
    classes = [attributes.get("class") for _, attributes in seen.elements]
    assert classes.count("resumed") == 2
    assert classes.count("saved") == 2
    (loss,) = (attributes for tag, attributes in seen.elements if attributes.get("aria-label") == "Loss")
    assert tag_points(loss) == 40


def tag_points(attributes: dict[str, str | None]) -> int:
    return len((attributes["data-points"] or "").split())


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = write_report(made(tmp_path)).read_text()
    assert not re.search(r"(src|href|action|background)\s*=|url\(|@import|<link|<iframe|<object", page)
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "'><svg/onload=alert(1)>",
        "</style></script><!--",
        "{{ 7 * 7 }}{% raw %}",
        "&lt;b&gt;",
        "a\x00b\x1b[31m\x7f",
        "\ud800 alone",
        "\u202egnp.exe",
    ],
)
def test_hostile_text_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "calm").mkdir()
    calm = made(tmp_path / "calm")
    hostile = made(tmp_path, text=text, model="org/model" if "\ud800" in text else json.dumps(text)[1:-1])
    safe, seen = Seen(write_report(calm).read_text()), Seen(write_report(hostile).read_text(encoding="utf-8"))
    assert [tag for tag, _ in seen.elements] == [tag for tag, _ in safe.elements]
    assert [set(attributes) for _, attributes in seen.elements] == [set(attributes) for _, attributes in safe.elements]
    # What cannot be written at all is replaced in the run's own file already, by another sign.
    shown = "".join(re.escape(each) if each.isprintable() else "[?\ufffd]" for each in text)
    assert len(re.findall(shown, seen.text)) >= 10
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", seen.text)


def test_what_was_asked_is_shown_by_who_said_it(tmp_path: Path) -> None:
    run = made(tmp_path, text="system\nBe short.\nuser\nWhat of the user\nand of us?")
    said = Seen(write_report(run).read_text()).cells()
    assert "Asked system Be short. user What of the user and of us? Base" in said


@pytest.mark.parametrize("torn", [b"", b'{"record": "st', b"\x00\xff\n" * 3])
def test_a_run_that_hardly_began_has_a_page(tmp_path: Path, torn: bytes) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_bytes(torn)
    run.evaluation.write_bytes(torn or b"7")
    run.job.write_text("nonsense: [")
    seen = Seen(write_report(run).read_text())
    assert "not ended" in seen.text
    assert "No step was made." in seen.text
    assert "job.yaml:" in seen.text


@pytest.mark.parametrize(
    "evaluation",
    [
        '{"base": {"eval_loss": "x"}, "tuned": 5, "n": [], "gates": [7], "samples": {}, "unmeasured": []}',
        '{"base": {"eval_loss": ' + "9" * 4000 + '}, "tuned": {"eval_loss": 1}}',
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize("about", ['{"fi', "[]", "{}"])
def test_what_others_wrote_into_the_directory_costs_its_part_of_the_page(
    tmp_path: Path, evaluation: str, about: str
) -> None:
    run = RunDirectory(tmp_path)
    JsonLines(run.metrics).tell(step(1, 10))
    run.evaluation.write_text(evaluation)
    rows = run.data / "train/abc"
    rows.mkdir(parents=True)
    (rows / "about.json").write_text(about)
    (rows / "ends.bin").write_bytes(b"odd")
    seen = Seen(write_report(run).read_text())
    assert f"{rows}: damaged" in seen.text


def test_a_directory_without_a_run_has_a_page(tmp_path: Path) -> None:
    assert "No step was made." in Seen(write_report(RunDirectory(tmp_path)).read_text()).text


def test_steps_without_number_are_gaps_and_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    metrics = JsonLines(run.metrics)
    for at in range(1, 11):
        metrics.tell(step(at, 10, math.nan if at in (4, 5) else 1.0))
    page = write_report(run).read_text()
    assert "the loss of 2 steps is no number" in page
    path = re.search(r'<path class="line" d="([^"]+)"', page[page.index("aria-label") :])
    assert path is not None
    assert path[1].count("M") == 2


def test_a_long_run_has_a_page_no_larger_than_a_short_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    line = '{"record":"step","time":1.0,"step":%d,"steps":20000,"epoch":0.1,"loss":%r,"learning_rate":0.1,'
    rest = '"grad_norm":0.5,"tokens":9,"trained_tokens":3,"seconds":0.5,"eta_s":1.0,"gpu_memory_bytes":null}\n'
    with run.metrics.open("w") as lines:
        lines.writelines(line % (at, 9.5 if at == 11_234 else 1 + at % 97 / 97) + rest for at in range(1, 20_001))
    page = write_report(run).read_text()
    assert len(page) < 250_000
    assert tag_points(next(each for _, each in Seen(page).elements if each.get("aria-label") == "Loss")) <= 600


class TestSeries:
    def series(self, values: list[float]) -> Series:
        series = Series()
        for at, value in enumerate(values, 1):
            series.add(at, value)
        return series

    def test_a_million_steps_keep_their_spikes(self) -> None:
        series = Series()
        series.steps.extend(range(1, 1_000_001))
        series.values.frombytes(np.ones(1_000_000).tobytes())
        series.values[123_456], series.values[900_001] = 50.0, -50.0
        thin = series.thinned(500)
        assert len(thin) <= 1000
        assert Point(123_457, 50.0) in thin
        assert Point(900_002, -50.0) in thin
        assert thin == sorted(thin)

    @given(st.lists(st.floats(-1e9, 1e9) | st.just(math.nan), min_size=1, max_size=400), st.integers(1, 40))
    def test_thinning_adds_nothing_and_keeps_the_extremes(self, values: list[float], columns: int) -> None:
        series = self.series(values)
        thin = series.thinned(columns)
        assert 1 <= len(thin) <= 2 * columns
        finite = [value for value in values if math.isfinite(value)]
        kept = [point.value for point in thin if math.isfinite(point.value)]
        assert not finite or (min(kept), max(kept)) == (min(finite), max(finite))
        assert all(repr(values[point.step - 1]) == repr(point.value) for point in thin)

    @given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200))
    def test_a_mean_lies_between_what_it_is_of(self, values: list[float]) -> None:
        for at, point in enumerate(self.series(values).smoothed(), 1):
            assert min(values[:at]) - 1e-6 <= point.value <= max(values[:at]) + 1e-6


class TestChart:
    @given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
    @example(0.0, 5e-324)
    def test_ticks_hold_the_values_and_are_few(self, one: float, other: float) -> None:
        low, high = sorted((one, other))
        ticks = nice_ticks(low, high)
        assert 2 <= len(ticks) <= 9
        assert ticks == sorted(set(ticks))
        slack = 1e-6 * max(1.0, abs(low), abs(high))
        assert ticks[0] <= low + slack
        assert ticks[-1] >= high - slack

    @pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [5.0] * 30, [1e-12, 2e-12], [1e30, -1e30], [math.inf, 1.0]])
    def test_whatever_the_values_the_drawing_is_whole(self, values: list[float]) -> None:
        series = TestSeries().series(values)
        drawing = draw(Chart("<a & b>", series, measured=[Point(0, 1.0), Point(40, math.nan)], saved=[1], resumed=[1]))
        root = ElementTree.fromstring(drawing)
        assert root.attrib["aria-label"] == "<a & b>"
        assert "nan" not in drawing
        assert "inf" not in drawing

    def test_nothing_to_draw_is_no_drawing(self) -> None:
        assert draw(Chart("a", Series())) == ""
        assert draw(Chart("a", TestSeries().series([math.nan, math.inf]))) == ""
        assert bars([]) == ""
        assert bars([("<1>", 0)]) == ""

    def test_a_histogram_has_a_bar_for_each(self) -> None:
        root = ElementTree.fromstring(bars([("<1>", 4), ("2", 2), ("3", 0)]))
        heights = [float(bar.attrib["height"]) for bar in root if bar.tag == "rect"]
        assert heights[1] == pytest.approx(heights[0] / 2)
        assert heights[2] == 0
