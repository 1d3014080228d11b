"""What happens to one picture and its label before training: scale, crop, mirror, colour, blur.

All draws come from one generator, in a fixed order. Pixels stay uint8; only the part of a picture
that the crop shows is resized.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from stages.labels import IGNORE
from stages.training_config import AugmentConfig

PADDING_RGB = (123, 116, 103)
"""Colour outside a picture that is smaller than the crop: about the mean of photographs."""

CROP_ATTEMPTS = 10
"""Crops drawn before the last one is taken (Mask2Former, mmsegmentation)."""

BLUR_SIGMA_PX = (0.15, 1.15)
"""Range of the Gaussian's standard deviation (DAFormer)."""

_FOCUS_SHARE = 0.0015
"""Share of a crop that the class it was drawn for should fill."""


@dataclass(frozen=True)
class Window:
    """A crop of a scaled picture; it may reach beyond the picture."""

    scaled: tuple[int, int]
    """(height, width) of the whole picture at the drawn scale."""
    top: int
    left: int
    height: int
    width: int

    @property
    def inner(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) of what lies inside the scaled picture."""
        return (
            max(self.top, 0),
            max(self.left, 0),
            min(self.top + self.height, self.scaled[0]),
            min(self.left + self.width, self.scaled[1]),
        )

    @property
    def target(self) -> tuple[slice, slice]:
        """Where `inner` lies in the crop."""
        top, left, bottom, right = self.inner
        rows = slice(top - self.top, bottom - self.top)
        return rows, slice(left - self.left, right - self.left)


def augment(
    image_HW3: np.ndarray,
    labels_HW: np.ndarray,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    focus: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One augmented view.

    Args:
        image_HW3: uint8 RGB.
        labels_HW: uint8 train ids of the same size.
        config: sizes, ranges and shares.
        rng: the only source of chance.
        focus: train id that the crop should show, if a few attempts find it.

    Returns:
        Image uint8 [crop height, crop width, 3] and labels uint8 [crop height, crop width].
    """
    scale = rng.uniform(config.scale_min, config.scale_max)
    scaled = tuple(max(1, round(side * scale)) for side in labels_HW.shape)
    for _ in range(CROP_ATTEMPTS):
        window = _draw_window(scaled, config, rng)
        labels = crop_labels(labels_HW, window)
        if _balanced(labels, config.max_class_share) and _shows(labels, focus):
            break
    image = crop_image(image_HW3, window)
    mirrored = rng.random() < 0.5
    colour, blur = rng.random(9), rng.random(2)
    if config.colour:
        image = jitter_colour(image, colour, strength=config.colour)
    if blur[0] < config.blur:
        low, high = BLUR_SIGMA_PX
        sigma_px = float(low + (high - low) * blur[1])
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma_px)))
    if config.flip and mirrored:
        return image[:, ::-1], labels[:, ::-1]
    return image, labels


