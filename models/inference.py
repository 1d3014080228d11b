"""Scores of images at any size: whole or in sliding windows, flipped, at several scales, in bf16.

The window rule is mmsegmentation's (its `slide_inference`); windows of one size are batched.
"""

# B batch, K classes, H W height and width
from collections.abc import Callable, Sequence
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
    device = images_B3HW.device.type

    def whole(part_B3HW: torch.Tensor) -> torch.Tensor:
        context = torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()
        with context:
            output = segmenter(part_B3HW)
        return segmenter.semantic(output)

    def scored(scaled_B3HW: torch.Tensor) -> torch.Tensor:
        if mode == "slide":
            scores = slide(whole, scaled_B3HW, window=window, stride=stride, batch=batch)
        else:
            scores = whole(scaled_B3HW)
        return resize(scores, size)

    if segmenter.training:
        raise ValueError("predict needs segmenter.eval(): running statistics would change")
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
    B, _, H, W = images_B3HW.shape
    places = windows((H, W), window, stride)
    crops = [(image, place) for place in places for image in range(B)]
    total = None
    count = images_B3HW.new_zeros((1, 1, H, W), dtype=torch.float32)
    for y1, x1, y2, x2 in places:
        count[..., y1:y2, x1:x2] += 1
    for start in range(0, len(crops), batch):
        part = crops[start : start + batch]
        inputs = torch.stack([images_B3HW[i, :, y1:y2, x1:x2] for i, (y1, x1, y2, x2) in part])
        for (image, (y1, x1, y2, x2)), scores in zip(part, scores_of(inputs), strict=True):
            if total is None:
                total = scores.new_zeros((B, scores.shape[0], H, W))
            total[image, :, y1:y2, x1:x2] += scores
    return total / count


def windows(size: Size, window: Size, stride: Size) -> list[tuple[int, int, int, int]]:
    """Places (y1, x1, y2, x2) of sliding windows, row after row.

    The last window of a row or column is shifted inward instead of leaving the image.
    """
    ends = []
    for length, crop, step in zip(size, window, stride, strict=True):
        count = max(length - crop + step - 1, 0) // step + 1
        ends.append([min(index * step + crop, length) for index in range(count)])
    return [
        (max(bottom - window[0], 0), max(right - window[1], 0), bottom, right)
        for bottom in ends[0]
        for right in ends[1]
    ]
