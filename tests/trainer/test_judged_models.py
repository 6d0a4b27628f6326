"""Base and tuned model side by side: tiny real models, trained for a moment, measured and asked."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers.configuration_utils", reason="make trainer")


from aim_trainer.cli.app import app
from aim_trainer.data.tokens import Row, Tokens, write_tokens
from aim_trainer.errors import DataError, GateError, StoreError
from aim_trainer.evaluate import guardrail
from aim_trainer.evaluate.answers import answers
from aim_trainer.evaluate.gates import require
from aim_trainer.evaluate.judge import Judgement, judge
from aim_trainer.evaluate.questions import held_out_questions
from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics.records import Note
from aim_trainer.recipe.evaluation import held_out
from aim_trainer.recipe.model import Loaded, load, save
from aim_trainer.run_directory import RunDirectory
from filter_service import BLOCKED_WORDS
from tiny_models import tokenizer
from tiny_runs import Told, chat_tokens, class_tokens, run_tiny, tiny_job

Tiny = Callable[[str], Path]
VALIDATION: dict[str, Any] = {
    "metrics": ["eval_loss", "perplexity", "exact_match", "rouge_l"],
    "samples": 6,
    "maxNewTokens": 24,
}


def judged_by(job: FineTuningJob, **validation: Any) -> FineTuningJob:
    """The job with another spec.validation; a measure that needs a file or a server is named where that is given."""
    needs = {"regressionPrompts": "regressions", "guardrail": "guardrail_blocked"}
    metrics = [*VALIDATION["metrics"], *(metric for key, metric in needs.items() if key in validation)]
    raw = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw["spec"]["validation"] = VALIDATION | {"metrics": metrics} | validation
    return FineTuningJob.model_validate(raw)


class Trained:
    """A job, its run with a result, the rows it was trained on and is asked about, the model as training left it."""

    def __init__(self, folder: Path, job: FineTuningJob, rows: Tokens, rows_in: Path) -> None:
        self.job, self.run, self.rows, self.rows_in = job, RunDirectory(folder / "run"), rows, rows_in
        self.loaded: Loaded = run_tiny(job, rows, folder / "checkpoints").loaded
        self.run.root.mkdir()
        save(self.loaded, self.run.result)

    def judge(self, **validation: Any) -> tuple[Judgement, Told]:
        told = Told()
        return judge(judged_by(self.job, **validation), self.run, self.rows_in, "cpu", told), told


@pytest.fixture(scope="module")
def lora(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("lora")
    rows = chat_tokens(folder / "rows", 12)
    return Trained(folder, tiny_job(tiny("llama"), maxSteps=12, loraDropout=0.1), rows, folder / "rows")


@pytest.fixture(scope="module")
def full(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Learns its few rows by heart."""
    folder = tmp_path_factory.mktemp("full")
    rows = chat_tokens(folder / "rows", 4)
    job = tiny_job(tiny("llama"), "full", maxSteps=80, learningRate=5e-3, batchSize=4)
    return Trained(folder, job, rows, folder / "rows")


def test_an_adapter_is_judged_beside_the_model_it_is_of(lora: Trained) -> None:
    judgement, told = lora.judge()
    assert judgement.base | held_out(load(lora.job), lora.rows) == judgement.base
    assert judgement.tuned | held_out(lora.loaded, lora.rows) == judgement.tuned
    assert judgement.tuned["eval_loss"] < judgement.base["eval_loss"]
    assert judgement.delta["eval_loss"] == judgement.tuned["eval_loss"] - judgement.base["eval_loss"]
    assert judgement.n == {"eval_loss": 12, "perplexity": 12, "exact_match": 6, "rouge_l": 6}
    questions = held_out_questions(lora.rows, lora.loaded.tokenizer, 6)
    prompts = [question.tokens for question in questions]
    assert [sample["base"] for sample in judgement.samples] == answers(load(lora.job), prompts, 24)
    assert [sample["tuned"] for sample in judgement.samples] == answers(lora.loaded, prompts, 24)
    assert [(type(record), getattr(record, "kind", "")) for record in told.records] == [
        (Note, "judging"),
        (Note, "judging"),
        (Note, "judged"),
    ]


def test_what_is_written_is_what_was_judged(lora: Trained) -> None:
    judgement, _ = lora.judge(gates=[{"metric": "eval_loss", "max": 100}, {"metric": "rouge_l", "minDelta": 1}])
    written = json.loads(lora.run.evaluation.read_bytes())
    assert (written["base"], written["tuned"], written["delta"]) == (judgement.base, judgement.tuned, judgement.delta)
    assert [(gate["metric"], gate["passed"]) for gate in written["gates"]] == [("eval_loss", True), ("rouge_l", False)]
    assert [gate.metric for gate in judgement.failed_gates] == ["rouge_l"]
    with pytest.raises(
        GateError, match=r"1 of 2 gates failed; what was trained is kept:\n  rouge_l: [\d.e-]+, minDelta 1"
    ):
        require(judgement.gates)
    assert [path.name for path in lora.run.root.iterdir() if path.name.startswith("evaluation")] == ["evaluation.json"]


