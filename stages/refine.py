"""Sharpen pseudo-labels with SAM, by our rule, that of CLOUDS or another.

    clouds --stage refine --set refine.min_area=200

Every large component of a label map prompts SAM with a few random points of its own. Under rule
`agreement` a mask counts where it agrees with the teacher (`models/refine_rules.py`); under rule
`released` the best mask replaces it, and what no mask covers becomes 255 (`models/masks.py`). The
rules of other papers label SAM's automatic masks (`models/published_rules.py`).
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from models.checkpoints import describe_checkpoint
from models.masks import classes_of
from stages.config import RefineConfig, StageConfig
from stages.contracts import Progress, Summary
from stages.devices import choose_device, in_halves
from stages.labels import IGNORE
from stages.readers import read_image, read_label
from stages.refinement import Outcome, Refinement, Subject, load_refinement
from stages.shards import (
    Row,
    ShardJob,
    Work,
    read_index,
    read_jsonl,
    write_json,
    write_shards,
)
from stages.truth import compare, percent, quality


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture with its pseudo-label."""

    id: str
    picture: Path
    label: Path
    confidence: Path
    truth: Path | None = None
    """Its true label map (train ids), where that is known: to compare with."""


def run(
    config: StageConfig,
    *,
    out: Path,
    progress: Progress,
    pictures: Path,
    labels: Path,
    selection: Path,
) -> Summary:
    """Write shards of refined label maps for the pictures that the selection keeps.

    Args:
        config: reads `refine`.
        out: the stage's folder.
        progress: told each picture.
        pictures: artifact of `synthesize`.
        labels: artifact of `pseudo_label`.
        selection: artifact of `select`.

    Raises:
        FileNotFoundError: SAM's weights are not there.
        ValueError: pictures and labels do not pair, nothing is kept, or the weights do not fit.
    """
    job = shards(config, progress=progress, pictures=pictures, labels=labels, selection=selection)
    num_shards = write_shards(out, job, progress=progress)
    statistics = sum_up(read_rows(out), untrained=config.refine.weights is None)
    write_json(out / "statistics.json", statistics)
    shutil.copyfile(labels / "checkpoint.json", out / "checkpoint.json")
    if not any(counts["after"] for counts in statistics["classes"].values()):
        progress.note(
            "no pixel of any picture has a label: a training on them learns nothing of the "
            f"pictures. Loosen refine.rule={config.refine.rule}, or pseudo_label"
        )
    return _summary(statistics, num_shards)


def shards(
    config: StageConfig, *, progress: Progress, pictures: Path, labels: Path, selection: Path
) -> ShardJob:
    """The work shard by shard; arguments and errors as of `run`."""
    section = config.refine

    def at_bench(progress: Progress) -> Work:
        names = describe_checkpoint(labels)["class_names"]
        refinement = load_refinement(config, names, device=choose_device(config))
        bench = _Bench(refinement=refinement, class_names=names, section=section, progress=progress)
        return bench.refine_shard

    return ShardJob(
        items=pair(pictures, labels, selection),
        shard_size=section.shard_size,
        unit="pictures",
        open=at_bench,
    )


def pair(pictures: Path, labels: Path, selection: Path) -> list[Job]:
    """The kept pictures with their labels, in the pictures' order.

    Raises:
        ValueError: a kept picture has no label, or nothing is kept.
    """
    kept = {row["id"] for row in read_jsonl(selection / "selection.jsonl") if row["kept"]}
    label_rows = {row["id"]: row for row in read_index(labels)}
    rows = [row for row in read_index(pictures) if row["id"] in kept]
    strays = sorted(kept - {row["id"] for row in rows}) or sorted(
        row["id"] for row in rows if row["id"] not in label_rows
    )
    if strays:
        raise ValueError(
            f"{len(strays)} selected pictures lack their picture or label (the first: "
            f"{strays[0]}): {pictures.name}, {labels.name} and {selection.name} do not belong "
            "together. Run `clouds --from pseudo_label`."
        )
    if not rows:
        raise ValueError("no picture is left to refine: the selection keeps none. Loosen `select`.")
    return [_job(row, label_rows[row["id"]]) for row in rows]


