"""Set prediction losses: queries are matched with classes, then compared at points.

Source: Cheng et al., Mask2Former (CVPR 2022), section 3.3; constants as in CLOUDS. All matching
costs of all predictions are made on the device and copied to the host once.
"""

# B batch, L predictions, Q queries, K classes, N matched pairs of the batch, P points,
# H W height and width
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import distributed
from torch.nn import functional as F

from models.config import LossConfig
from models.decoder import Prediction
from models.points import (
    PointDraws,
    draw_points,
    sample_label_masks,
    sample_label_shares,
    sample_masks,
)
from models.segmenter import SegmenterOutput

IGNORE = 255
"""The label of unlabelled pixels."""


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


class Matches(NamedTuple):
    """Matched pairs of one prediction, image after image, by query inside an image."""

    images_N: list[int]
    queries_N: list[int]
    classes_N: list[int]


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
        present = present_classes(labels_BHW, self.num_classes)
        if draws is None:
            if seeds is None:
                raise ValueError("the criterion needs seeds, one per image")
            draws = draw_points(
                seeds,
                [len(classes) for classes in present],
                predictions=len(predictions),
                points=self.config.points,
                candidates=self.candidates,
                uncertain=self.uncertain,
                device=labels_BHW.device,
            )

        # 2. Match every prediction.
        matches = self.match(predictions, labels_BHW, present, draws, ignore_B=handling.ignore_B)

        # 3. Classes.
        class_logits = torch.stack([p.class_logits_BQK1 for p in predictions]).float()
        class_sums_L, weight_sums_L = self._class_sums(class_logits, matches, handling)

        # 4. Masks, all predictions at once.
        num_masks = class_logits.new_tensor([sum(len(classes) for classes in present)])
        mask_sums_L, dice_sums_L = self._mask_sums(
            predictions, labels_BHW, matches, draws, handling
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

    @torch.no_grad()
    def match(
        self,
        predictions: Sequence[Prediction],
        labels_BHW: torch.Tensor,
        present: Sequence[Sequence[int]],
        draws: PointDraws,
        *,
        ignore_B: torch.Tensor | None = None,
    ) -> list[Matches]:
        """The cheapest pairs of queries and classes, for every prediction.

        Args:
            predictions: the final one first.
            labels_BHW: label maps that cover the same area as the masks.
            present: classes of each image.
            draws: random points; `matching` is used.
            ignore_B: images whose unlabelled pixels are left out; None: as configured.
        """
        ignore_B = self._ignored(ignore_B, labels_BHW)
        costs_LBQK = torch.stack(
            [
                self._costs(
                    prediction,
                    labels_BHW,
                    torch.stack([d[index] for d in draws.matching]),
                    ignore_B,
                )
                for index, prediction in enumerate(predictions)
            ]
        )
        # Non-finite costs match anyhow; the losses then say what is not finite.
        costs = torch.nan_to_num(costs_LBQK).cpu().numpy()
        found = []
        for costs_BQK in costs:
            matches = Matches([], [], [])
            for image, (costs_QK, classes) in enumerate(zip(costs_BQK, present, strict=True)):
                queries, targets = linear_sum_assignment(costs_QK[:, classes])
                matches.images_N.extend([image] * len(queries))
                matches.queries_N.extend(queries.tolist())
                matches.classes_N.extend(classes[t] for t in targets)
            found.append(matches)
        return found

    def _costs(
        self,
        prediction: Prediction,
        labels_BHW: torch.Tensor,
        points_BP2: torch.Tensor,
        ignore_B: torch.Tensor | None,
    ) -> torch.Tensor:
        """Matching costs of all queries and classes, [B, Q, K]."""
        logits_BQP = sample_masks(prediction.masks_BQHW.float(), points_BP2)
        shares = sample_label_shares(labels_BHW, points_BP2, self.num_classes)
        targets_BPK = shares[:, :-1].transpose(1, 2)
        probabilities_BQP = logits_BQP.sigmoid()
        # Cross-entropy is softplus(x) - x t: the first part is the same for every class.
        entropy_BQP = F.softplus(logits_BQP)
        if ignore_B is not None:
            labelled_B1P = shares[:, :-1].sum(1, keepdim=True)
            valid_B1P = torch.where(ignore_B[:, None, None], labelled_B1P, 1)
            count = valid_B1P.sum(-1, keepdim=True).clamp(min=1e-6)
            entropy_BQP, covered_BQP = entropy_BQP * valid_B1P, probabilities_BQP * valid_B1P
        else:
            count, covered_BQP = points_BP2.shape[1], probabilities_BQP
        entropy = (entropy_BQP.sum(-1, keepdim=True) - logits_BQP @ targets_BPK) / count
        overlap = probabilities_BQP @ targets_BPK
        total = covered_BQP.sum(-1, keepdim=True) + targets_BPK.sum(1, keepdim=True)
        dice = 1 - (2 * overlap + 1) / (total + 1)
        classes = -prediction.class_logits_BQK1.float().softmax(-1)[..., :-1]
        c = self.config
        return c.class_weight * classes + c.mask_weight * entropy + c.dice_weight * dice

    def _class_sums(
        self, class_logits_LBQK1: torch.Tensor, matches: Sequence[Matches], handling: Handling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per prediction: weighted sum of cross-entropies, and the sum of the weights."""
        L, B, Q, K1 = class_logits_LBQK1.shape
        targets = torch.full((L, B, Q), K1 - 1)
        for index, match in enumerate(matches):
            targets[index, match.images_N, match.queries_N] = torch.tensor(
                match.classes_N, dtype=torch.int64
            )
        targets = targets.to(class_logits_LBQK1.device, non_blocking=True)
        weights_K1 = class_logits_LBQK1.new_ones(K1)
        weights_K1[-1] = self.config.no_object
        entropies = F.cross_entropy(
            class_logits_LBQK1.flatten(0, 2), targets.flatten(), weight=weights_K1, reduction="none"
        )
        if handling.weights_B is not None:
            entropies = entropies.view(L, B, Q) * handling.weights_B[:, None]
        return entropies.view(L, -1).sum(1), weights_K1[targets].flatten(1).sum(1)

    def _mask_sums(
        self,
        predictions: Sequence[Prediction],
        labels_BHW: torch.Tensor,
        matches: Sequence[Matches],
        draws: PointDraws,
        handling: Handling,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per prediction: sums over matched masks of the point-wise cross-entropy and of dice."""
        L = len(predictions)
        indices = torch.tensor(
            [[m.images_N, m.queries_N, m.classes_N] for m in matches], dtype=torch.int64
        ).to(labels_BHW.device, non_blocking=True)
        masks = torch.cat(
            [p.masks_BQHW[i[0], i[1]] for p, i in zip(predictions, indices, strict=True)]
        )
        if len(masks) == 0:
            nothing = torch.stack([p.masks_BQHW.float().sum() * 0 for p in predictions])
            return nothing, nothing
        masks_N1HW = masks.float()[:, None]
        images, classes = indices[:, 0].flatten(), indices[:, 2].flatten()
        points = self._points(masks_N1HW, draws)
        logits_NP = sample_masks(masks_N1HW, points)[:, 0]
        with torch.no_grad():
            targets_NP = sample_label_masks(labels_BHW, images, classes, points)
            valid_NP = None
            if handling.ignore_B is not None:
                labelled_BHW = (labels_BHW != IGNORE).to(torch.uint8)
                labelled_NP = sample_label_masks(
                    labelled_BHW, images, torch.ones_like(classes), points
                )
                valid_NP = torch.where(handling.ignore_B[images, None], labelled_NP, 1)
        entropy_N = mask_entropy(logits_NP, targets_NP, valid_NP)
        dice_N = dice_loss(logits_NP, targets_NP, valid_NP)
        if handling.weights_B is not None:
            weights_N = handling.weights_B[images]
            entropy_N, dice_N = entropy_N * weights_N, dice_N * weights_N
        return entropy_N.view(L, -1).sum(1), dice_N.view(L, -1).sum(1)

    @torch.no_grad()
    def _points(self, masks_N1HW: torch.Tensor, draws: PointDraws) -> torch.Tensor:
        """The most uncertain candidates of each mask, and uniform points, [N, P, 2]."""
        candidates = torch.cat(draws.candidates, 1).flatten(0, 1)
        uniform = torch.cat(draws.uniform, 1).flatten(0, 1)
        uncertainty = -sample_masks(masks_N1HW, candidates)[:, 0].abs()
        kept = uncertainty.topk(self.uncertain, dim=1).indices
        return torch.cat([candidates.gather(1, kept[..., None].expand(-1, -1, 2)), uniform], 1)


def present_classes(labels_BHW: torch.Tensor, classes: int) -> list[list[int]]:
    """The classes of each image, ascending, without 255; one copy to the host.

    Raises:
        ValueError: a value that is neither a class nor 255.
    """
    found = torch.zeros(len(labels_BHW), 256, dtype=torch.uint8, device=labels_BHW.device)
    found.scatter_(1, labels_BHW.flatten(1).long(), 1)
    present = [row.nonzero()[:, 0].tolist() for row in found.cpu()]
    strange = sorted({v for values in present for v in values if classes <= v < IGNORE})
    if strange:
        raise ValueError(
            f"labels hold {strange}, but train ids go from 0 to {classes - 1} (255: unlabelled); "
            "check the data set's id map"
        )
    return [[v for v in values if v < classes] for values in present]


def mask_entropy(
    logits_NP: torch.Tensor, targets_NP: torch.Tensor, valid_NP: torch.Tensor | None = None
) -> torch.Tensor:
    """Binary cross-entropy of each mask, mean over its points, [N].

    Args:
        logits_NP: predicted logits at points.
        targets_NP: bilinear share of the mask's pixels around each point.
        valid_NP: bilinear share of labelled pixels, at least the target's; None: all.
    """
    if valid_NP is None:
        entropy = F.binary_cross_entropy_with_logits(logits_NP, targets_NP, reduction="none")
        return entropy.mean(1)
    entropy = F.softplus(logits_NP) * valid_NP - logits_NP * targets_NP
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
    present = present_classes(labels_BHW, classes)
    sums = torch.stack(
        [
            labels_BHW.new_tensor(len(present), dtype=torch.float64),
            labels_BHW.new_tensor(sum(map(len, present)), dtype=torch.float64),
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
