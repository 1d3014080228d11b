"""Styles of the miniature world: ranges of camera, scene, light and sensor.

`source` is one narrow look; the four targets and `web` never share its ranges. `web_unseen` holds
looks that
the web pictures never show (dust, sodium light, faded film): it is for gates, not for training.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

Range = tuple[float, float]
Weights = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Style:
    """Ranges are uniform (low, high); weights are relative frequencies by name."""

    name: str
    layouts: Weights = field(default_factory=lambda: dict(ALL_LAYOUTS))
    palettes: Weights = field(default_factory=lambda: {"mixed": 1.0})
    times: Weights = field(default_factory=lambda: {"day": 1.0})
    skies: Weights = field(default_factory=lambda: {"clear": 1.0, "cloudy": 1.0})
    precipitation: Weights = field(default_factory=lambda: {"none": 1.0})
    fog: Range = (0.0, 0.004)
    """Extinction per metre."""
    snow_cover: Range = (0.0, 0.0)
    wetness: Range = (0.0, 0.0)
    texture: Range = (0.5, 1.2)
    """Strength of surface textures; 0 paints flat colours."""
    clutter: Range = (0.6, 1.3)
    """Density of street furniture, people and vehicles."""
    field_of_view_deg: Range = (60.0, 80.0)
    camera_height_m: Range = (1.2, 1.9)
    horizon: Range = (0.40, 0.52)
    """Row of the horizon as a share of the picture's height."""
    roll_deg: Range = (-1.0, 1.0)
    distortion: Range = (0.0, 0.0)
    """Barrel distortion k1 of normalised radius squared."""
    lateral: Range = (-0.35, 0.35)
    """Camera position across the road, as a share of its half width."""
    hood: float = 0.1
    """Probability that the ego vehicle's hood shows (ignored in labels)."""
    exposure: Range = (0.85, 1.2)
    contrast: Range = (0.85, 1.15)
    saturation: Range = (0.7, 1.2)
    white_balance: Range = (-0.08, 0.08)
    """Log gain from blue (-) to yellow (+) light."""
    tint: Range = (-0.03, 0.03)
    noise: Range = (0.005, 0.03)
    """Standard deviation of the sensor's noise, full scale 1."""
    blur_px: Range = (0.0, 0.4)
    vignette: Range = (0.0, 0.25)
    jpeg: tuple[int, int] | None = (60, 95)
    film: Weights = field(default_factory=lambda: {"neutral": 1.0})


ALL_LAYOUTS: Weights = {
    "city": 3.0,
    "suburb": 2.0,
    "highway": 1.2,
    "park": 1.2,
    "square": 1.0,
    "country": 0.8,
}

STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style(
            name="source",
            layouts={"city": 3.0, "suburb": 2.0, "highway": 1.0, "park": 0.6},
            palettes={"engine": 1.0},
            skies={"clear": 1.0},
            fog=(0.0, 0.001),
            texture=(0.0, 0.12),
            clutter=(0.8, 1.2),
            field_of_view_deg=(66.0, 70.0),
            camera_height_m=(1.45, 1.55),
            horizon=(0.45, 0.49),
            roll_deg=(0.0, 0.0),
            lateral=(-0.2, 0.3),
            hood=0.0,
            exposure=(1.0, 1.08),
            contrast=(1.05, 1.1),
            saturation=(1.1, 1.2),
            white_balance=(0.02, 0.05),
            tint=(0.0, 0.0),
            noise=(0.0, 0.004),
            blur_px=(0.0, 0.0),
            vignette=(0.0, 0.0),
            jpeg=None,
        ),
        Style(
            name="city",
            layouts={"city": 4.0, "square": 1.5, "park": 0.7, "suburb": 1.0},
            palettes={"old_town": 2.0, "concrete": 1.0, "brick": 1.0},
            skies={"overcast": 2.0, "cloudy": 1.5, "clear": 0.7},
            texture=(0.9, 1.7),
            clutter=(1.0, 1.9),
            field_of_view_deg=(50.0, 64.0),
            camera_height_m=(1.15, 1.4),
            horizon=(0.42, 0.5),
            hood=0.35,
            exposure=(0.75, 1.0),
            contrast=(0.8, 1.05),
            saturation=(0.45, 0.8),
            white_balance=(-0.1, 0.02),
            noise=(0.02, 0.05),
            blur_px=(0.2, 0.5),
        ),
        Style(
            name="night",
            layouts={"city": 3.0, "suburb": 1.5, "highway": 1.5, "square": 0.8},
            palettes={"mixed": 1.0, "concrete": 1.0},
            times={"dusk": 1.5, "night": 2.5},
            skies={"cloudy": 1.0, "overcast": 1.0, "clear": 1.0},
            precipitation={"none": 1.4, "rain": 1.0},
            wetness=(0.0, 0.8),
            exposure=(0.8, 1.3),
            noise=(0.02, 0.06),
            white_balance=(-0.12, 0.12),
            hood=0.2,
        ),
        Style(
            name="winter",
            layouts={"city": 1.5, "suburb": 2.0, "country": 1.5, "highway": 1.0, "park": 1.0},
            palettes={"nordic": 1.0, "mixed": 1.0},
            skies={"overcast": 2.5, "cloudy": 0.6},
            precipitation={"none": 1.2, "snow": 1.2},
            fog=(0.004, 0.045),
            snow_cover=(0.0, 1.0),
            wetness=(0.0, 0.3),
            exposure=(0.9, 1.2),
            contrast=(0.75, 1.0),
            saturation=(0.5, 0.85),
            white_balance=(-0.14, 0.0),
        ),
        Style(
            name="cameras",
            palettes={"mixed": 1.0, "tropical": 0.7, "brick": 0.7},
            skies={"clear": 1.2, "cloudy": 1.2, "overcast": 0.6},
            clutter=(0.6, 1.7),
            field_of_view_deg=(42.0, 105.0),
            camera_height_m=(0.9, 3.4),
            horizon=(0.25, 0.66),
            roll_deg=(-9.0, 9.0),
            distortion=(-0.02, 0.2),
            lateral=(-1.3, 1.3),
            hood=0.25,
            exposure=(0.65, 1.45),
            contrast=(0.7, 1.35),
            saturation=(0.3, 1.4),
            white_balance=(-0.18, 0.18),
            tint=(-0.06, 0.06),
            noise=(0.0, 0.06),
            blur_px=(0.0, 0.8),
            vignette=(0.0, 0.5),
            jpeg=(25, 95),
            film={"neutral": 3.0, "warm_print": 1.0, "cross": 1.0, "grey": 0.4},
        ),
        Style(
            name="web",
            palettes={
                "mixed": 2.0,
                "old_town": 0.8,
                "concrete": 0.8,
                "brick": 0.8,
                "nordic": 0.6,
                "tropical": 0.8,
            },
            times={"day": 5.0, "golden": 1.0, "dusk": 1.0, "night": 1.3},
            skies={"clear": 1.5, "cloudy": 1.5, "overcast": 1.3},
            precipitation={"none": 5.0, "rain": 1.0, "snow": 0.6},
            fog=(-0.03, 0.035),
            snow_cover=(-2.5, 1.0),
            wetness=(-0.8, 0.7),
            texture=(0.3, 1.6),
            clutter=(0.5, 1.8),
            field_of_view_deg=(45.0, 95.0),
            camera_height_m=(1.0, 2.8),
            horizon=(0.3, 0.6),
            roll_deg=(-5.0, 5.0),
            distortion=(-0.05, 0.12),
            lateral=(-1.1, 1.1),
            hood=0.12,
            exposure=(0.7, 1.35),
            contrast=(0.75, 1.25),
            saturation=(0.35, 1.3),
            white_balance=(-0.15, 0.15),
            tint=(-0.05, 0.05),
            noise=(0.0, 0.05),
            blur_px=(0.0, 0.6),
            vignette=(0.0, 0.4),
            jpeg=(35, 95),
            film={"neutral": 4.0, "warm_print": 1.0, "cross": 0.7, "grey": 0.3},
        ),
        Style(
            name="web_unseen",
            palettes={"mixed": 1.0, "desert": 1.0},
            times={"day": 1.0, "sodium": 1.0},
            skies={"overcast": 1.0, "cloudy": 1.0},
            texture=(0.5, 1.3),
            fog=(-0.01, 0.02),
            noise=(0.02, 0.08),
            film={"dust": 1.0, "faded": 1.0, "infrared": 0.5},
        ),
    )
}

TARGETS = ("city", "night", "winter", "cameras")
"""The domains on which a model is judged and by which nothing may be chosen."""


def find_style(name: str) -> Style:
    """The style of that name.

    Raises:
        ValueError: for an unknown name, with the known ones and the nearest.
    """
    if name not in STYLES:
        near = difflib.get_close_matches(name, STYLES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown miniature style {name!r}; known: {', '.join(STYLES)}.{hint}")
    return STYLES[name]
