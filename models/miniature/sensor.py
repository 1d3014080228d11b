"""Between the scene and the file: wet streets, glow, falling rain and snow, lens, film and sensor.

Works at the picture's size on display values in 0..1, [H, W, 3].
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

from models.miniature.light import Conditions


def expose(
    colour: np.ndarray,
    emitted: np.ndarray,
    *,
    wet: np.ndarray,
    horizon_px: float,
    conditions: Conditions,
    generator: np.random.Generator,
) -> np.ndarray:
    """Turn light into a uint8 picture [H, W, 3].

    Args:
        colour: reflected light, float32 [H, W, 3].
        emitted: light of lamps and windows, float32 [H, W, 3].
        wet: where rain water mirrors, float32 [H, W] in 0..1.
        horizon_px: row of the horizon.
        conditions: the picture's light, weather and sensor.
        generator: noise.
    """
    power = {"night": 1.3, "dusk": 1.0, "sodium": 1.2}.get(conditions.time, 0.25)
    picture = colour + power * emitted
    if conditions.is_dark:
        glow = ndimage.gaussian_filter(emitted, (1.6, 1.6, 0))
        halo = ndimage.gaussian_filter(emitted, (4.5, 4.5, 0))
        picture += power * (0.9 * glow + (1.2 + 20 * conditions.fog) * halo)
    if conditions.wetness > 0.05:
        picture = _mirror(picture, wet * conditions.wetness, horizon_px)
    if conditions.precipitation == "rain":
        picture = _rain(picture, generator)
    elif conditions.precipitation == "snow":
        picture = _flakes(picture, generator, bright=0.95 if not conditions.is_dark else 0.5)
    return _develop(picture, conditions, generator)


def _mirror(picture: np.ndarray, strength: np.ndarray, horizon_px: float) -> np.ndarray:
    height = picture.shape[0]
    rows = np.clip(np.round(2 * horizon_px - np.arange(height)), 0, height - 1).astype(np.intp)
    mirrored = ndimage.uniform_filter1d(picture[rows], 5, axis=0)
    share = (0.55 * strength)[..., None]
    return picture * (1 - 0.25 * strength[..., None]) * (1 - share) + mirrored * share


def _rain(picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    height, width, _ = picture.shape
    drops = (generator.random((height, width), dtype=np.float32) > 0.985).astype(np.float32)
    streaks = ndimage.uniform_filter1d(drops, 7, axis=0)
    return picture + 0.5 * streaks[..., None] * (0.35 + 0.4 * picture.mean())


def _flakes(picture: np.ndarray, generator: np.random.Generator, bright: float) -> np.ndarray:
    height, width, _ = picture.shape
    small = generator.random((height, width), dtype=np.float32) > 0.985
    large = generator.random((height, width), dtype=np.float32) > 0.998
    cover = np.maximum(0.6 * small, ndimage.uniform_filter(large.astype(np.float32), 2) * 2.4)
    cover = np.clip(cover, 0, 0.9)[..., None]
    return picture * (1 - cover) + bright * cover


def _develop(
    picture: np.ndarray, conditions: Conditions, generator: np.random.Generator
) -> np.ndarray:
    height, width, _ = picture.shape
    if conditions.blur_px > 0.25:
        picture = ndimage.gaussian_filter(picture, (conditions.blur_px, conditions.blur_px, 0))
    warm = conditions.white_balance
    gains = np.exp(np.array([warm, conditions.tint, -warm], dtype=np.float32))
    picture = picture * (conditions.exposure * gains)
    picture = (picture - 0.45) * conditions.contrast + 0.45
    grey = picture.mean(axis=2, keepdims=True)
    picture = _film(grey + (picture - grey) * conditions.saturation, grey, conditions.film)
    if conditions.vignette > 0.02:
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, width, dtype=np.float32)[None]
        picture = picture * (1 - 0.5 * conditions.vignette * (x * x + y * y))[..., None]
    if conditions.noise > 0.001:
        grain = generator.standard_normal(picture.shape, dtype=np.float32)
        picture = picture + conditions.noise * grain
    pixels = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    if conditions.jpeg is None:
        return pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=conditions.jpeg)
    return np.asarray(Image.open(buffer))


def _film(picture: np.ndarray, grey: np.ndarray, film: str) -> np.ndarray:
    match film:
        case "warm_print":
            return picture * np.array([1.06, 1.0, 0.86], np.float32) + np.float32(0.03)
        case "cross":
            return np.clip(picture, 0, 1) ** np.array([0.85, 1.0, 1.15], np.float32)
        case "grey":
            return np.repeat(grey, 3, axis=2)
        case "dust":
            return 0.75 * picture + 0.2 * grey * np.array([1.25, 0.95, 0.6], np.float32)
        case "faded":
            return 0.55 * picture + np.array([0.30, 0.24, 0.26], np.float32)
        case "infrared":
            swapped = picture[..., [1, 0, 2]]
            return 0.6 * swapped + 0.5 * picture[..., 1:2]
        case _:
            return picture
