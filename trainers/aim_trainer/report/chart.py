"""A curve as SVG, in the colours of the page around it; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from .series import FEWEST_SMOOTHED, Point, Series

_COLUMNS = 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 14.0, 26.0
_MOST_MARKS = 80


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn. size: width and height in the units of the drawing. measured: points of another curve, with their
    values beside the first and the last. saved: steps with a mark on the axis; resumed: steps with a line through it.
    from_zero: the axis begins there.
    """

    title: str
    series: Series
    size: tuple[int, int] = (360, 190)
    measured: Sequence[Point] = ()
    saved: Sequence[int] = ()
    resumed: Sequence[int] = ()
    from_zero: bool = False
    smooth: bool = True


def draw(chart: Chart) -> Markup:
    """The drawing, or an empty text where there is no number to draw."""
    bounds = _bounds(chart)
    if bounds is None:
        return Markup("")
    return _Drawing(chart, _Plane(chart, *bounds)).svg()


class _Plane:
    """From steps and values to places on the paper."""

    def __init__(self, chart: Chart, low: float, high: float) -> None:
        self.width, self.height = chart.size
        steps = [*chart.series.steps[:1], *chart.series.steps[-1:], *(point.step for point in chart.measured)]
        self.first, self.last = min(steps), max(max(steps), min(steps) + 1)
        self.ticks = nice_ticks(low, high)
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first)
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    @property
    def floor(self) -> float:
        return self.height - _BOTTOM


