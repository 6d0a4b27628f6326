"""Judges the embedded toxicity model: ``make eval-toxicity``, ``python -m toxicity_training.evaluate FOLDER``.

Three labelled collections and our own ordinary chat; for each label and for any of them the share of texts found at the
shipped thresholds, with 95 % intervals; AUC of TOXIC; CPU milliseconds a text. Thresholds were chosen on the first,
third, ... texts of the collections (`--validation`), figures are of the others.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import html
import json
import re
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.cli.figures import auc, rate
from aim_guardrail.detectors.toxicity.family import TOXICITY_LABELS
from aim_guardrail.detectors.toxicity.model import embedded
from injection_training.foreign import benign_chat

CHAT = 2000
LENGTHS_CHARS = (50, 500, 4000)
THRESHOLDS = np.array([label.threshold for label in TOXICITY_LABELS.values()])
LABELS = tuple(TOXICITY_LABELS)

Scores = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the collections, as make eval-toxicity fetches them")
    parser.add_argument("--validation", action="store_true", help="the half on which thresholds were chosen")
    options = parser.parse_args()
    for row in figures(options.folder, 0 if options.validation else 1):
        print(" | ".join(f"{name} {value}" for name, value in row.items()))


def figures(folder: Path, half: int) -> Iterable[dict[str, str]]:
    """One row a set."""
    chat = scores(benign_chat(CHAT))
    yield {"set": "ordinary chat", **found(chat)}
    for name, read in (("Davidson", davidson), ("moderation", moderation), ("HateCheck", hatecheck)):
        groups = {kind: scores(texts[half::2]) for kind, texts in read(folder).items()}
        for kind, group in groups.items():
            row = {"set": f"{name}: {kind}", **found(group)}
            yield (
                row if kind == "harmless" else {**row, "AUC of TOXIC": str(auc(group[:, 0], groups["harmless"][:, 0]))}
            )
    yield from milliseconds()


def found(group: Scores) -> dict[str, str]:
    hits = group >= THRESHOLDS
    by_label = {label: str(rate(int(hits[:, at].sum()), len(hits))) for at, label in enumerate(LABELS)}
    return {"n": str(len(group)), "any": str(rate(int(hits.any(axis=1).sum()), len(hits))), **by_label}


def scores(texts: Iterable[str]) -> Scores:
    """(texts, labels); 0 for a text without a word that the model knows."""

    async def judged() -> Scores:
        model = embedded()
        answers = await model.classify(list(texts), time.monotonic() + 3600)
        await model.close()
        return np.array([[score.score for score in each] or [0.0] * len(LABELS) for each in answers])

    return asyncio.run(judged())


def davidson(folder: Path) -> dict[str, list[str]]:
    """Tweets, by the majority of their annotators; names and links left out."""
    kinds = {"0": "hate", "1": "offensive", "2": "harmless"}
    texts: dict[str, list[str]] = {kind: [] for kind in kinds.values()}
    with (folder / "davidson.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            texts[kinds[row["class"]]].append(re.sub(r"@\w+|https?://\S+", "", html.unescape(row["tweet"])))
    return {kind: rows[:4000] for kind, rows in texts.items()}


def moderation(folder: Path) -> dict[str, list[str]]:
    """Prompts to OpenAI's models, labelled by its rules; harmless: without any label."""
    kinds = {"H": "hate", "HR": "harassment", "V": "violence", "S": "sexual", "SH": "self-harm"}
    with gzip.open(folder / "moderation.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = {kind: [row["prompt"] for row in rows if row.get(key) == 1] for key, kind in kinds.items()}
    every = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
    return {**texts, "harmless": [row["prompt"] for row in rows if not any(row.get(key) for key in every)]}


def hatecheck(folder: Path) -> dict[str, list[str]]:
    """Cases written to be hard: negation, quotation, reclaimed slurs on the harmless side."""
    texts: dict[str, list[str]] = {"hateful": [], "threatening": [], "harmless": []}
    with (folder / "hatecheck.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            texts["hateful" if row["label_gold"] == "hateful" else "harmless"].append(row["test_case"])
            if row["functionality"].startswith("threat"):
                texts["threatening"].append(row["test_case"])
    return texts


def milliseconds() -> Iterable[dict[str, str]]:
    """CPU of the model alone, without its thread: windows and graph."""
    model = embedded()
    prose = " ".join(benign_chat(CHAT))
    for length in LENGTHS_CHARS:
        spent = []
        for text in (prose[at : at + length] for at in range(0, 20 * length, length)):
            start = time.process_time()
            for _ in range(5):
                model.judge(text)
            spent.append((time.process_time() - start) * 200)
        p95 = statistics.quantiles(spent, n=20)[-1]
        yield {"set": f"CPU ms at {length} characters", "p50": f"{statistics.median(spent):.2f}", "p95": f"{p95:.2f}"}


if __name__ == "__main__":
    main()
