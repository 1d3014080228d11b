"""Confusion matrices on the device, and IoU by the rules of four evaluators.

The rules differ: a class that is predicted but absent from the ground truth counts as 0 for
mmsegmentation and cityscapesScripts and is left out by detectron2 and CLOUDS; a void prediction is
a miss for the former and dropped by the latter.
"""

# K classes; confusion matrices are [K + 1, K + 1]: row ground truth, column prediction, K void
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

Rule = Literal["mmseg", "cityscapes", "detectron2", "clouds"]

SHORTEST_RUN_PX = 8
"""Mean length of runs of equal pairs from which on runs are counted instead of pixels."""
PIECE_PX = 1 << 18
"""Pixels counted at once on a CPU: small enough for its caches."""

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label ids of the 19 train ids (cityscapesScripts, `labels.py`)."""
CITYSCAPES_CATEGORIES = {
    "flat": (0, 1),
    "construction": (2, 3, 4),
    "object": (5, 6, 7),
    "nature": (8, 9),
    "sky": (10,),
    "human": (11, 12),
    "vehicle": (13, 14, 15, 16, 17, 18),
}
"""Train ids of each category (cityscapesScripts, `labels.py`)."""


@dataclass(frozen=True)
class IouScores:
    """What an evaluator reports; fractions, float64, NaN where a class does not count."""

    class_iou_K: torch.Tensor
    """Intersection over union per class."""
    class_accuracy_K: torch.Tensor
    """Share of a class's labelled pixels that were found."""
    miou: float
    """Mean of the class IoUs that count."""
    mean_accuracy: float
    """Mean of the class accuracies that count."""
    pixel_accuracy: float
    """Share of labelled pixels with the right class."""
    frequency_iou: float
    """Class IoUs weighted by the classes' shares of the ground truth."""


