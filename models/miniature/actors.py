"""Who moves in a miniature street: vehicles, people on foot, people on two wheels."""

from __future__ import annotations

import itertools
import random

from models.miniature import canvas as surface
from models.miniature import materials as m
from models.miniature import palettes
from models.miniature.canvas import Canvas
from models.miniature.palettes import Colour

GLASS: Colour = (0.12, 0.15, 0.19)
TYRE: Colour = (0.05, 0.05, 0.05)

Profile = tuple[tuple[float, float], ...]
"""Side view as (share of the length from the rear, share of the height)."""

CAR_PROFILES: tuple[Profile, ...] = (
    ((0, 0.15), (0, 0.62), (0.05, 0.72), (0.22, 1), (0.62, 1), (0.78, 0.66), (1, 0.55), (1, 0.15)),
    ((0, 0.15), (0, 0.60), (0.16, 0.66), (0.30, 1), (0.60, 1), (0.74, 0.66), (1, 0.56), (1, 0.15)),
    ((0, 0.15), (0.01, 0.9), (0.06, 1), (0.66, 1), (0.82, 0.62), (1, 0.55), (1, 0.15)),
)
BOX_PROFILE: Profile = ((0, 0.1), (0, 1), (1, 1), (1, 0.1))
VAN_PROFILE: Profile = ((0, 0.12), (0, 1), (0.78, 1), (0.9, 0.55), (1, 0.45), (1, 0.12))

KINDS: dict[int, tuple[tuple[float, float], ...]] = {
    m.CAR: ((3.7, 4.8), (1.65, 1.95), (1.4, 1.75)),
    m.TRUCK: ((6.0, 10.0), (2.2, 2.6), (2.6, 3.9)),
    m.BUS: ((9.0, 13.0), (2.4, 2.6), (2.9, 3.4)),
    m.TRAIN: ((16.0, 26.0), (2.5, 2.7), (3.2, 3.7)),
}
"""Ranges of length, width and height in metres."""


def draw_vehicle(
    canvas: Canvas,
    rng: random.Random,
    label: int,
    palette: str,
    x: float,
    z: float,
    *,
    oncoming: bool,
) -> str:
    """A vehicle along the road, its near end at depth z. Returns its colour's word."""
    length, width, height = (rng.uniform(*bounds) for bounds in KINDS[label])
    word, paint = palettes.car_paint(rng, palette)
    entity = canvas.entity()
    profile = rng.choice(CAR_PROFILES)
    if label in (m.BUS, m.TRAIN):
        profile = BOX_PROFILE
    elif label == m.TRUCK:
        profile = VAN_PROFILE if rng.random() < 0.4 else BOX_PROFILE
    if oncoming:
        profile = tuple((1 - u, v) for u, v in reversed(profile))
    _draw_shadow(canvas, x, z, width, length)
    x0, x1 = x - width / 2, x + width / 2
    eye_x = canvas.camera.lateral_m
    near_x = x0 if abs(x0 - eye_x) < abs(x1 - eye_x) else x1
    flank_shows = not x0 < eye_x < x1
    shade = tuple(c * 0.82 for c in paint)
    body = canvas.part(label, shade, entity=entity, z=z + length / 2, face=surface.TOP)
    for u0, u1 in itertools.pairwise(profile):
        canvas.world_polygon(
            (
                (x0, u0[1] * height, z + u0[0] * length),
                (x1, u0[1] * height, z + u0[0] * length),
                (x1, u1[1] * height, z + u1[0] * length),
                (x0, u1[1] * height, z + u1[0] * length),
            ),
            body,
        )
    if flank_shows:
        _draw_flank(canvas, rng, label, entity, paint, profile, near_x, z, length, height)
    _draw_end(canvas, rng, label, entity, paint, profile, x0, x1, z, height, oncoming)
    return word


def _draw_shadow(canvas: Canvas, x: float, z: float, width: float, length: float) -> None:
    shadow = canvas.part(
        m.ROAD,
        (0.07, 0.07, 0.08),
        entity=canvas.road_entity,
        texture=surface.ASPHALT,
        face=surface.GROUND,
    )
    half = width / 2 + 0.1
    canvas.world_polygon(
        (
            (x - half, 0, z + length),
            (x + half, 0, z + length),
            (x + half, 0, z - 0.15),
            (x - half, 0, z - 0.15),
        ),
        shadow,
    )