def _job(picture: Row, label: Row) -> Job:
    return Job(
        id=picture["id"],
        picture=picture["folder"] / picture["file"],
        label=label["folder"] / label["label"],
        confidence=label["folder"] / label.get("confidence", ""),
        truth=picture["folder"] / picture["truth_file"] if "truth_file" in picture else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Refines the pictures of one shard after the other."""

    refinement: Refinement
    class_names: Sequence[str]
    section: RefineConfig
    progress: Progress

    def refine_shard(self, jobs: Sequence[Job], folder: Path) -> list[Row]:
        rows = []
        size = self.section.batch_size
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            subjects = [self._read(job) for job in batch]
            outcomes = in_halves(self.refinement.refine, subjects, note=self.progress.note)
            for job, subject, (outcome, together) in zip(batch, subjects, outcomes, strict=True):
                name = f"{subject.id.replace('/', '+')}.label.png"
                Image.fromarray(outcome.label_HW).save(folder / name)
                counts = count_changes(subject.label_HW, outcome)
                row = {"id": subject.id, "label": name, "counts": counts}
                if together < len(batch):
                    row["batch_size"] = together
                rows.append(row | _against_truth(job, subject, outcome))
            self.progress.advance(len(subjects))
        return rows

    def _read(self, job: Job) -> Subject:
        image = read_image(job.picture)
        confidence_HW = None
        if self.refinement.needs_confidence:
            confidence_HW = _read_map(job, job.confidence, image).astype(np.float32) / 255
        label_HW = _read_map(job, job.label, image)
        unknown = [k for k in classes_of(label_HW) if k >= len(self.class_names)]
        if unknown:
            raise ValueError(
                f"{job.label.name} of picture {job.id} holds train id {unknown[0]}, but its labels "
                f"have {len(self.class_names)} classes ({', '.join(self.class_names)}; 255: none): "
                "it was made for another label space. Run `clouds --from pseudo_label`."
            )
        return Subject(id=job.id, image=image, label_HW=label_HW, confidence_HW=confidence_HW)


def _against_truth(job: Job, subject: Subject, outcome: Outcome) -> Row:
    """How label maps before and after compare with the truth; empty where none is known."""
    if job.truth is None:
        return {}
    truth_HW = read_label(job.truth)
    before, after = (compare(each, truth_HW) for each in (subject.label_HW, outcome.label_HW))
    return {"truth": {"before": before, "after": after}}


def _read_map(job: Job, path: Path, image: np.ndarray) -> np.ndarray:
    map_HW = read_label(path)
    if map_HW.shape != image.shape[:2]:
        raise ValueError(
            f"picture {job.id} is {image.shape[0]}x{image.shape[1]}, its {path.name} "
            f"{map_HW.shape[0]}x{map_HW.shape[1]}: they do not belong together."
        )
    return map_HW


def count_changes(before_HW: np.ndarray, outcome: Outcome) -> Row:
    """What a refinement did to one label map (uint8 train ids, 255 none).

    Returns:
        "components" (those SAM was asked about), "fallback" (the released rule: none was large
        enough, so the teacher's labels stay), "mean_iou" (SAM's own, or None), what else the rule
        counts, and "classes": train id -> pixels "before", "after", "kept" (the class before and
        after), "changed" (became another class), "dropped" (became 255), "gained" (were not the
        class before), and "components".
    """
    after_HW = outcome.label_HW
    pixels = np.bincount(
        before_HW.ravel().astype(np.int64) * 256 + after_HW.ravel(), minlength=65536
    ).reshape(256, 256)
    num_components = Counter(outcome.prompted)
    present = sorted({*classes_of(before_HW), *classes_of(after_HW)})
    return {
        "components": len(outcome.prompted),
        "fallback": False,
        "mean_iou": round(float(np.mean(outcome.iou)), 4) if len(outcome.iou) else None,
        "classes": {str(k): _class_counts(pixels, k, num_components[k]) for k in present},
    } | dict(outcome.counts)


def _class_counts(pixels: np.ndarray, train_id: int, num_components: int) -> dict[str, int]:
    before, after = pixels[train_id].sum(), pixels[:, train_id].sum()
    kept, dropped = pixels[train_id, train_id], pixels[train_id, IGNORE]
    return {
        "before": int(before),
        "after": int(after),
        "kept": int(kept),
        "changed": int(before - kept - dropped),
        "dropped": int(dropped),
        "gained": int(after - kept),
        "components": num_components,
    }


def read_rows(out: Path) -> list[Row]:
    """All index rows of the shards in a stage's own folder."""
    return list(read_index(out))


def sum_up(rows: Sequence[Mapping[str, object]], *, untrained: bool) -> Row:
    """The rows' counts over all pictures, per class."""
    totals: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for train_id, counts in row["counts"]["classes"].items():
            totals[train_id].update(counts)
    scores = [row["counts"]["mean_iou"] for row in rows if row["counts"]["mean_iou"] is not None]
    ruled = {
        name: sum(row["counts"][name] for row in rows)
        for name in ("accepted", "trusted", "automatic")
        if all(name in row["counts"] for row in rows)
    }
    known = [row["truth"] for row in rows if "truth" in row]
    truth = {when: quality([each[when] for each in known]) for when in ("before", "after")}
    return (
        ({"truth": truth} if known else {})
        | ruled
        | {
            "num_pictures": len(rows),
            "num_fallback": sum(row["counts"]["fallback"] for row in rows),
            "components": sum(row["counts"]["components"] for row in rows),
            "mean_iou": round(float(np.mean(scores)), 4) if scores else None,
            "untrained": untrained,
            "classes": {key: dict(totals[key]) for key in sorted(totals, key=int)},
        }
    )


def _summary(statistics: Row, num_shards: int) -> Summary:
    """Shares are of the pixels that had a label; both are 0 where none had."""
    counts = list(statistics["classes"].values())
    before = sum(count["before"] for count in counts)
    kept = sum(count["kept"] for count in counts)
    dropped = sum(count["dropped"] for count in counts)
    share, lost = (part / before if before else 0.0 for part in (kept, dropped))
    text = f"{statistics['num_pictures']} label maps, {statistics['components']} components, "
    if before:
        text += f"{share:.0%} of the labelled pixels kept their class, {lost:.0%} lost their label"
    else:
        text += "no pixel had a label"
    if statistics["untrained"]:
        text += ", by an untrained SAM"
    numbers: dict[str, float | int | str] = {
        "pictures": statistics["num_pictures"],
        "components": statistics["components"],
        "kept_share": round(share, 4),
        "lost_share": round(lost, 4),
        "shards": num_shards,
    }
    if "truth" in statistics:
        before, after = (statistics["truth"][when]["whole"]["miou"] for when in ("before", "after"))
        numbers |= {"truth_miou_before": before, "truth_miou_after": after}
        text += f", mIoU against the truth {percent(before)} before, {percent(after)} after"
    return Summary(text=text, numbers=numbers)
