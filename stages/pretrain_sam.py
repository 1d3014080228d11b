"""Train the miniature's SAM on rendered streets: points, boxes and masks as prompts, in two rounds.

python flows/miniature.py --stage pretrain_sam
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import nn

from models.miniature import sam_lessons
from models.miniature.renderer import render
from models.miniature.sam_lessons import AffinityHead, Lesson
from models.miniature.sam_network import SIZES, build_sam
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.pretrain_config import PretrainSamConfig
from stages.pretraining import pretrain
from stages.shards import item_seed

WEIGHTS_NAME = "sam.safetensors"


def run(config: StageConfig, *, out: Path, progress: Progress) -> Summary:
    """Train, and leave `sam.safetensors` (fp16) and `config.json`.

    Args:
        config: section `pretrain_sam`.
        out: the artifact; an interrupted attempt goes on from its `state/`.
        progress: told every step.

    Raises:
        TrainingError: the training diverged.
    """
    section, seed = config.pretrain_sam, config.seed
    torch.manual_seed(seed)
    sam = build_sam(SIZES)
    head = AffinityHead(SIZES["prompt_embed_dim"])
    both = nn.ModuleDict({"sam": sam, "head": head})
    both.train()
    found = pretrain(
        both,
        lambda step: _losses(sam, head, section, step, seed=seed, bf16=config.precision == "bf16"),
        section,
        seed=seed,
        out=out,
        progress=progress,
    )
    sam.eval()
    save_sam(sam, out)
    pictures = int(found["steps"]) * section.batch_size
    return Summary(
        text=f"{found['steps']:.0f} steps, {pictures} pictures, IoU in training {found['iou']:.3f}",
        numbers={"pictures": pictures, **found},
    )


def save_sam(sam: Sam, folder: Path) -> None:
    """Write fp16 weights under `segment_anything`'s names, and the sizes beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in sam.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME)
    (folder / "config.json").write_text(json.dumps(SIZES, indent=2) + "\n", encoding="utf-8")


def lessons_of_step(config: PretrainSamConfig, step: int, *, seed: int) -> list[Lesson]:
    """The pictures and prompts of an update; a function of seed and step alone."""
    lessons: list[Lesson] = []
    for index in range(config.batch_size):
        picture_seed = item_seed(seed, "sam", step, index)
        generator = np.random.default_rng(picture_seed)
        picture = render("web", seed=picture_seed)
        lesson = sam_lessons.make_lesson(picture, generator, num_prompts=config.num_prompts)
        if lesson is not None:
            lessons.append(lesson)
    return lessons


def _losses(
    sam: Sam, head: AffinityHead, config: PretrainSamConfig, step: int, *, seed: int, bf16: bool
) -> dict[str, torch.Tensor]:
    lessons = lessons_of_step(config, step, seed=seed)
    generator = np.random.default_rng(item_seed(seed, "sam clicks", step))
    again = generator.random() < config.second_round
    total, ious, gains = torch.zeros(()), [], []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        embeddings = sam_lessons.embed_images(sam, lessons)
        affinity = head(embeddings, lessons)
        for embedding, lesson in zip(embeddings.split(1), lessons, strict=True):
            targets = torch.from_numpy(lesson.targets_PHW)
            outputs = sam_lessons.decode(sam, embedding, lesson)
            single = lesson.kind == "point"
            loss, kept = sam_lessons.lesson_loss(outputs, targets, ambiguous=single)
            if again:
                filled, low, _ = outputs
                drawn = sam_lessons.enlarge(filled[:, :1].detach(), targets)[:, 0] > 0
                extra = sam_lessons.correct(drawn, targets, generator)
                outputs = sam_lessons.decode(
                    sam, embedding, lesson, extra=extra, masks_PGG=low[:, :1].detach()
                )
                second, _ = sam_lessons.lesson_loss(outputs, targets, ambiguous=False)
                loss = loss + second
            total = total + loss / len(lessons)
            ious.append(kept.mean())
            if lesson.masks_PHW is not None:
                hints = torch.from_numpy(lesson.hints_PHW)
                gains.append(
                    (kept - sam_lessons.iou(hints[:, None], targets[:, None])[:, 0]).mean()
                )
    total = total + config.affinity_weight * affinity
    found = {"total": total, "affinity": affinity, "iou": torch.stack(ious).mean()}
    found["mask_gain"] = torch.stack(gains).mean() if gains else found["iou"] * 0
    return found
