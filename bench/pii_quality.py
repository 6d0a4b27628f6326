"""How well personal data is found: precision, recall and F1 of each label on generated, labelled text.

2,000 texts, seeded: sentences as people write them, in each up to three values made with their checksums (cards of
every brand, IBANs of many countries, SSNs, e-mail addresses, telephone numbers, IP addresses, wallets), in prose,
Markdown, JSON, tables and URLs; and as many texts of code, dates, logs, lock files and numbers that hold none (those of
``bench/false_positives.py``). A value counts as found where a finding of its label covers it; a finding that covers no
value of its label is false. 95 % intervals: Wilson for precision and recall, 1,000 resamples of the texts for F1.

``python bench/pii_quality.py [--quick] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "transformers"), str(ROOT / "tests/fakes"), str(ROOT / "bench")]

from false_positives import KINDS  # noqa: E402

import guardrail_values as made  # noqa: E402
from aim_guardrail.cli.figures import Figure, rate  # noqa: E402
from aim_guardrail.pipeline import Guard  # noqa: E402
from aim_guardrail.policy import parse_policy  # noqa: E402
from aim_guardrail.text import Text  # noqa: E402

POLICY = "version: 1\nname: pii\nprompt: [{type: pii, action: flag}]\n"
FRAMES = (
    "Hi, please update my file: {} is the new one, thanks.",
    "You can reach me at {} until Friday, or write to {} instead.",
    "The form says {}; I had entered {} before.",
    "Customer record\n- first: {}\n- second: {}\n- third: {}",
    '{{"name": "Ann Lee", "value": "{}", "other": "{}"}}',
    "| field | value |\n|---|---|\n| a | {} |\n| b | {} |",
    "**{}** and _{}_ were both rejected.",
    "> {}\n\nIs that right? My colleague has {}.",
    "Ticket 4711: payment with {} failed twice, the receipt went to {}.",
    "see https://shop.example/check?v={}&lang=en",
)
RESAMPLES = 1000


class Labelled(NamedTuple):
    """A text and where its values are: (label, start, end)."""

    text: str
    values: tuple[tuple[str, int, int], ...]


def labelled(seed: int) -> Labelled:
    """A text with values."""
    r = random.Random(f"pii quality {seed}")
    frame = r.choice(FRAMES)
    pieces, values, at = frame.replace("{{", "\0").replace("}}", "\1").split("{}"), [], 0
    text = ""
    for number, piece in enumerate(pieces):
        text += piece.replace("\0", "{").replace("\1", "}")
        if number < len(pieces) - 1:
            label = r.choice(sorted(made.PII))
            value = made.card(r, r.choice(sorted(made.CARD_BRANDS))) if label == "CREDIT_CARD" else made.PII[label](r)
            value = value.replace(" ", "%20").replace("+", "%2B") if "https://" in frame else value
            at = len(text)
            text += value
            values.append((label, at, len(text)))
    return Labelled(text, tuple(values))


def negatives(count: int) -> list[Labelled]:
    """Texts without."""
    kinds = sorted(KINDS)
    made_of = (KINDS[kinds[seed % len(kinds)]](random.Random(f"pii quality, none {seed}")) for seed in range(count))
    return [Labelled(text, ()) for text in made_of]


def judged(guard: Guard, item: Labelled) -> dict[str, Counter[str]]:
    """Of one text, by label: how many values were found and missed, how many findings were false."""
    found = guard.verdict("prompt", Text(item.text)).findings
    counts: dict[str, Counter[str]] = {"hit": Counter(), "missed": Counter(), "false": Counter()}
    for label, start, end in item.values:
        covered = any(f.label == label and f.start <= start and end <= f.end for f in found)
        counts["hit" if covered else "missed"][label] += 1
    for f in found:
        if not any(f.label == label and f.start < end and start < f.end for label, start, end in item.values):
            counts["false"][f.label] += 1
    return counts


def f1(hit: int, missed: int, false: int) -> float:
    return 2 * hit / (2 * hit + missed + false) if hit else 0.0


def figures(counts: list[dict[str, Counter[str]]], label: str) -> dict[str, Any]:
    """The label's precision, recall and F1; label "" stands for all of them."""
    rows = np.array([[_count(one[what], label) for what in ("hit", "missed", "false")] for one in counts])
    hit, missed, false = (int(total) for total in rows.sum(axis=0))
    r = np.random.default_rng(0)
    again = [f1(*rows[r.integers(0, len(rows), len(rows))].sum(axis=0)) for _ in range(RESAMPLES)]
    low, high = (float(q) for q in np.quantile(again, (0.025, 0.975)))
    return {
        "n": hit + missed,
        "precision": rate(hit, hit + false)._asdict() if hit + false else None,
        "recall": rate(hit, hit + missed)._asdict() if hit + missed else None,
        "f1": Figure(f1(hit, missed, false), low, high)._asdict(),
    }


def _count(counter: Counter[str], label: str) -> int:
    return counter[label] if label else counter.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer texts: a look, not a figure to quote")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where to write")
    args = parser.parse_args()
    count = 200 if args.quick else 2000
    guard = Guard.load(parse_policy(POLICY, "bench"))
    counts = [judged(guard, item) for item in [*map(labelled, range(count)), *negatives(count)]]
    result = {label or "all": figures(counts, label) for label in [*sorted(made.PII), ""]}
    args.json.write_text(json.dumps({"texts": 2 * count, "labels": result}, indent=2) + "\n")
    print(f"{2 * count} texts, half of them without values\n{'label':16} {'n':>6}  precision, recall, F1 (95 %)")
    for label, row in result.items():
        told = (_told(row[name]) for name in ("precision", "recall", "f1"))
        print(f"{label:16} {row['n']:6}  {'  '.join(told)}")


def _told(figure: dict[str, float] | None) -> str:
    return "-" if figure is None else f"{figure['value']:.3f} ({figure['low']:.3f}-{figure['high']:.3f})"


if __name__ == "__main__":
    main()
