"""Rules that combine a teacher's label map with SAM's masks, as pure functions.

The released rule of CLOUDS stands in `models/masks.py`; here is ours:

    components = prompted_components(labels, min_area_px=5000, floor_px=64, class_share=0.25)
    ... SAM's candidates for every component ...
    refined = agreement_rule(labels, confidence, components, masks, iou, settings=Agreement())
"""

# P components, C candidate masks of each, H W picture size
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models.masks import Component, find_components


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Thresholds of `agreement_rule`."""

    min_iou: float = 0.5
    """SAM's own estimate of a mask's IoU below which the mask is not used."""
    min_agreement: float = 0.5
    """IoU of mask and component below which the mask is not used."""
    trust: float = 0.5
    """Mean confidence from which on a component without a usable mask keeps its labels."""
    sure: float = 0.9
    """Confidence from which on a pixel that its component's mask leaves out keeps its label."""


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """The outcome of a rule for one picture."""

    label_HW: np.ndarray
    """uint8 class ids, void where undecided."""
    num_accepted: int
    """Components whose mask was used."""
    num_trusted: int
    """Components that keep the teacher's labels."""


def prompted_components(
    label_map_HW: np.ndarray,
    *,
    min_area_px: int,
    floor_px: int,
    class_share: float,
    void: Sequence[int] = (255,),
) -> list[Component]:
    """The components worth a prompt, with a minimum size that depends on the class.

    A component counts when it is larger than `min_area_px`, or larger than both `floor_px` and
    `class_share` of its class's largest component here: so poles and signs, whose largest
    component is small, are not lost, and the specks around a large building are.

    Args:
        label_map_HW: uint8 class ids.
        min_area_px: area above which every component counts.
        floor_px: area that a component of any class must exceed.
        class_share: share of the class's largest component that a smaller one must exceed.
        void: values that are no class.
    """
    candidates = find_components(label_map_HW, min_area_px=min(floor_px, min_area_px), void=void)
    largest: dict[int, int] = {}
    for component in candidates:
        largest[component.label] = max(largest.get(component.label, 0), component.area_px)
    return [
        component
        for component in candidates
        if component.area_px > min(min_area_px, class_share * largest[component.label])
    ]


def agreement_rule(
    label_map_HW: np.ndarray,
    confidence_HW: np.ndarray,
    components: Sequence[Component],
    masks_PCHW: torch.Tensor,
    iou_PC: torch.Tensor,
    *,
    settings: Agreement,
    void: int = 255,
) -> Ruling:
    """Use a mask only where SAM and the teacher agree on what it shows; settle by size.

    1. Of a component's candidates the one with the highest (predicted IoU x IoU with the
       component) is chosen; it is accepted if both reach their thresholds.
    2. A component without an accepted mask keeps its own shape, if the teacher's mean confidence
       in it is at least `trust`; else it is left out.
    3. Shapes are painted from the largest component to the smallest, so that what is small and in
       front stays (as SAM4UDASS paints its masks; Yan et al. 2023).
    4. A labelled pixel that no shape covers keeps its label if the teacher is `sure` of it, else
       it is undecided. That includes components that were too small for a prompt.

    No pixel gets a class that the label map does not hold.

    Args:
        label_map_HW: the teacher's uint8 class ids.
        confidence_HW: float, 0..1.
        components: of `prompted_components`.
        masks_PCHW: bool candidates of each.
        iou_PC: SAM's estimate of their IoU.
        settings: thresholds.
        void: label of undecided pixels.
    """
    labels_HW = torch.from_numpy(label_map_HW.copy())
    order = sorted(range(len(components)), key=lambda p: _from_large_to_small(components[p]))
    after_HW = labels_HW.masked_fill(torch.from_numpy(confidence_HW < settings.sure), void)
    num_accepted = num_trusted = 0
    for place in order:
        component = components[place]
        agreement_C = _agreement(component, masks_PCHW[place]).to(iou_PC.device)
        best = int((iou_PC[place] * agreement_C).argmax())
        accepted = bool(
            (iou_PC[place, best] >= settings.min_iou)
            & (agreement_C[best] >= settings.min_agreement)
        )
        if accepted:
            after_HW.masked_fill_(masks_PCHW[place, best].cpu(), component.label)
            num_accepted += 1
        elif _mean_inside(component, confidence_HW) >= settings.trust:
            component.paint(after_HW.numpy(), component.label)
            num_trusted += 1
    return Ruling(label_HW=after_HW.numpy(), num_accepted=num_accepted, num_trusted=num_trusted)


def _from_large_to_small(component: Component) -> tuple[int, int, int, int]:
    """Sort key; ties are settled by what does not depend on the components' order."""
    return -component.area_px, component.label, component.top, component.left


def _agreement(component: Component, masks_CHW: torch.Tensor) -> torch.Tensor:
    """IoU of each candidate with the component; only the mask's area is counted in full frame."""
    height, width = component.mask.shape
    rows = slice(component.top, component.top + height)
    columns = slice(component.left, component.left + width)
    inside_Chw = masks_CHW[:, rows, columns].cpu() & torch.from_numpy(component.mask)
    shared_C = inside_Chw.flatten(1).sum(1).float()
    areas_C = masks_CHW.flatten(1).sum(1).cpu().float()
    return shared_C / (areas_C + component.area_px - shared_C)


def _mean_inside(component: Component, confidence_HW: np.ndarray) -> float:
    height, width = component.mask.shape
    box = confidence_HW[
        component.top : component.top + height, component.left : component.left + width
    ]
    return float(box[component.mask].mean())
