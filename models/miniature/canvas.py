"""A canvas of parts: polygons leave the numbers of parts, a table says what each part is.

Drawing happens once, at twice the picture's size, with Pillow; labels, instances, colours, depth
and light are
then looked up by part. The inverse depth of a plane is affine in pixel coordinates, so three
numbers
per part give every pixel its depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from models.miniature.palettes import Colour

Point = tuple[float, float]

PLAIN, ASPHALT, CONCRETE, BRICK, LEAVES, GRASS, METAL, CLOUD = range(8)
"""Kinds of surface texture."""

GROUND, FRONT, LEFT_WALL, RIGHT_WALL, TOP = range(5)
"""Orientations towards the light; walls are named by the side of the road they stand on."""

NEAR_M = 0.6


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera on the road, looking along it. Pixels are the canvas', metres the world's.

    x is to the right of the road's centre line, y is above the ground, z is ahead.
    """

    height_px: int
    width_px: int
    focal_px: float
    horizon_px: float
    eye_m: float
    """Height above the ground."""
    lateral_m: float
    """Position right of the road's centre line."""
    roll: float
    """Radians, clockwise."""
    bend: float
    """Curvature of the road, 1/metres."""

    @property
    def centre_px(self) -> float:
        return self.width_px / 2

    def project(self, x: float, y: float, z: float) -> Point:
        """Pixel of a world point; points behind the camera are drawn to its near plane."""
        z = max(z, NEAR_M)
        scale = self.focal_px / z
        bend_m = 0.5 * self.bend * z * z if z < 120 else 7200 * self.bend
        return self.pixel((x - self.lateral_m + bend_m) * scale, (self.eye_m - y) * scale)

    def pixel(self, column: float, row: float) -> Point:
        """Pixel of an offset from the vanishing point: the camera's roll is applied."""
        if self.roll:
            cos, sin = math.cos(self.roll), math.sin(self.roll)
            column, row = column * cos - row * sin, column * sin + row * cos
        return self.centre_px + column, self.horizon_px + row

    def upright(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixel offsets (columns, rows) from the vanishing point with the roll undone, [H, W]."""
        rows, columns = np.mgrid[0 : self.height_px, 0 : self.width_px].astype(np.float32) + 0.5
        columns -= self.centre_px
        rows -= self.horizon_px
        if not self.roll:
            return columns, rows
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        return columns * cos + rows * sin, rows * cos - columns * sin


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A grid of windows on a facade, in metres."""

    pitch_u: float
    pitch_v: float
    width: float
    height: float
    sill: float
    colour: Colour
    lit: float
    """Share of windows that are lit at night."""


class Canvas:
    """Part numbers [H, W] int32 under construction, with the table of parts."""

    def __init__(self, camera: Camera):
        self.camera = camera
        self.image = Image.new("I", (camera.width_px, camera.height_px), 0)
        self._draw = ImageDraw.Draw(self.image)
        self.colours: list[Colour] = []
        self.labels: list[int] = []
        self.entities: list[int] = []
        self.planes: list[tuple[float, float, float]] = []
        self.textures: list[int] = []
        self.faces: list[int] = []
        self.emissions: list[float] = []
        self.windows: list[tuple[int, Windows]] = []
        self.pools: list[tuple[float, float]] = []
        """Street lamps as (x, z) in metres: where the ground is lit at night."""
        self.road_entity = 0
        """Entity of the carriageway, to which shadows on it belong."""
        self._num_entities = 0

    def entity(self) -> int:
        """A number for one thing or one piece of stuff; its parts share it."""
        self._num_entities += 1
        return self._num_entities

    def ground_plane(self) -> tuple[float, float, float]:
        """Inverse depth of the ground: (per column, per row, constant) from the vanishing point."""
        return 0.0, 1.0 / (self.camera.focal_px * self.camera.eye_m), 0.0

    def wall_plane(self, start: Point, end: Point) -> tuple[float, float, float]:
        """Inverse depth of the upright plane through two ground points (x, z)."""
        camera = self.camera
        columns, inverses = [], []
        for x, z in (start, end):
            z = max(z, NEAR_M)
            bend_m = 0.5 * camera.bend * z * z if z < 120 else 7200 * camera.bend
            columns.append((x - camera.lateral_m + bend_m) * camera.focal_px / z)
            inverses.append(1.0 / z)
        if abs(columns[1] - columns[0]) < 0.5:
            return 0.0, 0.0, 0.5 * (inverses[0] + inverses[1])
        slope = (inverses[1] - inverses[0]) / (columns[1] - columns[0])
        return slope, 0.0, inverses[0] - slope * columns[0]

    def part(
        self,
        label: int,
        colour: Colour,
        *,
        entity: int = 0,
        z: float | None = None,
        plane: tuple[float, float, float] | None = None,
        texture: int = PLAIN,
        face: int = FRONT,
        emission: float = 0.0,
        windows: Windows | None = None,
    ) -> int:
        """Add a part and return its number. Without a plane it faces the camera at depth `z`."""
        if plane is None:
            plane = (0.0, 0.0, 1.0 / z) if z is not None else self.ground_plane()
        number = len(self.labels)
        self.colours.append(colour)
        self.labels.append(label)
        self.entities.append(entity)
        self.planes.append(plane)
        self.textures.append(texture)
        self.faces.append(face)
        self.emissions.append(emission)
        if windows is not None:
            self.windows.append((number, windows))
        return number

    def polygon(self, points: Iterable[Point], part: int) -> None:
        """Fill a polygon given in pixels."""
        self._draw.polygon([(_clip(x), _clip(y)) for x, y in points], fill=part)

    def world_polygon(self, points: Iterable[tuple[float, float, float]], part: int) -> None:
        """Fill a polygon given in metres."""
        project = self.camera.project
        self.polygon([project(*point) for point in points], part)

    def ellipse(self, centre: Point, radius_x: float, radius_y: float, part: int) -> None:
        """Fill an upright ellipse given in pixels."""
        x, y = centre
        if not -4000 < x < 4000 or not -4000 < y < 4000:
            return
        self._draw.ellipse((x - radius_x, y - radius_y, x + radius_x, y + radius_y), fill=part)

    def line(self, start: Point, end: Point, width_px: float, part: int) -> None:
        """Draw a thick line given in pixels."""
        points = [(_clip(x), _clip(y)) for x, y in (start, end)]
        self._draw.line(points, fill=part, width=max(1, round(width_px)))

    def parts(self) -> np.ndarray:
        """Part numbers, int32 [H, W]."""
        return np.asarray(self.image, dtype=np.int32)


def _clip(value: float) -> float:
    return min(max(value, -30000.0), 30000.0)
