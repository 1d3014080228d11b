"""Set prediction losses: queries are matched with classes, then compared at points.

Source: Cheng et al., Mask2Former (CVPR 2022), section 3.3; constants as in CLOUDS. All matching
costs of all predictions are made on the device and copied to the host once.
"""

# B batch, L predictions, Q queries, K classes, T target masks of the batch (image after image,
# classes ascending), N any masks, P points, H W height and width
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import distributed
from torch.nn import functional as F

from models.config import LossConfig
from models.decoder import Prediction
from models.matching import IGNORE, Targets, find_targets, match
from models.points import (
    ChosenPoints,
    PointDraws,
    choose,
    draw_points,
    rows_at_once,
    sample_by_prediction,
    sample_masks,
    shares_at,
    smallest,
)
from models.segmenter import SegmenterOutput


class BatchCounts(NamedTuple):
    """What the losses of a whole batch are divided by, where one call sees a part of it."""

    images: float
    masks: float
    """Target masks of all images."""
    labelled: float
    """Pixels with a class, for losses per pixel."""


class Handling(NamedTuple):
    """How the images of one call count."""

    weights_B: torch.Tensor | None = None
    ignore_B: torch.Tensor | None = None
    """Images whose unlabelled pixels are left out; None: no image's."""
    whole: BatchCounts | None = None


PLAIN = Handling()
"""Every image counts alike, nothing is left out, the batch is whole."""