def _draw_flank(
    canvas: Canvas,
    rng: random.Random,
    label: int,
    entity: int,
    paint: Colour,
    profile: Profile,
    x: float,
    z: float,
    length: float,
    height: float,
) -> None:
    plane = canvas.wall_plane((x, z), (x, z + length))
    face = surface.RIGHT_WALL if x > canvas.camera.lateral_m else surface.LEFT_WALL
    flank = canvas.part(label, paint, entity=entity, plane=plane, face=face)
    canvas.world_polygon([(x, v * height, z + u * length) for u, v in profile], flank)
    glass = canvas.part(label, GLASS, entity=entity, plane=plane, face=face)
    tyre = canvas.part(label, TYRE, entity=entity, plane=plane, face=face)
    if label == m.CAR:
        roof = [(u, v) for u, v in profile if v > 0.95]
        u0, u1 = min(u for u, _ in roof), max(u for u, _ in roof)
        corners = ((u0 - 0.1, 0.66), (u0 + 0.02, 0.93), (u1 - 0.02, 0.93), (u1 + 0.09, 0.66))
        canvas.world_polygon([(x, v * height, z + u * length) for u, v in corners], glass)
    elif label in (m.BUS, m.TRAIN):
        corners = ((0.03, 0.5), (0.03, 0.85), (0.97, 0.85), (0.97, 0.5))
        canvas.world_polygon([(x, v * height, z + u * length) for u, v in corners], glass)
    else:
        cab = (0.0, 0.2) if rng.random() < 0.5 else (0.8, 1.0)
        corners = ((cab[0], 0.5), (cab[0], 0.85), (cab[1], 0.85), (cab[1], 0.5))
        canvas.world_polygon([(x, v * height, z + u * length) for u, v in corners], glass)
    if label == m.TRAIN:
        return
    radius = 0.34 if label == m.CAR else 0.5
    for u in (0.2, 0.8):
        centre = z + u * length
        points = ((-1, 0), (-0.7, 0.7), (0, 1), (0.7, 0.7), (1, 0), (0.7, -0.7), (-0.7, -0.7))
        canvas.world_polygon(
            [(x, max(0.0, radius + dy * radius), centre + dz * radius) for dz, dy in points], tyre
        )


def _draw_end(
    canvas: Canvas,
    rng: random.Random,
    label: int,
    entity: int,
    paint: Colour,
    profile: Profile,
    x0: float,
    x1: float,
    z: float,
    height: float,
    oncoming: bool,
) -> None:
    shade = tuple(c * 0.93 for c in paint)
    part = canvas.part(label, shade, entity=entity, z=z)
    low, high = profile[0][1] * height, profile[1][1] * height
    wide, middle = x1 - x0, (x0 + x1) / 2
    canvas.world_polygon(((x0, low, z), (x0, high, z), (x1, high, z), (x1, low, z)), part)
    glass = canvas.part(label, GLASS, entity=entity, z=z, face=surface.FRONT)
    if label == m.CAR:
        _draw_screen(canvas, profile, x0, x1, z, height, glass)
    elif label == m.BUS or oncoming:
        top, sill = 0.9 * height, 0.45 * height
        canvas.world_polygon(
            (
                (x0 + 0.1 * wide, sill, z),
                (x0 + 0.1 * wide, top, z),
                (x1 - 0.1 * wide, top, z),
                (x1 - 0.1 * wide, sill, z),
            ),
            glass,
        )
    colour = (1.0, 0.95, 0.8) if oncoming else (0.8, 0.06, 0.05)
    lamp = canvas.part(label, colour, entity=entity, z=z, emission=1.0 if oncoming else 0.6)
    row = low + 0.32 * (min(high, 1.2) - low) + 0.2
    for x in (x0 + 0.12 * wide, x1 - 0.12 * wide):
        half_w, half_h = 0.09 * wide, 0.09
        canvas.world_polygon(
            (
                (x - half_w, row - half_h, z),
                (x - half_w, row + half_h, z),
                (x + half_w, row + half_h, z),
                (x + half_w, row - half_h, z),
            ),
            lamp,
        )
    plate = canvas.part(label, (0.85, 0.85, 0.8), entity=entity, z=z)
    canvas.world_polygon(
        (
            (middle - 0.25, low + 0.1, z),
            (middle - 0.25, low + 0.22, z),
            (middle + 0.25, low + 0.22, z),
            (middle + 0.25, low + 0.1, z),
        ),
        plate,
    )
    tyre = canvas.part(label, TYRE, entity=entity, z=z)
    for x in (x0 + 0.08 * wide, x1 - 0.08 * wide):
        canvas.world_polygon(
            ((x - 0.11, 0, z), (x - 0.11, low, z), (x + 0.11, low, z), (x + 0.11, 0, z)), tyre
        )


