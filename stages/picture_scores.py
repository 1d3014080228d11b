"""Measure painted pictures for the selection: what the teacher sees, contrast, hash, CLIP.

scores = measure(pictures, labels, section=config.select, ...)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.likeness import ClipScorer, contrast, difference_hash, load_scorer
from stages.config import SelectConfig
from stages.contracts import Progress
from stages.readers import read_image, read_label
from stages.shards import Row, read_index

CLIP_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class PictureScore:
    """What was measured of one picture; None: not asked for."""

    id: str
    mean_confidence: float
    """Of the teacher, over all pixels."""
    sure_share: float | None = None
    """Share of pixels with at least `select.sure_above` confidence."""
    num_classes: int | None = None
    """Classes that the teacher sees."""
    contrast: float | None = None
    """Standard deviation of luminance, 0..1."""
    hash: int | None = None
    """64-bit perceptual hash."""
    similarity: float | None = None
    """Cosine similarity of picture and prompt by CLIP; None also for pictures without prompt."""
    prompt_id: str | None = None
    spare: bool = False
    """Whether it was painted to stand in for a dropped one."""
    flagged: bool = False
    """Whether the painter's safety checker made it black."""


def measure(
    pictures: Path,
    labels: Path,
    *,
    section: SelectConfig,
    device: torch.device | str,
    progress: Progress,
) -> list[PictureScore]:
    """Scores of all pictures, in their order.

    Under the rules "all" and "confidence" only the confidences of the label index are read; rule
    "checks" opens every picture.

    Raises:
        ValueError: pictures and labels do not pair, or a file cannot be read.
        FileNotFoundError: the CLIP is not to be had.
    """
    rows = list(read_index(pictures))
    label_rows = {row["id"]: row for row in read_index(labels)}
    _check_pairs([row["id"] for row in rows], label_rows.keys())
    if section.rule != "checks":
        progress.start(len(rows), "pictures")
        progress.advance(len(rows))
        return [
            PictureScore(
                id=row["id"],
                mean_confidence=float(label_rows[row["id"]]["mean_confidence"]),
                **_origin(row),
            )
            for row in rows
        ]
    scorer = None
    if section.clip is not None:
        scorer = load_scorer(section.clip, weights=section.clip_weights, device=device)
    progress.start(len(rows), "pictures")
    scores: list[PictureScore] = []
    for start in range(0, len(rows), CLIP_BATCH):
        batch = rows[start : start + CLIP_BATCH]
        scores += _measure_batch(batch, label_rows, section=section, scorer=scorer)
        progress.advance(len(batch))
    return scores


def _check_pairs(ids: Sequence[str], labelled: set[str]) -> None:
    strays = sorted(set(ids) ^ labelled)
    if strays or not ids:
        raise ValueError(
            f"pictures ({len(ids)}) and labels ({len(labelled)}) do not pair"
            + (f" (the first without its other half: {strays[0]})" if strays else "")
            + ": run `clouds --from synthesize`."
        )


def _measure_batch(
    batch: Sequence[Row],
    label_rows: dict[str, Row],
    *,
    section: SelectConfig,
    scorer: ClipScorer | None,
) -> Iterator[PictureScore]:
    images = [read_image(row["folder"] / row["file"]) for row in batch]
    similarities = _similarities(batch, images, scorer)
    for row, image, similarity in zip(batch, images, similarities, strict=True):
        label = label_rows[row["id"]]
        confidence_HW = read_label(label["folder"] / label["confidence"])
        yield PictureScore(
            id=row["id"],
            mean_confidence=float(label["mean_confidence"]),
            sure_share=float(np.mean(confidence_HW >= 255 * section.sure_above)),
            num_classes=len(label["classes"]),
            contrast=contrast(image),
            hash=difference_hash(image),
            similarity=similarity,
            **_origin(row),
        )


def _origin(row: Row) -> dict[str, Any]:
    return {
        "prompt_id": row.get("prompt_id"),
        "spare": row.get("spare", False),
        "flagged": row.get("flagged", False),
    }


def _similarities(
    batch: Sequence[Row], images: Sequence[np.ndarray], scorer: ClipScorer | None
) -> list[float | None]:
    """Similarity of each picture that has a prompt, where a scorer is wanted."""
    found: list[float | None] = [None] * len(batch)
    asked = [place for place, row in enumerate(batch) if scorer and row.get("prompt")]
    if asked:
        values = scorer.score([images[p] for p in asked], [batch[p]["prompt"] for p in asked])
        for place, value in zip(asked, values, strict=True):
            found[place] = value
    return found
