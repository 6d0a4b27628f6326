"""``aim-guardrail eval FILE``: how good a policy's families are on labelled texts, each figure with a 95 % interval.

A line of the file is a text and what it holds: names of families or labels. A family's score of a text is the highest
of its findings there, whatever the threshold; at the policy's thresholds it finds the text or does not.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import orjson

from aim_guardrail.cli.figures import Figure, auc, rate
from aim_guardrail.cli.given import MAX_BYTES, add_output, parser, policy_named, run
from aim_guardrail.cli.refused import Refused
from aim_guardrail.cli.reliability import draw
from aim_guardrail.detectors.base import Asked, BatchDetector, Detector, Finding, Passage
from aim_guardrail.detectors.families import FAMILIES, build_detector
from aim_guardrail.policy import Direction, Policy, Rule
from aim_guardrail.text import Text
from aim_kserve.tables import plain_table, show

#: What a text's label says that holds nothing.
_NOTHING = frozenset(["", "0", "false", "no", "none", "benign", "safe", "harmless"])
_ANYTHING = frozenset(["1", "true", "yes", "attack", "unsafe", "positive"])
_MOST_LINES = 1_000_000
_BATCH = 64
_PATIENCE_S = 600.0  # nobody waits: a detector may take its time


class Labelled(NamedTuple):
    """A text and what it is said to hold: names of families or labels, or `*`: something."""

    text: str
    holds: frozenset[str]


class Scored(NamedTuple):
    """One rule's judgement of the texts: scores 0..1 and whether it found something, in their order."""

    rule: Rule
    scores: list[float]
    found: list[bool]
    cpu_ms: list[float]


def main(argv: Sequence[str]) -> int:
    arguments = parser("eval", "Judge a policy's families on labelled texts: TPR, FPR, AUC with 95 % intervals.")
    arguments.add_argument("file", type=Path, metavar="FILE", help="JSONL with text and label, or CSV with a header")
    arguments.add_argument("--policy", default="chat", help="a shipped policy's name or a file (default: chat)")
    arguments.add_argument("--direction", choices=("prompt", "answer"), default="prompt")
    arguments.add_argument("--family", help="only this one of the policy's rules, by its id")
    arguments.add_argument("--role", default="user", help="who says the texts: user, tool, … (default: user)")
    arguments.add_argument("--plot", type=Path, metavar="SVG", help="write a reliability plot: score against truth")
    add_output(arguments)
    return run(_evaluate, arguments, argv)


def _evaluate(given: argparse.Namespace) -> int:
    policy, texts = policy_named(given.policy), list(read(given.file))
    rules = _rules(policy, given.direction, given.family)
    _known(texts, rules)
    judged = [asyncio.run(scored(rule, texts, given.direction, given.role)) for rule in rules]
    alone = len(rules) == 1
    rows = [row for scored in judged for row in _rows(scored, texts, alone=alone)]
    if given.plot is not None:
        draw(given.plot, {s.rule.name: (s.scores, [_is(text, s.rule, alone) for text in texts]) for s in judged})
    if given.output == "json":
        sys.stdout.buffer.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    else:
        _show(rows)
    return 0


def _rules(policy: Policy, direction: Direction, name: str | None) -> list[Rule]:
    rules = [rule for rule in policy.rules(direction) if name is None or rule.name == name]
    if not rules:
        named = ", ".join(rule.name for rule in policy.rules(direction)) or "none"
        raise Refused(f"the policy {policy.name!r} has no such rule for the {direction}: it has {named}")
    return rules


# --- what is read ---------------------------------------------------------------------------------------------------


