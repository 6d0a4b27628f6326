"""Makes the embedded model anew: ``make train-injection``, or ``python -m injection_training.train FOLDER``.

Reads the packages in FOLDER, writes `fast.npz` and `fast.json` beside the code that reads them, and says whether the
weights are those that were there. About two CPU minutes, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors.injection import model as shipped
from aim_guardrail.detectors.injection.linear import Linear
from aim_guardrail.detectors.injection.normalise import copies, normal
from injection_training import training_set
from injection_training.archives import Archives
from injection_training.corpora import Example
from injection_training.fit import Labelled, fit

HERE = Path(shipped.__file__).parent
_DIGITS = 6
_MINING = 2
_CORPORA = frozenset({"slabs", "neuralchemy", "languages"})
_CORPUS_WEIGHT = 2.0  # what people wrote counts more than what our grammars make
#: Shares of harmless validation texts that may be found wrongly, the kinds weighing the same.
_FLAG, _BLOCK = 0.01, 0.001
_DIRECT = frozenset({"slabs", "neuralchemy", "chat", "instructions", "prompts"})
_INDIRECT = frozenset({"documents", "long documents", "prompts"})

Floats = NDArray[np.float64]


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


def _card(linear: Linear, examples: Sequence[Example], sizes: dict[str, int]) -> shipped.Card:
    logits = {example: max(map(linear.logit, copies(example.text))) for example in examples}
    slope, intercept = _platt(
        np.array([value for example, value in logits.items() if example.attack]),
        np.array([value for example, value in logits.items() if not example.attack]),
    )

    def thresholds(kinds: Iterable[str]) -> shipped.Thresholds:
        groups = [np.array([z for e, z in logits.items() if e.kind == kind and not e.attack]) for kind in sorted(kinds)]
        flag, block = (_probability(slope * _cut(groups, share) + intercept) for share in (_FLAG, _BLOCK))
        return shipped.Thresholds(flag=round(flag, _DIGITS), block=round(block, _DIGITS))

    return shipped.Card(
        name="fast",
        version=1,
        sha256=shipped.digest(linear.chars, linear.words),
        char_scale=linear.char_scale,
        word_scale=linear.word_scale,
        bias=linear.bias,
        slope=round(slope, _DIGITS),
        intercept=round(intercept, _DIGITS),
        direct=thresholds(_DIRECT),
        indirect=thresholds(_INDIRECT),
        training={"seed": training_set.SEED, **sizes, **_tools()},
    )


def _cut(groups: Sequence[Floats], share: float) -> float:
    """The lowest logit above which at most this share lies, averaged over the groups."""
    logits = np.concatenate(groups)
    weights = np.concatenate([np.full(len(group), 1 / len(group) / len(groups)) for group in groups])
    order = np.argsort(-logits, kind="stable")
    return float(logits[order][np.searchsorted(np.cumsum(weights[order]), share)])


def _tools() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("numpy", "scipy", "scikit-learn")}


def _probability(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit))


def _platt(attacks: Floats, benign: Floats) -> tuple[float, float]:
    """Slope and intercept that make the logits probabilities, both classes weighing the same; Newton's method."""
    z = np.concatenate((attacks, benign))
    label = np.repeat([1.0, 0.0], [len(attacks), len(benign)])
    weight = np.repeat([0.5 / len(attacks), 0.5 / len(benign)], [len(attacks), len(benign)])
    design = np.stack((z, np.ones_like(z)))
    found = np.array([1.0, 0.0])
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-found @ design))
        step = np.linalg.solve((design * (weight * p * (1 - p))) @ design.T, design @ (weight * (p - label)))
        found = found - step
    return float(found[0]), float(found[1])


if __name__ == "__main__":
    main()
