"""Capacities drawn: what each mode serves within the promise, and how its tokens slow down as it fills.

What is only a bound is hatched and open at its end, so that no one takes it for an estimate; a figure that was measured
is a point. Each mode has its colour, its dash and its name at its curve: it prints in grey too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import floor, log10
from typing import NamedTuple

from aim_profile.serving.capacity import Evidenced
from aim_profile.sizing.capacity import MARKS, Capacity, Served

from .capacities import best_in_words
from .mode_capacity import ModeCapacity, Question
from .svg import GREY, INK, LINE, MARGIN, PAPER, Box, cut, escape, page, rect, text

# After Okabe and Ito, by compute mode.
_COLOURS = {"SPX": "#0072b2", "DPX": "#d55e00", "TPX": "#7a5195", "QPX": "#009e73", "CPX": "#b8860b"}
_DASHES = {"SPX": "", "DPX": "9 3", "TPX": "6 3 2 3", "QPX": "4 3", "CPX": "2 2.5"}
_WIDTH = 980.0
_LABELS = 132.0
_WORDS = 250.0
_ROW = 30.0
_PLOT_HEIGHT = 330.0
_LEVELS = 28


class _Scale(NamedTuple):
    """Values from 0 to `most` on `length` pixels from `start` (a negative length goes up); more lies beyond."""

    most: float
    start: float
    length: float

    def __call__(self, value: float) -> float:
        return self.start + self.length * value / self.most

    @property
    def ticks(self) -> list[float]:
        """Round figures, four to eight of them."""
        step = 10.0 ** floor(log10(self.most))
        while self.most / step < 4:
            step /= 2 if self.most / step > 2 else 5
        return [step * at for at in range(int(self.most / step) + 1)]


class _Curve(NamedTuple):
    each: ModeCapacity
    levels: Sequence[tuple[Served | None, Served]]


def draw(question: Question, gpu: str, found: Sequence[ModeCapacity], evidenced: Evidenced) -> str:
    """The capacities of a GPU's modes as an SVG document."""
    rows = sorted(found, key=lambda each: (each.mode.tier != "validated", each.mode.partitions))
    bars = Box(MARGIN + _LABELS, MARGIN + 104, _WIDTH - _LABELS - _WORDS, _ROW * len(rows))
    plot = Box(MARGIN + 52, bars.y + bars.height + 96, _WIDTH - 62, _PLOT_HEIGHT)
    most = max((each.requests_per_s(each.capacity.high) for each in rows if each.capacity), default=0.0) or 1.0
    parts = [*_bars(rows, bars, _Scale(most * 1.04, bars.x, bars.width))]
    curves = [_Curve(each, evidenced.curve(question.asked(each.mode, each.tp), _LEVELS)) for each in _distinct(rows)]
    parts += _slowdown(question, curves, plot)
    title = f"{question.model.id} {question.precision} on {gpu}: what a card serves"
    shape, promise = question.shape, question.promise
    promised = [f"{name} {value:g} ms" for name, value in (("TTFT", promise.ttft_ms), ("ITL", promise.itl_ms)) if value]
    facts = (
        f"{shape.prompt_tokens} tokens in, {shape.answer_tokens} out · within {' and '.join(promised) or 'its memory'}"
    )
    best = f"serves most: {best_in_words(found)}"
    parts.append(text(MARGIN, MARGIN + 68, cut(best, _WIDTH * 1.2, 12), 12, INK))
    parts += _sources(rows, plot.y + plot.height + 62)
    lines = len({label for each in rows if each.capacity for label in each.capacity.evidence})
    return page(title, facts, parts, _WIDTH + 2 * MARGIN, plot.y + plot.height + 76 + 15 * max(1, lines) + MARGIN)


def _distinct(rows: Sequence[ModeCapacity]) -> list[ModeCapacity]:
    """One for each compute mode that serves something: memory modes differ in nothing that is known here."""
    found: dict[str, ModeCapacity] = {}
    for each in rows:
        if each.capacity is not None:
            found.setdefault(each.mode.compute, each)
    return list(found.values())


