"""Makes the embedded model anew: ``make train-injection``, or ``python -m injection_training.train FOLDER``.

Reads the packages in FOLDER, writes `fast.npz` and `fast.json` beside the code that reads them, and says whether the
weights are those that were there. About two CPU minutes, one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from aim_guardrail.detectors.injection import model as shipped
from aim_guardrail.detectors.injection.linear import Linear
from aim_guardrail.detectors.injection.normalise import copies, normal
from injection_training import calibrate, training_set
from injection_training.archives import Archives
from injection_training.corpora import Example
from injection_training.fit import Labelled, fit

HERE = Path(shipped.__file__).parent
_MINING = 2
_CORPORA = frozenset({"slabs", "neuralchemy", "languages"})
_CORPUS_WEIGHT = 2.0  # what people wrote counts more than what our grammars make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the packages, as make train-injection downloads them")
    archives = Archives(parser.parse_args().folder)
    before = _known_digest()
    started = time.process_time()
    linear, sizes = _trained(archives)
    card = _card(linear, training_set.validation(archives), sizes)
    np.savez_compressed(HERE / "fast.npz", chars=linear.chars, words=linear.words)
    (HERE / "fast.json").write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    verdict = "as before" if before == card.sha256 else f"before: {before}"
    print(f"{sizes} in {time.process_time() - started:.0f} CPU s\nweights sha256 {card.sha256} ({verdict})")


def _known_digest() -> str | None:
    path = HERE / "fast.json"
    return json.loads(path.read_text(encoding="utf-8"))["sha256"] if path.exists() else None


def _trained(archives: Archives) -> tuple[Linear, dict[str, int]]:
    examples = [
        Labelled(normal(example.text), int(example.attack), _CORPUS_WEIGHT if example.kind in _CORPORA else 1.0)
        for example in training_set.training(archives)
    ]
    papers = [normal(example.text) for example in training_set.long_documents(archives, training=True)]
    harmless = [normal(text) for text in training_set.harmless(_MINING)]
    attacks = sum(example.label for example in examples)
    benign = len(examples) - attacks
    sizes = {"attacks": attacks, "benign": benign, "long_documents": len(papers), "mined": len(harmless)}
    return fit(examples, papers, harmless), sizes


def _card(linear: Linear, examples: Sequence[Example], sizes: dict[str, int]) -> shipped.FastCard:
    logits = {example: max(map(linear.logit, copies(example.text))) for example in examples}
    slope, intercept = calibrate.platt(logits)
    calibrated = {example: slope * logit + intercept for example, logit in logits.items()}
    return shipped.FastCard(
        name="fast",
        version=1,
        sha256=shipped.digest(linear.chars, linear.words),
        char_scale=linear.char_scale,
        word_scale=linear.word_scale,
        bias=linear.bias,
        slope=slope,
        intercept=intercept,
        direct=calibrate.thresholds(calibrated, calibrate.DIRECT),
        indirect=calibrate.thresholds(calibrated, calibrate.INDIRECT),
        training={"seed": training_set.SEED, **sizes, **_tools()},
    )


def _tools() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("numpy", "scipy", "scikit-learn")}


if __name__ == "__main__":
    main()
