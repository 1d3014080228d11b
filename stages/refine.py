"""Sharpen pseudo-labels with SAM, by the released rule of CLOUDS or by agreement.

    clouds --stage refine --set refine.min_area=200

Every large component of a label map prompts SAM with a few random points of its own. Under rule
`released` the best mask replaces it, and what no mask covers becomes 255 (`models/masks.py`); under
rule `agreement` a mask counts where it agrees with the teacher (`models/refine_rules.py`).
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from models.masks import (
    Component,
    classes_of,
    draw_indices,
    find_components,
    pick_points,
    refined_label_map,
)
from models.refine_rules import Agreement, agreement_rule, prompted_components
from models.refiner import Masks, Prompts, Refiner, build_refiner, point_prompts
from stages.config import RefineConfig, StageConfig
from stages.contracts import Progress, Summary
from stages.devices import choose_device
from stages.labels import IGNORE
from stages.readers import read_image, read_label
from stages.shards import Row, item_seed, read_index, read_jsonl, write_json, write_shards


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture with its pseudo-label."""

    id: str
    picture: Path
    label: Path
    confidence: Path


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
    section = config.refine
    jobs = pair(pictures, labels, selection)
    device = choose_device(config)
    refiner = build_refiner(section.model, section.weights, device=device.device, seed=config.seed)
    bench = _Bench(
        refiner=refiner,
        section=section,
        seed=item_seed(config.seed, "refine"),
        bf16=config.precision == "bf16",
        progress=progress,
    )
    num_shards = write_shards(
        out,
        jobs,
        shard_size=section.shard_size,
        work=bench.refine_shard,
        progress=progress,
        unit="pictures",
    )
    statistics = sum_up(read_rows(out), untrained=refiner.untrained)
    write_json(out / "statistics.json", statistics)
    shutil.copyfile(labels / "checkpoint.json", out / "checkpoint.json")
    return _summary(statistics, num_shards)


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
    )


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Refines the pictures of one shard after the other."""

    refiner: Refiner
    section: RefineConfig
    seed: int
    bf16: bool
    progress: Progress

    def refine_shard(self, jobs: Sequence[Job], folder: Path) -> list[Row]:
        rows = []
        size = self.section.batch_size
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            rows += self._refine(batch, folder)
            self.progress.advance(len(batch))
        return rows

    def _refine(self, batch: Sequence[Job], folder: Path) -> list[Row]:
        images = [read_image(job.picture) for job in batch]
        befores = [
            _read_map(job, job.label, image) for job, image in zip(batch, images, strict=True)
        ]
        components = [self._components(before) for before in befores]
        prompts = [self._prompts(*each) for each in zip(batch, befores, components, strict=True)]
        found = self.refiner.masks(
            images,
            prompts,
            best_only=self.section.rule == "released",
            prompt_batch=self.section.prompt_batch,
            bf16=self.bf16,
        )
        rows = []
        for job, image, before, own, masks in zip(
            batch, images, befores, components, found, strict=True
        ):
            after, extra = self._rule(job, image, before, own, masks)
            name = f"{job.id.replace('/', '+')}.label.png"
            Image.fromarray(after).save(folder / name)
            iou = masks.iou_PC.amax(1).tolist() if own else []
            counts = count_changes(before, after, own, iou) | extra
            rows.append({"id": job.id, "label": name, "counts": counts})
        return rows

    def _components(self, label_HW: np.ndarray) -> list[Component]:
        section = self.section
        if section.rule == "released":
            return find_components(label_HW, min_area_px=section.min_area, void=(IGNORE,))
        return prompted_components(
            label_HW,
            min_area_px=section.min_area,
            floor_px=section.floor_area,
            class_share=section.class_share,
            void=(IGNORE,),
        )

    def _rule(
        self,
        job: Job,
        image: np.ndarray,
        before_HW: np.ndarray,
        components: Sequence[Component],
        masks: Masks,
    ) -> tuple[np.ndarray, Row]:
        """The refined label map, and what else the rule counts."""
        section = self.section
        if section.rule == "released":
            return refined_label_map(before_HW, components, masks.masks_PCHW[:, 0], void=IGNORE), {}
        ruling = agreement_rule(
            before_HW,
            _read_map(job, job.confidence, image).astype(np.float32) / 255,
            components,
            masks.masks_PCHW,
            masks.iou_PC,
            settings=Agreement(
                min_iou=section.min_iou,
                min_agreement=section.min_agreement,
                trust=section.trust,
                sure=section.sure,
            ),
            void=IGNORE,
        )
        return ruling.label_HW, {
            "accepted": ruling.num_accepted,
            "trusted": ruling.num_trusted,
            "fallback": False,
        }

    def _prompts(self, job: Job, label_HW: np.ndarray, components: Sequence[Component]) -> Prompts:
        """A few random points of every component, drawn by picture and component number.

        Under rule "agreement" with the component's box or its shape as a rough mask.
        """
        points = [
            pick_points(
                component,
                draw_indices(
                    component, self.section.points, seed=item_seed(self.seed, job.id, number)
                ),
            )
            for number, component in enumerate(components)
        ]
        with_shapes = self.section.prompts if self.section.rule == "agreement" else ()
        boxes = masks = None
        if "box" in with_shapes:
            boxes = np.array([_box(component) for component in components], np.float32)
            boxes = boxes.reshape(-1, 4)
        if "mask" in with_shapes:
            masks = np.zeros((len(components), *label_HW.shape), bool)
            for mask_HW, component in zip(masks, components, strict=True):
                component.paint(mask_HW, True)
        return point_prompts(points, boxes_P4=boxes, masks_PHW=masks)


def _box(component: Component) -> tuple[int, int, int, int]:
    height, width = component.mask.shape
    left, top = component.left, component.top
    return left, top, left + width - 1, top + height - 1


def _read_map(job: Job, path: Path, image: np.ndarray) -> np.ndarray:
    map_HW = read_label(path)
    if map_HW.shape != image.shape[:2]:
        raise ValueError(
            f"picture {job.id} is {image.shape[0]}x{image.shape[1]}, its {path.name} "
            f"{map_HW.shape[0]}x{map_HW.shape[1]}: they do not belong together."
        )
    return map_HW


def count_changes(
    before_HW: np.ndarray,
    after_HW: np.ndarray,
    components: Sequence[Component],
    iou: Sequence[float],
) -> Row:
    """What a refinement did to one label map.

    Args:
        before_HW: uint8 train ids, 255 none.
        after_HW: the same after refinement.
        components: those that were large enough.
        iou: SAM's score of each component's mask.

    Returns:
        "components" (number), "fallback" (no component was large enough, so the teacher's labels
        stay), "mean_iou" (SAM's own, or None), and "classes": train id -> pixels "before",
        "after", "kept" (the class before and after), "changed" (became another class), "dropped"
        (became 255), "gained" (were not the class before), and "components".
    """
    pixels = np.bincount(
        before_HW.ravel().astype(np.int64) * 256 + after_HW.ravel(), minlength=65536
    ).reshape(256, 256)
    num_components = Counter(component.label for component in components)
    present = sorted({*classes_of(before_HW), *classes_of(after_HW)})
    return {
        "components": len(components),
        "fallback": not components,
        "mean_iou": round(float(np.mean(iou)), 4) if len(iou) else None,
        "classes": {str(k): _class_counts(pixels, k, num_components[k]) for k in present},
    }


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
        for name in ("accepted", "trusted")
        if all(name in row["counts"] for row in rows)
    }
    return ruled | {
        "num_pictures": len(rows),
        "num_fallback": sum(row["counts"]["fallback"] for row in rows),
        "components": sum(row["counts"]["components"] for row in rows),
        "mean_iou": round(float(np.mean(scores)), 4) if scores else None,
        "untrained": untrained,
        "classes": {key: dict(totals[key]) for key in sorted(totals, key=int)},
    }


def _summary(statistics: Row, num_shards: int) -> Summary:
    counts = list(statistics["classes"].values())
    before = sum(count["before"] for count in counts)
    kept = sum(count["kept"] for count in counts)
    share = kept / before if before else 1.0
    text = (
        f"{statistics['num_pictures']} label maps, {statistics['components']} components, "
        f"{share:.0%} of the labelled pixels kept their class"
    )
    if statistics["untrained"]:
        text += ", by an untrained SAM"
    numbers = {
        "pictures": statistics["num_pictures"],
        "components": statistics["components"],
        "kept_share": round(share, 4),
        "shards": num_shards,
    }
    return Summary(text=text, numbers=numbers)
