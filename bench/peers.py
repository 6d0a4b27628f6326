"""The guardrail beside its peers: the same texts, one run, CPU and wall milliseconds a text, p50 and p95.

Ours: the inline rules of the shipped policy `chat`; secrets alone; PII alone; and, one after another, the inline
families, toxicity and prompt injection (`all families`). Peers, each in a process of an environment of its own
(``make .venv-peers/.installed``; none of them is a dependency): gorget's Secrets and Regex scanners, NeMo Guardrails
with one regular expression as an input rail and no model, Guardrails AI with one regular expression, Presidio's default
pipeline, detect-secrets. They do not do the same work: what each looks for stands in its line. Rounds are interleaved,
so that a busy machine hurts all alike; the ratio is to `chat`'s inline rules, medians of the rounds'.

``python bench/peers.py [--quick] [--rounds N] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
HERE = Path(__file__).parent / "beside"
OURS = ("chat, inline", "secrets", "pii", "all families")
PEERS = ("gorget secrets", "gorget regex", "nemo", "guardrails-ai", "presidio", "detect-secrets")


class Side:
    """One subject in a process that has loaded it; ``measure`` has it judge every text once more."""

    def __init__(self, name: str) -> None:
        python, script = (sys.executable, "ours.py") if name in OURS else (str(PEERS_PYTHON), "theirs.py")
        self.name = name
        self._process = subprocess.Popen(
            [python, str(HERE / script), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.loaded: dict[str, Any] = self._said()

    def measure(self, texts: list[str]) -> dict[str, list[float]]:
        """CPU and wall milliseconds of each text."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(texts) + "\n")
        self._process.stdin.flush()
        found: dict[str, list[float]] = self._said()
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _said(self) -> dict[str, Any]:
        """Its next line of JSON; libraries print others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):
                said: dict[str, Any] = json.loads(line)
                return said
        return {"error": f"ended with {self._process.wait()}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where to write")
    parser.add_argument("--quick", action="store_true", help="fewer texts and rounds: a look, not a figure to quote")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not PEERS_PYTHON.exists():
        print("the peers are missing: make .venv-peers/.installed", file=sys.stderr)
        return 1
    from aim_guardrail.cli.bench import LENGTHS, texts

    count, rounds = (10, 1) if args.quick else (40, args.rounds)
    kinds = {f"{chars} characters": texts(chars, count) for chars in LENGTHS}
    kinds["500, six values"] = texts(500, count, values=True)
    sides = [Side(name) for name in (*OURS, *PEERS)]
    for side in sides:
        if "error" in side.loaded:
            print(f"{side.name}: {side.loaded['error']}", file=sys.stderr)
    sides = [side for side in sides if "error" not in side.loaded]
    found = _measured(sides, kinds, rounds)
    for side in sides:
        side.close()
    result = {"texts": count, "rounds": rounds, "sides": {side.name: side.loaded for side in sides}, "ms": found}
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    _show(sides, found)
    return 0


def _measured(sides: list[Side], kinds: dict[str, list[str]], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Side → kind of text → figures; ratios are medians over rounds."""
    seen: dict[tuple[str, str], list[dict[str, list[float]]]] = {}
    for side in sides:
        side.measure([texts[0] for texts in kinds.values()])  # what is made the first time
    for _ in range(rounds):
        for kind, texts in kinds.items():
            for side in sides:
                seen.setdefault((side.name, kind), []).append(side.measure(texts))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, kind), measured in seen.items():
        base = seen[OURS[0], kind]
        ratios = [
            statistics.median(one["cpu_ms"]) / statistics.median(other["cpu_ms"])
            for one, other in zip(measured, base, strict=True)
        ]
        figures = {f"{clock}_p{q}": _quantile(measured, clock, q) for clock in ("cpu_ms", "wall_ms") for q in (50, 95)}
        found.setdefault(name, {})[kind] = {**figures, "ratio": round(statistics.median(ratios), 2)}
    return found


def _quantile(measured: list[dict[str, list[float]]], clock: str, q: int) -> float:
    every = sorted(value for one in measured for value in one[clock])
    return round(every[min(len(every) - 1, len(every) * q // 100)], 4)


def _show(sides: list[Side], found: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"{'':16} {'text':16} {'CPU ms p50':>10} {'p95':>9} {'wall p50':>9} {'p95':>9} {'ratio':>8}")
    for side in sides:
        print(f"{side.name} ({side.loaded['what']}; {side.loaded['load_cpu_s']:.1f} s of CPU to load)")
        for kind, row in found[side.name].items():
            cells = (f"{row[key]:9.3f}" for key in ("cpu_ms_p50", "cpu_ms_p95", "wall_ms_p50", "wall_ms_p95"))
            print(f"{'':16} {kind:16} {' '.join(cells)} {row['ratio']:8.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
