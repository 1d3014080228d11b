"""Points at which masks are compared: drawn by seeds, sampled bilinearly from masks and labels.

Source: Kirillov et al., PointRend (CVPR 2020), section 3.1, as used by Mask2Former.
"""

# B batch, L predictions, D 1 (draws shared by all predictions) or L, T target masks of the batch
# (image after image, classes ascending), N any masks, C candidates or channels, P points, K
# classes, H W height and width; a trailing 2 is (x, y) in [0, 1] across the map, align_corners
# False
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F


class PointDraws(NamedTuple):
    """All random numbers of one call of the criterion; lists run over the images."""

    matching: list[torch.Tensor]
    """Points of the matching, [D, P, 2], shared by all masks of an image."""
    candidates: list[torch.Tensor]
    """Candidates for uncertain points, [D, target masks of the image, C, 2]."""
    uniform: list[torch.Tensor]
    """The other points, [D, target masks of the image, P less the uncertain ones, 2]."""


class ChosenPoints(NamedTuple):
    """Where the masks are compared, and what the labels are there."""

    points_TLP2: torch.Tensor
    targets_TLP: torch.Tensor
    """Bilinear share of the target's pixels around each point."""
    valid_TLP: torch.Tensor | None
    """Bilinear share of the pixels that count; None: all do."""


def draw_points(
    seeds: Sequence[int],
    masks: Sequence[int],
    *,
    points: int,
    candidates: int,
    uncertain: int,
    device: torch.device,
) -> PointDraws:
    """Uniform draws that depend, image by image, on its seed alone; shared by all predictions.

    Args:
        seeds: one per image.
        masks: number of target masks of each image.
        points: points per mask.
        candidates: candidates per mask for the uncertain points.
        uncertain: how many of the points are chosen among the candidates.
        device: where to draw; CPU and GPU draw different numbers from one seed.
    """
    draws = PointDraws([], [], [])
    for seed, n in zip(seeds, masks, strict=True):
        generator = torch.Generator(device=device).manual_seed(seed)
        for target, shape in (
            (draws.matching, (1, points, 2)),
            (draws.candidates, (1, n, candidates, 2)),
            (draws.uniform, (1, n, points - uncertain, 2)),
        ):
            target.append(torch.rand(shape, generator=generator, device=device))
    return draws


def rows_at_once(device: torch.device, rows: int, values_per_row: int) -> int:
    """How many rows to work on at a time: what stays in a CPU's cache, all on a GPU."""
    if device.type != "cpu":
        return max(rows, 1)
    return min(max(CACHED_VALUES // values_per_row, 1), max(rows, 1))


CACHED_VALUES = 2**19
"""Values of a temporary tensor that stay in a CPU's second-level cache, more or less."""


def smallest(values_NC: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the smallest values of each row, in any order, int64 [N, count].

    On a CPU by numpy's partition, which is an order of magnitude faster than `topk`.
    """
    if values_NC.device.type == "cpu" and 0 < count < values_NC.shape[1]:
        limits = np.partition(values_NC.numpy(), count - 1, axis=1)[:, count - 1]
        kept = np.flatnonzero(values_NC.numpy() <= limits[:, None])
        if len(kept) == len(values_NC) * count:  # no ties
            columns = torch.from_numpy(kept).view(-1, count)
            first = torch.arange(len(values_NC))[:, None] * values_NC.shape[1]
            return columns - first
    return values_NC.topk(count, dim=1, largest=False, sorted=False).indices


def sample_by_prediction(masks_TLHW: torch.Tensor, points_DTP2: torch.Tensor) -> torch.Tensor:
    """Masks of all predictions at points that they share (D = 1) or not (D = L), [T, L, P]."""
    T, L, H, W = masks_TLHW.shape
    if len(points_DTP2) == 1:
        return sample_masks(masks_TLHW, points_DTP2[0])
    points = points_DTP2.transpose(0, 1).flatten(0, 1)
    return sample_masks(masks_TLHW.reshape(T * L, 1, H, W), points).view(T, L, -1)


def sample_masks(masks_NCHW: torch.Tensor, points_NP2: torch.Tensor) -> torch.Tensor:
    """Masks at points, [N, C, P]; zeros outside."""
    grid = 2 * points_NP2[:, None] - 1
    return F.grid_sample(masks_NCHW, grid, align_corners=False)[:, :, 0]


def corners(
    points_NP2: torch.Tensor, height: int, width: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The four pixels around each point as (row-major index, bilinear weight), both [N, P].

    Pixels outside of the map have weight 0 and some index inside.
    """
    x = points_NP2[..., 0] * width - 0.5
    y = points_NP2[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    x_share, y_share = x - left, y - top
    left, top = left.long(), top.long()
    found = []
    for dy, y_weight in ((0, 1 - y_share), (1, y_share)):
        row = top + dy
        y_weight = y_weight * ((row >= 0) & (row < height))
        for dx, x_weight in ((0, 1 - x_share), (1, x_share)):
            column = left + dx
            x_weight_inside = x_weight * ((column >= 0) & (column < width))
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            found.append((index, y_weight * x_weight_inside))
    return found


def sample_label_shares(
    labels_BHW: torch.Tensor, points_BP2: torch.Tensor, classes: int
) -> torch.Tensor:
    """The bilinear share of every class at points, [B, K + 1, P]; the last one: of other values.

    Equal to sampling the classes' binary masks, which are never built.
    """
    B, H, W = labels_BHW.shape
    shares = points_BP2.new_zeros(B, classes + 1, points_BP2.shape[1])
    flat = labels_BHW.flatten(1)
    for index, weight in corners(points_BP2, H, W):
        label = flat.gather(1, index).long().clamp(max=classes)
        shares.scatter_add_(1, label[:, None], weight[:, None])
    return shares


def choose(
    candidates_DTCX: torch.Tensor, uniform_DTPX: torch.Tensor, kept_TLU: torch.Tensor
) -> torch.Tensor:
    """Of things per candidate those of the kept ones, then those of the uniform points.

    Args:
        candidates_DTCX: anything per candidate; D is 1 or L.
        uniform_DTPX: the same per uniform point.
        kept_TLU: indices of the kept candidates.

    Returns:
        [T, L, U + P, X].
    """
    T, L, U = kept_TLU.shape
    X = candidates_DTCX.shape[-1]
    candidates = candidates_DTCX.transpose(0, 1).expand(T, L, -1, X)
    uniform = uniform_DTPX.transpose(0, 1).expand(T, L, -1, X)
    return torch.cat([candidates.gather(2, kept_TLU[..., None].expand(T, L, U, X)), uniform], 2)


def shares_at(
    masks_THW: torch.Tensor, drawn: tuple[torch.Tensor, torch.Tensor], kept_TLU: torch.Tensor
) -> torch.Tensor:
    """Binary masks at the chosen points, bilinearly, [T, L, P]; arguments as of `choose`."""
    plane = masks_THW.float()[:, None]
    sampled = (
        torch.stack([sample_masks(plane, points_TP2)[:, 0, :, None] for points_TP2 in points])
        for points in drawn
    )
    return choose(*sampled, kept_TLU)[..., 0]