def _draw_screen(
    canvas: Canvas, profile: Profile, x0: float, x1: float, z: float, height: float, glass: int
) -> None:
    shoulder = next((u, v) for u, v in profile if v >= 0.6)
    roof = next((u, v) for u, v in profile if v > 0.95)
    wide = x1 - x0
    length = 4.2
    low_y, high_y = (max(shoulder[1], 0.62) + 0.02) * height, 0.93 * height
    low_z, high_z = z + shoulder[0] * length, z + roof[0] * length
    canvas.world_polygon(
        (
            (x0 + 0.08 * wide, low_y, low_z),
            (x0 + 0.16 * wide, high_y, high_z),
            (x1 - 0.16 * wide, high_y, high_z),
            (x1 - 0.08 * wide, low_y, low_z),
        ),
        glass,
    )


def draw_crossing_car(canvas: Canvas, rng: random.Random, palette: str, x: float, z: float) -> str:
    """A car seen from its side, crossing the road. Returns its colour's word."""
    length, _, height = (rng.uniform(*bounds) for bounds in KINDS[m.CAR])
    word, paint = palettes.car_paint(rng, palette)
    entity = canvas.entity()
    profile = rng.choice(CAR_PROFILES)
    if rng.random() < 0.5:
        profile = tuple((1 - u, v) for u, v in profile)
    shadow = canvas.part(m.ROAD, (0.07, 0.07, 0.08), entity=canvas.road_entity, face=surface.GROUND)
    canvas.world_polygon(
        ((x, 0, z + 1.8), (x + length, 0, z + 1.8), (x + length, 0, z - 0.1), (x, 0, z - 0.1)),
        shadow,
    )
    body = canvas.part(m.CAR, paint, entity=entity, z=z)
    canvas.world_polygon([(x + u * length, v * height, z) for u, v in profile], body)
    roof = [u for u, v in profile if v > 0.95]
    glass = canvas.part(m.CAR, GLASS, entity=entity, z=z)
    u0, u1 = min(roof), max(roof)
    corners = ((u0 - 0.08, 0.66), (u0 + 0.01, 0.93), (u1 - 0.01, 0.93), (u1 + 0.08, 0.66))
    canvas.world_polygon([(x + u * length, v * height, z) for u, v in corners], glass)
    tyre = canvas.part(m.CAR, TYRE, entity=entity, z=z)
    scale = canvas.camera.focal_px / z
    for u in (0.2, 0.8):
        canvas.ellipse(
            canvas.camera.project(x + u * length, 0.33, z), 0.34 * scale, 0.34 * scale, tyre
        )
    return word


def draw_person(
    canvas: Canvas, rng: random.Random, palette: str, x: float, z: float, *, ground: float = 0.0
) -> None:
    """Somebody on foot."""
    entity, height = canvas.entity(), rng.uniform(1.5, 1.92)
    coat = canvas.part(m.PERSON, palettes.cloth(rng, palette), entity=entity, z=z)
    trousers = canvas.part(
        m.PERSON, tuple(0.7 * c for c in palettes.cloth(rng, palette)), entity=entity, z=z
    )
    skin_value = rng.uniform(0.25, 0.85)
    skin = (skin_value, skin_value * 0.78, skin_value * 0.65)
    head = canvas.part(m.PERSON, skin, entity=entity, z=z)
    project, scale = canvas.camera.project, canvas.camera.focal_px / z
    stride = rng.uniform(0.02, 0.3)
    hip = ground + 0.5 * height
    for step in (-stride, stride):
        canvas.line(
            project(x + step * 0.3, hip, z), project(x + step, ground, z), 0.17 * scale, trousers
        )
    half = rng.uniform(0.17, 0.25)
    shoulder = ground + 0.84 * height
    canvas.world_polygon(
        (
            (x - half * 0.8, hip - 0.1, z),
            (x - half, shoulder, z),
            (x + half, shoulder, z),
            (x + half * 0.8, hip - 0.1, z),
        ),
        coat,
    )
    for side in (-1, 1):
        hand = project(x + side * (half + rng.uniform(0.0, 0.2)), hip, z)
        canvas.line(project(x + side * half, shoulder - 0.05, z), hand, 0.1 * scale, coat)
    radius = 0.125 * scale
    canvas.ellipse(project(x, ground + 0.93 * height, z), radius, radius * 1.15, head)
    hair = canvas.part(m.PERSON, tuple(c * 0.3 for c in skin), entity=entity, z=z)
    canvas.ellipse(project(x, ground + 0.97 * height, z), radius, radius * 0.6, hair)


