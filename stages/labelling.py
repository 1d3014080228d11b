"""Label pictures with a teacher: from arrays to label and confidence maps.

labelled = Labeller(segmenter=teacher, section=config.pseudo_label, ...).label(images)

Used by `pseudo_label` (every picture once a round) and by online self-training (in every step). A
pixel's label is the class with the highest score. Its confidence is that class's share of the
scores of all classes, 0..1 (scores of a mask decoder do not add up to 1 by themselves).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from models.inference import entropy_of, label_of, predict
from models.segmenter import Segmenter
from stages.config import PseudoLabelConfig
from stages.devices import Device
from stages.labels import IGNORE


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What the teacher says about one picture."""

    label_HW: np.ndarray
    """uint8 train ids, 255 none."""
    confidence_HW: np.ndarray
    """uint8, 255 = 1."""


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """A teacher with how it labels."""

    segmenter: Segmenter
    """In eval mode, on the device."""
    section: PseudoLabelConfig
    device: Device
    bf16: bool

    def __post_init__(self) -> None:
        unknown = sorted(self.section.class_thresholds.keys() - set(self.segmenter.class_names))
        if unknown:
            raise ValueError(
                f"pseudo_label.class_thresholds names {unknown[0]!r}, which is no class of the "
                f"teacher: {', '.join(self.segmenter.class_names)}."
            )

    @property
    def thresholds(self) -> torch.Tensor:
        """The smallest confidence of a label, by class, float32 [K]."""
        named, usual = self.section.class_thresholds, self.section.threshold
        return torch.tensor([named.get(name, usual) for name in self.segmenter.class_names])

    def label(self, images: Sequence[np.ndarray]) -> list[Labelled]:
        """Label pictures (uint8 RGB [H, W, 3]), in batches of neighbours of one size."""
        size = self.section.batch_size
        labelled: list[Labelled] = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            for _, same in groupby(batch, key=lambda image: image.shape):
                labelled += self._label(list(same))
        return labelled

    def _label(self, images: Sequence[np.ndarray]) -> list[Labelled]:
        section = self.section
        images_B3HW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        # Off here: `predict` decides on the precision itself, also inside a training's autocast.
        with torch.autocast(self.device.device.type, enabled=False):
            scores_BKHW = predict(
                self.segmenter,
                images_B3HW.to(self.device.device),
                flip=section.flip,
                scales=section.scales,
                mode=section.mode,
                window=(section.window, section.window),
                stride=(section.stride, section.stride),
                bf16=self.bf16,
            )
        confidence_BHW, label_BHW = label_of(scores_BKHW, threshold=self.thresholds)
        if section.max_entropy < 1:
            label_BHW = label_BHW.masked_fill(entropy_of(scores_BKHW) > section.max_entropy, IGNORE)
        maps = zip(label_BHW.cpu().numpy(), confidence_BHW.cpu().numpy(), strict=True)
        return [Labelled(label_HW=label, confidence_HW=confidence) for label, confidence in maps]
