"""Label pictures with the teacher: a label map and a confidence map for each.

    clouds --stage pseudo_label --round 1

`stages/labelling.py` says what they are.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from models.checkpoints import load_segmenter
from stages.config import PseudoLabelConfig, StageConfig
from stages.contracts import Progress, Summary
from stages.devices import choose_device, in_halves
from stages.labelling import Labeller
from stages.labels import IGNORE
from stages.readers import read_image, read_label
from stages.shards import Row, ShardJob, Work, read_index, write_json, write_shards
from stages.truth import compare, percent, quality


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture to be labelled."""

    id: str
    path: Path
    truth: Path | None = None
    """Its true label map (train ids), where that is known: to compare with."""


def run(
    config: StageConfig, *, out: Path, progress: Progress, pictures: Path, teacher: Path
) -> Summary:
    """Write shards of label and confidence maps, `statistics.json` and `checkpoint.json`.

    Args:
        config: reads `pseudo_label`.
        out: the stage's folder.
        progress: told each picture.
        pictures: artifact of `synthesize`.
        teacher: a checkpoint folder.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: no picture, a picture cannot be read, or no pixel of any gets a label.
    """
    which = _weights(config, teacher)
    job = shards(config, progress=progress, pictures=pictures, teacher=teacher)
    num_shards = write_shards(out, job, progress=progress)
    statistics = sum_up(list(read_index(out)), which=which)
    _refuse_nothing(statistics, config.pseudo_label)
    write_json(out / "statistics.json", statistics)
    shutil.copyfile(teacher / "checkpoint.json", out / "checkpoint.json")
    return _summary(statistics, num_shards)


def shards(config: StageConfig, *, progress: Progress, pictures: Path, teacher: Path) -> ShardJob:
    """The work shard by shard; arguments and errors as of `run`."""
    items = [
        Picture(
            id=row["id"],
            path=row["folder"] / row["file"],
            truth=row["folder"] / row["truth_file"] if "truth_file" in row else None,
        )
        for row in read_index(pictures)
    ]
    if not items:
        raise ValueError("there is no picture to label: run `clouds --stage synthesize`.")
    section = config.pseudo_label
    which = _weights(config, teacher)
    if which != section.weights:
        progress.note("the teacher has no moving average: its own weights are used")

    def at_desk(progress: Progress) -> Work:
        device = choose_device(config)
        labeller = Labeller(
            segmenter=load_segmenter(teacher, device=device.device, which=which),
            section=section,
            device=device,
            bf16=config.precision == "bf16",
        )
        desk = _Desk(labeller=labeller, batch_size=section.batch_size, progress=progress)
        return desk.label_shard

    return ShardJob(items=items, shard_size=section.shard_size, unit="pictures", open=at_desk)


def _weights(config: StageConfig, teacher: Path) -> str:
    """Which of the teacher's weights are used: those asked for, if it has them."""
    asked = config.pseudo_label.weights
    return "model" if asked == "ema" and not (teacher / "ema.safetensors").is_file() else asked


def _refuse_nothing(statistics: Row, section: PseudoLabelConfig) -> None:
    """Labels of nothing would go all the way into a training that learns nothing of them."""
    if statistics["classes"]:
        return
    own = f", class_thresholds={section.class_thresholds}" if section.class_thresholds else ""
    raise ValueError(
        f"no pixel of the {statistics['num_pictures']} pictures gets a label (mean confidence "
        f"{statistics['mean_confidence']:.3f}; pseudo_label.threshold={section.threshold:g}{own}, "
        f"max_entropy={section.max_entropy:g}): lower the thresholds, or raise max_entropy."
    )