def mix_classes(
    onto: tuple[np.ndarray, np.ndarray],
    donor: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Paste half of a donor's classes onto a picture, with their labels.

    ClassMix (Olsson et al. 2021, section 3.1) across domains as in DACS (Tranheden et al. 2021,
    section 3.2): of the K classes that the donor's labels show, ceil(K / 2) are drawn, and all
    their pixels take the place of what the picture shows there. Unlabelled pixels of the donor are
    never pasted, those of the picture stay unlabelled where nothing is pasted.

    Args:
        onto: image uint8 [H, W, 3] and labels uint8 [H, W] of the picture.
        donor: of the donor, the same size.
        rng: the only source of chance.

    Returns:
        Image and labels, new arrays, and the share of pixels that were pasted.
    """
    labels_HW = donor[1]
    present = np.flatnonzero(np.bincount(labels_HW.ravel(), minlength=IGNORE + 1)[:IGNORE])
    drawn = rng.choice(present, size=(len(present) + 1) // 2, replace=False)
    pasted_HW = np.isin(labels_HW, drawn)
    image = np.where(pasted_HW[..., None], donor[0], onto[0])
    return image, np.where(pasted_HW, labels_HW, onto[1]), float(pasted_HW.mean())


def _draw_window(
    scaled: tuple[int, int], config: AugmentConfig, rng: np.random.Generator
) -> Window:
    crop = (config.crop_height, config.crop_width)
    slack = [side - wanted for side, wanted in zip(scaled, crop, strict=True)]
    top, left = (int(rng.integers(min(room, 0), max(room, 0) + 1)) for room in slack)
    return Window(scaled=scaled, top=top, left=left, height=crop[0], width=crop[1])


def _balanced(labels_HW: np.ndarray, max_class_share: float) -> bool:
    """Whether no class fills more than the share of the labelled pixels."""
    if max_class_share >= 1:
        return True
    counts = np.bincount(labels_HW.ravel(), minlength=IGNORE + 1)[:IGNORE]
    return counts.max() <= max_class_share * counts.sum()


def _shows(labels_HW: np.ndarray, focus: int | None) -> bool:
    return focus is None or np.count_nonzero(labels_HW == focus) > _FOCUS_SHARE * labels_HW.size


def crop_labels(labels_HW: np.ndarray, window: Window) -> np.ndarray:
    """The window of a label map scaled by nearest neighbour; 255 outside the picture."""
    top, left, bottom, right = window.inner
    height, width = labels_HW.shape
    rows = ((np.arange(top, bottom) + 0.5) * (height / window.scaled[0])).astype(np.intp)
    columns = ((np.arange(left, right) + 0.5) * (width / window.scaled[1])).astype(np.intp)
    inside = labels_HW[rows[:, None], columns]
    if inside.shape == (window.height, window.width):
        return inside
    labels = np.full((window.height, window.width), IGNORE, np.uint8)
    labels[window.target] = inside
    return labels


def crop_image(image_HW3: np.ndarray, window: Window) -> np.ndarray:
    """The window of a picture scaled bilinearly (antialiased); padding colour outside.

    Equals scaling the whole picture and cutting. Where the crop is a small part of the picture only
    that part is scaled (by Pillow); else all of it (by torch, the same numbers five times as fast).
    """
    top, left, bottom, right = window.inner
    if window.scaled == image_HW3.shape[:2]:
        inside = image_HW3[top:bottom, left:right]
    elif window.scaled[0] * window.scaled[1] <= _WHOLE_UP_TO * window.height * window.width:
        inside = _resized(image_HW3, window.scaled)[top:bottom, left:right]
    else:
        inside = _resized_part(image_HW3, window.scaled, (top, left, bottom, right))
    if inside.shape[:2] == (window.height, window.width):
        return np.ascontiguousarray(inside)
    image = np.empty((window.height, window.width, 3), np.uint8)
    image[:] = PADDING_RGB
    image[window.target] = inside
    return image


_WHOLE_UP_TO = 5
"""Area of the scaled picture in crops up to which scaling all of it is the faster way."""


def _resized(image_HW3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image_13HW = torch.from_numpy(image_HW3).permute(2, 0, 1)[None]
    scaled = functional.interpolate(image_13HW, size, mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def _resized_part(
    image_HW3: np.ndarray, scaled: tuple[int, int], part: tuple[int, int, int, int]
) -> np.ndarray:
    # The filter looks beyond the box by its support: one source pixel, or one target pixel where
    # the picture shrinks. A margin of that width gives the same numbers as the whole picture.
    ratios = [old / new for old, new in zip(image_HW3.shape, scaled, strict=False)]
    low = [edge * ratio for edge, ratio in zip(part[:2], ratios, strict=True)]
    high = [edge * ratio for edge, ratio in zip(part[2:], ratios, strict=True)]
    margins = [int(max(ratio, 1.0)) + 2 for ratio in ratios]
    first = [max(0, int(edge) - margin) for edge, margin in zip(low, margins, strict=True)]
    last = [int(edge) + 1 + margin for edge, margin in zip(high, margins, strict=True)]
    source = Image.fromarray(image_HW3[first[0] : last[0], first[1] : last[1]])
    box = (
        low[1] - first[1],
        low[0] - first[0],
        min(high[1] - first[1], source.width),
        min(high[0] - first[0], source.height),
    )
    size = (part[3] - part[1], part[2] - part[0])
    return np.asarray(source.resize(size, Image.Resampling.BILINEAR, box=box))


def jitter_colour(image_HW3: np.ndarray, draws: np.ndarray, *, strength: float) -> np.ndarray:
    """SSD's photometric distortion (Liu et al. 2016, as in mmsegmentation), by look-up tables.

    Brightness, contrast, saturation and hue change with probability 1/2 each; contrast before or
    after the other two.

    Args:
        image_HW3: uint8 RGB.
        draws: nine uniform numbers in [0, 1).
        strength: 1 for the published ranges (32 levels, 0.5, 0.5, 18 of 180 degrees of hue).
    """
    brightness, contrast, saturation, hue = draws[:4] < 0.5
    amounts = strength * (2 * draws[4:8] - 1)
    levels = np.arange(256)
    before, after = levels, levels
    if brightness:
        before = _clip(before + 32 * amounts[0])
    if contrast and draws[8] < 0.5:
        before = _clip(before * max(0.0, 1 + 0.5 * amounts[1]))
    elif contrast:
        after = _clip(after * max(0.0, 1 + 0.5 * amounts[1]))
    if before is not levels:
        image_HW3 = before[image_HW3]
    if saturation or hue:
        size = image_HW3.shape[1::-1]
        hsv = np.array(Image.fromarray(image_HW3).convert("HSV"))
        if hue:
            # Bytes wrap around, as hues do.
            hsv[..., 0] += np.uint8(round(18 / 180 * 256 * amounts[3]) % 256)
        if saturation:
            hsv[..., 1] = _clip(levels * max(0.0, 1 + 0.5 * amounts[2]))[hsv[..., 1]]
        image_HW3 = np.asarray(Image.frombuffer("HSV", size, hsv).convert("RGB"))
    return image_HW3 if after is levels else after[image_HW3]


def _clip(levels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)
