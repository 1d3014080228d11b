"""Line charts as plain geometry: ticks, scales and SVG path data, which a template then draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 28
_POINTS_MAX = 160

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A value on an axis and its place in SVG units."""

    text: str
    at: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: its values (thinned), the path through them and a smoothed path."""

    label: str
    colour: int
    path: str
    smooth: str
    points: tuple[tuple[float, float], ...]
    """(step, value) of the thinned line."""
    last: float


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """One quantity over the steps, one curve per training."""

    name: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def line_chart(name: str, lines: Mapping[str, Points], colours: Mapping[str, int]) -> LineChart:
    """A chart of one or more lines of (step, value); no line may be empty.

    Args:
        name: what the values are.
        lines: label -> points, steps ascending.
        colours: label -> colour number.
    """
    thin = {label: thinned(points) for label, points in lines.items()}
    smooth = {label: smoothed(points) for label, points in thin.items()}
    steps = [step for points in thin.values() for step, _ in points]
    values = [value for points in thin.values() for _, value in points]
    x_range = (min(0.0, *steps), max(steps) or 1.0)
    y_ticks = ticks(min(values), max(values))
    y_range = (y_ticks[0], y_ticks[-1])

    def x_of(step: float) -> float:
        return _LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        share = (value - y_range[0]) / (y_range[1] - y_range[0])
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def path(points: Points) -> str:
        return "M" + "L".join(f"{x_of(step):.1f} {y_of(value):.1f}" for step, value in points)

    curves = tuple(
        Curve(
            label=label,
            colour=colours.get(label, 0),
            path=path(points),
            smooth=path(smooth[label]),
            points=tuple((step, float(f"{value:.5g}")) for step, value in points),
            last=smooth[label][-1][1],
        )
        for label, points in thin.items()
    )
    return LineChart(
        name=name,
        curves=curves,
        x_ticks=tuple(
            Tick(text=short(step), at=x_of(step))
            for step in ticks(*x_range, about=5)
            if step <= x_range[1] and step == int(step)
        ),
        y_ticks=tuple(Tick(text=short(value), at=y_of(value)) for value in y_ticks),
        x_range=x_range,
        y_range=y_range,
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that cover [low, high], `about` of them: steps of 1, 2 or 5 times ten to the n.

    A single value gets a range around it.
    """
    if not high > low:
        pad = abs(low) * 0.5 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, about - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def thinned(points: Points, most: int = _POINTS_MAX) -> list[tuple[float, float]]:
    """At most `most` points: means of equal runs of neighbours, at their last step."""
    if len(points) <= most:
        return list(points)
    thin = []
    for number in range(most):
        run = points[number * len(points) // most : (number + 1) * len(points) // most]
        thin.append((run[-1][0], sum(value for _, value in run) / len(run)))
    return thin


def smoothed(points: Points) -> list[tuple[float, float]]:
    """A centred moving average over about a twelfth of the line; short lines stay as they are."""
    reach = len(points) // 24
    values = [value for _, value in points]
    result = []
    for number, (step, _) in enumerate(points):
        near = min(reach, number, len(points) - 1 - number)
        window = values[number - near : number + near + 1]
        result.append((step, sum(window) / len(window)))
    return result


def short(value: float) -> str:
    """A number in few letters: 0.25, 12k, 1e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
