"""Which query stands for which class of a picture: the cheapest assignment, for all predictions.

All costs are made on the device and copied to the host once. Source: Cheng et al., Mask2Former
(CVPR 2022), section 3.3.
"""

# B batch, L predictions, Q queries, K classes, T target masks of the batch (image after image,
# classes ascending), C most classes of a picture, P points, H W height and width
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from models.config import LossConfig
from models.decoder import Prediction
from models.points import corners, rows_at_once, sample_label_shares, sample_masks

IGNORE = 255
"""The label of unlabelled pixels."""


class Targets(NamedTuple):
    """The target masks of a batch: every class of every picture, in order."""

    images_T: list[int]
    classes_T: list[int]

    def of_image(self, image: int) -> list[int]:
        """Places in T of one picture's classes."""
        return [place for place, other in enumerate(self.images_T) if other == image]


def find_targets(labels_BHW: torch.Tensor, classes: int) -> Targets:
    """The classes of each picture, ascending, without 255; one copy to the host.

    Raises:
        ValueError: a value that is neither a class nor 255.
    """
    found = torch.zeros(len(labels_BHW), 256, dtype=torch.uint8, device=labels_BHW.device)
    found.scatter_(1, labels_BHW.flatten(1).long(), 1)
    images, values = (column.tolist() for column in found.cpu().nonzero(as_tuple=True))
    strange = sorted({v for v in values if classes <= v < IGNORE})
    if strange:
        raise ValueError(
            f"labels hold {strange}, but train ids go from 0 to {classes - 1} (255: unlabelled); "
            "check the data set's id map"
        )
    pairs = [(i, v) for i, v in zip(images, values, strict=True) if v < classes]
    return Targets([i for i, _ in pairs], [v for _, v in pairs])