def test_a_model_that_learned_its_rows_says_them(full: Trained) -> None:
    judgement, _ = full.judge()
    assert judgement.base["exact_match"] == 0
    assert judgement.tuned["exact_match"] == 1
    assert judgement.tuned["rouge_l"] == 1
    assert judgement.base["eval_loss"] == held_out(load(full.job), full.rows)["eval_loss"]
    assert judgement.tuned["eval_loss"] == held_out(full.loaded, full.rows)["eval_loss"]
    assert all(sample["tuned"] == sample["wanted"] != sample["base"] for sample in judgement.samples)


def test_regression_prompts_are_kept_or_not(full: Trained, tmp_path: Path) -> None:
    asked = [sample["prompt"].removeprefix("user\n").split("\n")[0] for sample in full.judge()[0].samples]
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": asked[0], "contains": "no such word"}, {"prompt": asked[0], "matches": r"^\w+ \w+"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judgement, _ = full.judge(regressionPrompts=str(file), gates=[{"metric": "regressions", "min": 1}])
    assert (judgement.tuned["regressions"], judgement.n["regressions"]) == (0.5, 2)
    assert [each["tuned_holds"] for each in judgement.regressions] == [False, True]
    assert judgement.regressions[0]["wanted"] == "contains 'no such word'"
    (failed,) = judgement.failed_gates
    assert (failed.metric, failed.value) == ("regressions", 0.5)


