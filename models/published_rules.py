"""Published rules that label SAM's automatic masks from a teacher's label map, as pure functions.

    refined = majority_rule(labels, masks)

Masks are bool [M, H, W], from the largest to the smallest (`Refiner.everything`), so that painting
them in order lets small ones overwrite large ones. Implemented from the rules as published; which
classes they treat in ways of their own, `models/rule_classes.py` says for any label space.
"""

# M automatic masks, P prompts, H W picture size
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from models.rule_classes import RuleClasses

VOID = 255

SMALL_SHARE = 0.2
STUFF_SHARE = 0.2
ROAD_RECTANGLE = (740, 780, 1645, 995)
"""Left, top, right, bottom on 2048 x 1024: where the road is expected."""

LabelOf = Callable[[int, np.ndarray], int | None]
"""From a mask's number and bool [H, W] to its class, or None."""


def paint_masks(masks_MHW: np.ndarray, label_of: LabelOf, *, size: tuple[int, int]) -> np.ndarray:
    """Paint masks in their order with the classes that `label_of` gives; 255 elsewhere."""
    painted_HW = np.full(size, VOID, np.uint8)
    for number, mask_HW in enumerate(masks_MHW):
        label = label_of(number, mask_HW)
        if label is not None:
            painted_HW[mask_HW] = label
    return painted_HW


