"""Train the miniature's SAM on rendered streets: points, boxes and masks as prompts, in two rounds.

python flows/miniature.py --stage pretrain_sam
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from segment_anything.modeling import Sam
from torch import nn

from models.config import weights_path
from models.miniature import sam_lessons
from models.miniature.renderer import render
from models.miniature.sam_lessons import PROMPT_TYPES, TYPE_SHARES, AffinityHead, Lesson
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
    if section.start is not None:
        taken = begin_with(sam, section.start)
        progress.note(f"begins with {taken} of {len(sam.state_dict())} tensors of {section.start}")
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


def begin_with(sam: Sam, start: str) -> int:
    """Load the tensors of an earlier SAM that fit; returns how many.

    Raises:
        FileNotFoundError: there is no SAM.
    """
    folder = weights_path(start)
    if folder is None or not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(
            f"pretrain_sam.start: {start!r} is no folder with {WEIGHTS_NAME}; name one by "
            "local-dir:FOLDER, or builtin:sam."
        )
    found = load_file(folder / WEIGHTS_NAME)
    own = sam.state_dict()
    fitting = {n: v.float() for n, v in found.items() if n in own and own[n].shape == v.shape}
    sam.load_state_dict(fitting, strict=False)
    return len(fitting)


def save_sam(sam: Sam, folder: Path) -> None:
    """Write fp16 weights under `segment_anything`'s names, and the sizes beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in sam.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME)
    (folder / "config.json").write_text(json.dumps(SIZES, indent=2) + "\n", encoding="utf-8")


def lessons_of_step(config: PretrainSamConfig, step: int, *, seed: int) -> list[list[Lesson]]:
    """The pictures and prompts of an update, in groups whose prompts are of one kind.

    A function of seed and step alone.
    """
    draws = np.random.default_rng(item_seed(seed, "sam kinds", step))
    groups = []
    for group in range(config.kinds):
        kind = str(draws.choice(PROMPT_TYPES, p=TYPE_SHARES))
        num_points = int(draws.integers(2, 6))
        lessons: list[Lesson] = []
        for index in range(group, config.batch_size, config.kinds):
            picture_seed = item_seed(seed, "sam", step, index)
            lesson = sam_lessons.make_lesson(
                render("web", seed=picture_seed),
                np.random.default_rng(picture_seed),
                num_prompts=config.num_prompts,
                kind=kind,
                num_points=num_points,
            )
            if lesson is not None:
                lessons.append(lesson)
        if lessons:
            groups.append(lessons)
    return groups


def _losses(
    sam: Sam, head: AffinityHead, config: PretrainSamConfig, step: int, *, seed: int, bf16: bool
) -> dict[str, torch.Tensor]:
    groups = lessons_of_step(config, step, seed=seed)
    everyone = [lesson for lessons in groups for lesson in lessons]
    generator = np.random.default_rng(item_seed(seed, "sam clicks", step))
    again = generator.random() < config.second_round
    rows = None if generator.random() < config.padded else _filled_rows(sam, everyone[0])
    total, ious, gains = torch.zeros(()), [], []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        embeddings = sam_lessons.embed_images(sam, everyone, rows=rows)
        affinity = head(embeddings, everyone)
        own = embeddings.split([len(lessons) for lessons in groups])
        for part, lessons in zip(own, groups, strict=True):
            targets = torch.from_numpy(np.concatenate([one.targets_PHW for one in lessons]))
            outputs = sam_lessons.decode(sam, part, lessons)
            single = lessons[0].kind == "point"
            loss, kept = sam_lessons.lesson_loss(outputs, targets, ambiguous=single)
            if again:
                filled, low, _ = outputs
                drawn = sam_lessons.enlarge(filled[:, :1].detach(), targets)[:, 0] > 0
                extra = sam_lessons.correct(drawn, targets, generator)
                outputs = sam_lessons.decode(
                    sam, part, lessons, extra=extra, masks_PGG=low[:, :1].detach()
                )
                second, _ = sam_lessons.lesson_loss(outputs, targets, ambiguous=False)
                loss = loss + second
            total = total + loss * (len(lessons) / len(everyone))
            ious.append(kept.mean())
            if lessons[0].masks_PHW is not None:
                hints = torch.from_numpy(np.concatenate([one.hints_PHW for one in lessons]))
                before = sam_lessons.iou(hints[:, None], targets[:, None])[:, 0]
                gains.append((kept - before).mean())
    total = total + config.affinity_weight * affinity
    found = {"total": total, "affinity": affinity, "iou": torch.stack(ious).mean()}
    if gains:
        found["mask_gain"] = torch.stack(gains).mean()
    return found


def _filled_rows(sam: Sam, lesson: Lesson) -> int:
    """Rows of patches that a picture fills."""
    grid, size = sam.prompt_encoder.image_embedding_size[0], sam.image_encoder.img_size
    return lesson.image_HW3.shape[0] * grid // size
