"""What the miniature SAM learns from: regions, prompts as wrong as a teacher's, losses.

Everything random comes from a `numpy.random.Generator`, so a training step is a function of its
number.
"""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from segment_anything.modeling import Sam
from torch import nn

from models.miniature.materials import IGNORE_ID
from models.miniature.renderer import Picture

# P prompts of one picture, N points, M mask outputs (0 single, 1..3 multimask),
# H W picture, G mask grid, g token grid

PROMPT_TYPES = ("point", "points", "box", "mask", "mask_points")

TYPE_SHARES = (0.08, 0.24, 0.14, 0.30, 0.24)
"""How often a picture's prompts are of each type in training."""

AREA_MIN_PX = 48
"""Regions below are fragments without a shape at this size; refinement leaves them out as well."""

MASK_LOGIT = 8.0
"""A mask prompt made from a binary mask holds plus and minus this; training varies it."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One picture with the regions to find in it and the prompts that hint at them."""

    image_HW3: np.ndarray
    """uint8 RGB."""
    entities_HW: np.ndarray
    """uint16, one number per thing or piece of stuff."""
    targets_PHW: np.ndarray
    """bool regions."""
    hints_PHW: np.ndarray
    """bool, the noisy masks of which the prompts were made."""
    kind: str
    """One of `PROMPT_TYPES`; all prompts of a lesson are of one type."""
    points_PN2: np.ndarray | None
    """float32 (x, y) pixels."""
    point_labels_PN: np.ndarray | None
    """int64, 1 = foreground."""
    boxes_P4: np.ndarray | None
    """float32 (x0, y0, x1, y1) pixels."""
    masks_PHW: np.ndarray | None
    """float32 logits."""


def regions(picture: Picture) -> np.ndarray:
    """Distinct regions, bool [R, H, W]: things, pieces of stuff, components of classes."""
    labels_HW = picture.labels_HW
    known_HW = labels_HW != IGNORE_ID
    by_class = cc3d.connected_components(
        np.where(known_HW, labels_HW + 1, 0).astype(np.uint8), connectivity=4
    )
    by_entity = np.where(known_HW, picture.entities_HW, 0)
    found, seen = [], set()
    for numbers_HW in (by_entity, by_class):
        areas = np.bincount(numbers_HW.ravel())
        for number in np.flatnonzero(areas >= AREA_MIN_PX):
            if number == 0:
                continue
            region_HW = numbers_HW == number
            key = region_HW.tobytes()
            if key not in seen:
                seen.add(key)
                found.append(region_HW)
    if not found:
        return np.zeros((0, *labels_HW.shape), dtype=bool)
    return np.stack(found)


def make_lesson(
    picture: Picture,
    generator: np.random.Generator,
    *,
    num_prompts: int,
    kind: str | None = None,
    num_points: int | None = None,
    clean: bool | None = None,
) -> Lesson | None:
    """Draw regions and prompts for a picture; None when nothing in it is large enough.

    Args:
        picture: a rendered street.
        generator: source of everything random.
        num_prompts: regions to ask for; repeats when there are fewer.
        kind: prompt type; drawn by `TYPE_SHARES` when None.
        num_points: points per prompt where there are several, 2 to 5; drawn when None.
        clean: whether several points lie in the region itself, or in the noisy hint; drawn when
            None (a single point always lies in the region).
    """
    found_RHW = regions(picture)
    if not len(found_RHW):
        return None
    areas = found_RHW.sum(axis=(1, 2)).astype(np.float64)
    odds = np.sqrt(areas)
    repeat = len(areas) < num_prompts
    chosen = generator.choice(len(areas), num_prompts, replace=repeat, p=odds / odds.sum())
    targets_PHW = found_RHW[chosen]
    hints_PHW = np.stack([spoil(target, generator) for target in targets_PHW])
    kind = kind or str(generator.choice(PROMPT_TYPES, p=TYPE_SHARES))
    points = labels = boxes = masks = None
    if kind in ("point", "points", "mask_points"):
        several = num_points or int(generator.integers(2, 6))
        count = 1 if kind == "point" else several
        clean = generator.random() < 0.5 if clean is None else clean
        origin_PHW = targets_PHW if clean or kind == "point" else hints_PHW
        points = np.stack([draw_points(mask, count, generator) for mask in origin_PHW])
        labels = np.ones(points.shape[:2], dtype=np.int64)
    if kind == "box":
        boxes = np.stack([draw_box(mask, generator) for mask in targets_PHW])
    if kind in ("mask", "mask_points"):
        strength = float(generator.uniform(3.0, 14.0))
        masks = np.where(hints_PHW, strength, -strength).astype(np.float32)
    return Lesson(
        image_HW3=picture.image_HW3,
        entities_HW=picture.entities_HW,
        targets_PHW=targets_PHW,
        hints_PHW=hints_PHW,
        kind=kind,
        points_PN2=points,
        point_labels_PN=labels,
        boxes_P4=boxes,
        masks_PHW=masks,
    )


