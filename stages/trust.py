"""How far labels of painted pictures are trusted: weights of pictures, pixels that are left out.

    samples = trusted(load_painted(...), evidence=pseudo_labels, section=config.self_train)

Both are told by the teacher's own label and confidence maps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from stages.config import SelfTrainConfig
from stages.labels import IGNORE
from stages.readers import Sample, read_label
from stages.shards import read_index

MIN_SHARE = 0.5 / 255
"""Confidence that stands for 0: half the smallest one an 8-bit map can hold."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The teacher's maps of one picture."""

    label: Path
    confidence: Path

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [H, W] each: train ids (255 none) and confidences (255 = 1)."""
        return read_label(self.label), read_label(self.confidence)


@dataclass(frozen=True, kw_only=True)
class DoubtedSample(Sample):
    """A painted sample whose doubtful pixels have no label."""

    evidence: Evidence
    floors: tuple[int, ...]
    """Per train id 0..254 the smallest belief (0..255, see `belief`) that a pixel may have."""

    def read_label(self) -> np.ndarray:
        """The label map with 255 where the teacher's belief is below the class's floor."""
        label_HW = super().read_label()
        floors = np.array([*self.floors, 0], np.uint8)
        doubtful_HW = belief(label_HW, *self.evidence.read()) < floors[label_HW]
        return np.where(doubtful_HW, np.uint8(IGNORE), label_HW)


def trusted(samples: Sequence[Sample], evidence: Path, section: SelfTrainConfig) -> list[Sample]:
    """The painted samples with weights and with floors, as the section asks for.

    Args:
        samples: of `load_painted`.
        evidence: the `pseudo_label` artifact of the same round.
        section: reads `weighting`, `sure_above`, `drop_noise`.

    Raises:
        ValueError: a sample has no maps in `evidence`.
    """
    maps = _maps(samples, evidence)
    weights = [1.0] * len(samples)
    if section.weighting == "confidence":
        weights = [sure_share(each.read()[1], section.sure_above) for each in maps]
    weighted = [replace(s, weight=w) for s, w in zip(samples, weights, strict=True)]
    if section.drop_noise is None:
        return weighted
    histogram = np.zeros((256, 256), np.int64)
    for sample, each in zip(samples, maps, strict=True):
        label_HW = sample.read_label()
        codes = label_HW.astype(np.int64) * 256 + belief(label_HW, *each.read())
        histogram += np.bincount(codes.ravel(), minlength=65536).reshape(256, 256)
    floors = floors_of(histogram, factor=section.drop_noise)
    return [
        DoubtedSample(**_fields(sample), evidence=each, floors=floors)
        for sample, each in zip(weighted, maps, strict=True)
    ]


def _fields(sample: Sample) -> dict[str, object]:
    return {field.name: getattr(sample, field.name) for field in fields(sample)}


def _maps(samples: Sequence[Sample], evidence: Path) -> list[Evidence]:
    rows = {f"painted/{row['id']}": row for row in read_index(evidence)}
    strays = [sample.id for sample in samples if sample.id not in rows]
    if strays:
        raise ValueError(
            f"{len(strays)} of {len(samples)} painted pictures have no confidences in {evidence} "
            f"(the first: {strays[0]}): the two do not belong together. Run "
            "`clouds --from pseudo_label`."
        )
    found = [rows[sample.id] for sample in samples]
    return [
        Evidence(label=row["folder"] / row["label"], confidence=row["folder"] / row["confidence"])
        for row in found
    ]


def sure_share(confidence_HW: np.ndarray, sure_above: float) -> float:
    """Share of a picture's pixels that are surer than a threshold: its weight in the loss.

    The quality estimate q of DACS (Tranheden et al. 2021, section 3.3) and DAFormer (Hoyer et al.
    2022, equation 4; their threshold is 0.968).

    Args:
        confidence_HW: uint8, 255 = 1.
        sure_above: 0..1.
    """
    return float(np.mean(confidence_HW > 255 * sure_above))


def belief(label_HW: np.ndarray, teacher_HW: np.ndarray, confidence_HW: np.ndarray) -> np.ndarray:
    """How far the teacher believes in given labels, uint8 (255 = 1).

    Where a label is the teacher's own, its confidence; where refinement changed it, what is left
    of 1, the most that the teacher can grant another class.
    """
    return np.where(label_HW == teacher_HW, confidence_HW, 255 - confidence_HW)


def floors_of(histogram: np.ndarray, *, factor: float) -> tuple[int, ...]:
    """The smallest belief per class whose loss is at most `factor` times the class's mean loss.

    FreeMask's filter (Yang et al. 2023, section 3.3: 1.25 times the class's mean): pixels with an
    unusually large loss for their class are taken for noise. The loss of a pixel is -log(belief).

    Args:
        histogram: pixels by train id and belief, int64 [256, 256].
        factor: how many mean losses are still believed.
    """
    losses = np.array([-math.log(max(level / 255, MIN_SHARE)) for level in range(256)])
    floors = []
    for counts in histogram[:IGNORE]:
        total = counts.sum()
        limit = factor * float(counts @ losses) / total if total else math.inf
        # Losses fall as belief rises; the tolerance forgives rounding where all pixels are alike.
        believed = np.flatnonzero(losses <= limit + 1e-9)
        floors.append(int(believed[0]) if len(believed) else 255)
    return tuple(floors)
