"""What a device serves: measured, a range by evidence of its class, or a bound; never one for the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.errors import SizingError
from aim_profile.files.trace import TracedRequest
from aim_profile.gpus.catalog import by_name
from aim_profile.models.load import by_id
from aim_profile.serving.capacity import Asked, Evidenced
from aim_profile.serving.observations import Observation, Row, of_vendors
from aim_profile.sizing.asked import Promise, RequestShape
from aim_profile.sizing.capacity import Engine, Served, latency_range
from aim_profile.sizing.constants import Constants, Observed
from aim_profile.sizing.recorded import recorded_load
from aim_profile.sizing.work import speeds_of, work_of

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
NEMO = "mistralai/Mistral-Nemo-Instruct-2407"
CHAT = RequestShape(prompt_tokens=512, answer_tokens=256)
PROMISE = Promise(ttft_ms=500, itl_ms=50)


def run(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["capacity", *words])
    assert done.exit_code == code, done.output
    return done.stdout


def ask(*words: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "-o", "json", code=code))
    return found


def observations() -> tuple[Observation, Observation]:
    spx, dpx = of_vendors()
    assert (spx.mode.label, dpx.mode.label) == ("SPX/NPS1", "DPX/NPS2")
    return spx, dpx


def constants(seen: Observation) -> Constants:
    assert seen.speeds is not None
    return Constants(seen.observed(), seen.speeds)


def ranges(seen: Observation, known: Constants) -> Iterator[tuple[Row, tuple[Served, Served]]]:
    """Each row of a table, and what these constants expect of it: the slow end, and the quick one."""
    assert seen.speeds is not None
    for row in seen.rows:
        engine = Engine(work_of(seen.model, seen.precision, row.shape), seen.speeds, row.shape, 10_000)
        yield row, latency_range(engine, known, row.sequences)


def test_the_published_tables_are_there_whole_with_whose_they_are() -> None:
    spx, dpx = observations()
    assert (len(spx.rows), len(dpx.rows)) == (10, 10)  # nine levels of load and one stream
    assert "published by AMD on 2026-01-22" in spx.label
    assert "https://rocm.blogs.amd.com/" in spx.label
    assert "MI300X" in spx.label
    assert "MI35x" in spx.label
    assert not spx.ours


def test_constants_of_the_published_whole_card_predict_every_row_of_its_halves() -> None:
    spx, dpx = observations()
    for row, (slow, quick) in ranges(dpx, constants(spx)):
        assert quick.itl_ms <= row.itl_ms <= slow.itl_ms
        assert slow.itl_ms / quick.itl_ms <= 3
        assert slow.tokens_per_s <= row.sequences / row.itl_ms * 1000 <= quick.tokens_per_s
        if row.ttft_ms is not None:
            assert quick.ttft_ms <= row.ttft_ms <= slow.ttft_ms
            assert slow.ttft_ms / quick.ttft_ms <= 3


def test_constants_of_the_halves_hold_the_whole_card_too() -> None:
    spx, dpx = observations()
    for row, (slow, quick) in ranges(spx, constants(dpx)):
        assert quick.itl_ms <= row.itl_ms <= slow.itl_ms


@pytest.mark.parametrize("left_out", range(10))
def test_a_row_that_was_left_out_is_in_the_range_of_the_others(left_out: int) -> None:
    spx, _ = observations()
    assert spx.speeds is not None
    observed = spx.observed()
    row = observed.pop(left_out)
    known = Constants(observed, spx.speeds)
    engine = Engine(row.work, spx.speeds, row.shape, 10_000)
    slow, quick = latency_range(engine, known, row.sequences)
    assert quick.itl_ms <= row.itl_ms <= slow.itl_ms


def test_rows_that_no_constants_explain_are_refused() -> None:
    spx, _ = observations()
    assert spx.speeds is not None
    first, *rest = spx.observed()
    absurd = [
        Observed(row.work, row.shape, row.sequences, 1000.0 if at % 2 else 1.0, 50.0) for at, row in enumerate(rest)
    ]
    with pytest.raises(SizingError, match="no constants explain"):
        Constants([first, *absurd], spx.speeds)


def test_a_range_never_beats_the_bound() -> None:
    mode = by_name("MI355X").mode("DPX")
    asked = Asked(by_id(NEMO), "fp8", mode, CHAT, PROMISE)
    found = Evidenced().capacity(asked)
    assert found is not None
    assert found.high is not None
    assert found.low is not None
    speeds = speeds_of(by_name("MI355X"), mode, "fp8")
    assert speeds is not None
    work = work_of(by_id(NEMO), "fp8", CHAT)
    reading_ms = (work.dense_bytes + work.cache_bytes * found.high.sequences) / speeds.bytes_per_s * 1000
    assert found.high.itl_ms >= reading_ms
    assert found.low.requests_per_s < found.high.requests_per_s


def test_work_of_a_mixture_of_experts_counts_those_that_work() -> None:
    mixtral = work_of(by_id("mistralai/Mixtral-8x7B-Instruct-v0.1"), "bf16", CHAT)
    assert mixtral.operations / 2 == pytest.approx(12.7e9, rel=0.02)  # 12.9 B active, without the input embedding
    least, most = mixtral.weights_read(1)
    assert least == most
    assert mixtral.weights_read(2)[1] > least
    assert mixtral.weights_read(100)[1] == pytest.approx(mixtral.dense_bytes + mixtral.expert_bytes)


def test_without_evidence_of_the_class_there_is_only_a_bound() -> None:
    found = ask(LLAMA, "--gpu", "MI300X", "--every-mode", "--ttft-ms", "500", "--itl-ms", "50")
    assert [mode["mode"] for mode in found["modes"]][:3] == ["SPX/NPS1", "DPX/NPS2", "CPX/NPS4"]
    for mode in found["modes"]:
        assert mode["marked"] == "bound, not an estimate"
        assert mode["low"] is None
        assert "no evidence of gfx942" in mode["notes"][0]
    table = run(LLAMA, "--gpu", "MI300X", "--every-mode", "--itl-ms", "50")
    assert "bound, not an estimate" in table
    assert "at most" in table
    assert "estimate, not measured" not in table


def test_with_evidence_of_the_class_it_is_a_range_that_says_so() -> None:
    found = ask(LLAMA, "--gpu", "MI355X", "--precision", "fp8", "--every-mode", "--ttft-ms", "500", "--itl-ms", "50")
    spx = found["modes"][0]
    assert spx["marked"] == "estimate, not measured"
    assert spx["low"]["requests_per_s"] < spx["high"]["requests_per_s"]
    assert spx["low"]["itl_ms"] <= 50
    assert "published by AMD" in spx["evidence"][0]
    assert found["serves_most"].startswith("SPX/NPS1")
    assert "DPX" in found["serves_most"]  # whose range reaches above


def test_what_was_asked_before_changes_no_answer() -> None:
    spx, dpx = observations()
    known, asked_before = constants(spx), constants(spx)
    assert dpx.speeds is not None
    work = work_of(dpx.model, dpx.precision, CHAT)
    for sequences in (1, 400, 17):
        asked_before.step_ms(work, dpx.speeds, CHAT, sequences, "least")
    for end in ("least", "most"):
        told = [each.step_ms(work, dpx.speeds, CHAT, 64, end) for each in (known, asked_before)]
        assert told[0] == told[1]


def test_what_ends_it_is_named_as_far_as_evidence_tells() -> None:
    spx, _ = observations()
    known = constants(spx)
    assert spx.speeds is not None
    work = work_of(spx.model, spx.precision, CHAT)
    assert known.may_fill(work, spx.speeds, CHAT, 1) == ("launch", "bandwidth")  # one sequence computes next to nothing
    assert "bandwidth" not in known.may_fill(work, spx.speeds, CHAT, 300)


def test_the_picture_tells_a_bound_from_an_estimate_and_from_a_measurement(tmp_path: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    file = tmp_path / "evidence.yaml"
    file.write_text(yaml.safe_dump({"measurements": [measured()]}), encoding="utf-8")
    drawn = {}
    for name, words in (("bound", ()), ("measured", ("--evidence", str(file)))):
        svg = tmp_path / f"{name}.svg"
        run(LLAMA, "--gpu", "MI300X", "--every-mode", "--itl-ms", "50", "--svg", str(svg), *words)
        ElementTree.parse(svg)
        drawn[name] = svg.read_text(encoding="utf-8")
    assert drawn["bound"].count("bound, not an estimate") == 7
    assert 'fill="url(#SPX)"' in drawn["bound"]
    assert "no evidence of gfx942" in drawn["bound"]
    assert 'fill-opacity="0.28"' not in drawn["bound"]
    assert drawn["measured"].count("estimate, not measured ·") == 6
    assert drawn["measured"].count(">measured<") == 1
    assert "url(#SPX)" not in drawn["measured"]


def measured(**hardware: Any) -> dict[str, Any]:
    def point(clients: int, itl: float) -> dict[str, Any]:
        answered, answer = 400, 256
        tokens_per_s = clients / itl * 1000
        return {
            "offered": float(clients),
            "duration_s": answered * answer / tokens_per_s,
            "answered": answered,
            "requests_per_s": tokens_per_s / answer,
            "output_tokens_per_s": tokens_per_s,
            "prompt_tokens": answered * 512,
            "output_tokens": answered * answer,
            "ttft_ms": {"p50": 40 + 2 * itl, "p95": 60 + 3 * itl, "p99": 80 + 4 * itl},
            "itl_ms": {"p50": itl, "p95": itl * 1.2, "p99": itl * 1.5},
            "e2e_ms": {"p50": 40 + 2 * itl + 255 * itl, "p95": 300 * itl, "p99": 310 * itl},
        }

    return {
        "version": 1,
        "model": LLAMA,
        "served_as": "chat",
        "precision": "bf16",
        "hardware": {"told_by": "node", "gpu": "MI300X", "partition": "CPX/NPS4", "gpu_count": 1, **hardware},
        "engine": {"name": "vllm"},
        "load": {
            "generator": "aim-runtime measure",
            "arrivals": "closed",
            "prompt_tokens": "constant:512",
            "output_tokens": "constant:256",
            "prompts": "sha256:0123",
            "seed": 1,
            "warm_up": 2,
            "requests": 1600,
            "duration_s": 60.0,
        },
        "points": [point(1, 30.0), point(8, 34.0), point(16, 40.0), point(32, 60.0)],
        "command": "aim-runtime measure --url http://127.0.0.1:8080",
        "date": "2026-01-02T03:04:05+00:00",
        "tool": "aim-kserve 0.1.0",
    }


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    file = tmp_path / "evidence.yaml"
    file.write_text(yaml.safe_dump({"measurements": [measured()]}), encoding="utf-8")
    return file


def test_what_was_measured_is_told_as_measured_and_carries_over_to_other_modes_as_a_range(evidence: Path) -> None:
    words = (
        LLAMA,
        "--gpu",
        "MI300X",
        "--every-mode",
        "--ttft-ms",
        "500",
        "--itl-ms",
        "50",
        "--evidence",
        str(evidence),
    )
    found = {mode["mode"]: mode for mode in ask(*words)["modes"]}
    cpx = found["CPX/NPS4"]
    assert cpx["marked"] == "measured"
    assert cpx["low"] == cpx["high"]
    assert cpx["low"]["requests_per_s"] == pytest.approx(8 * 16 / 40.0 * 1000 / 256, rel=1e-3)  # at 60 ms p95 is 72
    assert "measured on 2026-01-02" in cpx["evidence"][0]
    assert found["SPX/NPS1"]["marked"] == "estimate, not measured"
    assert "measured on 2026-01-02" in found["SPX/NPS1"]["evidence"][0]


def test_requests_of_another_length_are_not_what_was_measured(evidence: Path) -> None:
    words = (LLAMA, "--gpu", "MI300X", "--partition", "CPX/NPS4", "--itl-ms", "50", "--evidence", str(evidence))
    assert ask(*words, "--answer", "270")["modes"][0]["marked"] == "measured"
    assert ask(*words, "--answer", "300")["modes"][0]["marked"] == "estimate, not measured"


def test_evidence_quicker_than_physics_allows_is_passed_over_and_named(tmp_path: Path) -> None:
    body = measured(partition="CPX/NPS1")
    for point in body["points"]:
        point["itl_ms"] = {"p50": 1.0, "p95": 1.0, "p99": 1.0}
        point["e2e_ms"] = None
    file = tmp_path / "evidence.yaml"
    file.write_text(yaml.safe_dump({"measurements": [body]}), encoding="utf-8")
    (mode,) = ask(LLAMA, "--gpu", "MI300X", "--partition", "CPX/NPS4", "--evidence", str(file))["modes"]
    assert mode["marked"] == "bound, not an estimate"
    assert any("passed over" in note and "no constants explain" in note for note in mode["notes"])


def test_figures_of_unknown_hardware_speak_for_nothing(tmp_path: Path) -> None:
    body = measured()
    body["hardware"] = {"told_by": "unknown"}
    file = tmp_path / "evidence.yaml"
    file.write_text(yaml.safe_dump({"measurements": [body]}), encoding="utf-8")
    words = (LLAMA, "--gpu", "MI300X", "--itl-ms", "50", "--evidence", str(file))
    assert ask(*words)["modes"][0]["marked"] == "bound, not an estimate"
    assert "nothing in it speaks for MI300X" in CliRunner().invoke(app, ["capacity", *words]).stderr


def test_a_promise_that_no_device_keeps_is_an_answer() -> None:
    found = ask(LLAMA, "--gpu", "MI300X", "--itl-ms", "0.5", code=1)
    assert found["modes"][0]["high"] is None
    assert found["serves_most"].startswith("none")


def test_a_model_over_several_cards_has_only_a_bound() -> None:
    found = ask("meta-llama/Llama-3.3-70B-Instruct", "--gpu", "MI355X", "--tp", "2", "--itl-ms", "50")
    assert found["modes"][0]["basis"] == "bound"
    assert "never measured" in found["modes"][0]["notes"][0]
    assert found["modes"][0]["engines_per_card"] == 0.5


def test_what_does_not_fit_serves_nothing() -> None:
    found = ask("meta-llama/Llama-3.3-70B-Instruct", "--gpu", "MI300X", "--partition", "CPX/NPS4", code=1)
    assert not found["modes"][0]["fits"]
    words = ("meta-llama/Llama-3.3-70B-Instruct", "--gpu", "MI300X", "--every-mode", "--requests-per-s", "5")
    (row,) = [line for line in run(*words).splitlines() if line.startswith("CPX/NPS4")]
    assert row.endswith("does not fit")


def test_tokens_cost_what_the_price_table_says(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("currency: EUR\ngpu_hour: {MI355X: 3.6}\n", encoding="utf-8")
    words = (NEMO, "--gpu", "MI355X", "--precision", "fp8", "--itl-ms", "50", "--prices", str(prices))
    mode = ask(*words)["modes"][0]
    cautious = mode["low"]["tokens_per_s"]
    assert mode["cost_per_million_answer_tokens"]["high"] == pytest.approx(3.6 / 3600 / cautious * 1e6, rel=1e-4)
    assert "EUR/M answer tokens" in run(*words)


def trace(file: Path, lines: list[str]) -> Path:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def request(t: float, prompt: int = 512, answer: int = 256) -> str:
    return json.dumps({"t": t, "prompt_tokens": prompt, "output_tokens": answer})


def test_a_recorded_day_is_planned_for_by_a_percentile_of_its_windows(tmp_path: Path) -> None:
    # Ten windows of ten seconds: 1, 2 … 10 requests each; the busy ones ask for more.
    lines = [request(10 * at + n / 100, 512 if at < 8 else 1024) for at in range(10) for n in range(at + 1)]
    day = trace(tmp_path / "day.jsonl", list(reversed(lines)))
    words = (NEMO, "--gpu", "MI355X", "--precision", "fp8", "--itl-ms", "50", "--trace", str(day), "--window", "10")
    found = ask(*words, "--percentile", "90")
    assert found["recorded"]["requests"] == 55
    assert found["recorded"]["windows"] == 10
    assert found["requests_per_s"] == 0.9
    assert found["recorded"]["peak_per_s"] == 1.0
    assert (found["prompt_tokens"], found["answer_tokens"]) == (1024, 256)
    assert ask(*words, "--percentile", "50")["requests_per_s"] == 0.5
    assert (found["modes"][0]["engines"], found["modes"][0]["cards"]) == (1, 1)
    assert "p90" in run(*words, "--percentile", "90")


def test_empty_windows_count_among_a_days(tmp_path: Path) -> None:
    day = trace(tmp_path / "day.jsonl", [request(0), *(request(990 + n / 100) for n in range(5))])
    words = (NEMO, "--gpu", "MI355X", "--itl-ms", "50", "--trace", str(day), "--window", "10")
    assert ask(*words, "--percentile", "100")["requests_per_s"] == 0.5
    quiet = CliRunner().invoke(app, ["capacity", *words, "--percentile", "95"])
    assert quiet.exit_code == 2
    assert "have no request" in quiet.output


def test_cards_for_a_load_are_whole_and_of_the_cautious_end() -> None:
    words = (NEMO, "--gpu", "MI355X", "--precision", "fp8", "--every-mode", "--itl-ms", "50")
    found = {mode["mode"]: mode for mode in ask(*words, "--requests-per-s", "40")["modes"]}
    for mode in found.values():
        each = mode["low"]["requests_per_s"] / mode["engines_per_card"]
        assert (mode["engines"] - 1) * each < 40 <= mode["engines"] * each * (1 + 1e-3)
        assert mode["cards"] == -(-mode["engines"] // mode["engines_per_card"])


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([request(0), "{"], "day.jsonl:2: not JSON"),
        ([request(0), '{"t": 1, "prompt_tokens": 0, "output_tokens": 1}'], "day.jsonl:2: prompt_tokens: 0"),
        ([request(0), '{"t": -1, "prompt_tokens": 1, "output_tokens": 1}'], "day.jsonl:2: t: -1 is no time"),
        ([request(0), "", '{"t": 1, "prompt": 1, "output_tokens": 1}'], "day.jsonl:3: prompt: unknown field"),
        (["x" * 2**20 + "x"], "day.jsonl:1: longer than"),
        ([], "no requests"),
    ],
)
def test_a_line_of_a_trace_that_is_wrong_is_named(tmp_path: Path, lines: list[str], named: str) -> None:
    day = trace(tmp_path / "day.jsonl", lines)
    done = CliRunner().invoke(app, ["capacity", NEMO, "--gpu", "MI355X", "--trace", str(day)])
    assert done.exit_code == 2
    assert named in done.output


def test_a_trace_is_read_once_and_kept_as_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded_load((TracedRequest(at % 600, 512, 256, {}) for at in range(50_000)), 100, 60)
    assert seen.requests == 50_000
    assert seen.windows == 10
    monkeypatch.setattr("aim_profile.sizing.recorded.MOST_WINDOWS", 1000)
    with pytest.raises(SizingError, match="more than 1,000 windows"):
        recorded_load((TracedRequest(at, 1, 1, {}) for at in range(10**9)), 95, 1)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--gpu", "MI999"), "MI999"),
        (("--every-mode", "--partition", "CPX"), "--partition"),
        (("--prompt", "200000"), "context 200256"),
        (("--gpu", "MI350P"), "bandwidth is not established"),
        (("--trace", "none.jsonl"), "none.jsonl: No such file"),
        (("--trace", "none.jsonl", "--prompt", "5"), "--prompt 5"),
        (("--percentile", "5"), "--percentile 5"),
    ],
)
def test_bad_input_names_itself(words: tuple[str, ...], named: str) -> None:
    done = CliRunner().invoke(app, ["capacity", LLAMA, *words])
    assert done.exit_code == 2
    assert named in done.output


def test_a_table_of_a_solver_is_nothing_but_json() -> None:
    """HiGHS prints a banner of its own accord, from C."""
    import subprocess
    import sys

    words = ["capacity", NEMO, "--gpu", "MI355X", "--precision", "fp8", "-o", "json"]
    done = subprocess.run([sys.executable, "-m", "aim_profile", *words], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["modes"][0]["basis"] == "estimate"


def test_a_profile_speaks_by_the_evidence_it_carries(tmp_path: Path, evidence: Path) -> None:
    profile, bare = tmp_path / "profile.yaml", tmp_path / "bare.yaml"
    export = ["export", f"{LLAMA}/vllm-mi300x-cpx-nps4-bf16-tp1-latency", "--out"]
    assert CliRunner().invoke(app, [*export, str(bare)]).exit_code == 0
    assert CliRunner().invoke(app, [*export, str(profile), "--evidence", str(evidence)]).exit_code == 0
    words = (LLAMA, "--gpu", "MI300X", "--partition", "CPX/NPS4", "--itl-ms", "50", "--evidence")
    assert ask(*words, str(profile)) == ask(*words, str(evidence))
    refused = CliRunner().invoke(app, ["capacity", *words, str(bare)])
    assert refused.exit_code == 2
    assert "carries no evidence" in refused.output
