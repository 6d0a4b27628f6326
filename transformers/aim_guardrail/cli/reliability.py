"""The reliability plot: of texts with a score in a bin, how many held what was looked for. On the diagonal a score is
the probability it looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aim_guardrail.cli.refused import Refused

BINS = 10


def bins(scores: Sequence[float], truth: Sequence[bool]) -> list[tuple[float, float, int]]:
    """Of each bin that is not empty: its mean score, the share of its texts that hold something, how many they are."""
    values, held = np.asarray(scores), np.asarray(truth)
    of = np.minimum((values * BINS).astype(int), BINS - 1)
    return [
        (float(values[of == at].mean()), float(held[of == at].mean()), int((of == at).sum()))
        for at in range(BINS)
        if (of == at).any()
    ]


def draw(file: Path, judged: Mapping[str, tuple[Sequence[float], Sequence[bool]]]) -> None:
    """Write the plot of each rule, side by side, as SVG.

    Raises:
        Refused: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise Refused("--plot needs matplotlib: pip install 'aim-kserve[measure]'") from None
    canvas = Canvas(figsize=(4 * len(judged), 4), layout="constrained")
    for axes, (name, (scores, truth)) in zip(
        np.atleast_1d(canvas.subplots(1, len(judged))), judged.items(), strict=True
    ):
        found = bins(scores, truth)
        axes.plot([0, 1], [0, 1], color="0.75", linewidth=1, zorder=0)
        axes.scatter([b[0] for b in found], [b[1] for b in found], s=[20 + 12 * np.log1p(b[2]) for b in found])
        for score, share, count in found:
            axes.annotate(str(count), (score, share), xytext=(6, -10), textcoords="offset points", fontsize=8)
        axes.set(
            title=f"{name} (n = {len(scores)})",
            xlabel="score",
            ylabel="share that holds it",
            xlim=(-0.05, 1.1),
            ylim=(-0.05, 1.1),
        )
    try:
        canvas.savefig(file, format="svg")
    except OSError as error:
        raise Refused(f"{file}: cannot be written ({error.strerror}): give another file") from error