def _bars(rows: Sequence[ModeCapacity], box: Box, scale: _Scale) -> Iterator[str]:
    yield text(box.x, box.y - 14, "requests/s a card within the promise", 12, INK, bold=True)
    yield _hatches()
    for tick in scale.ticks:
        x = scale(tick)
        yield _line(x, box.y, x, box.y + box.height, LINE, 0.7 if tick else 1.6)
        yield text(x, box.y + box.height + 14, f"{tick:g}", 10, GREY, anchor="middle")
    for at, each in enumerate(rows):
        yield from _bar(each, box.y + _ROW * at, box, scale)


def _bar(each: ModeCapacity, y: float, box: Box, scale: _Scale) -> Iterator[str]:
    middle, colour, found = y + _ROW / 2, _COLOURS[each.mode.compute], each.capacity
    yield text(box.x - 10, middle + 4, each.mode.label, 12, INK, bold=each.mode.tier == "validated", anchor="end")
    words = box.x + box.width + 14
    if found is None or found.high is None:
        why = "does not fit" if found is None else f"not one request keeps the promise ({MARKS[found.basis]})"
        yield text(words, middle + 4, cut(why, _WORDS, 11), 11, GREY)
        return
    low, high = scale(each.requests_per_s(found.low)), scale(each.requests_per_s(found.high))
    yield f"<g><title>{escape(_tooltip(each, found))}</title>"
    if found.basis == "bound":
        yield rect(Box(scale.start, middle - 8, high - scale.start, 16), f'fill="url(#{each.mode.compute})"', 0)
        yield _line(high, middle - 9, high, middle + 9, colour, 1.5, "3 2")
    elif found.basis == "measured":
        yield _line(scale.start, middle, high, middle, colour, 2)
        yield f'<circle cx="{high:.1f}" cy="{middle:.1f}" r="6" fill="{colour}"/>'
    else:
        yield rect(
            Box(low, middle - 8, max(2.0, high - low), 16), f'fill="{colour}" fill-opacity="0.28" stroke="{colour}"', 3
        )
        yield _line(low, middle - 10, low, middle + 10, colour, 4)
    yield "</g>"
    yield text(words, middle - 1, _in_words(each, found), 11, INK)
    limit = " or ".join(found.limits)
    about = f"{MARKS[found.basis]}{f' · {limit}-bound' if limit else ''}"
    yield text(words, middle + 11, about, 9.5, GREY)


def _in_words(each: ModeCapacity, found: Capacity) -> str:
    high = f"{each.requests_per_s(found.high):.3g}"
    if found.basis == "bound":
        return f"at most {high}"
    return high if found.basis == "measured" else f"{each.requests_per_s(found.low):.3g} to {high}"


def _tooltip(each: ModeCapacity, found: Capacity) -> str:
    served = [f"{one.sequences} sequences an engine" for one in (found.low, found.high) if one]
    engines = f"{each.engines_per_card:g} engines a card"
    return (
        f"{each.mode.label} ({each.mode.tier}): {_in_words(each, found)} requests/s, {engines}, {' to '.join(served)}"
    )


def _slowdown(question: Question, curves: Sequence[_Curve], box: Box) -> Iterator[str]:
    """Milliseconds between tokens over requests/s of the card: the band from the quick end to the cautious one."""
    promised = question.promise.itl_ms
    slowest = max(
        (ends[0] or ends[1] for curve in curves for ends in curve.levels), key=lambda one: one.itl_ms, default=None
    )
    if slowest is None:
        return
    up = _Scale(2 * promised if promised else slowest.itl_ms, box.y + box.height, -box.height)
    within = [
        curve.each.requests_per_s(one)
        for curve in curves
        for ends in curve.levels
        for one in ends
        if one is not None and one.itl_ms <= up.most
    ]
    along = _Scale(max(within, default=1.0) * 1.04, box.x, box.width)
    yield text(box.x - 40, box.y - 20, "milliseconds between two tokens, as the card fills", 12, INK, bold=True)
    yield from _axes(box, along, up)
    yield f'<clipPath id="plot">{rect(box, "", 0)}</clipPath><g clip-path="url(#plot)">'
    for curve in curves:
        yield from _band(curve, along, up)
    yield "</g>"
    if promised:
        y = up(promised)
        yield _line(box.x, y, box.x + box.width, y, INK, 1.2, "6 3")
        yield rect(Box(box.x + box.width - 100, y - 18, 98, 16), f'fill="{PAPER}" fill-opacity="0.85"', 2)
        yield text(box.x + box.width - 6, y - 6, f"promised: {promised:g} ms", 11, INK, anchor="end")
    yield text(box.x + box.width, box.y + box.height + 32, "requests/s a card", 11, GREY, anchor="end")
    yield from _key(curves, box.x, box.y + box.height + 32)


