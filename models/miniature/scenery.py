"""What stands still in a miniature street: sky, ground, houses, walls, trees, furniture."""

from __future__ import annotations

import random
from dataclasses import dataclass

from models.miniature import canvas as surface
from models.miniature import materials as m
from models.miniature import palettes
from models.miniature.canvas import Canvas, Windows
from models.miniature.palettes import Colour

FAR_M = 110.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Cross-section and character of a street, in metres from the centre line."""

    kind: str
    palette: str
    season: str
    road_half: float
    lanes: int
    sidewalk: tuple[float, float]
    """Width of the sidewalk, left and right; 0 for none."""
    verge: tuple[float, float]
    """Width of the grass beyond it, left and right."""
    crossing_m: float | None
    """Depth at which a road crosses, if one does."""
    clutter: float

    def edge(self, side: int) -> float:
        """Where buildings may begin on a side (-1 left, 1 right), as a positive distance."""
        index = (side + 1) // 2
        return self.road_half + self.sidewalk[index] + self.verge[index]

    def kerb_room(self, side: int) -> float:
        """Width between carriageway and the building line."""
        return self.edge(side) - self.road_half


def draw_layout(rng: random.Random, kind: str, palette: str, season: str, clutter: float) -> Layout:
    """Draw the cross-section for a kind of street."""
    lanes = {"highway": (3, 5), "city": (2, 4), "square": (2, 3), "suburb": (2, 2)}.get(
        kind, (1, 2)
    )
    num_lanes = rng.randint(*lanes)
    road_half = num_lanes * rng.uniform(2.7, 3.6) / 2 + rng.choice((0.0, 0.0, 2.2))

    def sidewalk() -> float:
        wide = {"city": (1.6, 4.5), "square": (3.0, 9.0), "suburb": (1.2, 2.6), "park": (0.0, 2.5)}
        if kind not in wide:
            return rng.choice((0.0, 0.0, 1.6))
        return rng.uniform(*wide[kind])

    def verge() -> float:
        wide = {
            "suburb": (0.5, 7.0),
            "park": (3.0, 14.0),
            "highway": (2.0, 9.0),
            "country": (6, 25),
        }
        if kind not in wide:
            return rng.choice((0.0, 0.0, 0.0, 1.5))
        return rng.uniform(*wide[kind])

    return Layout(
        kind=kind,
        palette=palette,
        season=season,
        road_half=road_half,
        lanes=num_lanes,
        sidewalk=(sidewalk(), sidewalk()),
        verge=(verge(), verge()),
        crossing_m=rng.uniform(14, 45) if kind != "highway" and rng.random() < 0.4 else None,
        clutter=clutter,
    )


def draw_ground(canvas: Canvas, rng: random.Random, layout: Layout) -> None:
    """Sky, far silhouettes, terrain, sidewalks, carriageway and its markings."""
    _draw_backdrop(canvas, rng, layout)
    base = m.TERRAIN
    colour = palettes.grass(rng, layout.palette, layout.season)
    if layout.kind in ("city", "square") and layout.palette != "engine" and rng.random() < 0.6:
        base, colour = m.SIDEWALK, palettes.pavement(rng, layout.palette)
    texture = surface.GRASS if base == m.TERRAIN else surface.CONCRETE
    ground = canvas.part(base, colour, entity=canvas.entity(), texture=texture, face=surface.GROUND)
    camera = canvas.camera
    reach, low = 2.0 * camera.width_px, 4.0 * camera.height_px
    far = camera.focal_px * camera.eye_m / 320
    corners = ((-reach, far), (reach, far), (reach, low), (-reach, low))
    canvas.polygon([camera.pixel(*corner) for corner in corners], ground)
    pavement = palettes.pavement(rng, layout.palette)
    for side in (-1, 1):
        width = layout.sidewalk[(side + 1) // 2]
        if width:
            walk = canvas.part(
                m.SIDEWALK,
                pavement,
                entity=canvas.entity(),
                texture=surface.CONCRETE,
                face=surface.GROUND,
            )
            _strip(canvas, side * layout.road_half, side * (layout.road_half + width), walk)
            kerb = canvas.part(
                m.SIDEWALK,
                tuple(0.8 * c + 0.1 for c in pavement),
                entity=canvas.entities[walk],
                face=surface.GROUND,
            )
            _strip(canvas, side * layout.road_half, side * (layout.road_half + 0.2), kerb)
    asphalt = palettes.asphalt(rng, layout.palette)
    road = canvas.part(
        m.ROAD, asphalt, entity=canvas.entity(), texture=surface.ASPHALT, face=surface.GROUND
    )
    canvas.road_entity = canvas.entities[road]
    _strip(canvas, -layout.road_half, layout.road_half, road)
    if layout.crossing_m:
        z0, z1 = layout.crossing_m, layout.crossing_m + rng.uniform(6, 10)
        canvas.world_polygon(((-90, 0, z1), (90, 0, z1), (90, 0, z0), (-90, 0, z0)), road)
    _draw_markings(canvas, rng, layout, road, asphalt)


def _strip(canvas: Canvas, x0: float, x1: float, part: int) -> None:
    depths = (0.0, 3, 5, 8, 12, 18, 27, 40, 60, 85, FAR_M, 300)
    left = [(x0, 0.0, z) for z in depths]
    right = [(x1, 0.0, z) for z in reversed(depths)]
    canvas.world_polygon(left + right, part)


def _draw_backdrop(canvas: Canvas, rng: random.Random, layout: Layout) -> None:
    camera = canvas.camera
    sky = canvas.part(m.SKY, (0.5, 0.65, 0.9), entity=canvas.entity(), z=4000.0)
    right, low = camera.width_px + 9, camera.height_px + 9
    canvas.polygon([(-9, -9), (right, -9), (right, low), (-9, low)], sky)
    leafy = rng.random() < {"city": 0.3, "square": 0.4}.get(layout.kind, 0.85)
    if leafy:
        colour = palettes.leaf(rng, layout.palette, layout.season)
        part = canvas.part(
            m.VEGETATION, colour, entity=canvas.entity(), z=170.0, texture=surface.LEAVES
        )
        top = rng.uniform(3, 16)
        points = [(x, max(1.0, top + rng.uniform(-4, 4)), 170.0) for x in range(-260, 261, 20)]
        canvas.world_polygon([(-260, -2, 170.0), *points, (260, -2, 170.0)], part)
        return
    x = -220.0
    while x < 220:
        width, height = rng.uniform(10, 30), rng.uniform(6, 34)
        part = canvas.part(
            m.BUILDING,
            palettes.facade(rng, layout.palette),
            entity=canvas.entity(),
            z=160.0,
            windows=_windows(rng),
        )
        canvas.world_polygon(
            ((x, -2, 160), (x, height, 160), (x + width, height, 160), (x + width, -2, 160)), part
        )
        x += width + (rng.uniform(0, 12) if rng.random() < 0.3 else 0)


def _draw_markings(
    canvas: Canvas, rng: random.Random, layout: Layout, road: int, asphalt: Colour
) -> None:
    entity = canvas.entities[road]
    paint = (0.88, 0.88, 0.85) if rng.random() < 0.8 else (0.85, 0.68, 0.2)
    fade = rng.uniform(0.0, 0.6) if layout.palette != "engine" else 0.0
    paint = tuple(p * (1 - fade) + a * fade for p, a in zip(paint, asphalt, strict=True))
    mark = canvas.part(m.ROAD, paint, entity=entity, face=surface.GROUND)
    half = layout.road_half
    if rng.random() < 0.85:
        step = 2 * half / max(layout.lanes, 2)
        for lane in range(1, max(layout.lanes, 2)):
            x = -half + lane * step
            z = rng.uniform(0, 4)
            while z < 60:
                dash = ((x - 0.08, 0, z + 3), (x + 0.08, 0, z + 3), (x + 0.08, 0, z))
                canvas.world_polygon((*dash, (x - 0.08, 0, z)), mark)
                z += rng.choice((6.0, 7.0)) if z < 30 else 9.0
    if layout.kind == "highway" or rng.random() < 0.4:
        for side in (-1, 1):
            _strip(canvas, side * (half - 0.35), side * (half - 0.2), mark)
    if layout.crossing_m and rng.random() < 0.6:
        z0 = layout.crossing_m - 4
        x = -half + 0.3
        while x < half - 0.5:
            bar = ((x, 0, z0 + 2.8), (x + 0.5, 0, z0 + 2.8), (x + 0.5, 0, z0), (x, 0, z0))
            canvas.world_polygon(bar, mark)
            x += 1.0
    if layout.palette != "engine":
        for _ in range(rng.randint(0, 4)):
            shade = rng.uniform(0.7, 1.15)
            patch = canvas.part(
                m.ROAD,
                tuple(c * shade for c in asphalt),
                entity=entity,
                texture=surface.ASPHALT,
                face=surface.GROUND,
            )
            x, z = rng.uniform(-half, half - 1), rng.uniform(3, 25)
            w, d = rng.uniform(0.6, 2.5), rng.uniform(1, 8)
            x1 = min(x + w, half)
            canvas.world_polygon(((x, 0, z + d), (x1, 0, z + d), (x1, 0, z), (x, 0, z)), patch)


def _windows(rng: random.Random) -> Windows:
    pitch_u, pitch_v = rng.uniform(1.8, 4.0), rng.uniform(2.7, 3.6)
    glass = rng.uniform(0.08, 0.4)
    return Windows(
        pitch_u=pitch_u,
        pitch_v=pitch_v,
        width=pitch_u * rng.uniform(0.3, 0.75),
        height=pitch_v * rng.uniform(0.35, 0.7),
        sill=pitch_v * rng.uniform(0.15, 0.3),
        colour=(glass * rng.uniform(0.7, 1), glass, glass * rng.uniform(1, 1.5)),
        lit=rng.uniform(0.05, 0.6),
    )


def draw_sides(canvas: Canvas, rng: random.Random, layout: Layout) -> None:
    """Houses, walls, fences, hedges and woods along both sides, far ones first."""
    pieces = [piece for side in (-1, 1) for piece in _plan_side(rng, layout, side)]
    pieces.sort(key=lambda piece: -piece[1])
    for side, z0, z1, kind in pieces:
        edge = layout.edge(side)
        match kind:
            case "block":
                draw_building(canvas, rng, layout, side * edge, z0, z1, house=False)
            case "house":
                setback = rng.uniform(0, 5)
                draw_building(canvas, rng, layout, side * (edge + setback), z0, z1, house=True)
            case "wall" | "fence":
                draw_barrier(canvas, rng, layout, side * edge, z0, z1, kind)
            case "hedge":
                draw_hedge(canvas, rng, layout, side * edge, z0, z1)
            case "wood":
                draw_wood(canvas, rng, layout, side, z0, z1)


def _plan_side(
    rng: random.Random, layout: Layout, side: int
) -> list[tuple[int, float, float, str]]:
    weights = {
        "city": {"block": 8, "wall": 0.5, "fence": 0.5, "wood": 0.8, "open": 0.4},
        "square": {"block": 5, "wood": 1.5, "open": 1.5, "fence": 0.6, "wall": 0.4},
        "suburb": {"house": 6, "hedge": 1.2, "fence": 1.5, "wall": 1, "wood": 1.5, "open": 1},
        "highway": {"wall": 2, "fence": 2.5, "wood": 2, "open": 3, "block": 1},
        "park": {"wood": 4, "hedge": 1, "fence": 1.5, "open": 2.5, "house": 0.6, "wall": 0.5},
        "country": {"wood": 2, "open": 4, "fence": 1.2, "house": 1, "hedge": 1, "wall": 0.3},
    }[layout.kind]
    names, odds = list(weights), list(weights.values())
    pieces: list[tuple[int, float, float, str]] = []
    z = rng.uniform(-6, 4)
    while z < FAR_M:
        kind = rng.choices(names, odds)[0]
        low, high = {"block": (9, 24), "house": (8, 14), "open": (5, 18)}.get(kind, (8, 22))
        length = rng.uniform(low, high)
        crosses = (
            layout.crossing_m and z < layout.crossing_m + 11 and z + length > layout.crossing_m
        )
        if crosses:
            length = layout.crossing_m - z - 1
            if length > 5:
                pieces.append((side, z, z + length, kind))
            z = layout.crossing_m + 12
            continue
        if kind != "open":
            pieces.append((side, z, z + length, kind))
        if kind in ("fence", "wall", "hedge") and layout.kind in ("suburb", "country"):
            pieces.append((side, z + length + 0.1, z + length + 0.2, "wood"))
        z += length + (rng.uniform(2, 7) if kind == "house" else 0)
    return pieces


def draw_building(
    canvas: Canvas,
    rng: random.Random,
    layout: Layout,
    x: float,
    z0: float,
    z1: float,
    *,
    house: bool,
) -> None:
    """A block with a flat top, or a house with a gable, its front at x facing the road."""
    side = 1 if x > 0 else -1
    entity = canvas.entity()
    colour = palettes.facade(rng, layout.palette)
    height = rng.uniform(3.0, 7.0) if house else rng.uniform(8, 26)
    depth = side * rng.uniform(7, 14)
    texture = rng.choice((surface.BRICK, surface.CONCRETE, surface.CONCRETE, surface.PLAIN))
    windows = _windows(rng)
    front = canvas.part(
        m.BUILDING,
        colour,
        entity=entity,
        plane=canvas.wall_plane((x, z0), (x, z1)),
        texture=texture,
        face=surface.LEFT_WALL if side < 0 else surface.RIGHT_WALL,
        windows=windows,
    )
    near = max(z0, 0.3)
    if house:
        _draw_roof(canvas, rng, entity, x, depth, height, near, z1)
    canvas.world_polygon(((x, 0, near), (x, 0, z1), (x, height, z1), (x, height, near)), front)
    if z0 > 0.5:
        end = canvas.part(
            m.BUILDING,
            tuple(c * rng.uniform(0.85, 1.0) for c in colour),
            entity=entity,
            z=z0,
            texture=texture,
            windows=windows if rng.random() < 0.6 else None,
        )
        wall = [(x, 0, z0), (x, height, z0), (x + depth, height, z0), (x + depth, 0, z0)]
        if house:
            wall.insert(2, (x + depth / 2, height + abs(depth) * 0.3, z0))
        canvas.world_polygon(wall, end)
    if not house and layout.kind in ("city", "square") and rng.random() < 0.6:
        shop = canvas.part(
            m.BUILDING,
            palettes.pick(rng, ((0, 1), (0.1, 0.7), (0.1, 0.6))),
            entity=entity,
            plane=canvas.planes[front],
            face=canvas.faces[front],
            windows=Windows(
                pitch_u=rng.uniform(3, 6),
                pitch_v=50,
                width=2.4,
                height=2.2,
                sill=0.4,
                colour=(0.25, 0.27, 0.3),
                lit=0.7,
            ),
        )
        top = rng.uniform(2.8, 3.6)
        canvas.world_polygon(((x, 0, near), (x, 0, z1), (x, top, z1), (x, top, near)), shop)


def _draw_roof(
    canvas: Canvas,
    rng: random.Random,
    entity: int,
    x: float,
    depth: float,
    height: float,
    z0: float,
    z1: float,
) -> None:
    tiles = palettes.pick(rng, ((0.0, 0.08), (0.2, 0.6), (0.2, 0.5)))
    roof = canvas.part(
        m.BUILDING,
        tiles,
        entity=entity,
        plane=canvas.wall_plane((x, z0), (x, z1)),
        face=surface.TOP,
    )
    ridge_x, ridge_y = x + depth / 2, height + abs(depth) * 0.3
    eave = (x - 0.4 * (1 if depth > 0 else -1), height - 0.2)
    canvas.world_polygon(
        ((*eave, z0), (*eave, z1), (ridge_x, ridge_y, z1), (ridge_x, ridge_y, z0)), roof
    )


def draw_barrier(
    canvas: Canvas, rng: random.Random, layout: Layout, x: float, z0: float, z1: float, kind: str
) -> None:
    """A wall, or a fence of bars, along the road."""
    near = max(z0, 0.4)
    engine = layout.palette == "engine"
    face = surface.LEFT_WALL if x < 0 else surface.RIGHT_WALL
    plane = canvas.wall_plane((x, near), (x, z1))
    if kind == "wall":
        height = 1.8 if engine else rng.uniform(1.0, 3.6)
        colour = (0.62, 0.60, 0.56)
        if not engine:
            colour = palettes.pick(rng, ((0.03, 0.13), (0.05, 0.45), (0.35, 0.75)))
        texture = rng.choice((surface.BRICK, surface.CONCRETE))
        part = canvas.part(
            m.WALL, colour, entity=canvas.entity(), plane=plane, texture=texture, face=face
        )
        canvas.world_polygon(((x, 0, near), (x, 0, z1), (x, height, z1), (x, height, near)), part)
        return
    height = 1.3 if engine else rng.uniform(0.8, 2.2)
    colour = (0.45, 0.33, 0.22) if engine or rng.random() < 0.4 else (rng.uniform(0.2, 0.8),) * 3
    behind = palettes.grass(rng, layout.palette, layout.season)
    pitch = rng.uniform(0.25, 1.2)
    bars = Windows(
        pitch_u=pitch,
        pitch_v=rng.choice((0.5, 50.0)),
        width=pitch * rng.uniform(0.4, 0.75),
        height=rng.uniform(0.28, 0.4) if rng.random() < 0.5 else 40,
        sill=0.05,
        colour=tuple(0.6 * c for c in behind),
        lit=0.0,
    )
    part = canvas.part(
        m.FENCE, colour, entity=canvas.entity(), plane=plane, face=face, windows=bars
    )
    canvas.world_polygon(((x, 0, near), (x, 0, z1), (x, height, z1), (x, height, near)), part)


def draw_hedge(
    canvas: Canvas, rng: random.Random, layout: Layout, x: float, z0: float, z1: float
) -> None:
    """A hedge with an uneven top."""
    near = max(z0, 0.4)
    part = canvas.part(
        m.VEGETATION,
        palettes.leaf(rng, layout.palette, layout.season),
        entity=canvas.entity(),
        plane=canvas.wall_plane((x, near), (x, z1)),
        texture=surface.LEAVES,
        face=surface.LEFT_WALL if x < 0 else surface.RIGHT_WALL,
    )
    height = rng.uniform(0.8, 2.6)
    steps = [near + (z1 - near) * i / 6 for i in range(7)]
    top = [(x, height * rng.uniform(0.85, 1.15), z) for z in reversed(steps)]
    canvas.world_polygon([(x, 0, near), (x, 0, z1), *top], part)


def draw_wood(
    canvas: Canvas, rng: random.Random, layout: Layout, side: int, z0: float, z1: float
) -> None:
    """A few trees and bushes behind the building line."""
    count = max(1, round((z1 - z0) / 4.5))
    spots = sorted((rng.uniform(max(z0, 1.5), max(z1, 2.0)) for _ in range(count)), reverse=True)
    for z in spots:
        x = side * (layout.edge(side) + rng.uniform(0.5, 7))
        if rng.random() < 0.35:
            draw_bush(canvas, rng, layout, x, z)
        else:
            draw_tree(canvas, rng, layout, x, z, rng.uniform(5, 13))


def draw_bush(canvas: Canvas, rng: random.Random, layout: Layout, x: float, z: float) -> None:
    """A low shrub."""
    leaf = palettes.leaf(rng, layout.palette, layout.season)
    entity, scale = canvas.entity(), canvas.camera.focal_px / max(z, 1.0)
    for _ in range(4):
        part = _leaf_part(canvas, rng, leaf, entity, z)
        centre = canvas.camera.project(x + rng.uniform(-0.6, 0.6), rng.uniform(0.3, 0.9), z)
        radius = rng.uniform(0.4, 0.8) * scale
        canvas.ellipse(centre, radius, radius * 0.9, part)


def draw_tree(
    canvas: Canvas, rng: random.Random, layout: Layout, x: float, z: float, height: float
) -> None:
    """A tree: trunk and crown are vegetation, as in Cityscapes."""
    camera = canvas.camera
    entity, scale = canvas.entity(), camera.focal_px / max(z, 1.0)
    bark_value = rng.uniform(0.12, 0.3)
    bark = canvas.part(
        m.VEGETATION,
        (bark_value * 1.2, bark_value, bark_value * 0.8),
        entity=entity,
        z=z,
        texture=surface.BRICK if rng.random() < 0.2 else surface.PLAIN,
    )
    crown_low = height * rng.uniform(0.25, 0.4)
    foot, fork = camera.project(x, 0, z), camera.project(x, crown_low + height * 0.15, z)
    canvas.line(foot, fork, max(1.5, height * 0.035 * scale), bark)
    leaf = palettes.leaf(rng, layout.palette, layout.season)
    conifer = rng.random() < 0.2 and layout.season != "bare"
    if conifer:
        part = _leaf_part(canvas, rng, tuple(0.75 * c for c in leaf), entity, z)
        for tier in range(3):
            low = crown_low * 0.5 + (height - crown_low * 0.5) * tier * 0.28
            reach = height * 0.24 * (1 - 0.28 * tier)
            high = min(height, low + height * 0.5)
            canvas.world_polygon(((x - reach, low, z), (x + reach, low, z), (x, high, z)), part)
        return
    if layout.season == "bare":
        for _ in range(9):
            tip = camera.project(
                x + rng.uniform(-0.3, 0.3) * height, rng.uniform(0.5, 1.0) * height, z
            )
            canvas.line(fork, tip, max(1.0, height * 0.010 * scale), bark)
    wide = height * rng.uniform(0.2, 0.32)
    blobs = 5 if z > 40 else 11
    for index in range(blobs):
        part = _leaf_part(canvas, rng, leaf, entity, z)
        centre = camera.project(
            x + rng.uniform(-1, 1) * wide * 0.75, rng.uniform(crown_low + 0.2 * wide, height), z
        )
        radius = wide * rng.uniform(0.3, 0.65) * scale * (0.5 if layout.season == "bare" else 1.0)
        if index % 3 == 0 or layout.season != "bare":
            canvas.ellipse(centre, radius, radius * rng.uniform(0.75, 1.0), part)


def _leaf_part(canvas: Canvas, rng: random.Random, leaf: Colour, entity: int, z: float) -> int:
    shade = rng.uniform(0.75, 1.15)
    return canvas.part(
        m.VEGETATION,
        tuple(c * shade for c in leaf),
        entity=entity,
        z=z,
        texture=surface.LEAVES,
    )


def draw_lamp(canvas: Canvas, rng: random.Random, layout: Layout, x: float, z: float) -> None:
    """A street lamp: a pole, and where it is dark a light."""
    camera = canvas.camera
    scale = camera.focal_px / z
    grey = 0.35 if layout.palette == "engine" else rng.uniform(0.15, 0.65)
    height = rng.uniform(4.5, 8.5)
    pole = canvas.part(
        m.POLE, (grey, grey, grey), entity=canvas.entity(), z=z, texture=surface.METAL
    )
    top = camera.project(x, height, z)
    canvas.line(camera.project(x, 0, z), top, max(1.6, rng.uniform(0.14, 0.26) * scale), pole)
    arm = camera.project(x - (1.6 if x > 0 else -1.6), height + 0.2, z)
    canvas.line(top, arm, max(1.0, 0.12 * scale), pole)
    warm = rng.choice(((1.0, 0.75, 0.4), (1.0, 0.9, 0.7), (0.85, 0.92, 1.0)))
    head = canvas.part(m.POLE, warm, entity=canvas.entities[pole], z=z, emission=1.0)
    canvas.ellipse(arm, max(1.0, 0.3 * scale), max(0.8, 0.16 * scale), head)
    canvas.pools.append((x, z))


def draw_traffic_light(canvas: Canvas, rng: random.Random, x: float, z: float) -> None:
    """A signal head on a pole, one lamp on."""
    camera = canvas.camera
    scale = camera.focal_px / z
    grey = rng.uniform(0.15, 0.5)
    pole = canvas.part(m.POLE, (grey, grey, grey), entity=canvas.entity(), z=z)
    height = rng.uniform(2.6, 4.6)
    top = camera.project(x, height, z)
    canvas.line(camera.project(x, 0, z), top, max(1.5, 0.18 * scale), pole)
    entity = canvas.entity()
    box = canvas.part(m.TRAFFIC_LIGHT, (0.08, 0.08, 0.07), entity=entity, z=z)
    half, low, high = 0.3, height - 0.3, height + 1.0
    canvas.world_polygon(
        ((x - half, low, z), (x - half, high, z), (x + half, high, z), (x + half, low, z)), box
    )
    index, colour = rng.choice(((2, (1.0, 0.15, 0.1)), (1, (1.0, 0.7, 0.1)), (0, (0.1, 1.0, 0.5))))
    lamp = canvas.part(m.TRAFFIC_LIGHT, colour, entity=entity, z=z, emission=1.0)
    centre = camera.project(x, low + 0.22 + 0.42 * index, z)
    canvas.ellipse(centre, 0.17 * scale, 0.17 * scale, lamp)


def draw_sign(canvas: Canvas, rng: random.Random, x: float, z: float) -> None:
    """A round, triangular or rectangular sign on a pole."""
    camera = canvas.camera
    scale = camera.focal_px / z
    pole = canvas.part(m.POLE, (0.5, 0.5, 0.5), entity=canvas.entity(), z=z, texture=surface.METAL)
    height = rng.uniform(2.0, 3.4)
    canvas.line(camera.project(x, 0, z), camera.project(x, height, z), max(1.3, 0.12 * scale), pole)
    entity, radius = canvas.entity(), rng.uniform(0.35, 0.65)
    rim, inner = rng.choice(
        (
            ((0.8, 0.1, 0.1), (0.95, 0.95, 0.92)),
            ((0.1, 0.25, 0.7), (0.15, 0.35, 0.8)),
            ((0.9, 0.75, 0.1), (0.95, 0.8, 0.15)),
            ((0.05, 0.4, 0.25), (0.08, 0.45, 0.3)),
            ((0.85, 0.1, 0.1), (0.8, 0.12, 0.12)),
        )
    )
    shape = rng.choice(("disc", "triangle", "plate"))
    for share, colour in ((1.0, rim), (0.68, inner)):
        part = canvas.part(m.TRAFFIC_SIGN, colour, entity=entity, z=z)
        reach = radius * share
        if shape == "disc":
            centre = camera.project(x, height, z)
            canvas.ellipse(centre, reach * scale, reach * scale, part)
        elif shape == "triangle":
            low = height - 0.6 * reach
            points = ((x - reach, low, z), (x + reach, low, z), (x, height + reach, z))
            canvas.world_polygon(points, part)
        else:
            wide = reach * 1.4
            low, high = height - reach, height + reach
            points = ((x - wide, low, z), (x - wide, high, z), (x + wide, high, z))
            canvas.world_polygon((*points, (x + wide, low, z)), part)


def draw_bin(canvas: Canvas, rng: random.Random, x: float, z: float) -> None:
    """Something static that no class names (ignored in labels)."""
    colour = palettes.pick(rng, ((0.0, 1.0), (0.0, 0.6), (0.15, 0.6)))
    part = canvas.part(m.STATIC, colour, entity=canvas.entity(), z=z)
    wide, high = rng.uniform(0.25, 0.6), rng.uniform(0.7, 1.2)
    canvas.world_polygon(
        ((x - wide, 0, z), (x - wide, high, z), (x + wide, high, z), (x + wide, 0, z)), part
    )


def draw_hood(canvas: Canvas, rng: random.Random) -> None:
    """The ego vehicle's hood at the lower edge (ignored in labels)."""
    camera = canvas.camera
    value = rng.uniform(0.05, 0.5)
    part = canvas.part(m.EGO_VEHICLE, (value, value, value * 1.05), z=1.0)
    rise = rng.uniform(0.03, 0.12) * camera.height_px
    centre = (camera.centre_px + rng.uniform(-20, 20), camera.height_px + rise)
    canvas.ellipse(centre, camera.width_px * rng.uniform(0.42, 0.6), 2 * rise, part)