def confusion_matrix(
    predictions: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """Count pairs of labels and predictions, int64 [K + 1, K + 1], on the tensors' device.

    Args:
        predictions: uint8 class ids of any shape; values from K on are void.
        labels: uint8 class ids of the same shape; values from K on are void.
        num_classes: number of classes K.
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions are {tuple(predictions.shape)}, labels {tuple(labels.shape)}: "
            "resize the predictions to the labels"
        )
    side = num_classes + 1
    if labels.device.type == "cpu" and predictions.device.type == "cpu":
        columns, rows = predictions.flatten().numpy(), labels.flatten().numpy()
        counts = np.zeros(side**2, np.int64)
        for start in range(0, len(rows), PIECE_PX):
            piece = slice(start, start + PIECE_PX)
            counts += _count_runs(columns[piece], rows[piece], num_classes)
        return torch.from_numpy(counts).view(side, side)
    small = torch.int16 if side**2 <= torch.iinfo(torch.int16).max else torch.int64
    rows = labels.flatten().clamp(max=num_classes).to(small)
    columns = predictions.flatten().clamp(max=num_classes)
    return torch.bincount(rows * side + columns, minlength=side**2).view(side, side)


def _count_runs(predictions_N: np.ndarray, labels_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Pairs of a piece of two maps, numbered by label first: int64 [(K + 1) ** 2].

    Runs of equal pairs are counted at once, which is several times faster on large regions; where
    runs are short (noise), single pixels are.
    """
    side = num_classes + 1
    changes = predictions_N[1:] != predictions_N[:-1]
    changes |= labels_N[1:] != labels_N[:-1]
    starts, lengths = slice(None), None
    if np.count_nonzero(changes) * SHORTEST_RUN_PX < len(labels_N):
        starts = np.append(0, np.flatnonzero(changes) + 1)
        lengths = np.diff(starts, append=len(labels_N))
    rows = np.minimum(labels_N[starts], num_classes).astype(np.intp)
    pairs = rows * side + np.minimum(predictions_N[starts], num_classes)
    # Weights make float64 counts, which are exact up to 2**53 pixels.
    return np.bincount(pairs, weights=lengths, minlength=side**2).astype(np.int64)


def iou_scores(confusion: torch.Tensor, rule: Rule = "mmseg") -> IouScores:
    """IoU and accuracies of a confusion matrix by an evaluator's rule.

    Raises:
        ValueError: an unknown rule.
    """
    counts = confusion.double().cpu()[:-1]
    match rule:
        case "mmseg" | "cityscapes":
            truth_K = counts.sum(1)
        case "detectron2" | "clouds":
            truth_K = counts[:, :-1].sum(1)
        case other:
            raise ValueError(f"rule {other!r}: known are mmseg, cityscapes, detectron2, clouds")
    right_K = counts.diagonal()
    union_K = truth_K + counts[:, :-1].sum(0) - right_K
    counted_K = union_K > 0
    if rule in ("detectron2", "clouds"):
        counted_K = counted_K & (truth_K > 0)
    iou_K = torch.where(counted_K, right_K / union_K, math.nan)
    accuracy_K = torch.where(truth_K > 0, right_K / truth_K, math.nan)
    shares_K = truth_K / truth_K.sum()
    return IouScores(
        class_iou_K=iou_K,
        class_accuracy_K=accuracy_K,
        miou=iou_K.nanmean().item(),
        mean_accuracy=accuracy_K.nanmean().item(),
        pixel_accuracy=(right_K.sum() / truth_K.sum()).item(),
        frequency_iou=(iou_K.nan_to_num() * shares_K).sum().item(),
    )


def category_iou(
    confusion: torch.Tensor, categories: Mapping[str, Sequence[int]] = CITYSCAPES_CATEGORIES
) -> dict[str, float]:
    """IoU of categories by cityscapesScripts' rule: confusion inside a category is right."""
    counts = confusion.double().cpu()[:-1]
    found = {}
    for name, members in categories.items():
        inside = list(members)
        right = counts[inside][:, inside].sum()
        union = counts[inside].sum() + counts[:, inside].sum() - right
        found[name] = (right / union).item() if union > 0 else math.nan
    return found


def cityscapes_confusion(confusion: torch.Tensor) -> torch.Tensor:
    """The matrix in original Cityscapes ids, int64 [34, 34]; void is id 0."""
    ids = torch.tensor([*CITYSCAPES_IDS, 0])
    matrix = torch.zeros(34, 34, dtype=torch.int64)
    matrix[ids[:, None], ids] = confusion.cpu()
    return matrix


def boundary_differences(label_map_HW: torch.Tensor, ratio: float = 0.02) -> torch.Tensor:
    """detectron2's boundary of a label map: each label less the smallest label near it.

    "Near" is a square of `ratio` times the image's diagonal around the pixel; outside of the
    image there is one ring of zeros. For a binary mask this is its inner boundary.
    """
    height, width = label_map_HW.shape
    reach = max(1, round(ratio * math.hypot(height, width)))
    padded = F.pad(label_map_HW.float()[None, None], (1, 1, 1, 1))
    smallest = -F.max_pool2d(-padded, 2 * reach + 1, stride=1, padding=reach)
    return label_map_HW - smallest[0, 0, 1:-1, 1:-1].to(label_map_HW.dtype)


def boundary_confusion(
    predictions_BHW: torch.Tensor,
    labels_BHW: torch.Tensor,
    num_classes: int,
    *,
    eight_bits: bool = False,
) -> torch.Tensor:
    """Confusion matrix of the boundary differences, [K + 1, K + 1], as detectron2 counts it.

    Args:
        predictions_BHW: uint8 class ids; values from K on are void.
        labels_BHW: uint8 class ids of the same shape.
        num_classes: number of classes K.
        eight_bits: as released: pairs are numbered in 8 bits, so that with 19 classes
            everything from prediction 13 on is counted elsewhere.
    """
    side = num_classes + 1
    total = torch.zeros(side * side, dtype=torch.int64, device=labels_BHW.device)
    for prediction, label in zip(predictions_BHW, labels_BHW, strict=True):
        columns, rows = (
            boundary_differences(m.clamp(max=num_classes)).flatten().long()
            for m in (prediction, label)
        )
        # Numbered by prediction first, as there; the result is turned around below.
        pairs = columns * side + rows
        total += torch.bincount(pairs % 256 if eight_bits else pairs, minlength=side * side)
    return total.view(side, side).T


def boundary_iou(boundary: torch.Tensor) -> torch.Tensor:
    """IoU per class of a boundary confusion matrix by detectron2's rule; NaN: not there at all."""
    counts = boundary.double().cpu()[:-1, :-1]
    right_K = counts.diagonal()
    union_K = counts.sum(0) + counts.sum(1) - right_K
    return torch.where(union_K > 0, right_K / union_K, math.nan)
