"""A tuned classifier as ONNX: it says what torch says, alone and in a batch, and the guardrail takes it as its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from aim_trainer.errors import JobError
from aim_trainer.publish import classifier
from aim_trainer.publish.publish import publish
from aim_trainer.publish.weights import tuned_model, tuned_tokenizer
from asked_runtime import ROOT, SERVING
from published_runs import job_of, trained
from tiny_models import conversations
from tiny_runs import class_tokens

LABELS = ["fine", "toxic"]


class Classifier:
    """The version, and torch's scores of the same weights."""

    def __init__(self, version: Path, model: Any) -> None:
        self.version, self._model = version, model
        self.tokenizer = AutoTokenizer.from_pretrained(version)
        self._session = onnxruntime.InferenceSession(version / "model.onnx", providers=["CPUExecutionProvider"])

    def onnx(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return found

    def torch(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = self._model(
                torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
            ).logits.numpy()
        return found


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """LoRA over the tiny Llama with a new head, until it knows the two kinds of text apart."""
    root = tmp_path_factory.mktemp("classifier")
    rows = class_tokens(root / "data/train/beef", 48)
    output = {"registry": str(root / "registry")}
    job = job_of(tiny("llama"), output, template="classification", labels=LABELS, maxSteps=30, learningRate=1e-2)
    run = trained(job, root, rows)
    version = Path(publish(job, run).uri)
    return Classifier(version, tuned_model(job, run.result, tuned_tokenizer(job)))


def texts() -> list[str]:
    return [turn["content"] for turns in conversations(6, seed=9) for turn in turns[:2]]


def test_the_graph_says_what_torch_says(made: Classifier) -> None:
    for text in texts():
        ids = made.tokenizer(text)["input_ids"]
        row = np.array([ids])
        assert np.abs(made.onnx(row, np.ones_like(row)) - made.torch(ids)).max() < 1e-3


def test_a_score_depends_on_no_neighbour_and_no_padding(made: Classifier) -> None:
    batch = made.tokenizer(texts(), padding=True, padding_side="right", return_tensors="np")
    together = made.onnx(batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64))
    for at, text in enumerate(texts()):
        row = np.array([made.tokenizer(text)["input_ids"]])
        assert np.abs(together[at] - made.onnx(row, np.ones_like(row))[0]).max() < 1e-3


def test_a_graph_that_says_something_else_is_not_published(made: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "TOLERANCE", -1.0)
    with pytest.raises(JobError, match=r"ONNX Runtime's scores are .* from torch's"):
        classifier._prove(made._model, made.version / "model.onnx")


def test_it_learned_what_it_was_taught(made: Classifier) -> None:
    found = [int(made.torch(made.tokenizer(text)["input_ids"]).argmax()) for text in texts()]
    assert sum(label == 1 - at % 2 for at, label in enumerate(found)) >= 10  # of 12: 1 where it asks how many


def test_the_snippet_names_no_family_for_labels_that_say_none(tmp_path: Path) -> None:
    classifier.write_snippet(["billing", "shipping"], "desk", tmp_path)
    text = (tmp_path / "guardrail-snippet.yaml").read_text()
    assert "What the labels billing, shipping mean to the guardrail nobody said" in text
    classifier.write_snippet(["safe", "nsfw"], "desk", tmp_path)
    assert yaml.safe_load((tmp_path / "guardrail-snippet.yaml").read_text())["prompt"][0]["type"] == "nsfw_text"


def guardrail(version: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if not SERVING.is_file():
        pytest.skip(f"{SERVING} is missing: make test sets it up")
    roots = os.pathsep.join(str(ROOT / name) for name in ("runtimes", "transformers", "profiles"))
    command = [str(SERVING), "-m", "aim_guardrail", *arguments, "-o", "json"]
    env = {**os.environ, "PYTHONPATH": roots, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, cwd=version, env=env, capture_output=True, text=True, check=False, timeout=120)


def test_the_guardrail_checks_with_it(made: Classifier) -> None:
    asks, says = texts()[:2]
    blocked = guardrail(made.version, "check", asks, "--policy", "guardrail-snippet.yaml")
    assert blocked.returncode == 1, blocked.stderr
    (found,) = json.loads(blocked.stdout)["findings"]
    wanted = torch.softmax(torch.from_numpy(made.torch(made.tokenizer(asks)["input_ids"])), -1)[0, 1]
    assert found["label"] == "TOXIC"
    assert abs(found["score"] - float(wanted)) < 1e-2
    passes = guardrail(made.version, "check", says, "--policy", "guardrail-snippet.yaml")
    assert passes.returncode == 0, passes.stderr


def test_the_guardrails_eval_judges_it(made: Classifier, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": "none" if at % 2 else "TOXIC"}) for at, text in enumerate(texts())]
    (tmp_path / "labelled.jsonl").write_text("\n".join(lines))
    judged = guardrail(made.version, "eval", str(tmp_path / "labelled.jsonl"), "--policy", "guardrail-snippet.yaml")
    assert judged.returncode == 0, judged.stderr
    assert "TOXIC" in judged.stdout or "toxicity" in judged.stdout
