"""Render the miniature world: pixels, labels, instances, caption; same seed, same bytes.

from models.miniature.renderer import render
picture = render("web", seed=7)
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

import numpy as np

from models.miniature import light, materials, scenery, sensor, street
from models.miniature.canvas import Camera, Canvas
from models.miniature.captions import Attributes, describe
from models.miniature.light import Conditions
from models.miniature.styles import Style, find_style

HEIGHT_PX, WIDTH_PX = 64, 128
"""The miniature's picture size: 13 classes can be told apart, and training fits two cores."""

OVERSAMPLING = 2


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A rendered street."""

    image_HW3: np.ndarray
    """uint8 RGB."""
    label_ids_HW: np.ndarray
    """uint8 Cityscapes label ids (0, 1 and 4 are ignored by every label space)."""
    instances_HW: np.ndarray
    """uint16 Cityscapes instance ids: label id * 1000 + number for things, else the label id."""
    entities_HW: np.ndarray
    """uint16: one number per thing or piece of stuff (each house or tree; the road; the sky)."""
    attributes: Attributes
    """What the scene is like, in words."""

    @property
    def labels_HW(self) -> np.ndarray:
        """uint8 miniature train ids, 255 = ignore."""
        return materials.train_id_table()[self.label_ids_HW]

    @property
    def caption(self) -> str:
        """A sentence about the whole picture."""
        return describe(self.label_ids_HW, self.attributes)


def render(
    style: str | Style, *, seed: int, height_px: int = HEIGHT_PX, width_px: int = WIDTH_PX
) -> Picture:
    """Render one picture.

    Args:
        style: a style or its name in `models.miniature.styles.STYLES`.
        seed: any integer; together with the style's name it decides every byte.
        height_px: picture height.
        width_px: picture width.

    Raises:
        ValueError: for an unknown style.
    """
    style = find_style(style) if isinstance(style, str) else style
    digest = hashlib.sha256(f"{style.name}/{seed}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "little"))
    generator = np.random.default_rng(int.from_bytes(digest[8:16], "little"))

    # 1. Draw what kind of scene, light and camera this is.
    conditions = light.draw_conditions(style, rng)
    palette = rng.choices(list(style.palettes), list(style.palettes.values()))[0]
    kind = rng.choices(list(style.layouts), list(style.layouts.values()))[0]
    season = _draw_season(rng, conditions)
    layout = scenery.draw_layout(rng, kind, palette, season, rng.uniform(*style.clutter))
    camera = _draw_camera(rng, style, layout.road_half, height_px, width_px)

    # 2. Draw the street as parts.
    canvas = Canvas(camera)
    paints = street.draw_street(canvas, rng, layout)
    if rng.random() < style.hood:
        scenery.draw_hood(canvas, rng)

    # 3. Light it, and take the picture.
    seen = light.look(canvas, conditions.distortion)
    colour, emitted = light.paint(canvas, seen, conditions, rng)
    shape = (height_px, OVERSAMPLING, width_px, OVERSAMPLING, 3)
    part_HW = _front_part(seen.part.reshape(camera.height_px, camera.width_px))
    label_ids_HW = np.asarray(canvas.labels, dtype=np.uint8)[part_HW]
    image_HW3 = sensor.expose(
        colour.reshape(shape).mean(axis=(1, 3)),
        emitted.reshape(shape).mean(axis=(1, 3)),
        wet=np.isin(label_ids_HW, (materials.ROAD, materials.SIDEWALK)).astype(np.float32),
        horizon_px=camera.horizon_px / OVERSAMPLING,
        conditions=conditions,
        generator=generator,
    )

    # 4. Read labels and instances off the same canvas.
    entities_HW = np.asarray(canvas.entities, dtype=np.uint16)[part_HW]
    return Picture(
        image_HW3=image_HW3,
        label_ids_HW=label_ids_HW,
        instances_HW=_instances(label_ids_HW, entities_HW),
        entities_HW=entities_HW,
        attributes=Attributes(
            layout=kind,
            season=season,
            time=conditions.time,
            sky=conditions.sky,
            precipitation=conditions.precipitation,
            foggy=conditions.fog > 0.012,
            snowy=conditions.snow_cover > 0.45,
            wet=conditions.wetness > 0.3,
            car_paints=tuple(sorted(set(paints))),
        ),
    )


def _draw_season(rng: random.Random, conditions: Conditions) -> str:
    if conditions.snow_cover > 0.3:
        return rng.choice(("bare", "bare", "summer"))
    return rng.choices(("summer", "autumn", "bare"), (5, 1.3, 1))[0]


def _draw_camera(
    rng: random.Random, style: Style, road_half: float, height_px: int, width_px: int
) -> Camera:
    width = width_px * OVERSAMPLING
    half_angle = math.radians(rng.uniform(*style.field_of_view_deg)) / 2
    return Camera(
        height_px=height_px * OVERSAMPLING,
        width_px=width,
        focal_px=width / 2 / math.tan(half_angle),
        horizon_px=rng.uniform(*style.horizon) * height_px * OVERSAMPLING,
        eye_m=rng.uniform(*style.camera_height_m),
        lateral_m=rng.uniform(*style.lateral) * road_half,
        roll=math.radians(rng.uniform(*style.roll_deg)),
        bend=rng.uniform(-0.004, 0.004) if rng.random() < 0.5 else 0.0,
    )


def _front_part(part_HW: np.ndarray) -> np.ndarray:
    """Part of each picture pixel: of its 2x2 canvas pixels the second nearest to the front.

    Parts are numbered from back to front, so this is the part that covers at least half of the
    pixel, ties to
    the nearer one, and thin poles neither break nor swell.
    """
    a, b = part_HW[0::2, 0::2], part_HW[0::2, 1::2]
    c, d = part_HW[1::2, 0::2], part_HW[1::2, 1::2]
    low = np.maximum(np.minimum(a, b), np.minimum(c, d))
    return np.maximum(low, np.minimum(np.maximum(a, b), np.maximum(c, d)))


def _instances(label_ids_HW: np.ndarray, entities_HW: np.ndarray) -> np.ndarray:
    instances = label_ids_HW.astype(np.uint16)
    things = np.isin(label_ids_HW, materials.THINGS)
    for label in np.unique(label_ids_HW[things]):
        where = label_ids_HW == label
        _, numbers = np.unique(entities_HW[where], return_inverse=True)
        instances[where] = int(label) * 1000 + numbers.astype(np.uint16)
    return instances
