"""How good pseudo-labels are, where the truth is known: IoU per class, and near boundaries.

Only collected pictures of a data set with labels have a truth (`data.unlabelled[].truth`). It is
compared with, never trained on.

    row["truth"] = compare(label_HW, truth_HW)      # per picture: counts, which add up
    statistics["truth"] = quality([row["truth"] for row in rows])
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import ndimage

from stages.labels import IGNORE

BOUNDARY_PX = 2
"""Pixels within this distance (chessboard) of another class in the truth are near a boundary."""
REGIONS = ("whole", "boundary")

Counts = Mapping[str, Mapping[str, list[int]]]
"""Region -> train id -> pixels [right, given, true, true and labelled] (see `compare`)."""


def compare(label_HW: np.ndarray, truth_HW: np.ndarray) -> Counts:
    """Count a label map (uint8 train ids, 255 none) against its truth, over its labelled pixels.

    Returns:
        For the whole picture and near boundaries, per class of either map: pixels that are rightly
        given the class, that are given it, whose truth it is, and those of the latter that have
        any label.

    Raises:
        ValueError: the maps differ in size.
    """
    if label_HW.shape != truth_HW.shape:
        raise ValueError(
            f"the label map is {label_HW.shape[0]}x{label_HW.shape[1]}, its truth "
            f"{truth_HW.shape[0]}x{truth_HW.shape[1]} (height x width)"
        )
    known_HW = truth_HW != IGNORE
    regions = {"whole": known_HW, "boundary": known_HW & near_boundary(truth_HW)}
    return {name: _count(label_HW[region], truth_HW[region]) for name, region in regions.items()}


def near_boundary(truth_HW: np.ndarray, *, radius_px: int = BOUNDARY_PX) -> np.ndarray:
    """Whether a pixel sees another class within the radius; unlabelled pixels are no class."""
    side = 2 * radius_px + 1
    known_HW = truth_HW != IGNORE
    largest_HW = ndimage.maximum_filter(np.where(known_HW, truth_HW, 0), side, mode="nearest")
    smallest_HW = ndimage.minimum_filter(truth_HW, side, mode="nearest")
    return known_HW & (largest_HW != smallest_HW)


def _count(labels_N: np.ndarray, truth_N: np.ndarray) -> dict[str, list[int]]:
    pairs = np.bincount(truth_N.astype(np.int64) * 256 + labels_N, minlength=65536)
    pairs = pairs.reshape(256, 256)
    given, true = pairs.sum(0), pairs.sum(1)
    labelled = true - pairs[:, IGNORE]
    return {
        str(k): [int(pairs[k, k]), int(given[k]), int(true[k]), int(labelled[k])]
        for k in range(IGNORE)
        if given[k] or true[k]
    }


def quality(counts: Iterable[Counts]) -> dict[str, Any]:
    """Sum pictures up and say how good their labels are, as fractions.

    Returns:
        "num_pictures" and per region "miou" (over the classes of either; a pixel without label is
        a miss), "miou_labelled" (pixels without label do not count), "labelled" (share of pixels
        that have a label), "accuracy" (share of those that is right) and "classes": train id ->
        "iou", "iou_labelled", "pixels" (of the truth). None where nothing counts.
    """
    rows = list(counts)
    return {"num_pictures": len(rows)} | {
        region: _quality_of(_summed(row[region] for row in rows)) for region in REGIONS
    }


def _summed(rows: Iterable[Mapping[str, list[int]]]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for row in rows:
        for key, numbers in row.items():
            total[key] = total.get(key, np.zeros(4, np.int64)) + np.array(numbers)
    return {key: total[key] for key in sorted(total, key=int)}


def _quality_of(total: Mapping[str, np.ndarray]) -> dict[str, Any]:
    classes = {
        key: {
            "iou": _share(right, given + true - right),
            "iou_labelled": _share(right, given + labelled - right),
            "pixels": int(true),
        }
        for key, (right, given, true, labelled) in total.items()
    }
    right, _, true, labelled = sum(total.values(), np.zeros(4, np.int64))
    return {
        "miou": _mean([one["iou"] for one in classes.values()]),
        "miou_labelled": _mean([one["iou_labelled"] for one in classes.values()]),
        "labelled": _share(labelled, true),
        "accuracy": _share(right, labelled),
        "classes": classes,
    }


def _share(part: int, whole: int) -> float | None:
    return round(float(part / whole), 6) if whole else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 6) if known else None


def percent(value: float | None) -> str:
    """A fraction for a sentence: "45.1", or "-" where nothing counts."""
    return "-" if value is None else f"{100 * value:.1f}"
