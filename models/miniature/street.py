"""Put a miniature street together: layout, then what stands and moves, far before near."""

from __future__ import annotations

import random
from collections.abc import Callable

from models.miniature import actors, scenery
from models.miniature import materials as m
from models.miniature.canvas import Canvas
from models.miniature.scenery import Layout

Placed = tuple[float, Callable[[], object]]
"""Something to draw, with its depth in metres."""


def draw_street(canvas: Canvas, rng: random.Random, layout: Layout) -> list[str]:
    """Draw the whole street; returns words that the caption may use for colours of cars."""
    scenery.draw_ground(canvas, rng, layout)
    scenery.draw_sides(canvas, rng, layout)
    words: list[str] = []
    placed = [
        *_place_furniture(canvas, rng, layout),
        *_place_traffic(canvas, rng, layout, words),
        *_place_people(canvas, rng, layout),
    ]
    placed.sort(key=lambda entry: -entry[0])
    for _, draw in placed:
        draw()
    return words


def _place_furniture(canvas: Canvas, rng: random.Random, layout: Layout) -> list[Placed]:
    placed: list[Placed] = []

    def put(z: float, draw: Callable[..., object], *arguments: object) -> None:
        placed.append((z, lambda: draw(canvas, rng, *arguments)))

    trees = layout.kind in ("park", "suburb") or (layout.kind != "highway" and rng.random() < 0.4)
    for side in (-1, 1):
        kerb = side * (layout.road_half + 0.5)
        z = rng.uniform(4, 18)
        while z < 80:
            put(z, scenery.draw_lamp, layout, kerb, z)
            z += rng.uniform(14, 26)
        if trees:
            z = rng.uniform(5, 18)
            while z < 80:
                x = side * (layout.road_half + rng.uniform(0.8, max(1.0, layout.kerb_room(side))))
                put(z, scenery.draw_tree, layout, x, z, rng.uniform(4, 9))
                z += rng.uniform(6, 22)
        for _ in range(_poisson(rng, 1.6 * layout.clutter)):
            z = rng.uniform(5, 45)
            put(z, scenery.draw_sign, kerb + side * rng.uniform(-0.1, 0.8), z)
        for _ in range(_poisson(rng, 0.5 * layout.clutter)):
            z = rng.uniform(5, 35)
            put(z, scenery.draw_bin, side * (layout.road_half + rng.uniform(0.6, 1.4)), z)
        if layout.kind == "highway" and rng.random() < 0.6:
            kind = rng.choice(("fence", "wall"))
            put(60.0, scenery.draw_barrier, layout, kerb, 1.0, 60.0, kind)
        if layout.kind in ("city", "square") and rng.random() < 0.15 * layout.clutter:
            z0 = rng.uniform(4, 20)
            put(z0 + 8, scenery.draw_barrier, layout, kerb, z0, z0 + rng.uniform(5, 14), "fence")
    crossing = layout.crossing_m
    if layout.kind != "country" and (crossing or rng.random() < 0.3):
        z = (crossing or rng.uniform(12, 30)) - 1
        for side in (-1, 1):
            if rng.random() < 0.8:
                put(z, scenery.draw_traffic_light, side * (layout.road_half + 0.6), z)
    return placed


def _place_traffic(
    canvas: Canvas, rng: random.Random, layout: Layout, words: list[str]
) -> list[Placed]:
    placed: list[Placed] = []
    palette = layout.palette

    def vehicle(label: int, x: float, z: float, oncoming: bool) -> None:
        def draw() -> None:
            words.append(actors.draw_vehicle(canvas, rng, label, palette, x, z, oncoming=oncoming))

        placed.append((z, draw))

    lanes = max(layout.lanes, 2)
    lane_width = 2 * layout.road_half / lanes
    for lane in range(lanes):
        x = -layout.road_half + (lane + 0.5) * lane_width
        if abs(x - canvas.camera.lateral_m) < 0.9 and rng.random() < 0.35:
            continue
        z = rng.uniform(5, 30) / layout.clutter
        while z < 75:
            label = rng.choices((m.CAR, m.TRUCK, m.BUS), (7.0, 1.2, 1.0))[0]
            vehicle(label, x + rng.uniform(-0.3, 0.3), z, x < 0)
            z += rng.uniform(12, 40) / layout.clutter
    for side in (-1, 1):
        if layout.kind == "highway" or rng.random() > 0.55 * layout.clutter:
            continue
        x = side * (layout.road_half - 0.9)
        z = rng.uniform(3, 14)
        while z < 60:
            if rng.random() < 0.75:
                vehicle(m.CAR if rng.random() < 0.93 else m.TRUCK, x, z, rng.random() < 0.4)
            z += rng.uniform(5.4, 7.5)
    if layout.kind in ("city", "square") and rng.random() < 0.12:
        z = rng.uniform(8, 35)
        vehicle(m.TRAIN, rng.choice((-1, 1)) * lane_width / 2, z, rng.random() < 0.5)
    if layout.crossing_m and rng.random() < 0.6 * layout.clutter:
        z = layout.crossing_m + rng.uniform(2, 5)
        x = rng.uniform(-14, 8)
        placed.append(
            (
                z,
                lambda: words.append(actors.draw_crossing_car(canvas, rng, palette, x, z)),
            )
        )
    return placed


def _place_people(canvas: Canvas, rng: random.Random, layout: Layout) -> list[Placed]:
    placed: list[Placed] = []
    palette = layout.palette
    crowd = {"city": 4.0, "square": 4.5, "suburb": 2.0, "park": 2.2, "country": 0.5}
    for _ in range(_poisson(rng, crowd.get(layout.kind, 0.3) * layout.clutter)):
        side = rng.choice((-1, 1))
        z = rng.uniform(4, 34)
        x = side * (layout.road_half + rng.uniform(0.3, max(0.8, layout.kerb_room(side))))
        if rng.random() < 0.15:
            x = rng.uniform(-layout.road_half, layout.road_half)
        for follower in range(rng.choice((1, 1, 1, 2, 3))):
            spot = (x + 0.6 * follower, z + 0.2 * follower)
            placed.append(
                (spot[1], lambda spot=spot: actors.draw_person(canvas, rng, palette, *spot))
            )
    wheels = {"highway": 0.5, "country": 0.7}.get(layout.kind, 1.7) * layout.clutter
    for _ in range(_poisson(rng, wheels)):
        z = rng.uniform(4, 30)
        motor, ridden = rng.random() < 0.4, rng.random() < 0.6
        side = rng.choice((-1, 1))
        x = side * (layout.road_half + 0.6)
        if ridden:
            x = side * rng.uniform(0.45, 0.9) * layout.road_half
        sideways = rng.random() < (0.3 if ridden else 0.75)

        def draw(x=x, z=z, motor=motor, ridden=ridden, sideways=sideways) -> None:
            actors.draw_two_wheeler(
                canvas, rng, palette, x, z, motor=motor, ridden=ridden, sideways=sideways
            )

        placed.append((z, draw))
    return placed


def _poisson(rng: random.Random, mean: float) -> int:
    """A Poisson draw by counting unit exponentials (small means only)."""
    count, elapsed = 0, rng.expovariate(1.0)
    while elapsed < mean and count < 40:
        count += 1
        elapsed += rng.expovariate(1.0)
    return count
