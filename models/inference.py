"""Scores of images at any size: whole or in sliding windows, flipped, at several scales, in bf16.

The window rule is mmsegmentation's (its `slide_inference`); windows of one size are batched.
"""

# B batch, K classes, H W height and width
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Literal

import torch

from models.segmenter import Segmenter, Size, resize

Scores = Callable[[torch.Tensor], torch.Tensor]
"""From images [B, 3, H, W] to scores [B, K, H, W]."""


@torch.inference_mode()
def predict(
    segmenter: Segmenter,
    images_B3HW: torch.Tensor,
    *,
    size: Size | None = None,
    mode: Literal["whole", "slide"] = "whole",
    window: Size = (512, 512),
    stride: Size = (341, 341),
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    bf16: bool = False,
    batch: int = 8,
) -> torch.Tensor:
    """Class scores of a batch of images; their argmax is the label map.

    Args:
        segmenter: in eval mode.
        images_B3HW: RGB on 0..255.
        size: (height, width) of the scores; None: the images'.
        mode: `whole`, or `slide`: windows, scores averaged where they overlap.
        window: (height, width) of a window, in pixels of the scaled image.
        stride: (vertical, horizontal) step between windows.
        flip: average with the mirrored image.
        scales: image scales to average over.
        bf16: run the network in bfloat16 autocast; scores stay float32.
        batch: windows in one forward pass.

    Returns:
        Scores [B, K, H, W], float32: as `Segmenter.semantic` gives them.
    """
    size = size or tuple(images_B3HW.shape[-2:])
    whole = scores_by(segmenter, bf16=bf16)

    def scored(scaled_B3HW: torch.Tensor) -> torch.Tensor:
        if mode == "slide":
            scores = slide(whole, scaled_B3HW, window=window, stride=stride, batch=batch)
        else:
            scores = whole(scaled_B3HW)
        return resize(scores, size)

    total = None
    for scale in scales:
        scaled = images_B3HW
        if scale != 1:
            target = tuple(max(1, round(scale * side)) for side in images_B3HW.shape[-2:])
            scaled = resize(images_B3HW.float(), target)
        for mirrored in (False, True) if flip else (False,):
            scores = scored(scaled.flip(3)).flip(3) if mirrored else scored(scaled)
            total = scores if total is None else total + scores
    return total / (len(scales) * (2 if flip else 1))


def scores_by(segmenter: Segmenter, *, bf16: bool = False) -> Scores:
    """One forward pass of a segmenter, at the images' own size.

    Args:
        segmenter: in eval mode.
        bf16: run the network in bfloat16 autocast; scores stay float32.

    Raises:
        ValueError: it is in training mode.
    """
    if segmenter.training:
        raise ValueError("predict needs segmenter.eval(): running statistics would change")

    def whole(images_B3HW: torch.Tensor) -> torch.Tensor:
        device = images_B3HW.device.type
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            output = segmenter(images_B3HW)
        return segmenter.semantic(output)

    return whole


def slide(
    scores_of: Scores, images_B3HW: torch.Tensor, *, window: Size, stride: Size, batch: int = 8
) -> torch.Tensor:
    """Scores averaged over sliding windows, [B, K, H, W].

    Args:
        scores_of: scores of a batch of windows, at their size.
        images_B3HW: images of one size; a side shorter than the window shortens the window.
        window: (height, width) of a window.
        stride: (vertical, horizontal) step between windows.
        batch: windows in one call of `scores_of`.
    """
    places = windows(tuple(images_B3HW.shape[-2:]), window, stride)
    total = sum_of_windows(scores_of, images_B3HW, places, batch=batch)
    return total[:, :-1] / total[:, -1:]


def sum_of_windows(
    scores_of: Scores,
    images_B3HW: torch.Tensor,
    places: Sequence[tuple[int, int, int, int]],
    *,
    batch: int,
) -> torch.Tensor:
    """Scores added up where windows overlap, and last how many windows: [B, K + 1, H, W]."""
    B, _, H, W = images_B3HW.shape
    crops = [(image, place) for place in places for image in range(B)]
    total = None
    for start in range(0, len(crops), batch):
        part = crops[start : start + batch]
        inputs = torch.stack([images_B3HW[i, :, y1:y2, x1:x2] for i, (y1, x1, y2, x2) in part])
        for (image, (y1, x1, y2, x2)), scores in zip(part, scores_of(inputs), strict=True):
            if total is None:
                total = scores.new_zeros((B, scores.shape[0] + 1, H, W))
            total[image, :-1, y1:y2, x1:x2] += scores
            total[image, -1, y1:y2, x1:x2] += 1
    return total


