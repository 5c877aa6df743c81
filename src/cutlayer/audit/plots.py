"""Plots as inline SVG, with axes, intervals, and words for those who do not see them.

Colours are the page's (`report.css`), so that dark mode and print need no second drawing. Series
differ in the shape of their marks and not in colour alone. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

__all__ = ["Axis", "Point", "Series", "plot", "strip"]

_WIDTH, _STRIP_WIDTH = 440, 320
_TOP, _RIGHT, _BOTTOM, _LEGEND_ROW = 34, 20, 56, 20
_CHARACTER = 7.6
"""Width of a digit in the largest type that the page sets plots in, the phone's."""

_MARKS = (
    "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z",
    "M-3.8 -3.8h7.6v7.6h-7.6z",
    "M0 -5L4.8 3.6h-9.6z",
    "M0 -5.4L5 0L0 5.4L-5 0z",
    "M0 5L4.8 -3.6h-9.6z",
    "M-1.6 -5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "M-5 -1.6L0 -5.2L5 -1.6L3.1 4.4h-6.2z",
    "M-4.8 -2.8L0 -5.4L4.8 -2.8v5.6L0 5.4L-4.8 2.8z",
)


@dataclass(frozen=True)
class Axis:
    """One direction of a plot.

    Attributes:
        label: What is measured, with its unit.
        low: Its least value.
        high: Its greatest.
        ticks: Values and what is written at them.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    @classmethod
    def percent(cls, label: str) -> Axis:
        """Return an axis from 0 to 100%, for shares between 0 and 1."""
        return cls(label, 0.0, 1.0, tuple((k / 4, f"{25 * k}%") for k in range(5)))

    @classmethod
    def over(cls, label: str, values: Iterable[float], *, shares: bool = False) -> Axis:
        """Return an axis with round ticks that holds these values; `shares` shows percentages."""
        found = list(values) or [0.0, 1.0]
        least, most = min(found), max(found)
        step = _round_step((most - least) or abs(most) or 1.0)
        low, high = math.floor(least / step) * step, math.ceil(most / step) * step
        if low == high:
            low, high = low - step, high + step
        if shares:
            low, high = max(low, 0.0), min(high, 1.0)
        count = round((high - low) / step)
        ticks = [low + k * step for k in range(count + 1)]
        return cls(label, low, high, tuple((t, _tick(t, step, shares)) for t in ticks))

    @classmethod
    def of_names(cls, label: str, names: Sequence[str]) -> Axis:
        """Return an axis with one place per name: the first at `len(names) - 1`, the top."""
        last = len(names) - 1
        ticks = tuple((float(last - k), name) for k, name in enumerate(names))
        return cls(label, -0.6, last + 0.6, ticks)

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 to 1; what is outside is put at the edge."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


@dataclass(frozen=True)
class Point:
    """One mark, with the intervals around it if there are any."""

    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    ringed: bool = False
    """Drawn with a ring: this is the run that the report is about."""


@dataclass(frozen=True)
class Series:
    """Marks of one shape."""

    name: str
    points: tuple[Point, ...]
    joined: bool = True
    """A line goes through them."""
    baseline: bool = False
    """A dashed grey line without marks' weight: what the others are compared with."""


@dataclass(frozen=True)
class _Frame:
    """Where values lie on the drawing."""

    x: Axis
    y: Axis
    left: float
    height: float
    right: float = _WIDTH - _RIGHT

    def at(self, x: float, y: float) -> tuple[float, float]:
        width = self.right - self.left
        return self.left + self.x.share(x) * width, _TOP + (1 - self.y.share(y)) * self.height


def plot(
    ident: str,
    *,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    height: float = 210,
) -> Markup:
    """Return a plot of series over two axes.

    Args:
        ident: Prefix of its element ids, unique on the page.
        title: What it is, in a few words.
        description: What is to be seen, in a sentence.
        x: The axis from left to right.
        y: The axis from bottom to top; its label is written above it, to be read without turning.
        series: What is drawn; a legend follows if there are several.
        height: Of the part between the axes, in units of which the drawing is 440 wide.
    """
    left = 14 + _CHARACTER * max(len(text) for _, text in y.ticks)
    frame = _Frame(x, y, left, height)
    legend = _LEGEND_ROW * len(series) if len(series) > 1 else 0
    parts = [
        *_axes(frame),
        *(part for number, one in enumerate(series) for part in _drawn(frame, one, number)),
        *(_legend(one, k, left, _TOP + height + _BOTTOM) for k, one in enumerate(series) if legend),
    ]
    total = _TOP + height + _BOTTOM + legend
    return _svg(ident, title, description, "plot", (_WIDTH, total), Markup("").join(parts))