@dataclass(slots=True)
class _Drawing:
    chart: Chart
    plane: _Plane
    parts: list[Markup] = field(default_factory=list)

    def svg(self) -> Markup:
        self._grid()
        self._marks()
        lines = self._curves()
        self._measured()
        width, height = self.chart.size
        head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"').format(
            width, height, self.chart.title
        )
        data = Markup(' data-points="{}" data-frame="{}">').format(_data(lines), self._frame())
        return head + data + Markup("").join(self.parts) + Markup("</svg>")

    def _frame(self) -> str:
        plane = self.plane
        numbers = plane.first, plane.last, plane.low, plane.high, _LEFT, plane.width - _RIGHT, _TOP, plane.floor
        return " ".join(f"{number:.6g}" for number in numbers)

    def _grid(self) -> None:
        plane = self.plane
        for tick in plane.ticks:
            self._line("grid", _LEFT, plane.y(tick), plane.width - _RIGHT, plane.y(tick))
            self._text("tick end", _LEFT - 7, plane.y(tick) + 3.5, number(tick))
        for tick in nice_ticks(plane.first, plane.last, 6 if plane.width > 500 else 4, whole=True):
            if plane.first <= tick <= plane.last:
                self._text("tick middle", plane.x(tick), plane.floor + 17, f"{tick:,.0f}")
        self._line("axis", _LEFT, plane.floor, plane.width - _RIGHT, plane.floor)

    def _marks(self) -> None:
        plane = self.plane
        for step in self.chart.resumed[:_MOST_MARKS]:
            self._line("resumed", plane.x(step), _TOP, plane.x(step), plane.floor, f"resumed from step {step:,}")
        saved = self.chart.saved
        for step in saved[:: max(1, len(saved) // _MOST_MARKS)]:
            x, y = plane.x(step), plane.floor
            shape = f"M{x:.1f} {y - 5:.1f}l4 5h-8z"
            self.parts.append(
                Markup('<path class="saved" d="{}"><title>{}</title></path>').format(shape, f"checkpoint {step:,}")
            )

    def _curves(self) -> list[Point]:
        """Draws them. Returns the points that a pointer is told of."""
        series = self.chart.series
        smooth = self.chart.smooth and len(series) >= FEWEST_SMOOTHED
        thin = series.thinned(_COLUMNS)
        self._curve("raw" if smooth else "line", thin)
        if smooth:
            thin = series.smoothed().thinned(_COLUMNS // 2)
            self._curve("line", thin)
        return thin

    def _curve(self, kind: str, points: Iterable[Point]) -> None:
        plane = self.plane
        path, pen = [], "M"
        for step, value in points:
            if not math.isfinite(value):
                pen = "M"
                continue
            path.append(f"{pen}{plane.x(step):.1f} {plane.y(value):.1f}")
            pen = "L"
        self.parts.append(Markup('<path class="{}" d="{}"/>').format(kind, "".join(path)))

    def _measured(self) -> None:
        points = [point for point in self.chart.measured if math.isfinite(point.value)]
        if len(points) > 1:
            self._curve("between", points)
        plane = self.plane
        for step, value in points:
            self.parts.append(
                Markup('<circle class="measured" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>').format(
                    plane.x(step), plane.y(value), f"held-out after step {step:,}: {value:.4f}"
                )
            )
        for (step, value), side in zip(points[:1] + points[1:][-1:], ("start", "end"), strict=False):
            up = -9 if plane.y(value) > _TOP + 16 else 16
            self._text(
                f"value {side}", plane.x(step) + (2 if side == "start" else 0), plane.y(value) + up, number(value)
            )

    def _line(self, kind: str, x1: float, y1: float, x2: float, y2: float, title: str = "") -> None:
        line = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}">{}</line>')
        inner = Markup("<title>{}</title>").format(title) if title else Markup("")
        self.parts.append(line.format(kind, x1, y1, x2, y2, inner))

    def _text(self, kind: str, x: float, y: float, text: str) -> None:
        self.parts.append(Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text))


def bars(counts: Sequence[tuple[str, int]], size: tuple[int, int] = (360, 150)) -> Markup:
    """A histogram: a label and a count for each bar; a label every few bars."""
    if not counts or not any(count for _, count in counts):
        return Markup("")
    width, height = size
    step = (width - 2 * _RIGHT) / len(counts)
    most = max(count for _, count in counts)
    parts = []
    for at, (label, count) in enumerate(counts):
        tall = (height - _TOP - _BOTTOM) * count / most
        x, y = _RIGHT + at * step, height - _BOTTOM - tall
        bar = Markup(
            '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2"><title>{}</title></rect>'
        )
        parts.append(bar.format(x + 1, y, max(1.0, step - 2), tall, f"{label}: {count:,}"))
        if at % max(1, len(counts) // 6) == 0:
            text = Markup('<text class="tick middle" x="{:.1f}" y="{:.1f}">{}</text>')
            parts.append(text.format(x + step / 2, height - _BOTTOM + 17, label))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img">{}</svg>').format(
        width, height, Markup("").join(parts)
    )


#: What is less has no fifth that is a number above 0.
_LEAST_SPAN = 1e-300


def nice_ticks(low: float, high: float, about: int = 5, whole: bool = False) -> list[float]:
    """Around `about` round numbers from below `low` to above `high`, 1, 2 or 5 times a power of ten apart."""
    span = high - low if high > low else abs(high) or 1.0
    rough = max(span, _LEAST_SPAN) / about
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    if whole:
        apart = max(1.0, apart)
    first = math.floor(low / apart)
    last = math.ceil(high / apart)
    return [float(f"{at * apart:.12g}") for at in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """As short as it can be told apart: 12,300, 1.25, −0.0008, 2e-05."""
    if value < 0:
        return f"−{number(-value)}"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2g}"


def _bounds(chart: Chart) -> tuple[float, float] | None:
    extremes = chart.series.extremes()
    measured = [point.value for point in chart.measured if math.isfinite(point.value)]
    values = [*(extremes or ()), *measured]
    if not values:
        return None
    return min([0.0, *values]) if chart.from_zero else min(values), max(values)


def _data(points: Iterable[Point]) -> str:
    return " ".join(f"{step},{value:.5g}" for step, value in points if math.isfinite(value))
