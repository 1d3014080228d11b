"""One confusion matrix per data set, and the numbers that follow from it.

The matrix is summed over the whole data set before anything is divided (never a mean of per-image
IoU). Counting and the evaluators' rules are in `models/evaluators.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from models.evaluators import confusion_matrix, iou_scores


class DatasetScore:
    """What a segmenter got right on one data set: a confusion matrix that grows on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes, self.num_images = num_classes, 0
        side = num_classes + 1
        self._total = torch.zeros(side, side, dtype=torch.int64, device=device)

    def add(self, predictions_BHW: torch.Tensor, labels_BHW: torch.Tensor) -> None:
        """Count a batch: uint8 train ids, of the same size; labels 255 do not count."""
        self._total += confusion_matrix(predictions_BHW, labels_BHW, self.num_classes)
        self.num_images += len(predictions_BHW)

    def to_json(self) -> dict[str, Any]:
        """The matrix (row truth, column prediction, classes only) and the number of images."""
        confusion = self._total[:-1, :-1].tolist()
        return {"confusion": confusion, "num_images": self.num_images}


def scores(
    confusion: list[list[int]], rule: str, *, left_out: Sequence[int] = ()
) -> dict[str, Any]:
    """IoU per class, mIoU and accuracies as fractions; None where a class does not count.

    Args:
        confusion: [K][K], row truth, column prediction.
        rule: "mmseg", "cityscapes" or "detectron2" (see `models/evaluators.py`).
        left_out: classes that the mIoU is not a mean of; their pixels count all the same.
    """
    counts = torch.tensor(confusion, dtype=torch.int64)
    found = iou_scores(torch.nn.functional.pad(counts, (0, 1, 0, 1)), rule)
    iou = [_number(value) for value in found.class_iou_K.tolist()]
    return {
        "iou": iou,
        "miou": miou_without(iou, left_out) if left_out else _number(found.miou),
        "mean_accuracy": _number(found.mean_accuracy),
        "pixel_accuracy": _number(found.pixel_accuracy),
    }


def miou_without(iou: Sequence[float | None], left_out: Sequence[int]) -> float | None:
    """Mean of the class IoUs that count and are not left out."""
    return mean([value for number, value in enumerate(iou) if number not in set(left_out)])


def sum_of(confusions: Sequence[list[list[int]]]) -> list[list[int]]:
    """One matrix of several, as if their pictures were one data set."""
    return torch.tensor(confusions, dtype=torch.int64).sum(0).tolist()


def relative_performance(unseen: Sequence[float | None], trained: float | None) -> float | None:
    """rPD: mean mIoU on unseen domains relative to that on the domain trained on (VLTSeg, sec. 4).

    1 means that nothing is lost; None: one of the two is not known, or the latter is 0.
    """
    reached = mean(list(unseen))
    return reached / trained if reached is not None and trained else None


def mean(values: list[float | None]) -> float | None:
    """Mean of the values that exist."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
