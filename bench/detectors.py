"""The guardrail's detectors: CPU time a text, and a streamed token. One process, no network.

CPU milliseconds a text (median of batches) at 50, 500 and 4,000 characters, of prose and of prose that ends with six
pieces of personal data and a secret; CPU microseconds a 4-character token streamed; CPU seconds to import and load.

``python bench/detectors.py [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROSE = (
    "The scheduler assigns each request to a partition, and the runtime refuses to start on anything else; that is "
    "how a plan stays true. Models load in the background, answers stream as they are made, and nothing waits. "
) * 24
VALUES = (
    " Mail bob@example.com, call +1 415-555-2671, card 4111 1111 1111 1111, SSN 536-90-4399, "
    "IBAN DE89 3704 0044 0532 0130 00, host 10.1.2.3, password=hunter2Xy7q!."
)
LENGTHS_CHARS = (50, 500, 4000)
TOKEN_CHARS = 4


def cpu_ms(call: Callable[[], object], batch: int = 40, batches: int = 9) -> float:
    call()
    samples = []
    for _ in range(batches):
        start = time.process_time()
        for _ in range(batch):
            call()
        samples.append((time.process_time() - start) / batch * 1e3)
    return round(statistics.median(samples), 4)


def texts() -> dict[str, str]:
    plain = {f"prose {n}": PROSE[:n] for n in LENGTHS_CHARS}
    return plain | {f"values {n}": PROSE[: n - len(VALUES)] + VALUES for n in LENGTHS_CHARS if n > len(VALUES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where to write")
    args = parser.parse_args()

    start = time.process_time()
    from aim_guardrail.detectors.families import FAMILIES, Wanted, build_detector
    from aim_guardrail.detectors.pii_labels import PII_LABELS
    from aim_guardrail.pipeline import Guard, Session
    from aim_guardrail.policy import shipped_policy
    from aim_guardrail.streams.held import StreamGuard
    from aim_guardrail.text import Text

    imported = time.process_time()
    guard = Guard.load(shipped_policy("values"))
    loaded = time.process_time()
    result: dict[str, Any] = {"import_cpu_s": round(imported - start, 3), "load_cpu_s": round(loaded - imported, 3)}

    subjects: dict[str, Callable[[str], object]] = {}
    for name, family in FAMILIES.items():
        if family.kind == "inline":
            subjects[name] = _scanner(build_detector(name, Wanted(frozenset(family.labels))), Text)
    for label in PII_LABELS:
        subjects[label] = _scanner(build_detector("pii", Wanted(frozenset({label}))), Text)
    subjects["whole check"] = lambda text: guard.check("answer", text, Session())
    result["cpu_ms"] = {
        name: {kind: cpu_ms(lambda s=subject, t=text: s(t)) for kind, text in texts().items()}
        for name, subject in subjects.items()
    }

    def stream(text: str) -> None:
        checker = StreamGuard(guard, Session())
        for at in range(0, len(text), TOKEN_CHARS):
            checker.push(text[at : at + TOKEN_CHARS])
        checker.finish()

    result["cpu_us_per_streamed_token"] = {
        kind: round(cpu_ms(lambda t=text: stream(t), batch=4) * 1e3 / (len(text) / TOKEN_CHARS), 2)
        for kind, text in texts().items()
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _scanner(detector: Any, text_type: Any) -> Callable[[str], object]:
    def scan(text: str) -> object:
        folded = text_type(text)
        return detector.scan(folded) if detector.may_find(folded.scan) else []

    return scan


if __name__ == "__main__":
    main()
