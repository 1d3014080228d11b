"""Light and weather of the miniature world: from parts to a picture.

At the canvas' size: textures, windows, sun, shadow, lamps, snow cover, fog. At the picture's size:
wet
reflections, glow, rain, flakes, and the sensor. Colours are display values in 0..1 throughout.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from models.miniature import canvas as surface
from models.miniature import materials as m
from models.miniature.canvas import Canvas
from models.miniature.styles import Style

TILE_PX = 256

TEXTURES: tuple[tuple[float, float], ...] = (
    (14.0, 0.05),
    (30.0, 0.22),
    (16.0, 0.14),
    (20.0, 0.34),
    (26.0, 0.75),
    (20.0, 0.45),
    (12.0, 0.05),
    (1.0, 1.0),
)
"""Per kind of surface: texels per metre, amplitude relative to the colour."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything about one picture that is not geometry."""

    time: str
    sky: str
    precipitation: str
    film: str
    fog: float
    snow_cover: float
    wetness: float
    texture: float
    exposure: float
    contrast: float
    saturation: float
    white_balance: float
    tint: float
    noise: float
    blur_px: float
    vignette: float
    distortion: float
    jpeg: int | None
    sun_side: int
    sun_back: float
    shade_edge: float
    """Where the shadow of one side of the street ends, in half road widths; above 3: no shadow."""

    @property
    def is_dark(self) -> bool:
        return self.time in ("dusk", "night", "sodium")


def draw_conditions(style: Style, rng: random.Random) -> Conditions:
    """Draw light, weather and sensor from a style."""

    def choose(weights: dict[str, float]) -> str:
        return rng.choices(list(weights), list(weights.values()))[0]

    precipitation = choose(style.precipitation)
    snow_cover = max(0.0, rng.uniform(*style.snow_cover))
    wetness = max(0.0, rng.uniform(*style.wetness))
    sky = choose(style.skies)
    if precipitation == "snow":
        snow_cover = max(snow_cover, rng.uniform(0.2, 1.0))
    if precipitation == "rain":
        wetness = max(wetness, rng.uniform(0.3, 0.9))
    if precipitation != "none":
        sky = "overcast"
    shaded = sky == "clear" and rng.random() < 0.6
    return Conditions(
        time=choose(style.times),
        sky=sky,
        precipitation=precipitation,
        film=choose(style.film),
        fog=max(0.0, rng.uniform(*style.fog)),
        snow_cover=snow_cover,
        wetness=wetness,
        texture=rng.uniform(*style.texture),
        exposure=rng.uniform(*style.exposure),
        contrast=rng.uniform(*style.contrast),
        saturation=rng.uniform(*style.saturation),
        white_balance=rng.uniform(*style.white_balance),
        tint=rng.uniform(*style.tint),
        noise=rng.uniform(*style.noise),
        blur_px=rng.uniform(*style.blur_px),
        vignette=rng.uniform(*style.vignette),
        distortion=rng.uniform(*style.distortion),
        jpeg=rng.randint(*style.jpeg) if style.jpeg else None,
        sun_side=rng.choice((-1, 1)),
        sun_back=rng.uniform(0.2, 1.0),
        shade_edge=rng.uniform(-1.2, 1.2) if shaded else 9.0,
    )


