"""Pseudo-label refinement as pure steps: components, prompt points, best masks, no overlaps.

The steps and their order are those of CLOUDS' released code; SAM itself stands between
`pick_points` and `best_masks` and belongs to `models/refiner.py`.
"""

# P components, one mask each; H W height and width
from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
import torch


@dataclass(frozen=True)
class Component:
    """One 4-connected region of a label map."""

    label: int
    """Its class."""
    area_px: int
    """Its pixels."""
    top: int
    """First row of its bounding box."""
    left: int
    """First column of its bounding box."""
    mask: np.ndarray
    """bool [box height, box width]: its pixels inside the bounding box."""

    def pixels(self) -> np.ndarray:
        """Its pixels as int64 (x, y) in row-major order, [area, 2]."""
        rows, columns = np.nonzero(self.mask)
        return np.stack([columns + self.left, rows + self.top], axis=1)

    def paint(self, canvas_HW: np.ndarray, value: int | bool) -> None:
        """Write `value` to its pixels in a full-size array."""
        height, width = self.mask.shape
        box = canvas_HW[self.top : self.top + height, self.left : self.left + width]
        box[self.mask] = value


def find_components(
    label_map_HW: np.ndarray, *, min_area_px: int, void: Sequence[int] = (255,)
) -> list[Component]:
    """The components with strictly more than `min_area_px` pixels.

    One labelling pass over the whole map; the rest happens inside bounding boxes.

    Args:
        label_map_HW: uint8 class ids.
        min_area_px: the largest area that is dropped.
        void: values that are no class.

    Returns:
        Components by ascending class, then by their first pixel in row-major order.
    """
    # cc3d takes 0 as background and labels all other values in one pass.
    shifted = label_map_HW.astype(np.uint16) + 1
    shifted[np.isin(label_map_HW, void)] = 0
    numbers, count = cc3d.connected_components(shifted, connectivity=4, return_N=True)
    if count == 0:
        return []
    stats = cc3d.statistics(numbers)
    first = np.zeros(count + 1, dtype=np.int64)
    flat = numbers.ravel()
    first[flat[::-1]] = np.arange(flat.size - 1, -1, -1)  # the last write, the first pixel, stays
    labels = label_map_HW.ravel()[first]
    kept = np.flatnonzero(stats["voxel_counts"] > min_area_px)
    kept = kept[kept > 0]
    found = []
    for number in sorted(kept, key=lambda n: (labels[n], first[n])):
        rows, columns = stats["bounding_boxes"][number][:2]
        found.append(
            Component(
                label=int(labels[number]),
                area_px=int(stats["voxel_counts"][number]),
                top=rows.start,
                left=columns.start,
                mask=numbers[rows, columns] == number,
            )
        )
    return found


def classes_of(label_map_HW: np.ndarray, *, void: Sequence[int] = (255,)) -> list[int]:
    """The classes of a label map, ascending, without `void`."""
    present = np.flatnonzero(np.bincount(label_map_HW.ravel(), minlength=256))
    return [int(value) for value in present if value not in set(void)]


def pick_points(component: Component, indices: np.ndarray) -> np.ndarray:
    """Pixels of a component as prompts, float32 (x, y), [number of indices, 2].

    Args:
        component: whose pixels.
        indices: places in the row-major order of its pixels (see `draw_indices`).
    """
    return component.pixels()[indices].astype(np.float32)


def draw_indices(component: Component, num_points: int, *, seed: int) -> np.ndarray:
    """Distinct uniform draws from a component's pixels, in the order drawn.

    Fewer than `num_points` where the component has fewer pixels.
    """
    generator = np.random.default_rng(seed)
    count = min(num_points, component.area_px)
    return generator.choice(component.area_px, size=count, replace=False)


def scale_points(
    points: np.ndarray, size: tuple[int, int], *, longest_px: int = 1024
) -> np.ndarray:
    """Points (x, y) of an image, moved to where SAM sees it: its longest side resized.

    Height and width after resizing are whole pixels, as in Segment Anything's `ResizeLongestSide`,
    and the points are scaled by the ratio of the rounded sizes.

    Args:
        points: (x, y) in pixels of the image, on the last axis.
        size: (height, width) of the image.
        longest_px: its longest side after resizing.
    """
    height, width = size
    scale = longest_px / max(height, width)
    resized_height, resized_width = int(height * scale + 0.5), int(width * scale + 0.5)
    factors = np.array([resized_width / width, resized_height / height])
    return (points.astype(np.float64) * factors).astype(np.float32)


def best_masks(
    masks_P3HW: torch.Tensor, scores_P3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each prompt's candidates the one with the highest score: masks [P, H, W], indices [P]."""
    best_P = scores_P3.argmax(1)
    return masks_P3HW[torch.arange(len(best_P), device=best_P.device), best_P], best_P


def remove_overlaps(masks_PHW: torch.Tensor) -> torch.Tensor:
    """bool masks without the pixels that two or more of them claim, of one class or not."""
    masks_PHW = masks_PHW.bool()
    return masks_PHW & (masks_PHW.sum(0) == 1)


def label_map_of(
    masks_PHW: torch.Tensor, labels: Sequence[int], *, void: int = 255
) -> torch.Tensor:
    """uint8 label map of masks that do not overlap; `void` where none is.

    Args:
        masks_PHW: bool, at most one true per pixel.
        labels: class of each mask.
        void: what uncovered pixels become.
    """
    values = torch.tensor([*labels, void], dtype=torch.uint8, device=masks_PHW.device)
    covered_HW, index_HW = masks_PHW.bool().to(torch.uint8).max(0)
    return values[torch.where(covered_HW.bool(), index_HW, len(labels))]


def merge_masks(masks_PHW: torch.Tensor, labels: Sequence[int], *, void: int = 255) -> torch.Tensor:
    """`label_map_of(remove_overlaps(masks_PHW), labels)` in one pass of byte operations.

    Args:
        masks_PHW: bool; they may overlap.
        labels: class of each mask.
        void: label of what no mask covers, or more than one.
    """
    once_HW, again_HW, label_HW = torch.zeros(
        (3, *masks_PHW.shape[1:]), dtype=torch.uint8, device=masks_PHW.device
    )
    for mask_HW, label in zip(masks_PHW.bool().view(torch.uint8), labels, strict=True):
        again_HW |= once_HW & mask_HW
        once_HW |= mask_HW
        label_HW |= mask_HW * label  # right where one mask alone has written
    return torch.where(once_HW > again_HW, label_HW, void)


def refined_label_map(
    label_map_HW: np.ndarray,
    components: Sequence[Component],
    best_PHW: torch.Tensor,
    *,
    void: int = 255,
) -> np.ndarray:
    """The released refinement: SAM's masks replace the components, the rest becomes void.

    Args:
        label_map_HW: the teacher's uint8 label map; stays as it is where there is no component.
        components: of `find_components`.
        best_PHW: one mask per component.
        void: label of what no mask covers, or more than one.
    """
    if not components:
        return label_map_HW.copy()
    labels = [component.label for component in components]
    return merge_masks(best_PHW, labels, void=void).cpu().numpy()