class SetCriterion:
    """The losses of a segmenter's output against label maps.

    Args:
        config: weights and point numbers.
        num_classes: classes K, without "nothing".
        temperature: divisor of the similarities in the pixel-text loss.
    """

    def __init__(self, config: LossConfig, num_classes: int, *, temperature: float = 0.07):
        self.config = config
        self.num_classes = num_classes
        self.temperature = temperature
        self.candidates = int(config.points * config.oversample)
        self.uncertain = int(config.points * config.importance)

    def __call__(
        self,
        output: SegmenterOutput,
        labels_BHW: torch.Tensor,
        *,
        seeds: Sequence[int] | None = None,
        draws: PointDraws | None = None,
        weights_B: torch.Tensor | None = None,
        ignore_B: torch.Tensor | None = None,
        whole: BatchCounts | None = None,
    ) -> dict[str, torch.Tensor]:
        """All losses, unweighted, and their weighted sum.

        Args:
            output: of a segmenter.
            labels_BHW: uint8 class ids at the size of the images, 255 = unlabelled.
            seeds: one per image, for the random points.
            draws: random points given instead of seeds.
            weights_B: factor on all losses of an image; None: 1.
            ignore_B: images (bool) whose unlabelled pixels are left out of mask losses; None: as
                `config.unlabelled` says, for all.
            whole: counts of the batch (per rank, on average) of which these images are a part, so
                that the losses of its parts add up to those of the batch; None: these images are
                the rank's batch.

        Returns:
            Scalars `loss_ce`, `loss_mask`, `loss_dice` of the final prediction, with suffix `_0`,
            `_1`, ... of the earlier ones, `loss_text` where there is language guidance, `total`.

        Raises:
            ValueError: labels of another size, or with values that are no class.
        """
        labels_BHW = self._padded(labels_BHW, output)
        handling = Handling(weights_B, self._ignored(ignore_B, labels_BHW), whole)
        with torch.autocast(labels_BHW.device.type, enabled=False):
            if output.pixel_logits_BKHW is not None:
                logits_BKHW = output.pixel_logits_BKHW.float()
                losses = {"loss_ce": pixel_loss(logits_BKHW, labels_BHW, handling=handling)}
                losses["total"] = self.config.class_weight * losses["loss_ce"]
            else:
                losses = self._set_losses(output.predictions, labels_BHW, seeds, draws, handling)
            if output.text_scores_BKHW is not None:
                losses["loss_text"] = pixel_loss(
                    output.text_scores_BKHW.float() / self.temperature,
                    labels_BHW,
                    count_ignored=True,
                    handling=handling,
                )
                losses["total"] = losses["total"] + self.config.text_weight * losses["loss_text"]
        return losses

    def _ignored(
        self, ignore_B: torch.Tensor | None, labels_BHW: torch.Tensor
    ) -> torch.Tensor | None:
        """Images whose unlabelled pixels are left out: as given, or as configured for all."""
        if ignore_B is None and self.config.unlabelled == "ignore":
            return torch.ones(len(labels_BHW), dtype=torch.bool, device=labels_BHW.device)
        return ignore_B

    def _padded(self, labels_BHW: torch.Tensor, output: SegmenterOutput) -> torch.Tensor:
        if tuple(labels_BHW.shape[-2:]) != tuple(output.image_size):
            raise ValueError(
                f"labels are {tuple(labels_BHW.shape[-2:])}, the images {output.image_size}: "
                "give labels at the size of the images"
            )
        height, width = output.padded_size
        right, bottom = width - labels_BHW.shape[2], height - labels_BHW.shape[1]
        return F.pad(labels_BHW, (0, right, 0, bottom), value=IGNORE)

    def _set_losses(
        self,
        predictions: tuple[Prediction, ...],
        labels_BHW: torch.Tensor,
        seeds: Sequence[int] | None,
        draws: PointDraws | None,
        handling: Handling,
    ) -> dict[str, torch.Tensor]:
        # 1. Which classes are there, and the random points.
        targets = find_targets(labels_BHW, self.num_classes)
        if draws is None:
            if seeds is None:
                raise ValueError("the criterion needs seeds, one per image")
            draws = draw_points(
                seeds,
                [targets.images_T.count(image) for image in range(len(labels_BHW))],
                points=self.config.points,
                candidates=self.candidates,
                uncertain=self.uncertain,
                device=labels_BHW.device,
            )

        # 2. Match every prediction.
        queries_LT = self.match(predictions, labels_BHW, targets, draws, ignore_B=handling.ignore_B)

        # 3. Classes.
        class_logits = torch.stack([p.class_logits_BQK1 for p in predictions]).float()
        class_sums_L, weight_sums_L = self._class_sums(class_logits, targets, queries_LT, handling)

        # 4. Masks, all predictions at once.
        num_masks = class_logits.new_tensor([len(targets.images_T)])
        mask_sums_L, dice_sums_L = self._mask_sums(
            predictions, labels_BHW, targets, queries_LT, draws, handling
        )

        # 5. Means over the batch of all ranks, then the weighted sum.
        if handling.whole is None:
            divisors = over_ranks(torch.cat([weight_sums_L, num_masks.clamp(min=1)]))
        else:
            divisors = self._divisors(handling.whole, class_logits)
        ce_L = class_sums_L / divisors[:-1]
        mask_L, dice_L = mask_sums_L / divisors[-1], dice_sums_L / divisors[-1]
        suffixes = ["", *(f"_{index}" for index in range(len(predictions) - 1))]
        losses = {}
        for name, values_L in (("ce", ce_L), ("mask", mask_L), ("dice", dice_L)):
            losses |= {f"loss_{name}{s}": v for s, v in zip(suffixes, values_L, strict=True)}
        c = self.config
        losses["total"] = (
            c.class_weight * ce_L + c.mask_weight * mask_L + c.dice_weight * dice_L
        ).sum()
        return losses

    def _divisors(self, whole: BatchCounts, class_logits_LBQK1: torch.Tensor) -> torch.Tensor:
        """Sum of class weights of every prediction, then the number of masks, for a whole batch."""
        L, _, Q, _ = class_logits_LBQK1.shape
        unmatched = whole.images * Q - whole.masks
        weight_sum = whole.masks + self.config.no_object * unmatched
        return class_logits_LBQK1.new_tensor([*[weight_sum] * L, max(whole.masks, 1)])

    def match(
        self,
        predictions: Sequence[Prediction],
        labels_BHW: torch.Tensor,
        targets: Targets,
        draws: PointDraws,
        *,
        ignore_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The query of every target mask, for every prediction, int64 [L, T], -1: none.

        Args:
            predictions: the final one first.
            labels_BHW: label maps that cover the same area as the masks.
            targets: the classes of each image.
            draws: random points; `matching` is used.
            ignore_B: images whose unlabelled pixels are left out; None: as configured.
        """
        return match(
            predictions,
            labels_BHW,
            targets,
            draws.matching,
            self.config,
            num_classes=self.num_classes,
            ignore_B=self._ignored(ignore_B, labels_BHW),
        )

    def _class_sums(
        self,
        class_logits_LBQK1: torch.Tensor,
        targets: Targets,
        queries_LT: torch.Tensor,
        handling: Handling,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per prediction: weighted sum of cross-entropies, and the sum of the weights."""
        L, B, Q, K1 = class_logits_LBQK1.shape
        classes_LBQ = torch.full((L, B, Q), K1 - 1)
        images_T, classes_T = torch.tensor(targets, dtype=torch.int64)
        for index, queries_T in enumerate(queries_LT):
            found = queries_T >= 0
            classes_LBQ[index, images_T[found], queries_T[found]] = classes_T[found]
        classes_LBQ = classes_LBQ.to(class_logits_LBQK1.device, non_blocking=True)
        weights_K1 = class_logits_LBQK1.new_ones(K1)
        weights_K1[-1] = self.config.no_object
        entropies = F.cross_entropy(
            class_logits_LBQK1.flatten(0, 2),
            classes_LBQ.flatten(),
            weight=weights_K1,
            reduction="none",
        )
        if handling.weights_B is not None:
            entropies = entropies.view(L, B, Q) * handling.weights_B[:, None]
        return entropies.view(L, -1).sum(1), weights_K1[classes_LBQ].flatten(1).sum(1)

    def _mask_sums(
        self,
        predictions: Sequence[Prediction],
        labels_BHW: torch.Tensor,
        targets: Targets,
        queries_LT: torch.Tensor,
        draws: PointDraws,
        handling: Handling,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per prediction: sums over matched masks of the point-wise cross-entropy and of dice."""
        if not targets.images_T:
            nothing = torch.stack([p.masks_BQHW.float().sum() * 0 for p in predictions])
            return nothing, nothing
        # 1. The mask of every target's query.
        table = torch.cat([torch.tensor([targets.images_T, targets.classes_T]), queries_LT])
        images_T, classes_T, *queries = table.to(labels_BHW.device, non_blocking=True)
        masks_TLHW = torch.stack(
            [p.masks_BQHW[images_T, q] for p, q in zip(predictions, queries, strict=True)], 1
        ).float()

        # 2. Where they are compared, with what.
        chosen = self._choose_points(
            masks_TLHW.detach(), labels_BHW, images_T, classes_T, draws, handling
        )

        # 3. Compare.
        T, L, H, W = masks_TLHW.shape
        logits_NP = sample_masks(masks_TLHW.view(T * L, 1, H, W), chosen.points_TLP2.flatten(0, 1))[
            :, 0
        ]
        valid_NP = None if chosen.valid_TLP is None else chosen.valid_TLP.flatten(0, 1)
        targets_NP = chosen.targets_TLP.flatten(0, 1)
        counted_TL = (torch.stack(queries, 1) >= 0).float()
        if handling.weights_B is not None:
            counted_TL = counted_TL * handling.weights_B[images_T, None]
        entropy_TL = mask_entropy(logits_NP, targets_NP, valid_NP).view(T, L)
        dice_TL = dice_loss(logits_NP, targets_NP, valid_NP).view(T, L)
        return (entropy_TL * counted_TL).sum(0), (dice_TL * counted_TL).sum(0)

    @torch.no_grad()
    def _choose_points(
        self,
        masks_TLHW: torch.Tensor,
        labels_BHW: torch.Tensor,
        images_T: torch.Tensor,
        classes_T: torch.Tensor,
        draws: PointDraws,
        handling: Handling,
    ) -> ChosenPoints:
        """The most uncertain candidates of each mask and uniform points, and what is there."""
        candidates, uniform = torch.cat(draws.candidates, 1), torch.cat(draws.uniform, 1)
        T, L = masks_TLHW.shape[:2]
        step = rows_at_once(masks_TLHW.device, T, L * self.candidates)
        parts = []
        for start in range(0, T, step):
            rows = slice(start, start + step)
            drawn = candidates[:, rows], uniform[:, rows]
            uncertainty = sample_by_prediction(masks_TLHW[rows], drawn[0]).abs_()
            kept_NU = smallest(uncertainty.flatten(0, 1), self.uncertain)
            kept_TLU = kept_NU.view(*uncertainty.shape[:2], -1)
            labels_THW = labels_BHW[images_T[rows]]
            valid_TLP = None
            if handling.ignore_B is not None:
                ignored = handling.ignore_B[images_T[rows], None, None]
                labelled = shares_at(labels_THW != IGNORE, drawn, kept_TLU)
                valid_TLP = torch.where(ignored, labelled, 1)
            parts.append(
                ChosenPoints(
                    points_TLP2=choose(*drawn, kept_TLU),
                    targets_TLP=shares_at(
                        labels_THW == classes_T[rows, None, None], drawn, kept_TLU
                    ),
                    valid_TLP=valid_TLP,
                )
            )
        points, targets, valid = zip(*parts, strict=True)
        return ChosenPoints(
            torch.cat(points), torch.cat(targets), None if valid[0] is None else torch.cat(valid)
        )


def mask_entropy(
    logits_NP: torch.Tensor, targets_NP: torch.Tensor, valid_NP: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary cross-entropy of each mask, mean over its points, [N].

    Args:
        logits_NP: predicted logits at points.
        targets_NP: bilinear share of the mask's pixels around each point.
        valid_NP: bilinear share of labelled pixels, at least the target's; None: all.
    """
    # softplus(x) - x t: torch's own cross-entropy takes a slower way to the same numbers.
    entropy = F.softplus(logits_NP)
    if valid_NP is None:
        return torch.addcmul(entropy, logits_NP, targets_NP, value=-1).mean(1)
    entropy = entropy * valid_NP - logits_NP * targets_NP
    return entropy.sum(1) / valid_NP.sum(1).clamp(min=1e-6)


def dice_loss(
    logits_NP: torch.Tensor, targets_NP: torch.Tensor, valid_NP: torch.Tensor | None = None
) -> torch.Tensor:
    """Dice loss of each mask over its points, smoothed by 1, [N]; arguments as above."""
    probabilities = logits_NP.sigmoid()
    overlap = 2 * (probabilities * targets_NP).sum(1)
    covered = probabilities if valid_NP is None else probabilities * valid_NP
    return 1 - (overlap + 1) / (covered.sum(1) + targets_NP.sum(1) + 1)


def pixel_loss(
    logits_BKHW: torch.Tensor,
    labels_BHW: torch.Tensor,
    *,
    count_ignored: bool = False,
    handling: Handling = PLAIN,
) -> torch.Tensor:
    """Cross-entropy per pixel, logits resized bilinearly to the labels.

    Args:
        logits_BKHW: class scores.
        labels_BHW: uint8, 255 = unlabelled.
        count_ignored: divide by all pixels (mmseg's default) instead of the labelled ones.
        handling: weights of the images; counts of the whole batch (None: over all ranks).
    """
    logits = F.interpolate(
        logits_BKHW, size=labels_BHW.shape[-2:], mode="bilinear", align_corners=False
    )
    reduction = "sum" if handling.weights_B is None else "none"
    total = F.cross_entropy(logits, labels_BHW.long(), ignore_index=IGNORE, reduction=reduction)
    if handling.weights_B is not None:
        total = (total.sum((1, 2)) * handling.weights_B).sum()
    if handling.whole is not None:
        area = labels_BHW[0].numel()
        counted = handling.whole.images * area if count_ignored else handling.whole.labelled
        return total / max(counted, 1)
    labelled = (labels_BHW != IGNORE).sum().clamp(min=1)
    counted = total.new_tensor(labels_BHW.numel()) if count_ignored else labelled.to(total)
    return total / over_ranks(counted)


def count_batch(labels_BHW: torch.Tensor, classes: int) -> BatchCounts:
    """What the losses of these labels are divided by, per rank on average.

    Every class present is one target mask, so counts do not depend on what is predicted (as long
    as there are at least as many queries as classes in an image).
    """
    masks = len(find_targets(labels_BHW, classes).images_T)
    sums = torch.stack(
        [
            labels_BHW.new_tensor(len(labels_BHW), dtype=torch.float64),
            labels_BHW.new_tensor(masks, dtype=torch.float64),
            (labels_BHW != IGNORE).sum().double(),
        ]
    )
    return BatchCounts(*over_ranks(sums).tolist())


def over_ranks(sums: torch.Tensor) -> torch.Tensor:
    """Sums averaged over the ranks, so that averaged gradients are those of the whole batch."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return sums
    distributed.all_reduce(sums)
    return sums / distributed.get_world_size()