def draw_two_wheeler(
    canvas: Canvas,
    rng: random.Random,
    palette: str,
    x: float,
    z: float,
    *,
    motor: bool,
    ridden: bool,
    sideways: bool,
) -> None:
    """A bicycle or motorcycle, parked or with its rider."""
    label = m.MOTORCYCLE if motor else m.BICYCLE
    entity = canvas.entity()
    project, scale = canvas.camera.project, canvas.camera.focal_px / z
    tyre = canvas.part(label, TYRE, entity=entity, z=z)
    frame = canvas.part(label, palettes.car_paint(rng, palette)[1], entity=entity, z=z)
    radius = 0.34
    thick = (0.16 if motor else 0.09) * scale
    reach = (0.65 if motor else 0.52) if sideways else 0.0
    if sideways:
        for side in (-1, 1):
            centre = project(x + side * reach, radius, z)
            canvas.ellipse(centre, radius * scale, radius * scale, tyre)
            if not motor:
                hub = canvas.part(label, (0.45, 0.45, 0.45), entity=entity, z=z)
                canvas.ellipse(centre, 0.2 * scale, 0.2 * scale, hub)
        saddle, bars = project(x - 0.25, 0.9, z), project(x + 0.4, 1.05, z)
        for start, end in (
            (project(x - reach, radius, z), saddle),
            (saddle, bars),
            (bars, project(x + reach, radius, z)),
            (saddle, project(x, 0.35, z)),
            (project(x, 0.35, z), bars),
        ):
            canvas.line(start, end, max(1.2, thick), frame)
        if motor:
            canvas.world_polygon(
                ((x - 0.45, 0.4, z), (x - 0.5, 0.8, z), (x + 0.4, 0.95, z), (x + 0.3, 0.35, z)),
                frame,
            )
    else:
        canvas.line(project(x, 0, z), project(x, 2 * radius, z), max(1.5, 1.4 * thick), tyre)
        canvas.line(project(x, radius, z), project(x, 1.0, z), max(1.2, thick), frame)
        canvas.line(project(x - 0.28, 1.0, z), project(x + 0.28, 1.0, z), max(1.2, thick), frame)
        if motor:
            canvas.ellipse(project(x, 0.7, z), 0.2 * scale, 0.28 * scale, frame)
    if ridden:
        _draw_rider(canvas, rng, palette, x, z, sideways=sideways)


def _draw_rider(
    canvas: Canvas, rng: random.Random, palette: str, x: float, z: float, *, sideways: bool
) -> None:
    entity = canvas.entity()
    project, scale = canvas.camera.project, canvas.camera.focal_px / z
    coat = canvas.part(m.RIDER, palettes.cloth(rng, palette), entity=entity, z=z)
    legs = canvas.part(m.RIDER, palettes.cloth(rng, palette), entity=entity, z=z)
    head_colour = palettes.cloth(rng, palette) if rng.random() < 0.5 else (0.7, 0.52, 0.42)
    head = canvas.part(m.RIDER, head_colour, entity=entity, z=z)
    lean = 0.25 if sideways else 0.0
    hip, shoulder = project(x - 0.22 * bool(sideways), 0.95, z), project(x + lean * 0.5, 1.5, z)
    for side in (-1, 1):
        spread = 0.05 if sideways else 0.18 * side
        knee = project(x + lean * 0.6 + spread, 0.7, z)
        canvas.line(hip, knee, 0.16 * scale, legs)
        canvas.line(knee, project(x + spread, 0.3, z), 0.13 * scale, legs)
    canvas.line(hip, shoulder, (0.3 if sideways else 0.42) * scale, coat)
    canvas.line(shoulder, project(x + 0.4 * bool(sideways), 1.05, z), 0.11 * scale, coat)
    radius = 0.14 * scale
    canvas.ellipse(project(x + lean * 0.7, 1.68, z), radius, radius, head)