def slide_in_bands(
    scores_of: Scores,
    images_B3HW: torch.Tensor,
    *,
    window: Size,
    stride: Size,
    flip: bool = False,
    batch: int = 8,
) -> Iterator[torch.Tensor]:
    """What `slide` gives, from top to bottom: bands [B, K, rows, W] as soon as they are final.

    Only one row of windows is held at a time, so that pictures of any height fit into memory.

    Args:
        scores_of: scores of a batch of windows, at their size.
        images_B3HW: images of one size.
        window: (height, width) of a window.
        stride: (vertical, horizontal) step between windows.
        flip: average with the mirrored images.
        batch: windows in one call of `scores_of`.
    """
    if flip:
        options = {"window": window, "stride": stride, "batch": batch}
        straight = slide_in_bands(scores_of, images_B3HW, **options)
        mirrored = slide_in_bands(scores_of, images_B3HW.flip(3), **options)
        yield from ((a + b.flip(3)) / 2 for a, b in zip(straight, mirrored, strict=True))
        return
    places = windows(tuple(images_B3HW.shape[-2:]), window, stride)
    waiting, top = None, 0
    for (y1, y2), row in itertools.groupby(places, key=lambda place: (place[0], place[2])):
        row = [(0, x1, y2 - y1, x2) for _, x1, _, x2 in row]
        total = sum_of_windows(scores_of, images_B3HW[:, :, y1:y2], row, batch=batch)
        if waiting is not None:
            final, waiting = waiting[..., : y1 - top, :], waiting[..., y1 - top :, :]
            yield final[:, :-1] / final[:, -1:]
            total[..., : waiting.shape[2], :] += waiting
        waiting, top = total, y1
    yield waiting[:, :-1] / waiting[:, -1:]


def resize_in_bands(scores_BKHW: torch.Tensor, size: Size, *, rows: int) -> Iterator[torch.Tensor]:
    """What `resize` gives, from top to bottom, `rows` rows [B, K, rows, W] at a time."""
    height = scores_BKHW.shape[2]
    for top in range(0, size[0], rows):
        index = torch.arange(top, min(top + rows, size[0]), device=scores_BKHW.device)
        place = ((index + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
        above = place.long().clamp(max=height - 1)
        below = (above + 1).clamp(max=height - 1)
        weights = (place - above)[:, None].to(scores_BKHW.dtype)
        band = torch.lerp(scores_BKHW[:, :, above], scores_BKHW[:, :, below], weights)
        yield resize(band, (len(index), size[1]))


def windows(size: Size, window: Size, stride: Size) -> list[tuple[int, int, int, int]]:
    """Places (y1, x1, y2, x2) of sliding windows, row after row.

    The last window of a row or column is shifted inward instead of leaving the image.

    Raises:
        ValueError: steps larger than windows, which would leave gaps.
    """
    ends = []
    for length, crop, step in zip(size, window, stride, strict=True):
        if step > crop:
            raise ValueError(f"windows of {crop} pixels every {step} pixels would leave gaps")
        count = max(length - crop + step - 1, 0) // step + 1
        ends.append([min(index * step + crop, length) for index in range(count)])
    return [
        (max(bottom - window[0], 0), max(right - window[1], 0), bottom, right)
        for bottom in ends[0]
        for right in ends[1]
    ]


def label_of(
    scores_BKHW: torch.Tensor, *, threshold: float | torch.Tensor = 0.0, void: int = 255
) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence and label of class scores.

    Args:
        scores_BKHW: not negative, float32.
        threshold: pixels less confident than this get the label `void`; a tensor: one per class.
        void: label of no class.

    Returns:
        uint8 [B, H, W] each: confidence (0..255 = 0..1) and train ids.
    """
    best_BHW, label_BHW = scores_BKHW.max(1)
    share_BHW = best_BHW / scores_BKHW.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    if isinstance(threshold, torch.Tensor):
        threshold = threshold.to(share_BHW)[label_BHW]
    label_BHW = label_BHW.to(torch.uint8).masked_fill(share_BHW < threshold, void)
    return (share_BHW * 255).round().to(torch.uint8), label_BHW


def entropy_of(scores_BKHW: torch.Tensor) -> torch.Tensor:
    """Entropy of the classes' shares of the scores, float32 [B, H, W]: 0 (sure) to 1 (all alike).

    Args:
        scores_BKHW: not negative, of at least two classes.
    """
    tiny = torch.finfo(torch.float32).tiny
    shares_BKHW = scores_BKHW / scores_BKHW.sum(1, keepdim=True).clamp_min(tiny)
    return torch.special.entr(shares_BKHW).sum(1) / math.log(scores_BKHW.shape[1])