def _axes(box: Box, along: _Scale, up: _Scale) -> Iterator[str]:
    yield rect(box, f'fill="{PAPER}" stroke="{LINE}"', 0)
    for tick in along.ticks:
        x = along(tick)
        yield _line(x, box.y, x, box.y + box.height, LINE, 0.5)
        yield text(x, box.y + box.height + 14, f"{tick:g}", 10, GREY, anchor="middle")
    for tick in up.ticks:
        y = up(tick)
        yield _line(box.x, y, box.x + box.width, y, LINE, 0.5)
        yield text(box.x - 6, y + 3.5, f"{tick:g}", 10, GREY, anchor="end")


def _band(curve: _Curve, along: _Scale, up: _Scale) -> Iterator[str]:
    colour, dash = _COLOURS[curve.each.mode.compute], _DASHES[curve.each.mode.compute]
    cautious = [_at(curve.each, low, along, up) for low, _ in curve.levels if low]
    other = [_at(curve.each, high, along, up) for _, high in curve.levels]
    if cautious and cautious != other:
        shape = " ".join((*cautious, *reversed(other)))
        yield f'<polygon points="{shape}" fill="{colour}" fill-opacity="0.10"/>'
    basis = curve.each.capacity.basis if curve.each.capacity else None
    for points, width in ((cautious, 2.4), (other, 1.1)):
        for point in points if basis == "measured" else points[-1:]:
            x, y = point.split(",")
            fill = colour if basis == "measured" else PAPER
            yield f'<circle cx="{x}" cy="{y}" r="{width + 1.6}" fill="{fill}" stroke="{colour}" stroke-width="1.4"/>'
        opacity = ' stroke-opacity="0.6"' if basis == "bound" else ""
        yield (
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="{width}"{opacity}'
            f"{f' stroke-dasharray={chr(34)}{dash}{chr(34)}' if dash else ''}/>"
        )


def _at(each: ModeCapacity, served: Served, along: _Scale, up: _Scale) -> str:
    return f"{along(each.requests_per_s(served)):.1f},{up(served.itl_ms):.1f}"


def _key(curves: Sequence[_Curve], x: float, y: float) -> Iterator[str]:
    for curve in curves:
        compute, each = curve.each.mode.compute, curve.each
        yield _line(x, y - 4, x + 30, y - 4, _COLOURS[compute], 2.4, _DASHES[compute])
        words = f"{compute}, {each.engines_per_card:g} engine{'s' if each.engines_per_card != 1 else ''}"
        yield text(x + 36, y, words, 11, INK)
        x += 36 + 7 * len(words)
    is_range = any(curve.each.capacity and curve.each.capacity.basis == "estimate" for curve in curves)
    ends = "thick: cautious end, thin: the other; " if is_range else ""
    yield text(x + 4, y, f"{ends}ring: memory is full", 11, GREY)


def _sources(rows: Sequence[ModeCapacity], y: float) -> Iterator[str]:
    labels = dict.fromkeys(label for each in rows if each.capacity for label in each.capacity.evidence)
    notes = dict.fromkeys(note for each in rows if each.capacity and not labels for note in each.capacity.notes)
    for at, words in enumerate([f"evidence: {label}" for label in labels] or list(notes)[:1]):
        yield f"<g><title>{escape(words)}</title>"
        yield text(MARGIN, y + 15 * at, cut(words, _WIDTH, 10.5), 10.5, GREY)
        yield "</g>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _hatches() -> str:
    """One pattern a compute mode, of its colour."""
    patterns = (
        f'<pattern id="{compute}" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<line x1="0" y1="0" x2="0" y2="7" stroke="{colour}" stroke-width="2" stroke-opacity="0.55"/></pattern>'
        for compute, colour in _COLOURS.items()
    )
    return f"<defs>{''.join(patterns)}</defs>"