@functools.cache
def texture_tiles() -> np.ndarray:
    """Tileable textures, float32 [kinds, 256, 256] in about -1..1; the same on every call."""
    generator = np.random.default_rng(20231204)

    def noise(*octaves: tuple[float, float]) -> np.ndarray:
        total = np.zeros((TILE_PX, TILE_PX), dtype=np.float32)
        for sigma, weight in octaves:
            layer = generator.standard_normal((TILE_PX, TILE_PX)).astype(np.float32)
            layer = ndimage.gaussian_filter(layer, sigma, mode="wrap")
            total += weight * layer / layer.std()
        return np.clip(total / (2 * total.std()), -1.5, 1.5)

    rows, columns = np.mgrid[0:TILE_PX, 0:TILE_PX]
    course = rows // 8
    joints = (rows % 8 == 0) | ((columns + 8 * (course % 2)) % 16 == 0)
    stones = generator.uniform(-1, 1, (32, 33))[course, (columns + 8 * (course % 2)) // 16]
    bricks = np.where(joints, -0.9, 0.6 * stones).astype(np.float32)
    slabs = noise((1, 0.6), (12, 1)) - 0.7 * ((rows % 32 == 0) | (columns % 32 == 0))
    return np.stack(
        [
            noise((1, 0.4), (24, 1)),
            noise((0.6, 1), (6, 0.5), (30, 0.8)),
            slabs.astype(np.float32),
            bricks + 0.3 * noise((20, 1)),
            noise((2, 1), (6, 1), (14, 0.6)),
            noise((1.2, 1), (5, 0.7), (28, 0.8)),
            noise((1, 0.5), (30, 1)),
            noise((6, 0.4), (14, 0.8), (32, 1)),
        ]
    ).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Surface:
    """What each canvas pixel shows; flat arrays of N = canvas height x width."""

    part: np.ndarray
    """int32 part numbers."""
    row: np.ndarray
    """float32 rows below the vanishing point, roll undone."""
    column: np.ndarray
    """float32 columns right of the vanishing point, roll undone."""
    depth: np.ndarray
    """float32 metres."""
    across: np.ndarray
    """float32 metres right of the camera."""
    height: np.ndarray
    """float32 metres above the ground."""


def look(canvas: Canvas, distortion: float) -> Surface:
    """Parts, depths and world positions of all canvas pixels, after lens distortion."""
    camera = canvas.camera
    part = canvas.parts()
    column, row = camera.upright()
    if abs(distortion) > 0.005:
        rows, columns = _distorted(camera.height_px, camera.width_px, distortion)
        part, column, row = part[rows, columns], column[rows, columns], row[rows, columns]
    part, column, row = part.ravel(), column.ravel(), row.ravel()
    plane = np.asarray(canvas.planes, dtype=np.float32)[part]
    inverse = plane[:, 0] * column + plane[:, 1] * row + plane[:, 2]
    depth = 1.0 / np.clip(inverse, 1 / 4000.0, 1 / surface.NEAR_M)
    scale = depth / camera.focal_px
    return Surface(
        part=part,
        row=row,
        column=column,
        depth=depth,
        across=column * scale,
        height=camera.eye_m - row * scale,
    )


def _distorted(height: int, width: int, k1: float) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    y, x = (rows - height / 2) / (width / 2), (columns - width / 2) / (width / 2)
    corner = 1 + (height / width) ** 2
    gain = (1 + k1 * (x * x + y * y)) / (1 + k1 * (corner if k1 > 0 else 0.0))
    rows = np.clip(y * gain * width / 2 + height / 2, 0, height - 1).astype(np.intp)
    columns = np.clip(x * gain * width / 2 + width / 2, 0, width - 1).astype(np.intp)
    return rows, columns


def paint(
    canvas: Canvas, seen: Surface, conditions: Conditions, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Colours and emitted light of all canvas pixels, two float32 [N, 3]."""
    part = seen.part
    face = np.asarray(canvas.faces, dtype=np.int8)[part]
    ground = face == surface.GROUND
    u = np.where(ground, seen.across, seen.across + seen.depth)
    v = np.where(ground, seen.depth, seen.height)
    colour = np.asarray(canvas.colours, dtype=np.float32)[part]
    emission = np.asarray(canvas.emissions, dtype=np.float32)[part]
    value = _texture(canvas, seen, u, v, rng)
    colour *= (1.0 + conditions.texture * value)[:, None]
    lit = _paint_windows(canvas, seen, u, v, colour, conditions)
    if conditions.snow_cover > 0.02:
        _lay_snow(canvas, seen, face, value, colour, conditions)
    emitted = colour * emission[:, None] + lit
    colour *= _light(canvas, seen, face, ground, value, conditions)
    _paint_sky(canvas, seen, colour, conditions, rng)
    _add_fog(canvas, seen, colour, conditions)
    return colour, emitted


def _texture(
    canvas: Canvas, seen: Surface, u: np.ndarray, v: np.ndarray, rng: random.Random
) -> np.ndarray:
    tiles = texture_tiles()
    table = np.asarray(TEXTURES, dtype=np.float32)
    kinds = np.asarray(canvas.textures, dtype=np.intp)
    scale, amplitude = table[kinds, 0][seen.part], table[kinds, 1][seen.part]
    offsets = np.asarray([rng.randrange(TILE_PX) for _ in kinds], dtype=np.int32)[seen.part]
    column = ((u * scale).astype(np.int32) + offsets) & (TILE_PX - 1)
    row = ((v * scale).astype(np.int32) + offsets) & (TILE_PX - 1)
    footprint = scale * seen.depth / canvas.camera.focal_px
    return tiles[kinds[seen.part], row, column] * amplitude / (1.0 + 0.25 * footprint)


def _paint_windows(
    canvas: Canvas,
    seen: Surface,
    u: np.ndarray,
    v: np.ndarray,
    colour: np.ndarray,
    conditions: Conditions,
) -> np.ndarray:
    emitted = np.zeros((len(u), 3), dtype=np.float32)
    if not canvas.windows:
        return emitted
    rows = np.zeros((len(canvas.labels), 9), dtype=np.float32)
    for number, w in canvas.windows:
        rows[number] = (w.pitch_u, w.pitch_v, w.width, w.height, w.sill, *w.colour, w.lit)
    shown = np.flatnonzero(rows[:, 0][seen.part] > 0)
    part = seen.part[shown]
    pitch_u, pitch_v, width, height, sill, *_, share = rows[part].T
    cell_u, cell_v = np.floor(u[shown] / pitch_u), np.floor(v[shown] / pitch_v)
    in_u, in_v = u[shown] - cell_u * pitch_u, v[shown] - cell_v * pitch_v
    inside = (in_u < width) & (in_v > sill) & (in_v < sill + height)
    chance = (cell_u * 12.9898 + cell_v * 78.233 + part * 37.719) * 0.3183
    chance = (np.sin(chance) * 43758.5453) % 1.0
    fine = np.clip(pitch_u * canvas.camera.focal_px / seen.depth[shown] / 4.0, 0.15, 1.0)
    mix = (inside * fine)[:, None].astype(np.float32)
    glass = rows[part, 5:8] * (0.7 + 0.8 * chance[:, None])
    colour[shown] = colour[shown] * (1 - mix) + glass.astype(np.float32) * mix
    if conditions.is_dark:
        burning = (inside & (chance < share) & (share > 0)).astype(np.float32)
        warm = np.array([1.0, 0.78, 0.45], dtype=np.float32)
        emitted[shown] = (burning * (0.35 + 0.5 * chance))[:, None].astype(np.float32) * warm
    return emitted


def _lay_snow(
    canvas: Canvas,
    seen: Surface,
    face: np.ndarray,
    value: np.ndarray,
    colour: np.ndarray,
    conditions: Conditions,
) -> None:
    labels = np.asarray(canvas.labels)[seen.part]
    tile = texture_tiles()[surface.GRASS]
    rough = tile[
        (seen.depth * 9).astype(np.int32) & (TILE_PX - 1),
        (seen.across * 9).astype(np.int32) & (TILE_PX - 1),
    ]
    lying = np.zeros(256, dtype=np.float32)
    for label, share in ((m.ROAD, 0.45), (m.SIDEWALK, 0.8), (m.TERRAIN, 1.1), (m.BUILDING, 1.1)):
        lying[label] = share
    for label in (m.CAR, m.TRUCK, m.BUS, m.TRAIN):
        lying[label] = 0.7
    flat = (face == surface.GROUND) | (face == surface.TOP)
    depth = np.where(flat, lying[labels], 0.0) * conditions.snow_cover
    depth = depth + (labels == m.VEGETATION) * conditions.snow_cover * 0.5
    cover = np.clip((depth * 2.0 - 0.8) * 1.5 + 0.8 * rough * (depth > 0), 0.0, 0.92)
    white = (0.88 + 0.08 * np.clip(value, -1, 1))[:, None] * np.array([0.98, 0.99, 1.02])
    colour += cover[:, None] * (white.astype(np.float32) - colour)


def _light(
    canvas: Canvas,
    seen: Surface,
    face: np.ndarray,
    ground: np.ndarray,
    value: np.ndarray,
    conditions: Conditions,
) -> np.ndarray:
    """How strongly each pixel is lit, [N, 1] or [N, 3] float32."""
    direct = {"clear": 0.62, "cloudy": 0.35, "overcast": 0.06}[conditions.sky]
    ambient = {"clear": 0.52, "cloudy": 0.66, "overcast": 0.80}[conditions.sky]
    match conditions.time:
        case "golden":
            tone, ambient, direct = (1.12, 0.92, 0.70), 0.5 * ambient, 1.1 * direct
        case "dusk":
            tone, ambient, direct = (0.85, 0.88, 1.12), 0.45 * ambient, 0.05
        case "night":
            tone, ambient, direct = (0.85, 0.9, 1.15), 0.16 * ambient, 0.0
        case "sodium":
            tone, ambient, direct = (1.3, 0.85, 0.35), 0.35 * ambient, 0.0
        case _:
            tone = (1.03, 1.0, 0.95) if conditions.sky == "clear" else (0.98, 1.0, 1.03)
    towards = np.array(
        [
            0.75,
            conditions.sun_back * 0.8,
            1.0 if conditions.sun_side > 0 else 0.1,
            1.0 if conditions.sun_side < 0 else 0.1,
            1.0,
        ],
        dtype=np.float32,
    )
    light = direct * towards[face]
    if conditions.shade_edge < 5 and direct > 0.2:
        reach = seen.across * conditions.sun_side + canvas.camera.lateral_m * conditions.sun_side
        shaded = ground & (reach > conditions.shade_edge * 4.0 + 2.5 * (value - 0.05))
        light = np.where(shaded, 0.15 * light, light)
    light = light + ambient
    lit = light[:, None] * np.asarray(tone, dtype=np.float32)
    if conditions.is_dark:
        lit += (
            _lamp_light(canvas, seen)[:, None]
            * np.array([1.0, 0.85, 0.6], dtype=np.float32)
            * (0.5 if conditions.time == "dusk" else 0.9)
        )
    return lit.astype(np.float32)


def _lamp_light(canvas: Canvas, seen: Surface) -> np.ndarray:
    depth, across = seen.depth, seen.across
    cone = across / (1.5 + 0.22 * depth)
    beam = np.exp(-cone * cone) * np.clip((depth - 2) / 4, 0, 1) * np.exp(-depth / 16) * 0.9
    near = sorted(canvas.pools, key=lambda pool: pool[1])[:6]
    for x, z in near:
        dx, dz = across - (x - canvas.camera.lateral_m), depth - z
        beam += 0.55 * np.exp(-(dx * dx + dz * dz) * (1 / 45.0))
    return beam * np.clip(1.3 - seen.height / 9, 0.1, 1.0)


SKY_COLOURS: dict[str, dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]]] = {
    "day": {
        "clear": ((0.80, 0.88, 0.95), (0.30, 0.52, 0.85)),
        "cloudy": ((0.82, 0.86, 0.90), (0.45, 0.58, 0.78)),
        "overcast": ((0.84, 0.86, 0.87), (0.68, 0.71, 0.74)),
    },
    "golden": {
        "clear": ((1.0, 0.78, 0.50), (0.48, 0.56, 0.75)),
        "cloudy": ((0.98, 0.70, 0.45), (0.55, 0.52, 0.60)),
        "overcast": ((0.85, 0.75, 0.65), (0.62, 0.60, 0.62)),
    },
    "dusk": {
        "clear": ((0.75, 0.48, 0.42), (0.16, 0.20, 0.38)),
        "cloudy": ((0.55, 0.40, 0.42), (0.18, 0.20, 0.32)),
        "overcast": ((0.36, 0.38, 0.44), (0.24, 0.26, 0.32)),
    },
    "night": {
        "clear": ((0.10, 0.10, 0.14), (0.02, 0.02, 0.06)),
        "cloudy": ((0.16, 0.13, 0.13), (0.04, 0.04, 0.07)),
        "overcast": ((0.20, 0.16, 0.14), (0.08, 0.07, 0.08)),
    },
}
SKY_COLOURS["sodium"] = SKY_COLOURS["night"]


def _sky_colours(conditions: Conditions) -> tuple[np.ndarray, np.ndarray]:
    low, high = SKY_COLOURS[conditions.time][conditions.sky]
    return np.asarray(low, dtype=np.float32), np.asarray(high, dtype=np.float32)


def _paint_sky(
    canvas: Canvas,
    seen: Surface,
    colour: np.ndarray,
    conditions: Conditions,
    rng: random.Random,
) -> None:
    shown = np.flatnonzero(seen.part == 0)
    if not len(shown):
        return
    low, high = _sky_colours(conditions)
    camera = canvas.camera
    lift = np.clip(-seen.row[shown] / camera.focal_px, 0.0, 1.0)
    share = np.clip(lift / 0.42, 0.0, 1.0)[:, None]
    tones = low + (high - low) * share
    plane = 40.0 / (lift + 0.12)
    drift = rng.randrange(TILE_PX)
    column = (seen.column[shown] / camera.focal_px * plane * 0.8).astype(np.int32) + drift
    row = (plane * 1.2).astype(np.int32) + drift
    cloud = texture_tiles()[surface.CLOUD][row & (TILE_PX - 1), column & (TILE_PX - 1)]
    cover = {"clear": -0.55, "cloudy": 0.1, "overcast": 0.5}[conditions.sky]
    if conditions.texture < 0.2:
        cover -= 0.5
    density = np.clip((cloud + cover) * 1.6, 0.0, 1.0)[:, None]
    glow = 0.5 * (low + np.float32(0.95 if conditions.time in ("day", "golden") else 0.25))
    if conditions.sky == "overcast":
        glow = glow * 0.92
    tones = tones + density * (0.75 if conditions.sky != "overcast" else 0.35) * (glow - tones)
    colour[shown] = tones.astype(np.float32)


def _add_fog(canvas: Canvas, seen: Surface, colour: np.ndarray, conditions: Conditions) -> None:
    low, _ = _sky_colours(conditions)
    haze = conditions.fog + (0.002 if conditions.time != "night" else 0.0)
    haze += {"none": 0.0, "rain": 0.006, "snow": 0.008}[conditions.precipitation]
    if conditions.film == "dust":
        haze += 0.02
        low = np.array([0.80, 0.58, 0.34], dtype=np.float32)
    depth = np.where(seen.part == 0, 60.0 + 1200.0 * min(conditions.fog, 0.04), seen.depth)
    veil = (1.0 - np.exp(-haze * np.minimum(depth, 400.0)))[:, None].astype(np.float32)
    if conditions.sky == "overcast" or conditions.fog > 0.01:
        grey = low.mean()
        low = 0.5 * low + 0.5 * grey
    colour += veil * (low - colour)
