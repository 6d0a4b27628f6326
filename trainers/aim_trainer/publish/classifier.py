"""A tuned classifier as ONNX, in the directory that `aim_guardrail` takes for a family (docs/classifiers.md)."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aim_profile.files.write import dump
from aim_trainer.errors import JobError

GRAPH, POLICY = "model.onnx", "guardrail-snippet.yaml"
#: How far ONNX Runtime's outputs may be from torch's, and a row's in a batch from the same row's alone.
TOLERANCE = 1e-3
#: Family → what a label is called → the guardrail's label (docs/guardrail-families.md). None is guessed to mean one.
_TOXIC = ("TOXIC", "SEVERE_TOXIC", "OBSCENE", "THREAT", "INSULT", "IDENTITY_HATE")
_FAMILIES = {
    "toxicity": {**{label: label for label in _TOXIC}, "TOXICITY": "TOXIC", "IDENTITY_ATTACK": "IDENTITY_HATE"},
    "nsfw_text": {"NSFW": "NSFW"},
}
Floats = npt.NDArray[np.float32]


class _Scores(torch.nn.Module):  # type: ignore[misc]  # untyped where we check
    """The model as ONNX Runtime is asked: ids and mask in, a row's outputs out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def write_classifier(model: Any, into: Path) -> None:
    """model.onnx and config.json (id2label, problem_type) of a sequence classifier; float32.

    Raises JobError: the graph does not say what the model says.
    """
    model = model.float().eval()
    model.config.problem_type = "single_label_classification"
    model.config.save_pretrained(into)
    rows = _rows(model.config.vocab_size)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    both = {0: batch, 1: tokens}
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # of the exporter's own making, and nothing to be done about
        torch.onnx.export(
            _Scores(model),
            (rows, torch.ones_like(rows)),
            into / GRAPH,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": both, "attention_mask": both},
            dynamo=True,
            external_data=_is_large(model),
            verbose=False,
        )
    _prove(model, into / GRAPH)


def write_snippet(labels: list[str], name: str, into: Path) -> None:
    """A policy with a rule for this model: of the family whose labels these are, else with the place to say so."""
    family, entities = next(((family, meant) for family in _FAMILIES if (meant := _meant(family, labels))), ("", []))
    rule: dict[str, Any] = {"type": family or "toxicity", "action": "block", "threshold": 0.5}
    rule |= {"entities": entities or ["TOXIC"], "options": {"path": "."}}
    comment = (
        f"A policy of one rule, for aim-guardrail: {name} in the place of the family's own model.\n"
        "Read from this directory; where it lies elsewhere, put its path. Find the threshold with aim-guardrail eval."
    )
    if not family:
        comment += (
            f"\nWhat the labels {', '.join(labels)} mean to the guardrail nobody said: name it, as in\n"
            f"options: {{path: ., labels: {{{labels[-1]}: TOXIC}}}}. Until then the policy is refused."
        )
    (into / POLICY).write_text(dump({"version": 2, "name": name, "prompt": [rule]}, comment), encoding="utf-8")


def _meant(family: str, labels: list[str]) -> list[str]:
    known = _FAMILIES[family]
    return sorted({known[spelt] for label in labels if (spelt := _spelt(label)) in known})


def _spelt(label: str) -> str:
    return re.sub(r"[ -]", "_", label.upper())


def _prove(model: Any, graph: Path) -> None:
    """Outputs against torch's, and rows of a batch against the same rows alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def outputs(rows: torch.Tensor) -> Floats:
        ids = rows.numpy()
        found: Floats = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        return found

    for width in (1, 9, 40):
        rows = _rows(model.config.vocab_size, width)
        with torch.inference_mode():
            wanted = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits.numpy()
        together, alone = outputs(rows), np.concatenate([outputs(row[None]) for row in rows])
        apart = max(float(np.abs(together - wanted).max()), float(np.abs(together - alone).max()))
        if not apart <= TOLERANCE:
            why = f"ONNX Runtime's scores are {apart:.2g} from torch's (at most {TOLERANCE} are taken)"
            raise JobError(
                f"spec.template: classification: {why}", field="spec.template", remedy="train another architecture"
            )


def _rows(vocabulary: int, width: int = 9) -> torch.Tensor:
    """Three rows of ids, the same each time, none of them the first ids, where padding is."""
    chosen = np.random.default_rng(7).integers(min(16, vocabulary // 2), vocabulary, (3, width))
    return torch.from_numpy(chosen)


def _is_large(model: Any) -> bool:
    """A file of protobuf holds 2 GB; above, weights lie beside it."""
    return bool(sum(weight.numel() for weight in model.parameters()) * 4 > 1_800_000_000)


class _quiet:
    """The exporter tells of torchvision, which is not installed, for each of its operators."""

    def __enter__(self) -> None:
        self._log = logging.getLogger("torch.onnx._internal.exporter._registration")
        self._level = self._log.level
        self._log.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._log.setLevel(self._level)
