"""Scatter panels side by side, as SVG and PNG: colour says the class, shape the domain."""

import html
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, MARGIN, HEAD, LINE = 420, 16, 46, 20
RADIUS = 3.2
SCALE = 2
"""Pixels of the PNG per unit of the SVG."""

Colour = tuple[int, int, int]
Outline = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One scatter of points."""

    title: str
    note: str
    """A line below the title."""
    layout: np.ndarray
    """Places of the points, [N, 2], in any unit."""

    def placed(self, number: int) -> np.ndarray:
        """Places on the page, for the panel at this number from the left."""
        low, high = self.layout.min(0), self.layout.max(0)
        shares = (self.layout - low) / np.maximum(high - low, 1e-9)
        inner = SIDE - 2 * MARGIN
        left = MARGIN + number * (SIDE + MARGIN)
        return np.array([left + MARGIN, HEAD + MARGIN]) + shares * inner


@dataclass(frozen=True, kw_only=True)
class _Words:
    x: float
    y: float
    text: str
    size: int = 12


def outline(x: float, y: float, shape: int, radius: float = RADIUS) -> Outline:
    """Corners of a mark: circle, square, triangle, diamond, star, cross; then they repeat."""
    if shape % 6 == 5:
        arms = [(1, 0.3), (0.3, 0.3), (0.3, 1)]
        quarter = [*arms, *[(-b, a) for a, b in arms]]
        corners = [*quarter, *[(-a, -b) for a, b in quarter]]
        return [(x + 1.2 * radius * a, y + 1.2 * radius * b) for a, b in corners]
    count, turn, reach = [(12, 0, 1), (4, 45, 1.25), (3, -90, 1.35), (4, 0, 1.3), (10, -90, 1.5)][
        shape % 6
    ]
    angles = np.radians(turn + np.arange(count) * 360 / count)
    reaches = [radius * reach * (0.45 if count == 10 and n % 2 else 1) for n in range(count)]
    return [
        (x + r * float(np.cos(a)), y + r * float(np.sin(a)))
        for a, r in zip(angles, reaches, strict=True)
    ]


def page_size(num_panels: int, num_classes: int, num_domains: int) -> tuple[int, int]:
    """(width, height) of the whole in SVG units, legend included."""
    width = MARGIN + num_panels * (SIDE + MARGIN)
    columns = max(1, (width - 2 * MARGIN) // 140)
    lines = -(-num_classes // columns) + -(-num_domains // columns)
    return width, HEAD + SIDE + MARGIN + LINE * lines + MARGIN


def _legend(
    width: int, classes: Sequence[tuple[str, Colour]], domains: Sequence[str]
) -> Iterator[tuple[Outline, Colour, _Words]]:
    """Marks with words below the panels: a line or more of classes, then of domains."""
    columns = max(1, (width - 2 * MARGIN) // 140)
    y = HEAD + SIDE + MARGIN + LINE // 2
    entries = [(name, colour, 0) for name, colour in classes]
    skipped = -len(entries) % columns
    for number, (name, colour, shape) in enumerate(
        [*entries, *[("", (0, 0, 0), 0)] * skipped]
        + [(name, (90, 90, 90), shape) for shape, name in enumerate(domains)]
    ):
        if name:
            x = MARGIN + 8 + 140 * (number % columns)
            row = y + LINE * (number // columns)
            yield outline(x, row, shape, 4.5), colour, _Words(x=x + 10, y=row + 4, text=name)


def _titles(panels: Sequence[Panel]) -> list[_Words]:
    words = []
    for number, panel in enumerate(panels):
        left = MARGIN + number * (SIDE + MARGIN)
        words += [_Words(x=left, y=20, text=panel.title, size=15)]
        words += [_Words(x=left, y=38, text=panel.note)]
    return words


def draw_svg(
    path: Path,
    panels: Sequence[Panel],
    *,
    classes: Sequence[tuple[str, Colour]],
    domains: Sequence[str],
    colours: Sequence[Colour],
    shapes: Sequence[int],
) -> None:
    """Write the panels as SVG, whole or not at all.

    Args:
        path: of the file.
        panels: of the same points.
        classes: names and colours for the legend.
        domains: names of the shapes, in their order.
        colours: of each point.
        shapes: of each point, a number of `domains`.
    """
    width, height = page_size(len(panels), len(classes), len(domains))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" role="img">',
        f"<title>{html.escape('Features: ' + ', '.join(panel.title for panel in panels))}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, panel in enumerate(panels):
        left = MARGIN + number * (SIDE + MARGIN)
        frame = f'x="{left}" y="{HEAD}" width="{SIDE}" height="{SIDE}"'
        parts.append(f'<rect {frame} fill="#fafafa" stroke="#ccc"/>')
        places = zip(panel.placed(number), colours, shapes, strict=True)
        parts += [_svg_mark(outline(*place, shape), colour) for place, colour, shape in places]
    words = _titles(panels)
    for corners, colour, word in _legend(width, classes, domains):
        parts.append(_svg_mark(corners, colour))
        words.append(word)
    parts += [_svg_words(word) for word in words]
    _write(path, "\n".join([*parts, "</svg>\n"]).encode())


def _svg_mark(corners: Outline, colour: Colour) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f'<polygon points="{points}" fill="rgb{colour}" stroke="#0006" stroke-width=".4"/>'


def _svg_words(word: _Words) -> str:
    place = f'x="{word.x:g}" y="{word.y:g}" font-size="{word.size}"'
    return f"<text {place}>{html.escape(word.text)}</text>"


def draw_png(
    path: Path,
    panels: Sequence[Panel],
    *,
    classes: Sequence[tuple[str, Colour]],
    domains: Sequence[str],
    colours: Sequence[Colour],
    shapes: Sequence[int],
) -> None:
    """Write the panels as PNG of twice the SVG's size, whole or not at all; see `draw_svg`."""
    width, height = page_size(len(panels), len(classes), len(domains))
    page = Image.new("RGB", (SCALE * width, SCALE * height), "white")
    draw = ImageDraw.Draw(page)

    def mark(corners: Outline, colour: Colour) -> None:
        draw.polygon([(SCALE * x, SCALE * y) for x, y in corners], colour, (90, 90, 90))

    for number, panel in enumerate(panels):
        left = MARGIN + number * (SIDE + MARGIN)
        box = [SCALE * edge for edge in (left, HEAD, left + SIDE, HEAD + SIDE)]
        draw.rectangle(box, (250, 250, 250), (204, 204, 204))
        for place, colour, shape in zip(panel.placed(number), colours, shapes, strict=True):
            mark(outline(*place, shape), colour)
    words = _titles(panels)
    for corners, colour, word in _legend(width, classes, domains):
        mark(corners, colour)
        words.append(word)
    for word in words:
        font = ImageFont.load_default(SCALE * word.size)
        draw.text((SCALE * word.x, SCALE * word.y), word.text, "black", font, anchor="ls")
    held = io.BytesIO()
    page.save(held, format="PNG")
    _write(path, held.getvalue())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
