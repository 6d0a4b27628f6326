"""What parking a sequence of the embedded engine costs, beside computing its tokens again: CPU time per 1,000 tokens.

``bench/parking.py [--tokens N] [--rounds N] [--model FILE]``

One thread; medians over rounds. ``park`` copies the cells into host memory (the first time it takes ten times as long:
the kernel has to find that memory), ``resume`` puts them back into another slot; ``again`` computes the tokens as a
prompt, 512 at a time. ``shared``: slots share the cells; ``own``: each has its own, as with ``--deterministic``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
sys.path[:0] = [str(ROOT / name) for name in ("runtimes", "transformers", "profiles")]

from aim_runtime.engines.llama_cpp.bindings import LlamaContext, LlamaModel  # noqa: E402
from aim_runtime.engines.llama_cpp.parking import State  # noqa: E402

BATCH_TOKENS = 512


def prefill(context: LlamaContext, slot: int, tokens: int) -> None:
    context.keep(slot, 0)
    for at in range(0, tokens, BATCH_TOKENS):
        context.batch.clear()
        piece = np.arange(at, min(tokens, at + BATCH_TOKENS), dtype=np.int32) % 1000 + 1000
        context.batch.add(piece, at, slot, wants_logits=True)
        if context.decode() != 0:
            sys.exit("llama_decode failed")


def cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(model: LlamaModel, *, streams: bool, tokens: int, rounds: int) -> dict[str, float]:
    """Medians in CPU seconds, and the bytes that are kept."""
    cells = (-(-(tokens + 1) // 256) * 256) * 2
    context = model.new_context(cells=cells, slots=2, batch_tokens=BATCH_TOKENS, threads=1, streams=streams)
    found: dict[str, list[float]] = {"again": [], "park": [], "resume": []}
    for _ in range(rounds):
        found["again"].append(cpu_s(lambda: prefill(context, 0, tokens)))
        states: list[State] = []
        found["park"].append(cpu_s(lambda states=states: states.append(context.save(0))))  # type: ignore[misc]
        context.keep(1, 0)
        found["resume"].append(cpu_s(lambda states=states: context.load(1, states[0])))  # type: ignore[misc]
    size = context.state_bytes(0)
    context.close()
    return {name: median(values) for name, values in found.items()} | {"bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=MODEL)
    args = parser.parse_args()
    model = LlamaModel(args.model)
    print(f"{'cells':<8}{'park':>9}{'resume':>9}{'again':>9}{'ratio':>8}{'MB kept':>9}   per 1,000 tokens, CPU ms")
    for name, streams in (("shared", False), ("own", True)):
        took = measure(model, streams=streams, tokens=args.tokens, rounds=args.rounds)
        park, resume, again = (took[part] * 1e6 / args.tokens for part in ("park", "resume", "again"))
        share, kept_mb = (park + resume) / again, took["bytes"] / args.tokens / 1e3
        print(f"{name:<8}{park:>9.1f}{resume:>9.1f}{again:>9.0f}{share:>8.2%}{kept_mb:>9.1f}")


if __name__ == "__main__":
    main()
