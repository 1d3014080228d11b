"""Colours of the miniature world's surfaces, by palette. Each is linear-looking RGB in 0..1."""

from __future__ import annotations

import random
from colorsys import hsv_to_rgb

Colour = tuple[float, float, float]
Hsv = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

FACADES: dict[str, tuple[Hsv, ...]] = {
    "engine": (
        ((0.07, 0.08), (0.28, 0.32), (0.70, 0.74)),
        ((0.58, 0.59), (0.08, 0.11), (0.62, 0.66)),
        ((0.02, 0.03), (0.42, 0.46), (0.55, 0.58)),
    ),
    "mixed": (
        ((0.00, 0.15), (0.10, 0.50), (0.30, 0.85)),
        ((0.00, 1.00), (0.00, 0.12), (0.25, 0.90)),
        ((0.50, 0.68), (0.08, 0.45), (0.25, 0.75)),
        ((0.00, 1.00), (0.15, 0.45), (0.40, 0.85)),
    ),
    "old_town": (
        ((0.09, 0.15), (0.15, 0.45), (0.55, 0.85)),
        ((0.02, 0.07), (0.15, 0.40), (0.50, 0.80)),
        ((0.25, 0.50), (0.06, 0.18), (0.50, 0.75)),
        ((0.08, 0.12), (0.05, 0.15), (0.40, 0.70)),
    ),
    "concrete": (
        ((0.08, 0.14), (0.02, 0.10), (0.35, 0.75)),
        ((0.55, 0.65), (0.05, 0.35), (0.20, 0.60)),
    ),
    "brick": (
        ((0.98, 1.04), (0.40, 0.65), (0.30, 0.55)),
        ((0.05, 0.09), (0.30, 0.55), (0.35, 0.60)),
        ((0.08, 0.12), (0.05, 0.15), (0.55, 0.80)),
    ),
    "nordic": (
        ((0.99, 1.02), (0.50, 0.75), (0.35, 0.60)),
        ((0.11, 0.14), (0.30, 0.60), (0.55, 0.80)),
        ((0.55, 0.62), (0.10, 0.35), (0.35, 0.70)),
        ((0.00, 1.00), (0.00, 0.05), (0.65, 0.90)),
    ),
    "tropical": (
        ((0.00, 1.00), (0.30, 0.65), (0.60, 0.95)),
        ((0.10, 0.16), (0.10, 0.40), (0.70, 0.95)),
    ),
    "desert": (((0.07, 0.11), (0.20, 0.50), (0.50, 0.85)),),
}

CAR_PAINTS: tuple[tuple[str, Hsv], ...] = (
    ("white", ((0.10, 0.60), (0.00, 0.04), (0.82, 0.97))),
    ("black", ((0.55, 0.70), (0.00, 0.20), (0.05, 0.14))),
    ("grey", ((0.55, 0.65), (0.00, 0.10), (0.28, 0.60))),
    ("silver", ((0.55, 0.65), (0.00, 0.06), (0.62, 0.80))),
    ("red", ((0.98, 1.02), (0.70, 0.95), (0.45, 0.80))),
    ("blue", ((0.56, 0.64), (0.55, 0.90), (0.25, 0.75))),
    ("green", ((0.33, 0.45), (0.40, 0.80), (0.20, 0.50))),
    ("yellow", ((0.12, 0.15), (0.75, 0.95), (0.75, 0.95))),
)


def pick(rng: random.Random, hsv: Hsv) -> Colour:
    """A colour drawn uniformly from a box in hue, saturation and value."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in hsv)
    return hsv_to_rgb(hue % 1.0, saturation, value)


def facade(rng: random.Random, palette: str) -> Colour:
    """A house front."""
    return pick(rng, rng.choice(FACADES[palette]))


def car_paint(rng: random.Random, palette: str) -> tuple[str, Colour]:
    """A car's colour and the word for it; the engine knows three paints only."""
    paints = CAR_PAINTS[0], CAR_PAINTS[4], CAR_PAINTS[5]
    weights = None
    if palette != "engine":
        paints, weights = CAR_PAINTS, (5, 5, 5, 4, 2.5, 2.5, 1, 1)
    word, hsv = rng.choices(paints, weights)[0]
    return word, pick(rng, hsv)


def cloth(rng: random.Random, palette: str) -> Colour:
    """A garment: often dark, sometimes bright."""
    if palette == "engine":
        return rng.choice(((0.75, 0.15, 0.15), (0.15, 0.25, 0.65), (0.85, 0.80, 0.30)))
    if rng.random() < 0.5:
        return pick(rng, ((0.0, 1.0), (0.0, 0.35), (0.05, 0.35)))
    return pick(rng, ((0.0, 1.0), (0.1, 0.9), (0.25, 0.95)))


def leaf(rng: random.Random, palette: str, season: str) -> Colour:
    """A crown or a bush in its season."""
    if palette == "engine":
        return pick(rng, ((0.30, 0.32), (0.60, 0.65), (0.40, 0.45)))
    boxes = {
        "summer": ((0.20, 0.38), (0.30, 0.70), (0.18, 0.50)),
        "autumn": ((0.03, 0.17), (0.50, 0.85), (0.30, 0.75)),
        "bare": ((0.04, 0.10), (0.15, 0.35), (0.20, 0.38)),
    }
    return pick(rng, boxes[season])


def grass(rng: random.Random, palette: str, season: str) -> Colour:
    """Terrain beside the road."""
    if palette == "engine":
        return (0.38, 0.55, 0.22)
    if palette == "desert" or rng.random() < 0.2:
        return pick(rng, ((0.07, 0.12), (0.25, 0.50), (0.40, 0.70)))
    boxes = {
        "summer": ((0.19, 0.32), (0.35, 0.70), (0.28, 0.60)),
        "autumn": ((0.12, 0.20), (0.35, 0.60), (0.30, 0.55)),
        "bare": ((0.10, 0.16), (0.20, 0.40), (0.28, 0.48)),
    }
    return pick(rng, boxes[season])


def pavement(rng: random.Random, palette: str) -> Colour:
    """A sidewalk."""
    if palette == "engine":
        return (0.66, 0.64, 0.62)
    return pick(rng, ((0.02, 0.14), (0.01, 0.20), (0.35, 0.75)))


def asphalt(rng: random.Random, palette: str) -> Colour:
    """A carriageway."""
    if palette == "engine":
        return (0.33, 0.33, 0.35)
    value = rng.uniform(0.18, 0.55)
    warm = rng.uniform(-0.03, 0.03)
    return (value + warm, value, value - warm)
