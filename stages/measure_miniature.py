"""Measure the miniature's CLIP and SAM before they ship, on web pictures with seeds of their own.

    python flows/miniature.py --stage measure_clip

SAM goes through `SamPredictor`, CLIP through the segmenter that the pipeline trains: the paths of
the
real networks.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from segment_anything import SamPredictor

from models.build import build_segmenter
from models.miniature import sam_lessons
from models.miniature.renderer import Picture, render
from models.miniature.sam_lessons import PROMPT_TYPES, Lesson
from models.miniature.sam_network import build_sam, read_sizes
from models.segmenter import Segmenter
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.labels import load_labelspace
from stages.metrics import DatasetScore, scores
from stages.pretrain_config import MeasureMiniatureConfig
from stages.probes import batch_of, learn, probe_config
from stages.shards import item_seed, write_json

SAM_STYLES = ("web", "web_unseen", "source")
"""Where SAM is measured: as in training, in looks that web never shows, and in the clean engine."""


def run(
    config: StageConfig,
    *,
    out: Path,
    progress: Progress,
    clip: Path | None = None,
    sam: Path | None = None,
) -> Summary:
    """Measure, and leave `gates.json`: figures, and whether each gate is passed.

    Args:
        config: section `measure_miniature`.
        out: where `gates.json` goes.
        clip: folder of the CLIP; None leaves it out.
        sam: folder of the SAM; None leaves it out.
        progress: told each part.
    """
    out.mkdir(parents=True, exist_ok=True)
    progress.start((clip is not None) + (sam is not None), "networks")
    found: dict[str, Any] = {}
    if sam is not None:
        found["sam"] = measure_sam(config.measure_miniature, sam, seed=config.seed)
        progress.advance()
    if clip is not None:
        found["clip"] = measure_clip(config.measure_miniature, clip, seed=config.seed)
        progress.advance()
    write_json(out / "gates.json", found)
    passed = {name: part["passed"] for name, part in found.items()}
    return Summary(
        text=", ".join(f"{name} {'passed' if ok else 'NOT passed'}" for name, ok in passed.items()),
        numbers={name: json.dumps(part) for name, part in found.items()},
    )


def measure_sam(config: MeasureMiniatureConfig, folder: Path, *, seed: int) -> dict[str, Any]:
    """IoU of the prompts and of SAM's masks, per style and prompt type.

    A prompt's own IoU is that of the mask it was made from; of a box: of the filled box; of
    points: of discs around them that have the region's area. The gate: on web pictures every type's
    masks are better than its prompts, those of mask prompts by `mask_gain`; on looks never seen
    the gain of mask prompts is at most 0.05 less.
    """
    network = build_sam(read_sizes(folder))
    network.load_state_dict(load_file(folder / "sam.safetensors"))
    predictor = SamPredictor(network)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for style in SAM_STYLES:
        rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for index in range(config.num_sam_pictures):
            picture_seed = item_seed(seed, "judge sam", style, index)
            picture = render(style, seed=picture_seed)
            predictor.set_image(picture.image_HW3)
            for kind in PROMPT_TYPES:
                generator = np.random.default_rng([picture_seed, PROMPT_TYPES.index(kind)])
                lesson = sam_lessons.make_lesson(
                    picture, generator, num_prompts=config.num_prompts, kind=kind, clean=False
                )
                if lesson is not None:
                    rows[kind] += _judge(predictor, lesson)
        table[style] = {
            kind: {
                "prompt_iou": round(float(np.mean([own for own, _ in pairs])), 4),
                "mask_iou": round(float(np.mean([ours for _, ours in pairs])), 4),
                "gain": round(float(np.mean([ours - own for own, ours in pairs])), 4),
                "prompts": len(pairs),
            }
            for kind, pairs in rows.items()
        }
    seen, unseen = table["web"], table["web_unseen"]
    masks = ("mask", "mask_points")
    passed = (
        all(row["gain"] > 0.02 for row in seen.values())
        and all(seen[kind]["gain"] >= config.mask_gain for kind in masks)
        and all(unseen[kind]["gain"] >= seen[kind]["gain"] - 0.05 for kind in masks)
    )
    return {"styles": table, "passed": bool(passed)}


def _judge(predictor: SamPredictor, lesson: Lesson) -> list[tuple[float, float]]:
    """(IoU of the prompt, IoU of the mask) per region."""
    targets_PHW = torch.from_numpy(lesson.targets_PHW)
    own_PHW = torch.from_numpy(lesson.hints_PHW)
    points = labels = boxes = masks = None
    if lesson.points_PN2 is not None:
        points = torch.from_numpy(lesson.points_PN2)
        labels = torch.from_numpy(lesson.point_labels_PN)
        if lesson.kind in ("point", "points"):
            own_PHW = _discs(points, targets_PHW)
    if lesson.boxes_P4 is not None:
        boxes = torch.from_numpy(lesson.boxes_P4)
        own_PHW = torch.stack([_filled(box, targets_PHW.shape[-2:]) for box in boxes])
    if lesson.masks_PHW is not None:
        size = predictor.model.image_encoder.img_size
        grid = predictor.model.prompt_encoder.mask_input_size[0]
        masks = sam_lessons.mask_grid(torch.from_numpy(lesson.masks_PHW), size, grid)
    only_points = masks is None and boxes is None
    with torch.inference_mode():
        found_PMHW, quality_PM, _ = predictor.predict_torch(
            points, labels, boxes=boxes, mask_input=masks, multimask_output=only_points
        )
    best = quality_PM.argmax(1)
    kept_PHW = found_PMHW[torch.arange(len(best)), best]
    ours = sam_lessons.iou(kept_PHW[:, None], targets_PHW[:, None])[:, 0]
    own = sam_lessons.iou(own_PHW[:, None], targets_PHW[:, None])[:, 0]
    return list(zip(own.tolist(), ours.tolist(), strict=True))


def _discs(points_PN2: torch.Tensor, targets_PHW: torch.Tensor) -> torch.Tensor:
    """Discs of together each region's own area around its points: what points say of a region."""
    rows = torch.arange(targets_PHW.shape[1])[:, None] + 0.5
    columns = torch.arange(targets_PHW.shape[2])[None] + 0.5
    x_PN11, y_PN11 = points_PN2[..., 0, None, None], points_PN2[..., 1, None, None]
    radius2_P111 = targets_PHW.sum((1, 2))[:, None, None, None] / torch.pi / points_PN2.shape[1]
    return ((columns - x_PN11) ** 2 + (rows - y_PN11) ** 2 <= radius2_P111).any(1)


