"""One confusion matrix per data set, and the numbers that follow from it.

The matrix is summed over the whole data set before anything is divided (never a mean of per-image
IoU). Counting and the evaluators' rules are in `models/evaluators.py`.
"""

import math
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


def scores(confusion: list[list[int]], rule: str) -> dict[str, Any]:
    """IoU per class, mIoU and accuracies as fractions; None where a class does not count.

    Args:
        confusion: [K][K], row truth, column prediction.
        rule: "mmseg", "cityscapes" or "detectron2" (see `models/evaluators.py`).
    """
    counts = torch.tensor(confusion, dtype=torch.int64)
    found = iou_scores(torch.nn.functional.pad(counts, (0, 1, 0, 1)), rule)
    return {
        "iou": [_number(value) for value in found.class_iou_K.tolist()],
        "miou": _number(found.miou),
        "mean_accuracy": _number(found.mean_accuracy),
        "pixel_accuracy": _number(found.pixel_accuracy),
    }


def mean(values: list[float | None]) -> float | None:
    """Mean of the values that exist."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
