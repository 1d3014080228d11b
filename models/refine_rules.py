"""Rules that combine a teacher's label map with SAM's masks, as pure functions.

The released rule of CLOUDS stands in `models/masks.py`; here is ours:

    components = prompted_components(labels, min_area_px=5000, floor_px=64, class_share=0.25)
    ... SAM's candidates for every component ...
    refined = agreement_rule(labels, confidence, components, masks, iou, settings=Agreement())
"""

# P components, C candidate masks of each, H W picture size
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from models.masks import Component, find_components


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Thresholds of `agreement_rule`."""

    min_score: float = 0.4
    """Product of the two below, under which a mask is not used; as a share of the squared mean
    confidence of its class."""
    min_iou: float = 0.0
    """SAM's own estimate of a mask's IoU below which the mask is not used."""
    min_agreement: float = 0.0
    """IoU of mask and component below which the mask is not used."""
    min_stability: float = 0.0
    """SAM's stability score below which the mask is not used; 0: not looked at."""
    trust: float = 1.0
    """Mean confidence from which on a component without a usable mask keeps its labels."""
    sure: float = 1.0
    """Confidence from which on a pixel that belongs to no shape keeps its label."""
    overlaps: Literal["front", "score", "nobody"] = "nobody"
    """Whose the pixels are that shapes of several classes claim: the smallest one's, which stands
    in front; that of the highest score; or nobody's."""


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
    stability_PC: torch.Tensor | None = None,
    settings: Agreement,
    void: int = 255,
) -> Ruling:
    """Use a mask only where SAM and the teacher agree on what it shows; keep classes in proportion.

    SAM is asked by points alone: if its mask comes near the component all the same, two witnesses
    who do not know of each other say the same. (A rough mask tells SAM the answer, which it then
    repeats.) Thin and rare classes agree less and the teacher is seldom sure of them: one threshold
    for all would leave hardly any of them, and the student would unlearn them (miniature: labels
    of higher accuracy, student 5 mIoU worse). So the threshold follows the class, as in
    class-balanced self-training (Zou et al. 2018), but by one picture, so that pictures stay
    independent of each other.

    1. A candidate's score is (predicted IoU x IoU with the component). Of a component's candidates
       the one with the highest score is chosen. It is accepted if the score is at least
       `min_score` x (the teacher's mean confidence in the class, in this picture) squared, and both
       factors, and the mask's stability, reach thresholds of their own.
    2. A component without an accepted mask keeps its own shape, if the teacher's mean confidence
       in it is at least `trust`; else it is left out.
    3. What shapes of several classes claim is nobody's; or, by `overlaps`, shapes are painted from
       the largest component to the smallest, so that what is small and in front stays (as
       SAM4UDASS paints its masks; Yan et al. 2023), or the highest score wins: equal ones as in
       front, and shapes without an accepted mask yield to all others.
    4. A labelled pixel that is nobody's keeps its label if the teacher is `sure` of it, else it is
       undecided. That includes components that were too small for a prompt.

    No pixel gets a class that the label map does not hold.

    Args:
        label_map_HW: the teacher's uint8 class ids.
        confidence_HW: float, 0..1.
        components: of `prompted_components`.
        masks_PCHW: bool candidates of each.
        iou_PC: SAM's estimate of their IoU.
        stability_PC: their stability scores; needed where `min_stability` is above 0.
        settings: thresholds.
        void: label of undecided pixels.
    """
    order = sorted(range(len(components)), key=lambda p: _from_large_to_small(components[p]))
    means = _class_means(label_map_HW, confidence_HW)
    claimed_HW = torch.full(label_map_HW.shape, void, dtype=torch.uint8)
    contested_HW = torch.zeros(label_map_HW.shape, dtype=torch.bool)
    score_HW = torch.zeros(label_map_HW.shape)
    num_accepted = num_trusted = 0
    for place in order:
        component = components[place]
        agreement_C = _agreement(component, masks_PCHW[place]).to(iou_PC.device)
        best = int((iou_PC[place] * agreement_C).argmax())
        iou, agreement = float(iou_PC[place, best]), float(agreement_C[best])
        score = iou * agreement
        accepted = (
            score >= settings.min_score * means[component.label] ** 2
            and iou >= settings.min_iou
            and agreement >= settings.min_agreement
            and (settings.min_stability == 0 or stability_PC[place, best] >= settings.min_stability)
        )
        if accepted:
            shape_HW = masks_PCHW[place, best].cpu()
            num_accepted += 1
        elif _mean_inside(component, confidence_HW) >= settings.trust:
            shape_HW = torch.zeros(label_map_HW.shape, dtype=torch.bool)
            component.paint(shape_HW.numpy(), True)
            score = 0.0
            num_trusted += 1
        else:
            continue
        if settings.overlaps == "score":
            shape_HW = shape_HW & (score >= score_HW)
            score_HW[shape_HW] = score
        contested_HW |= shape_HW & (claimed_HW != void) & (claimed_HW != component.label)
        claimed_HW[shape_HW] = component.label
    if settings.overlaps == "nobody":
        claimed_HW[contested_HW] = void
    sure_HW = np.where(confidence_HW >= settings.sure, label_map_HW, np.uint8(void))
    return Ruling(
        label_HW=np.where(claimed_HW.numpy() == void, sure_HW, claimed_HW.numpy()),
        num_accepted=num_accepted,
        num_trusted=num_trusted,
    )


def _class_means(label_map_HW: np.ndarray, confidence_HW: np.ndarray) -> np.ndarray:
    """The teacher's mean confidence in each label of this picture, float [256]; 0 where absent."""
    labels = label_map_HW.ravel()
    sums = np.bincount(labels, weights=confidence_HW.ravel(), minlength=256)
    return sums / np.maximum(np.bincount(labels, minlength=256), 1)


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
