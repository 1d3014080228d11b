"""The picture of a study: one panel for the mean and one per target, one line per row, as SVG.

Every seed is a dot, the mean a diamond, the standard deviation a bar.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.charts import Tick, short, ticks
from stages.study_table import Row, Spread, Table, spread_text

_LINE = 26
_GROUP_GAP = 12
_LABEL_WIDTH = 200
_VALUE_WIDTH = 96
_PANEL_WIDTH = {True: 260, False: 130}
"""Of the mean, and of a target."""
_GAP = 22
_TOP = 46
_BOTTOM = 58


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One row in one panel, in SVG units."""

    y: float
    colour: int
    dots: tuple[float, ...]
    mean: float | None
    low: float | None
    """Mean less one standard deviation; None: fewer than two seeds."""
    high: float | None
    title: str
    """What a pointer over it reads."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity of all rows."""

    name: str
    left: float
    width: float
    ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row's words."""

    y: float
    case: str
    """Empty where the row above belongs to the same case."""
    model: str
    value: str


def draw(table: Table) -> str:
    """The picture as an SVG document; needs at least one row."""
    heights = _heights(table.rows)
    colours = {model: n for n, model in enumerate(dict.fromkeys(row.model for row in table.rows))}
    panels, left = [], float(_LABEL_WIDTH)
    for name in ("mean", *table.targets):
        width = _PANEL_WIDTH[name == "mean"]
        spreads = [row.mean if name == "mean" else row.targets[name] for row in table.rows]
        panels.append(_panel(name, spreads, table.rows, heights, colours, left, width))
        left += width + _GAP + (_VALUE_WIDTH if name == "mean" else 0)
    lines = [
        Line(
            y=y,
            case=row.case if number == 0 or table.rows[number - 1].case != row.case else "",
            model=row.model,
            value=spread_text(row.mean),
        )
        for number, (row, y) in enumerate(zip(table.rows, heights, strict=True))
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    bottom = heights[-1] + _LINE / 2
    return environment.get_template("study.svg.j2").render(
        table=table,
        lines=lines,
        panels=panels,
        width=left,
        height=bottom + _BOTTOM,
        top=_TOP,
        bottom=bottom,
        value_left=_LABEL_WIDTH + _PANEL_WIDTH[True] + 8,
    )


def _heights(rows: Sequence[Row]) -> list[float]:
    heights, y = [], _TOP + _LINE / 2
    for number, row in enumerate(rows):
        if number and rows[number - 1].case != row.case:
            y += _GROUP_GAP
        heights.append(y)
        y += _LINE
    return heights


def _panel(
    name: str,
    spreads: Sequence[Spread],
    rows: Sequence[Row],
    heights: Sequence[float],
    colours: dict[str, int],
    left: float,
    width: float,
) -> Panel:
    known = [100 * value for spread in spreads for value in spread.known] or [0.0, 1.0]
    bars = [
        100 * (spread.mean + side * spread.std)
        for spread in spreads
        if spread.mean is not None and spread.std is not None
        for side in (-1, 1)
    ]
    places = ticks(min([*known, *bars]), max([*known, *bars]), about=5 if name == "mean" else 3)

    def x_of(value: float) -> float:
        return left + width * (100 * value - places[0]) / (places[-1] - places[0])

    marks = []
    for row, spread, y in zip(rows, spreads, heights, strict=True):
        mean, std = spread.mean, spread.std
        ranged = mean is not None and std is not None
        marks.append(
            Mark(
                y=y,
                colour=colours[row.model] % 6,
                dots=tuple(x_of(value) for value in spread.known),
                mean=None if mean is None else x_of(mean),
                low=x_of(mean - std) if ranged else None,
                high=x_of(mean + std) if ranged else None,
                title=f"{row.case}, {row.model}: {name} {spread_text(spread)}",
            )
        )
    return Panel(
        name=name,
        left=left,
        width=width,
        ticks=tuple(Tick(text=short(value), at=x_of(value / 100)) for value in places),
        marks=tuple(marks),
    )