def _summary(statistics: Row, num_shards: int) -> Summary:
    labelled = sum(entry["pixels"] for entry in statistics["classes"].values())
    share = labelled / (labelled + statistics["unlabelled"])
    numbers = {
        "pictures": statistics["num_pictures"],
        "shards": num_shards,
        "mean_confidence": statistics["mean_confidence"],
        "labelled_share": round(share, 4),
    }
    text = (
        f"{statistics['num_pictures']} pictures labelled in {num_shards} shards, mean confidence "
        f"{statistics['mean_confidence']:.3f}, {share:.0%} of the pixels have a label"
    )
    if "truth" in statistics:
        miou = statistics["truth"]["whole"]["miou"]
        numbers["truth_miou"] = miou
        text += f", mIoU {percent(miou)} against the truth of {_known(statistics)}"
    return Summary(text=text, numbers=numbers)


def _known(statistics: Row) -> str:
    known, total = statistics["truth"]["num_pictures"], statistics["num_pictures"]
    return "all" if known == total else f"{known} of them"


@dataclass(frozen=True, kw_only=True)
class _Desk:
    """Labels the pictures of one shard after the other."""

    labeller: Labeller
    batch_size: int
    progress: Progress

    def label_shard(self, pictures: Sequence[Picture], folder: Path) -> list[Row]:
        rows = []
        for start in range(0, len(pictures), self.batch_size):
            batch = pictures[start : start + self.batch_size]
            images = [read_image(picture.path) for picture in batch]
            labelled = in_halves(self.labeller.label, images, note=self.progress.note)
            for picture, (found, together) in zip(batch, labelled, strict=True):
                row = save_label(folder, picture.id, found.label_HW, found.confidence_HW)
                if together < len(batch):
                    row["batch_size"] = together
                if picture.truth is not None:
                    row["truth"] = compare(found.label_HW, read_label(picture.truth))
                rows.append(row)
            self.progress.advance(len(batch))
        return rows


def save_label(
    folder: Path, picture_id: str, label_HW: np.ndarray, confidence_HW: np.ndarray
) -> Row:
    """Save a picture's maps as PNG and describe them in an index row."""
    stem = picture_id.replace("/", "+")
    label_name, confidence_name = f"{stem}.label.png", f"{stem}.confidence.png"
    Image.fromarray(label_HW).save(folder / label_name)
    Image.fromarray(confidence_HW).save(folder / confidence_name)
    flat, weights = label_HW.ravel(), confidence_HW.ravel()
    pixels = np.bincount(flat, minlength=256)
    sums = np.bincount(flat, weights=weights, minlength=256)
    present = [int(k) for k in np.flatnonzero(pixels) if k != IGNORE]
    return {
        "id": picture_id,
        "label": label_name,
        "confidence": confidence_name,
        "mean_confidence": round(float(weights.mean()) / 255, 6),
        "classes": {str(k): int(pixels[k]) for k in present},
        "class_confidence": {str(k): round(sums[k] / pixels[k] / 255, 6) for k in present},
        "unlabelled": int(pixels[IGNORE]),
    }


def sum_up(rows: Sequence[Row], *, which: str) -> Row:
    """Statistics over all pictures: per class its pixels, pictures and mean confidence.

    Where a truth is known, also how good the labels are (`stages/truth.py`).
    """
    pixels: Counter[str] = Counter()
    pictures: Counter[str] = Counter()
    sums: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        pixels.update(row["classes"])
        pictures.update(row["classes"].keys())
        for key, mean in row["class_confidence"].items():
            sums[key] += mean * row["classes"][key]
    known = [row["truth"] for row in rows if "truth" in row]
    return ({"truth": quality(known)} if known else {}) | {
        "num_pictures": len(rows),
        "weights": which,
        "mean_confidence": round(float(np.mean([row["mean_confidence"] for row in rows])), 6),
        "unlabelled": sum(row["unlabelled"] for row in rows),
        "classes": {
            key: {
                "pixels": pixels[key],
                "pictures": pictures[key],
                "mean_confidence": round(sums[key] / pixels[key], 6),
            }
            for key in sorted(pixels, key=int)
        },
    }