def _filled(box: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    left, top, right, bottom = box.round().int().tolist()
    mask[top:bottom, left:right] = True
    return mask


def measure_clip(config: MeasureMiniatureConfig, folder: Path, *, seed: int) -> dict[str, Any]:
    """mIoU on web pictures of one head above three towers: shipped, from scratch, random.

    The head learns on source pictures only. The gate: the frozen shipped tower beats the same tower
    learning from scratch, with the same head and schedule.
    """
    train = [
        render("source", seed=item_seed(seed, "judge source", index))
        for index in range(config.num_source)
    ]
    judged = {
        style: [
            render(style, seed=item_seed(seed, "judge clip", style, index))
            for index in range(config.num_web_val)
        ]
        for style in ("web", "source")
    }
    cases = {
        "frozen": probe_config(folder, weights=True, trained=False),
        "from_scratch": probe_config(folder, weights=False, trained=True),
    }
    if config.more_cases:
        cases |= {
            "random_frozen": probe_config(folder, weights=False, trained=False),
            "fine_tuned": probe_config(folder, weights=True, trained=True),
        }
    names = load_labelspace("miniature").names
    table: dict[str, Any] = {}
    for case, segmenter_config in cases.items():
        runs = []
        for head in range(seed, seed + config.num_seeds):
            seeded = segmenter_config.model_copy(
                update={"decoder": segmenter_config.decoder.model_copy(update={"seed": head})}
            )
            segmenter = build_segmenter(seeded, class_names=names)
            learn(segmenter, train, config, head)
            runs.append({style: _miou(segmenter, judged[style]) for style in judged})
        table[case] = {style: [round(run[style], 4) for run in runs] for style in judged}
    mean = {case: float(np.mean(row["web"])) for case, row in table.items()}
    return {
        "miou": table,
        "gain": round(mean["frozen"] - mean["from_scratch"], 4),
        "passed": mean["frozen"] > mean["from_scratch"],
    }


@torch.inference_mode()
def _miou(segmenter: Segmenter, pictures: list[Picture]) -> float:
    segmenter.eval()
    score = DatasetScore(segmenter.num_classes, torch.device("cpu"))
    for start in range(0, len(pictures), 25):
        images, labels = batch_of(pictures[start : start + 25])
        found = segmenter.semantic(segmenter(images), size=tuple(labels.shape[-2:]))
        score.add(found.argmax(1).to(torch.uint8), labels)
    return scores(score.to_json()["confusion"], "mmseg")["miou"]