@torch.no_grad()
def match(
    predictions: Sequence[Prediction],
    labels_BHW: torch.Tensor,
    targets: Targets,
    points: Sequence[torch.Tensor],
    config: LossConfig,
    *,
    num_classes: int,
    ignore_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """The query of every target mask, for every prediction, on the host.

    Args:
        predictions: of the queries.
        labels_BHW: label maps that cover the same area as the masks.
        targets: of `find_targets`.
        points: random points of each picture, [1 or L, P, 2]; one draw may serve all predictions.
        config: weights of the costs.
        num_classes: classes K.
        ignore_B: pictures whose unlabelled pixels are left out; None: no picture's.

    Returns:
        int64 [L, T]; -1 where there are fewer queries than classes and none was left.
    """
    # 1. What is at the points: the share of each picture's own classes, and of any class.
    points_DBP2 = torch.stack(list(points), 1)
    places = [targets.of_image(image) for image in range(len(labels_BHW))]
    width = max((len(here) for here in places), default=0)
    columns_BC = torch.tensor(
        [
            [targets.classes_T[p] for p in here] + [num_classes] * (width - len(here))
            for here in places
        ]
    ).to(labels_BHW.device)
    size = tuple(predictions[0].masks_BQHW.shape[-2:])
    there = [
        look_at(labels_BHW, drawn_BP2, columns_BC, num_classes, ignore_B, mask_size=size)
        for drawn_BP2 in points_DBP2
    ]

    # 2. All costs, and one copy of them.
    last = len(points_DBP2) - 1
    costs_LBQC = torch.stack(
        [
            matching_costs(
                prediction,
                points_DBP2[min(index, last)],
                there[min(index, last)],
                columns_BC,
                config,
            )
            for index, prediction in enumerate(predictions)
        ]
    )
    # Non-finite costs match anyhow; the losses then say what is not finite.
    costs = torch.nan_to_num(costs_LBQC).cpu().numpy()

    # 3. The cheapest assignments.
    queries_LT = torch.full((len(predictions), len(targets.images_T)), -1)
    for index, costs_BQC in enumerate(costs):
        for costs_QC, here in zip(costs_BQC, places, strict=True):
            queries, found = linear_sum_assignment(costs_QC[:, : len(here)])
            queries_LT[index, [here[place] for place in found]] = torch.from_numpy(queries)
    return queries_LT


class Shares(NamedTuple):
    """What the labels are at points, bilinearly."""

    targets_BCP: torch.Tensor
    """Share of each of a picture's classes."""
    valid_BP1: torch.Tensor | None
    """Share of what counts; None: all does."""
    around: tuple[torch.Tensor, torch.Tensor] | None
    """On a CPU: the four pixels of a mask around each point and their weights, both [B, P, 4]."""


def look_at(
    labels_BHW: torch.Tensor,
    points_BP2: torch.Tensor,
    columns_BC: torch.Tensor,
    num_classes: int,
    ignore_B: torch.Tensor | None,
    *,
    mask_size: tuple[int, int],
) -> Shares:
    """The shares of the classes `columns_BC` (K: padding) at points."""
    shares_BKP = sample_label_shares(labels_BHW, points_BP2, num_classes)
    rows = columns_BC[..., None].expand(-1, -1, shares_BKP.shape[2])
    valid_BP1 = None
    if ignore_B is not None:
        labelled_BP1 = shares_BKP[:, :-1].sum(1)[..., None]
        valid_BP1 = torch.where(ignore_B[:, None, None], labelled_BP1, 1)
    around = None
    if labels_BHW.device.type == "cpu":
        pixels, weights = zip(*corners(points_BP2, *mask_size), strict=True)
        around = torch.stack(pixels, 2), torch.stack(weights, 2)
    return Shares(shares_BKP.gather(1, rows), valid_BP1, around)


def matching_costs(
    prediction: Prediction,
    points_BP2: torch.Tensor,
    there: Shares,
    columns_BC: torch.Tensor,
    config: LossConfig,
) -> torch.Tensor:
    """Costs of all queries and classes, [B, Q, C].

    Args:
        prediction: of the queries.
        points_BP2: where masks are compared.
        there: what the labels are at the points.
        columns_BC: the classes of each picture; K where it has fewer.
        config: weights.
    """
    sums = point_sums(prediction.masks_BQHW.float(), points_BP2, there)
    if there.valid_BP1 is None:
        entropy = sums.entropy_BQC / points_BP2.shape[1]
    else:
        entropy = sums.entropy_BQC / there.valid_BP1.sum(1, keepdim=True).clamp(min=1e-6)
    total = sums.covered_BQ1 + there.targets_BCP.sum(2)[:, None]
    dice = 1 - (2 * sums.overlap_BQC + 1) / (total + 1)
    probabilities = prediction.class_logits_BQK1.float().softmax(-1)
    rows = columns_BC[:, None].expand(-1, probabilities.shape[1], -1)
    classes = -probabilities.gather(2, rows)
    return config.class_weight * classes + config.mask_weight * entropy + config.dice_weight * dice


class PointSums(NamedTuple):
    """Sums over points, of every query and class."""

    entropy_BQC: torch.Tensor
    """Binary cross-entropy."""
    overlap_BQC: torch.Tensor
    """Probability times target."""
    covered_BQ1: torch.Tensor
    """Probability."""


def point_sums(masks_BQHW: torch.Tensor, points_BP2: torch.Tensor, there: Shares) -> PointSums:
    """Compare every mask with every class at points."""
    if there.around is not None:
        valid = [None] * len(masks_BQHW) if there.valid_BP1 is None else there.valid_BP1[..., 0]
        images = zip(masks_BQHW, *there.around, there.targets_BCP, valid, strict=True)
        found = [point_sums_by_rows(*image) for image in images]
        return PointSums(*(torch.stack(column) for column in zip(*found, strict=True)))
    logits_BQP = sample_masks(masks_BQHW, points_BP2)
    probabilities_BQP = logits_BQP.sigmoid()
    # Cross-entropy is softplus(x) - x t: the first part is the same for every class.
    entropy_BQP = F.softplus(logits_BQP)
    if there.valid_BP1 is None:
        entropy_BQ1 = entropy_BQP.sum(-1, keepdim=True)
        covered_BQ1 = probabilities_BQP.sum(-1, keepdim=True)
    else:
        entropy_BQ1 = entropy_BQP @ there.valid_BP1
        covered_BQ1 = probabilities_BQP @ there.valid_BP1
    inside, overlap = (
        torch.bmm(x, there.targets_BCP.transpose(1, 2)) for x in (logits_BQP, probabilities_BQP)
    )
    return PointSums(entropy_BQ1 - inside, overlap, covered_BQ1)


def point_sums_by_rows(
    masks_QHW: torch.Tensor,
    pixels_P4: torch.Tensor,
    weights_P4: torch.Tensor,
    targets_CP: torch.Tensor,
    valid_P: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums of one picture, for a CPU: a point's values of all masks lie side by side.

    Some points at a time, so that what is in between stays in the cache.
    """
    Q, P = len(masks_QHW), len(pixels_P4)
    rows_NQ = masks_QHW.flatten(1).T.contiguous()
    step = rows_at_once(masks_QHW.device, P, Q)
    entropy_Q, covered_Q = masks_QHW.new_zeros(2, Q)
    inside_CQ, overlap_CQ = masks_QHW.new_zeros(2, len(targets_CP), Q)
    for start in range(0, P, step):
        here = slice(start, start + step)
        logits_PQ = F.embedding_bag(
            pixels_P4[here], rows_NQ, mode="sum", per_sample_weights=weights_P4[here]
        )
        probabilities_PQ, entropy_PQ = logits_PQ.sigmoid(), F.softplus(logits_PQ)
        for total_Q, values_PQ in ((entropy_Q, entropy_PQ), (covered_Q, probabilities_PQ)):
            total_Q += values_PQ.sum(0) if valid_P is None else valid_P[here] @ values_PQ
        inside_CQ.addmm_(targets_CP[:, here], logits_PQ)
        overlap_CQ.addmm_(targets_CP[:, here], probabilities_PQ)
    return (entropy_Q - inside_CQ).T, overlap_CQ.T, covered_Q[:, None]