def counts_in(label_map_HW: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """Pixels of every class inside a mask, without the void ones: int64 [255]."""
    return np.bincount(label_map_HW[mask_HW], minlength=256)[:VOID]


def majority_rule(
    label_map_HW: np.ndarray, masks_MHW: np.ndarray, *, fill: bool = True
) -> np.ndarray:
    """Every mask gets the commonest class of the teacher's labels inside it.

    Semantic Segment Anything (Chen et al. 2023); with `fill` as the first fusion of SAM4UDASS
    (Yan et al. 2023): what no mask covers keeps the teacher's label instead of 255.
    """

    def commonest(_number: int, mask_HW: np.ndarray) -> int | None:
        counts = counts_in(label_map_HW, mask_HW)
        return int(counts.argmax()) if counts.any() else None

    painted_HW = paint_masks(masks_MHW, commonest, size=label_map_HW.shape)
    return np.where(painted_HW == VOID, label_map_HW, painted_HW) if fill else painted_HW


def guided_rule(
    label_map_HW: np.ndarray,
    confidence_HW: np.ndarray,
    masks_MHW: np.ndarray,
    *,
    classes: RuleClasses,
    fusion: int = 3,
    sure: float = 0.99,
) -> np.ndarray:
    """SAM4UDASS (Yan et al. 2023): masks labelled with care for small classes, then fused.

    1. A mask gets the teacher's commonest class in it; if that is one of the large classes and the
       second commonest, of the small ones, has at least a fifth of its pixels: the second.
    2. A mask called sidewalk becomes road if road is second or third in it, and its centre lies
       where the road is expected, or it is the largest mask.
    3. Fusion 1: what no mask covers keeps the teacher's label. Fusion 2: the teacher's labels,
       painted over by the masks of small and thing classes (`detail`). Fusion 3: fusion 1, where
       the teacher's label comes back for certain pairs of classes (`restored_if_sure` where it is
       `sure`, `restored` always; their test for round signs on poles is left out).

    Args:
        label_map_HW: uint8 train ids.
        confidence_HW: float, 0..1.
        masks_MHW: from the largest to the smallest.
        classes: which ids are which of the rule's classes.
        fusion: 1, 2 or 3.
        sure: confidence of a sure teacher (0.99 for DAFormer, 0.9 for MIC).
    """

    def with_care(number: int, mask_HW: np.ndarray) -> int | None:
        counts = counts_in(label_map_HW, mask_HW)
        return _guided_label(counts, mask_HW, classes=classes, largest=number == 0)

    painted_HW = paint_masks(masks_MHW, with_care, size=label_map_HW.shape)
    fused_HW = np.where(painted_HW == VOID, label_map_HW, painted_HW)
    if fusion == 2:
        return np.where(np.isin(painted_HW, list(classes.detail)), painted_HW, label_map_HW)
    if fusion == 3:
        back_HW = _pairs(label_map_HW, fused_HW, classes.restored)
        if_sure_HW = _pairs(label_map_HW, fused_HW, classes.restored_if_sure)
        back_HW |= if_sure_HW & (confidence_HW >= sure)
        return np.where(back_HW, label_map_HW, fused_HW)
    return fused_HW


def _guided_label(
    counts: np.ndarray, mask_HW: np.ndarray, *, classes: RuleClasses, largest: bool
) -> int | None:
    if not counts.any():
        return None
    first, second, third = (int(label) for label in np.argsort(-counts, kind="stable")[:3])
    is_large, is_small = first in classes.large, second in classes.small
    if is_large and is_small and counts[second] >= SMALL_SHARE * counts[first]:
        return second
    if first in classes.sidewalk and (largest or _centre_on_road(mask_HW)):
        for near in (second, third):
            if near in classes.road and counts[near]:
                return near
    return first


def _centre_on_road(mask_HW: np.ndarray) -> bool:
    rows, columns = np.nonzero(mask_HW)
    height, width = mask_HW.shape
    x, y = columns.mean() * 2048 / width, rows.mean() * 1024 / height
    left, top, right, bottom = ROAD_RECTANGLE
    return bool(left <= x <= right and top <= y <= bottom)


def _pairs(
    teacher_HW: np.ndarray, fused_HW: np.ndarray, pairs: Mapping[int, frozenset[int]]
) -> np.ndarray:
    """Where (teacher's class, fused class) is one of the pairs: bool [H, W]."""
    table = np.zeros((256, 256), bool)
    for label, others in pairs.items():
        table[label, list(others)] = True
    return table[teacher_HW, fused_HW]


@dataclass(frozen=True, kw_only=True)
class ThingPrompts:
    """A box and two points for every component of a thing class."""

    labels: tuple[int, ...]
    boxes_P4: np.ndarray
    """float32 (left, top, right, bottom)."""
    points_P22: np.ndarray
    """float32 (x, y)."""


def stuff_labels(
    label_map_HW: np.ndarray, masks_MHW: np.ndarray, *, stuff: frozenset[int]
) -> np.ndarray:
    """SeCo (Zhao et al. 2024), stuff: a mask gets the stuff class with the greatest share.

    The share is of the mask's pixels with a label, and must exceed 0.2; 255 elsewhere.

    Args:
        label_map_HW: uint8 train ids.
        masks_MHW: from the largest to the smallest.
        stuff: ids of the stuff classes (`RuleClasses.stuff`).
    """

    def greatest(_number: int, mask_HW: np.ndarray) -> int | None:
        counts = counts_in(label_map_HW, mask_HW)
        total = counts.sum()
        best = max(stuff, key=lambda label: (counts[label], -label))
        return best if total and counts[best] > STUFF_SHARE * total else None

    return paint_masks(masks_MHW, greatest, size=label_map_HW.shape)


def stuff_things_rule(
    label_map_HW: np.ndarray,
    masks_MHW: np.ndarray,
    thing_labels: Sequence[int],
    things_PHW: np.ndarray,
    *,
    stuff: frozenset[int],
) -> np.ndarray:
    """SeCo, whole: what SAM found for things stands over the stuff; 255 where there is neither.

    Args:
        label_map_HW: uint8 train ids.
        masks_MHW: automatic masks, from the largest to the smallest.
        thing_labels: of the prompts (`ThingPrompts.labels`).
        things_PHW: bool, SAM's mask for each of them.
        stuff: ids of the stuff classes (`RuleClasses.stuff`).
    """
    stuff_HW = stuff_labels(label_map_HW, masks_MHW, stuff=stuff)
    painted_HW = paint_masks(
        things_PHW, lambda number, _: thing_labels[number], size=label_map_HW.shape
    )
    return np.where(painted_HW == VOID, stuff_HW, painted_HW)


def thing_prompts(
    label_map_HW: np.ndarray,
    *,
    things: Sequence[int],
    min_area_px: int = 10,
    unclip: float = 1.25,
    radius_px: int = 8,
) -> ThingPrompts:
    """SeCo, things: a generous box and two unambiguous points per 8-connected component.

    The box surrounds the component's smallest rotated rectangle, grown on every side by area x
    `unclip` / perimeter of that rectangle. The component's pixels, in scan order, are split into
    two halves; in each the pixel whose neighbourhood has the lowest entropy of labels is a point.

    Args:
        label_map_HW: uint8 train ids.
        things: ids of the thing classes (`RuleClasses.things`).
        min_area_px: smallest component. This and the radius are as published for Cityscapes'
            pictures, whatever the picture's size.
        unclip: how generous the box is.
        radius_px: of the neighbourhood. At 64x128 radii of 8, 4 and 2 gave labels equally good
            (27.5, 27.4 and 27.5 mIoU on 40 web pictures of the miniature).
    """
    labels, boxes, points = [], [], []
    entropy_HW = label_entropy(label_map_HW, radius_px=radius_px)
    height, width = label_map_HW.shape
    for label in things:
        numbers, count = cc3d.connected_components(
            label_map_HW == label, connectivity=8, return_N=True
        )
        for number in range(1, count + 1):
            rows, columns = np.nonzero(numbers == number)
            if len(rows) < min_area_px:
                continue
            labels.append(label)
            boxes.append(_grown_box(rows, columns, unclip=unclip, size=(height, width)))
            halves = np.array_split(np.arange(len(rows)), 2)
            picks = [half[entropy_HW[rows[half], columns[half]].argmin()] for half in halves]
            points.append([(columns[pick], rows[pick]) for pick in picks])
    return ThingPrompts(
        labels=tuple(labels),
        boxes_P4=np.array(boxes, np.float32).reshape(-1, 4),
        points_P22=np.array(points, np.float32).reshape(-1, 2, 2),
    )


def label_entropy(label_map_HW: np.ndarray, *, radius_px: int) -> np.ndarray:
    """Entropy (nats) of the labels in the square window around every pixel, float32 [H, W]."""
    entropy_HW = np.zeros(label_map_HW.shape, np.float32)
    for label in np.unique(label_map_HW):
        share_HW = ndimage.uniform_filter(
            (label_map_HW == label).astype(np.float32), 2 * radius_px + 1, mode="nearest"
        ).clip(0, 1)
        entropy_HW -= np.where(share_HW > 0, share_HW * np.log(np.maximum(share_HW, 1e-12)), 0)
    return entropy_HW


def _grown_box(
    rows: np.ndarray, columns: np.ndarray, *, unclip: float, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    corners_42 = smallest_rectangle(np.stack([columns, rows], axis=1).astype(np.float64))
    sides = np.linalg.norm(corners_42 - np.roll(corners_42, -1, axis=0), axis=1)
    grown = sides[0] * sides[1] * unclip / max(sides.sum(), 1e-9)
    left, top = np.maximum(corners_42.min(0) - grown, 0)
    right, bottom = np.minimum(corners_42.max(0) + grown, (size[1] - 1, size[0] - 1))
    return left, top, right, bottom


def smallest_rectangle(points_N2: np.ndarray) -> np.ndarray:
    """Corners [4, 2] of the rectangle of smallest area, at any angle, around points.

    One of its sides lies on a side of the convex hull (Freeman and Shapira 1975).
    """
    try:
        hull = points_N2[ConvexHull(points_N2).vertices]
    except (QhullError, ValueError):
        hull = points_N2[[points_N2[:, 0].argmin(), points_N2[:, 0].argmax()]]
        if (hull[0] == hull[1]).all():
            hull = points_N2[[points_N2[:, 1].argmin(), points_N2[:, 1].argmax()]]
    edges = np.roll(hull, -1, axis=0) - hull
    best, best_area = None, np.inf
    for angle in np.unique(np.arctan2(edges[:, 1], edges[:, 0]) % (np.pi / 2)):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turned = hull @ turn
        (left, top), (right, bottom) = turned.min(0), turned.max(0)
        area = (right - left) * (bottom - top)
        if area < best_area:
            corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
            best, best_area = corners @ turn.T, area
    assert best is not None, "a hull has at least one edge"
    return best