def spoil(mask_HW: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A mask as a weak teacher would have drawn it: blurred, shifted, with leaks and holes.

    Its IoU with the truth is mostly between 0.25 and 0.75, as that of a model's components in a
    domain
    it never saw.
    """
    height, width = mask_HW.shape
    side = float(np.sqrt(mask_HW.sum()))
    for attempt in range(5):
        calm = 0.7**attempt
        sigma = float(generator.uniform(0.05, 0.28)) * side * calm + 0.5
        soft = ndimage.gaussian_filter(mask_HW.astype(np.float32), sigma)
        shift = generator.normal(0, 0.14 * side * calm, 2)
        soft = ndimage.shift(soft, shift, order=1, mode="nearest")
        cells = int(np.clip(side * generator.uniform(0.3, 0.8), 3, 24))
        shape = (height // cells + 3, width // cells + 3)
        field = generator.standard_normal(shape).astype(np.float32)
        field = ndimage.zoom(field, cells, order=1)[:height, :width]
        strength = float(generator.uniform(0.15, 0.65)) * calm
        spoiled = soft + strength * field > generator.uniform(0.3, 0.6)
        near = ndimage.uniform_filter(mask_HW.astype(np.float32), int(2 * (2 + 0.35 * side)) | 1)
        spoiled &= near > 0.01
        union = (spoiled | mask_HW).sum()
        if spoiled.any() and (spoiled & mask_HW).sum() / union > 0.2:
            return spoiled
    return mask_HW.copy()


def draw_points(mask_HW: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Uniformly random pixels of a mask, float32 [count, 2] as (x, y) of pixel centres."""
    rows, columns = np.nonzero(mask_HW)
    picks = generator.integers(0, len(rows), count)
    return np.stack([columns[picks], rows[picks]], axis=1).astype(np.float32) + 0.5


def draw_box(mask_HW: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mask's box, each side off by a tenth of its length (standard deviation), float32 [4]."""
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
    sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    noise = np.clip(generator.normal(0, 0.1, 4), -0.2, 0.2) * sides
    limits = np.array([mask_HW.shape[1], mask_HW.shape[0]] * 2)
    return np.clip(box + noise, 0, limits).astype(np.float32)


def embed_images(sam: Sam, lessons: list[Lesson], *, rows: int | None = None) -> torch.Tensor:
    """Image embeddings [B, C, g, g] of the lessons' pictures, whose longer side is SAM's size.

    `rows` keeps the upper rows of patches, those that the pictures fill, and leaves the padding
    out: half the work. The stem sees the padding all the same.
    """
    pictures = [torch.tensor(lesson.image_HW3).permute(2, 0, 1).float() for lesson in lessons]
    inputs = torch.stack([sam.preprocess(picture) for picture in pictures])
    encoder = sam.image_encoder
    if rows is None:
        return encoder(inputs)
    patches = (encoder.patch_embed(inputs) + encoder.pos_embed)[:, :rows]
    for block in encoder.blocks:
        patches = block(patches)
    return encoder.neck(patches.permute(0, 3, 1, 2))


def mask_grid(masks_PHW: torch.Tensor, size: int, grid: int) -> torch.Tensor:
    """Mask logits in SAM's input grid, [P, 1, G, G]: padded below and right, then averaged down."""
    height, width = masks_PHW.shape[-2:]
    padded = F.pad(masks_PHW[:, None], (0, size - width, 0, size - height), value=-MASK_LOGIT)
    return F.interpolate(padded, (grid, grid), mode="area")


def decode(
    sam: Sam,
    embeddings_BCgg: torch.Tensor,
    lessons: list[Lesson],
    *,
    extra: tuple[torch.Tensor, torch.Tensor] | None = None,
    masks_PGG: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All four mask outputs for the prompts of lessons of one kind, P prompts in all.

    Args:
        sam: the network.
        embeddings_BCgg: of the lessons' pictures; with fewer rows than columns, the padding below
            the pictures is left out of the decoding too.
        lessons: the prompts, as many points in each.
        extra: more points [P, 1, 2] with labels [P, 1], for a second round.
        masks_PGG: mask prompt [P, 1, G, G] of a second round, instead of the lessons'.

    Returns:
        Mask logits [P, 4, h, w] in the part of SAM's mask grid that the picture fills, the same
        in the whole grid [P, 4, G, G], and predicted IoU [P, 4].
    """
    grid = sam.prompt_encoder.mask_input_size[0]
    size = sam.image_encoder.img_size
    rows = embeddings_BCgg.shape[2]
    points = _joined([lesson.points_PN2 for lesson in lessons])
    labels = _joined([lesson.point_labels_PN for lesson in lessons])
    boxes = _joined([lesson.boxes_P4 for lesson in lessons])
    hints = _joined([lesson.masks_PHW for lesson in lessons])
    if extra is not None:
        points = extra[0] if points is None else torch.cat([points, extra[0]], 1)
        labels = extra[1] if labels is None else torch.cat([labels, extra[1]], 1)
    if masks_PGG is None and hints is not None:
        masks_PGG = mask_grid(hints, size, grid)
    if masks_PGG is not None:
        masks_PGG = masks_PGG[..., : rows * grid // sam.prompt_encoder.image_embedding_size[0], :]
    clicks = None if points is None else (points, labels)
    sparse, dense = sam.prompt_encoder(points=clicks, boxes=boxes, masks=masks_PGG)
    low_PMGG, iou_PM = _decode_masks(
        sam,
        embeddings_BCgg.repeat_interleave(len(sparse) // len(lessons), 0),
        sparse,
        dense[..., :rows, :],
    )
    height, width = lessons[0].targets_PHW.shape[-2:]
    low_PMGG = low_PMGG.float()
    filled_PMhw = low_PMGG[..., : height * grid // size, : width * grid // size]
    return filled_PMhw, low_PMGG, iou_PM.float()


def _joined(parts: list[np.ndarray | None]) -> torch.Tensor | None:
    return None if parts[0] is None else torch.from_numpy(np.concatenate(parts))


def _decode_masks(
    sam: Sam, images_PCgg: torch.Tensor, sparse_PNC: torch.Tensor, dense_PCgg: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`MaskDecoder.predict_masks` for prompts of different pictures: it repeats one picture."""
    decoder = sam.mask_decoder
    own_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own_tokens.expand(len(sparse_PNC), -1, -1), sparse_PNC], 1)
    source = images_PCgg + dense_PCgg
    positions = sam.prompt_encoder.get_dense_pe()[..., : source.shape[2], :]
    answers, pixels = decoder.transformer(source, positions.expand(len(source), -1, -1, -1), tokens)
    upscaled = decoder.output_upscaling(pixels.transpose(1, 2).reshape(source.shape))
    filters = torch.stack(
        [mlp(answers[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1
    )
    masks = (filters @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    return masks, decoder.iou_prediction_head(answers[:, 0])


def enlarge(logits_PMhw: torch.Tensor, targets_PHW: torch.Tensor) -> torch.Tensor:
    """Mask logits at the picture's size, bilinearly, [P, M, H, W]."""
    size = tuple(targets_PHW.shape[-2:])
    if tuple(logits_PMhw.shape[-2:]) == size:
        return logits_PMhw
    return F.interpolate(logits_PMhw, size, mode="bilinear", align_corners=False)


CELLS = 4
"""Cells of SAM's mask grid per token, along each side."""

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 5), (5, 0))
"""Steps (rows, columns) in the mask grid whose ends `AffinityHead` compares."""


class AffinityHead(nn.Module):
    """A training aid, not shipped: do neighbouring cells of the mask grid show one entity?

    It gives every picture a dense lesson in boundaries, where prompts alone teach slowly.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.project = nn.Conv2d(dim, len(NEIGHBOURS) * CELLS * CELLS, 1)
        self.shuffle = nn.PixelShuffle(CELLS)

    def forward(self, embeddings_BCgg: torch.Tensor, lessons: list[Lesson]) -> torch.Tensor:
        """Binary cross-entropy over all cells and neighbours that lie in the picture."""
        logits_BAGG = self.shuffle(self.project(embeddings_BCgg)).float()
        step = max(lessons[0].entities_HW.shape) // logits_BAGG.shape[-1]
        middle = slice(step // 2, None, step)
        cells = np.stack([lesson.entities_HW[middle, middle] for lesson in lessons])
        cells_Bhw = torch.from_numpy(cells.astype(np.int64))
        height, width = cells_Bhw.shape[-2:]
        losses = []
        for index, (down, right) in enumerate(NEIGHBOURS):
            here = cells_Bhw[:, : height - down, : width - right]
            there = cells_Bhw[:, down:, right:]
            logits = logits_BAGG[:, index, : height - down, : width - right]
            losses.append(F.binary_cross_entropy_with_logits(logits, (here == there).float()))
        return torch.stack(losses).mean()


def iou(masks_PMHW: torch.Tensor, targets_P1HW: torch.Tensor) -> torch.Tensor:
    """IoU of bool masks with bool targets, [P, M]."""
    inter = (masks_PMHW & targets_P1HW).sum((-2, -1)).float()
    return inter / (masks_PMHW | targets_P1HW).sum((-2, -1)).clamp_min(1).float()


def mask_losses(logits_PMHW: torch.Tensor, targets_PHW: torch.Tensor) -> torch.Tensor:
    """20 x focal + dice per mask output, [P, M] (Kirillov et al., Segment Anything, section A).

    The focal term counts pixels at the region's boundary three times: at 64x128 that is where
    masks differ.
    """
    target = targets_PHW[:, None].float().expand_as(logits_PMHW)
    hit = torch.sigmoid(logits_PMHW)
    cross = F.binary_cross_entropy_with_logits(logits_PMHW, target, reduction="none")
    missed = (hit + target - 2 * hit * target) ** 2
    smooth = F.avg_pool2d(targets_PHW[:, None].float(), 3, 1, 1)
    weight = 1 + 2 * ((smooth > 0.01) & (smooth < 0.99)).float()
    focal = (cross * missed * weight).mean((-2, -1))
    overlap = (hit * target).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (hit.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return 20 * focal + dice


def lesson_loss(
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    targets_PHW: torch.Tensor,
    *,
    ambiguous: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of one decoding, and the IoU [P] of the masks one would keep.

    The best of the three multimask outputs learns; the single output learns unless the prompt is
    ambiguous (one point).
    """
    logits_PMhw, _, predicted_PM = outputs
    with torch.no_grad():
        actual_PM = iou(enlarge(logits_PMhw, targets_PHW) > 0, targets_PHW[:, None])
    best_P = actual_PM[:, 1:].argmax(1) + 1
    rows_P = torch.arange(len(best_P))
    learners = [logits_PMhw[rows_P, best_P]]
    if not ambiguous:
        learners.append(logits_PMhw[:, 0])
    losses = mask_losses(enlarge(torch.stack(learners, 1), targets_PHW), targets_PHW)
    total = losses.mean(0).sum() + F.mse_loss(predicted_PM, actual_PM)
    chosen_P = predicted_PM[:, 1:].argmax(1) + 1 if ambiguous else torch.zeros_like(best_P)
    return total, actual_PM[rows_P, chosen_P]


def correct(
    masks_PHW: torch.Tensor, targets_PHW: torch.Tensor, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One click per mask inside its error: points [P, 1, 2], labels [P, 1]."""
    points, labels = [], []
    for mask, target in zip(masks_PHW.numpy(), targets_PHW.numpy(), strict=True):
        wrong = mask != target
        spot = draw_points(wrong if wrong.any() else target, 1, generator)
        points.append(spot)
        column, row = spot[0].astype(int)
        labels.append([int(target[row, column])])
    return torch.from_numpy(np.stack(points)), torch.tensor(labels)