def read(file: Path) -> Iterator[Labelled]:
    """The labelled texts of a JSONL or CSV file. Raises Refused, naming the line."""
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            lines = _lines(opened, file)
            rows = _csv(lines) if file.suffix == ".csv" else _jsonl(lines)
            for at, row in rows:
                if at > _MOST_LINES:
                    raise Refused(f"{file}: more than {_MOST_LINES} lines: give a sample")
                yield _labelled(row, f"{file}:{at}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refused(f"{file}: cannot be read ({reason}): give JSONL or CSV in UTF-8") from error


def _lines(opened: TextIO, file: Path) -> Iterator[str]:
    """Line by line. Raises Refused: one is longer than any text may be."""
    while line := opened.readline(MAX_BYTES + 1):
        if len(line) > MAX_BYTES:
            raise Refused(f"{file}: has a line of more than {MAX_BYTES} characters: give one text a line")
        yield line


def _csv(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(lines)
    for row in reader:
        yield reader.line_num, row


def _jsonl(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for at, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield at, orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise Refused(f"line {at}: no JSON ({error}): give one object a line") from None


def _labelled(row: Any, where: str) -> Labelled:
    text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
    if not isinstance(text, str) or label is None:
        raise Refused(f"{where}: needs text and label: the text, and the families or labels it holds")
    said = [str(item).strip() for item in (label if isinstance(label, list) else str(label).split("|"))]
    told = (item for item in said if item.lower() not in _NOTHING)
    return Labelled(text, frozenset("*" if item.lower() in _ANYTHING else item for item in told))


def _known(texts: Sequence[Labelled], rules: Sequence[Rule]) -> None:
    """Raises Refused: no texts, or a label that nothing could be measured by."""
    if not texts:
        raise Refused("the file holds no text: give some")
    known = set(FAMILIES).union(*(family.labels for family in FAMILIES.values()), *(rule.known for rule in rules))
    if len(rules) == 1:
        known.add("*")
    unknown = sorted(frozenset().union(*(text.holds for text in texts)) - known)
    if unknown:
        more = "" if len(rules) == 1 else " (true and 1 need one rule: --family)"
        raise Refused(f"label {unknown[0]!r} is none of {', '.join(sorted(known))}{more}")


# --- what is judged -------------------------------------------------------------------------------------------------


async def scored(rule: Rule, texts: Sequence[Labelled], direction: Direction, role: str) -> Scored:
    """Have a rule's detector, made for this, judge the texts. Raises Refused: it cannot be loaded."""
    try:
        detector: Any = build_detector(rule.type, rule.wanted)
    except Exception as error:  # the edge of third-party engines: name the one that does not load
        raise Refused(f"{rule.name} cannot be loaded ({type(error).__name__}: {error})") from error
    judged = Scored(rule, [], [], [])
    find = _inline(detector) if rule.is_inline else _batch(detector, direction, role)
    async for found, cpu_ms in find([text.text for text in texts]):
        own = [f for f in found if f.label in rule.labels]
        judged.scores.append(max((f.score for f in own), default=0.0))
        judged.found.append(any(map(rule.applies, own)))
        judged.cpu_ms.append(cpu_ms)
    if not rule.is_inline:
        await detector.close()
    return judged


def _inline(detector: Detector) -> Callable[[Sequence[str]], Any]:
    async def find(texts: Sequence[str]) -> Any:
        for text in texts:
            began = time.process_time()
            folded = Text(text)
            found = detector.scan(folded) if detector.may_find(folded.scan) else []
            yield found, (time.process_time() - began) * 1000

    return find


def _batch(detector: BatchDetector, direction: Direction, role: str) -> Callable[[Sequence[str]], Any]:
    async def find(texts: Sequence[str]) -> Any:
        for at in range(0, len(texts), _BATCH):
            began, some = time.process_time(), texts[at : at + _BATCH]
            passages = [Passage(text, direction, role) for text in some]
            found: list[list[Finding]] = await detector.scan_batch(passages, Asked(time.monotonic() + _PATIENCE_S))
            spent = (time.process_time() - began) * 1000 / len(some)
            for each in found:
                yield each, spent

    return find


# --- what is told ---------------------------------------------------------------------------------------------------


def _is(text: Labelled, rule: Rule, alone: bool) -> bool:
    """Whether a text holds what a rule looks for."""
    return rule.type in text.holds or bool(text.holds & rule.labels) or (alone and "*" in text.holds)


def _rows(scored: Scored, texts: Sequence[Labelled], *, alone: bool) -> Iterator[dict[str, Any]]:
    rule = scored.rule
    truth = np.array([_is(text, rule, alone) for text in texts])
    scores, found = np.array(scored.scores), np.array(scored.found)
    held, free = int(truth.sum()), int((~truth).sum())
    row: dict[str, Any] = {"rule": rule.name, "held": held, "free": free}
    row["tpr"] = _figure(rate(int(found[truth].sum()), held)) if held else None
    row["fpr"] = _figure(rate(int(found[~truth].sum()), free)) if free else None
    row["auc"] = _figure(auc(scores[truth], scores[~truth])) if held and free else None
    row["cpu_ms_p50"], row["cpu_ms_p95"] = (round(float(q), 3) for q in np.quantile(scored.cpu_ms, (0.5, 0.95)))
    yield row


def _figure(figure: Figure) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figure._asdict().items()}


def _show(rows: Sequence[dict[str, Any]]) -> None:
    table = plain_table(("rule",), ("held", "free", "TPR", "FPR", "AUC", "CPU ms p50", "p95"))
    for row in rows:
        figures = (_told(row["tpr"], 100), _told(row["fpr"], 100), _told(row["auc"], 1))
        table.add_row(
            row["rule"],
            str(row["held"]),
            str(row["free"]),
            *figures,
            *(f"{row[f'cpu_ms_{p}']}" for p in ("p50", "p95")),
        )
    show(table)


def _told(figure: dict[str, float] | None, times: float) -> str:
    if figure is None:
        return "-"
    value, low, high = (figure[name] * times for name in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f}-{high:.1f})" if times > 1 else f"{value:.3f} ({low:.3f}-{high:.3f})"