def test_bad_regression_prompts_stop_it_before_a_model_is_loaded(full: Trained, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl:1: give one of"):
        judge(judged_by(full.job, regressionPrompts=str(file)), RunDirectory(tmp_path), None, "cpu", Told())


def test_a_guardrail_that_is_away_fails_its_gate_and_says_why(
    lora: Trained, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardrail, "_PAUSES_S", (0.01,))
    judgement, _ = lora.judge(
        guardrail={"url": f"http://127.0.0.1:{port}", "samples": 3},
        gates=[{"metric": "guardrail_blocked", "max": 1}],
    )
    (failed,) = judgement.failed_gates
    assert failed.value is None
    assert "the guardrail is away" in failed.reason
    assert "guardrail_blocked" not in judgement.tuned


def test_what_a_guardrail_blocks_is_counted_and_gated(full: Trained, filter_url: str) -> None:
    judgement, _ = full.judge(
        guardrail={"url": filter_url, "policy": "strict", "samples": 4},
        gates=[{"metric": "guardrail_blocked", "max": 0}],
    )
    hit = [any(word in sample["tuned"] for word in BLOCKED_WORDS) for sample in judgement.samples]
    assert 0 < sum(hit) < 4, "the rows were chosen so"
    assert [sample["blocked"] for sample in judgement.samples] == hit
    assert (judgement.tuned["guardrail_blocked"], judgement.n["guardrail_blocked"]) == (sum(hit) / 4, 4)
    (failed,) = judgement.failed_gates
    assert str(failed) == f"guardrail_blocked: {sum(hit) / 4:g}, max 0"


def test_what_nobody_can_measure_is_told(lora: Trained) -> None:
    judgement = judge(judged_by(lora.job, gates=[{"metric": "eval_loss", "max": 9}]), lora.run, None, "cpu", Told())
    assert judgement.unmeasured["eval_loss"] == "the job holds out no rows: spec.dataset.validation"
    assert [gate.passed for gate in judgement.gates] == [False]
    assert judgement.samples == []


def test_a_classifier_is_judged_by_its_classes(tiny: Tiny, tmp_path: Path) -> None:
    rows = class_tokens(tmp_path / "rows", 24)
    job = tiny_job(tiny("llama"), maxSteps=20, template="classification", labels=["where", "how many"])
    trained = Trained(tmp_path, job, rows, tmp_path / "rows")
    told = Told()
    validation = {"metrics": ["eval_loss", "accuracy", "f1"], "gates": [{"metric": "accuracy", "minDelta": 0.1}]}
    raw = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw["spec"]["validation"] = validation
    judgement = judge(FineTuningJob.model_validate(raw), trained.run, trained.rows_in, "cpu", told)
    assert judgement.tuned | held_out(trained.loaded, rows) == judgement.tuned
    assert judgement.tuned["accuracy"] > judgement.base["accuracy"]
    assert judgement.failed_gates == []
    assert judgement.samples == []


def test_without_a_result_there_is_nothing_to_judge(lora: Trained, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no result yet; run or resume the job first"):
        judge(lora.job, RunDirectory(tmp_path), None, "cpu", Told())
    (tmp_path / "result").mkdir()
    with pytest.raises(StoreError, match=r"adapter_model.safetensors: .*run or resume"):
        judge(lora.job, RunDirectory(tmp_path), None, "cpu", Told())


def test_a_result_of_another_job_is_not_judged(lora: Trained, tiny: Tiny) -> None:
    fewer = tiny_job(tiny("llama"), loraTargetModules=["q_proj"])
    with pytest.raises(StoreError, match=r"tensors, .* of which name nothing in the model"):
        judge(fewer, lora.run, None, "cpu", Told())


class TestQuestions:
    def rows(self, folder: Path, *masks: str) -> Tokens:
        rows = []
        for mask in masks:
            trained = np.array([int(each) for each in mask], np.uint8)
            rows.append(Row(np.arange(len(mask), dtype=np.int32) + 10, trained))
        write_tokens(folder, rows, {})
        return Tokens(folder)

    def test_the_last_trained_span_is_wanted_and_all_before_it_asked(self, tmp_path: Path) -> None:
        (question,) = held_out_questions(self.rows(tmp_path, "00110001110"), tokenizer(), 5)
        assert question.tokens == list(range(10, 17))

    def test_a_row_without_anything_before_it_asks_nothing(self, tmp_path: Path) -> None:
        assert held_out_questions(self.rows(tmp_path, "1111", "0000", "1110"), tokenizer(), 5) == []

    def test_fewer_questions_are_the_first_of_more(self, tmp_path: Path) -> None:
        rows = chat_tokens(tmp_path / "rows", 30)
        more, fewer = (held_out_questions(rows, tokenizer(), count) for count in (20, 4))
        assert more[:4] == fewer
        assert len(more) == 20
        assert fewer[0].wanted.endswith(".")

    def test_what_was_asked_is_shown_without_the_opening_of_an_answer(self, tmp_path: Path) -> None:
        for question in held_out_questions(chat_tokens(tmp_path / "rows", 4), tokenizer(), 4):
            assert question.prompt.startswith("user\n")
            assert question.prompt.endswith("?")
            assert tokenizer().decode(question.tokens).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("architecture", ["gemma3", "mixtral"])
def test_side_by_side_is_as_one_by_one(tiny: Tiny, architecture: str, tmp_path: Path) -> None:
    loaded = load(tiny_job(tiny(architecture)))
    prompts = [question.tokens for question in held_out_questions(chat_tokens(tmp_path, 10), loaded.tokenizer, 10)]
    together = answers(loaded, prompts, 8)
    assert together == [answers(loaded, [prompt], 8)[0] for prompt in prompts]


def test_the_verb_judges_once_more_and_a_failed_gate_is_exit_code_4(lora: Trained, tmp_path: Path) -> None:
    job = judged_by(lora.job, gates=[{"metric": "eval_loss", "min": 100}])
    file, kept = tmp_path / "job.yaml", lora.run.data / "validation"
    file.write_text(json.dumps(job.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    shutil.copytree(lora.rows_in, kept / "digest", dirs_exist_ok=True)
    ended = CliRunner().invoke(app, ["evaluate", str(file), str(lora.run.root), "--output", "json"])
    assert ended.exit_code == 4
    assert re.search(r"1 of 1 gates failed; what was trained is kept:\n  eval_loss: [\d.]+, min 100", ended.stderr)
    printed = json.loads(ended.stdout)
    assert printed["n"]["eval_loss"] == 12
    assert "1 of 1 gates failed" in lora.run.report.read_text()
    assert "judged" in lora.run.metrics.read_text()


def test_the_verb_refuses_what_is_no_run(lora: Trained, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(lora.job.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    ended = CliRunner().invoke(app, ["evaluate", str(file), str(tmp_path / "none")])
    assert (ended.exit_code, ended.stdout) == (3, "")
    assert "none: no run is there; name the directory of a run" in ended.stderr


def test_the_verb_judges_on_no_other_device_than_was_asked_for(lora: Trained, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(lora.job.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    ended = CliRunner().invoke(app, ["evaluate", str(file), str(lora.run.root), "--set", "spec.resources.gpu=1"])
    assert (ended.exit_code, ended.stdout) == (3, "")
    assert "spec.resources.gpu: no GPU that torch can use is here; set it to 0" in ended.stderr


@pytest.mark.parametrize(
    "how",
    [
        {"method": "lora", "precision": "bf16"},
        {"method": "full", "precision": "bf16"},
        {"method": "qlora", "quantization": "nf4", "precision": "bf16"},
    ],
    ids=lambda how: f"{how['method']}-{how['precision']}",
)
def test_reduced_precision_is_judged_as_it_was_trained(tiny: Tiny, tmp_path: Path, how: dict[str, str]) -> None:
    rows = chat_tokens(tmp_path / "rows", 4)
    trained = Trained(tmp_path, tiny_job(tiny("llama"), maxSteps=4, **how), rows, tmp_path / "rows")
    judgement, _ = trained.judge()
    assert judgement.base["eval_loss"] == held_out(load(trained.job), rows)["eval_loss"]
    assert judgement.tuned["eval_loss"] < judgement.base["eval_loss"] - 0.05
    assert len(judgement.samples) == 4