def strip(
    ident: str,
    *,
    title: str,
    description: str,
    rate: float,
    interval: tuple[float, float],
    prior: float,
) -> Markup:
    """Return one share on a scale from 0 to 100%, with its interval and what a blind guess gets."""
    frame = _Frame(Axis.percent(""), Axis("", 0, 1, ()), 16, 0, _STRIP_WIDTH - _RIGHT)

    def at(share: float) -> str:
        return _n(frame.at(share, 0)[0])

    low, high = at(interval[0]), at(interval[1])
    parts = [
        _line("track", at(0), "22", at(1), "22"),
        *(_line("notch", at(k), "16", at(k), "28") for k in (0, 0.5, 0.9, 1)),
        _line("interval", low, "22", high, "22"),
        Markup('<path class="prior" d="M{} 13l-5 -9h10z"/>').format(at(prior)),
        _line("found", at(rate), "12", at(rate), "32"),
        *(
            _text(at(share), "48", words, "middle")
            for share, words in ((0, "0"), (0.5, "50"), (0.9, "90"), (1, "100%"))
        ),
    ]
    return _svg(ident, title, description, "strip", (_STRIP_WIDTH, 54), Markup("").join(parts))


def _axes(frame: _Frame) -> Iterable[Markup]:
    x, y = frame.x, frame.y
    bottom = _n(_TOP + frame.height)
    yield _text("2", "14", y.label, "start", "label")
    for value, words in y.ticks:
        left, down = frame.at(x.low, value)
        yield _line("grid", _n(left), _n(down), _n(_WIDTH - _RIGHT), _n(down))
        yield _text(_n(left - 8), _n(down + 4), words, "end")
    for value, words in x.ticks:
        across, _ = frame.at(value, y.low)
        yield _line("axis", _n(across), bottom, _n(across), _n(_TOP + frame.height + 5))
        yield _text(_n(across), _n(_TOP + frame.height + 20), words, "middle")
    yield _line("axis", _n(frame.left), bottom, _n(_WIDTH - _RIGHT), bottom)
    yield _text(_n(_WIDTH - _RIGHT), _n(_TOP + frame.height + 40), x.label, "end", "label")


def _drawn(frame: _Frame, series: Series, number: int) -> Iterable[Markup]:
    kind = "baseline" if series.baseline else f"s{number % len(_MARKS)}"
    yield Markup('<g class="{}">').format(kind)
    if series.joined and len(series.points) > 1:
        path = " ".join("{},{}".format(*map(_n, frame.at(p.x, p.y))) for p in series.points)
        yield Markup('<polyline class="path" points="{}"/>').format(path)
    for point in series.points:
        yield from _whiskers(frame, point)
    for point in series.points:
        x, y = map(_n, frame.at(point.x, point.y))
        if point.ringed:
            yield Markup('<circle class="ring" cx="{}" cy="{}" r="9.5"/>').format(x, y)
        yield _mark(x, y, number)
    yield Markup("</g>")


def _whiskers(frame: _Frame, point: Point) -> Iterable[Markup]:
    ends = []
    if point.y_interval is not None:
        ends.append([frame.at(point.x, y) for y in point.y_interval])
    if point.x_interval is not None:
        ends.append([frame.at(x, point.y) for x in point.x_interval])
    for (x1, y1), (x2, y2) in ends:
        yield _line("whisker", _n(x1), _n(y1), _n(x2), _n(y2))


def _legend(series: Series, number: int, left: float, top: float) -> Markup:
    x, y = left + 10, top + _LEGEND_ROW * number + 4
    kind = "baseline" if series.baseline else f"s{number % len(_MARKS)}"
    dash = _line("path", _n(x - 10), _n(y), _n(x + 10), _n(y)) if series.joined else Markup("")
    drawn = Markup('<g class="{}">{}{}</g>').format(kind, dash, _mark(_n(x), _n(y), number))
    return drawn + _text(_n(x + 18), _n(y + 4), series.name, "start")


def _mark(x: str, y: str, number: int) -> Markup:
    shape = _MARKS[number % len(_MARKS)]
    return Markup('<path class="mark" transform="translate({} {})" d="{}"/>').format(x, y, shape)


def _line(kind: str, x1: str, y1: str, x2: str, y2: str) -> Markup:
    drawn = Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>')
    return drawn.format(kind, x1, y1, x2, y2)


def _text(x: str, y: str, words: str, anchor: str, kind: str = "tick") -> Markup:
    drawn = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')
    return drawn.format(kind, x, y, anchor, words)


def _svg(
    ident: str, title: str, description: str, kind: str, size: tuple[float, float], inside: Markup
) -> Markup:
    return Markup(
        '<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        'aria-labelledby="{ident}-title {ident}-desc"><title id="{ident}-title">{title}</title>'
        '<desc id="{ident}-desc">{description}</desc>{inside}</svg>'
    ).format(
        kind=kind,
        width=_n(size[0]),
        height=_n(size[1]),
        ident=ident,
        title=title,
        description=description,
        inside=inside,
    )


def _round_step(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten, such that about five steps make the span."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next((k for k in (1, 2, 5) if rough / power <= k * 1.2), 10)


def _tick(value: float, step: float, shares: bool) -> str:
    decimals = max(0, -math.floor(math.log10(step * (100 if shares else 1)) + 1e-9))
    shown = value * 100 if shares else value
    words = f"{shown + 0.0:,.{decimals}f}"
    return f"{words}%" if shares else words


def _n(value: float) -> str:
    """Write a coordinate in as few digits as can be seen."""
    return f"{value:.1f}".removesuffix(".0")
