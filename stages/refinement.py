"""Apply a refinement rule to pictures with their pseudo-labels: prompts, SAM, the pure rules.

outcomes = Refinement(refiner=refiner, section=config.refine, ...).refine(subjects)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.masks import (
    Component,
    draw_indices,
    find_components,
    pick_points,
    refined_label_map,
)
from models.published_rules import (
    guided_rule,
    majority_rule,
    stuff_things_rule,
    thing_prompts,
)
from models.refine_rules import Agreement, agreement_rule, prompted_components
from models.refiner import Masks, Prompts, Refiner, build_refiner, point_prompts
from models.rule_classes import RuleClasses
from stages.config import RefineConfig, StageConfig
from stages.devices import Device
from stages.fitness import BY_CLASS, rule_problem
from stages.labels import IGNORE
from stages.shards import item_seed

NEEDS_CONFIDENCE = frozenset({"agreement", "guided"})


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One picture with what the teacher says about it."""

    id: str
    image: np.ndarray
    """uint8 RGB [H, W, 3]."""
    label_HW: np.ndarray
    """uint8 train ids, 255 none."""
    confidence_HW: np.ndarray | None = None
    """float32, 0..1; only for rules in `NEEDS_CONFIDENCE`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The refined label map of one picture, and what was done."""

    label_HW: np.ndarray
    """uint8 train ids, 255 none."""
    prompted: Sequence[int]
    """Class of each component that SAM was asked about (none for automatic masks)."""
    iou: Sequence[float]
    """SAM's best estimate for each of those, or for nothing."""
    counts: Mapping[str, int | bool] = field(default_factory=dict)
    """What else the rule counts."""


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """A rule with its SAM."""

    refiner: Refiner
    section: RefineConfig
    seed: int
    bf16: bool
    classes: RuleClasses | None = None
    """Which ids are which of the rule's classes; only for rules in `BY_CLASS`."""

    @property
    def needs_confidence(self) -> bool:
        """Whether subjects must come with confidences."""
        return self.section.rule in NEEDS_CONFIDENCE

    def refine(self, subjects: Sequence[Subject]) -> list[Outcome]:
        """Refine a batch of pictures."""
        match self.section.rule:
            case "released" | "agreement":
                return self._by_components(subjects)
            case "stuff_things":
                return self._stuff_things(subjects)
            case _:
                return [self._by_automatic_masks(subject) for subject in subjects]

    def _by_components(self, subjects: Sequence[Subject]) -> list[Outcome]:
        released = self.section.rule == "released"
        components = [self._components(subject.label_HW) for subject in subjects]
        found = self._masks(
            subjects,
            [self._prompts(*each) for each in zip(subjects, components, strict=True)],
            candidates="best" if released else "all",
        )
        apply = self._released if released else self._agreement
        return [apply(*each) for each in zip(subjects, components, found, strict=True)]

    def _masks(
        self, subjects: Sequence[Subject], prompts: Sequence[Prompts], *, candidates: str
    ) -> list[Masks]:
        return self.refiner.masks(
            [subject.image for subject in subjects],
            prompts,
            candidates=candidates,
            stability=self.section.rule == "agreement" and self.section.min_stability > 0,
            prompt_batch=self.section.prompt_batch,
            bf16=self.bf16,
        )

    def _components(self, label_HW: np.ndarray) -> list[Component]:
        section = self.section
        if section.rule == "released":
            return find_components(label_HW, min_area_px=section.min_area, void=(IGNORE,))
        return prompted_components(
            label_HW,
            min_area_px=section.min_area,
            floor_px=section.floor_area,
            class_share=section.class_share,
            void=(IGNORE,),
        )

    def _prompts(self, subject: Subject, components: Sequence[Component]) -> Prompts:
        """A few random points of every component, drawn by picture and component number.

        Under rule "agreement" with the component's box, or its shape as a rough mask.
        """
        points = [
            pick_points(
                component,
                draw_indices(
                    component, self.section.points, seed=item_seed(self.seed, subject.id, number)
                ),
            )
            for number, component in enumerate(components)
        ]
        with_shapes = self.section.prompts if self.section.rule == "agreement" else ()
        boxes = masks = None
        if "box" in with_shapes:
            boxes = np.array([_box(component) for component in components], np.float32)
            boxes = boxes.reshape(-1, 4)
        if "mask" in with_shapes:
            masks = np.zeros((len(components), *subject.label_HW.shape), bool)
            for mask_HW, component in zip(masks, components, strict=True):
                component.paint(mask_HW, True)
        return point_prompts(points, boxes_P4=boxes, masks_PHW=masks)

    def _released(self, subject: Subject, components: Sequence[Component], masks: Masks) -> Outcome:
        best_PHW = masks.masks_PCHW[:, 0]
        return Outcome(
            label_HW=refined_label_map(subject.label_HW, components, best_PHW, void=IGNORE),
            prompted=[component.label for component in components],
            iou=masks.iou_PC[:, 0].tolist(),
            counts={"fallback": not components},
        )

    def _agreement(
        self, subject: Subject, components: Sequence[Component], masks: Masks
    ) -> Outcome:
        section = self.section
        ruling = agreement_rule(
            subject.label_HW,
            subject.confidence_HW,
            components,
            masks.masks_PCHW,
            masks.iou_PC,
            stability_PC=masks.stability_PC,
            settings=Agreement(
                min_score=section.min_score,
                min_iou=section.min_iou,
                min_agreement=section.min_agreement,
                min_stability=section.min_stability,
                trust=section.trust,
                sure=section.sure,
                overlaps=section.overlaps,
            ),
            void=IGNORE,
        )
        return Outcome(
            label_HW=ruling.label_HW,
            prompted=[component.label for component in components],
            iou=masks.iou_PC.amax(1).tolist(),
            counts={"accepted": ruling.num_accepted, "trusted": ruling.num_trusted},
        )

    def _everything(self, subject: Subject) -> np.ndarray:
        section = self.section
        return self.refiner.everything(
            subject.image,
            points_per_side=section.auto_points,
            min_iou=section.auto_min_iou,
            min_stability=section.auto_min_stability,
            crop_layers=section.auto_crop_layers,
            min_area_px=section.auto_min_area,
            prompt_batch=section.prompt_batch,
            bf16=self.bf16,
        )

    def _by_automatic_masks(self, subject: Subject) -> Outcome:
        section = self.section
        masks_MHW = self._everything(subject)
        if section.rule == "majority":
            after_HW = majority_rule(subject.label_HW, masks_MHW)
        else:
            after_HW = guided_rule(
                subject.label_HW,
                subject.confidence_HW,
                masks_MHW,
                classes=self.classes,
                fusion=section.fusion,
                sure=section.fusion_sure,
            )
        counts = {"automatic": len(masks_MHW)}
        return Outcome(label_HW=after_HW, prompted=[], iou=[], counts=counts)

    def _stuff_things(self, subjects: Sequence[Subject]) -> list[Outcome]:
        things = self.classes.things
        asked = [thing_prompts(subject.label_HW, things=things) for subject in subjects]
        prompts = [
            point_prompts(list(own.points_P22), boxes_P4=own.boxes_P4) if own.labels else _NOTHING
            for own in asked
        ]
        found = self._masks(subjects, prompts, candidates="single")
        outcomes = []
        for subject, own, masks in zip(subjects, asked, found, strict=True):
            automatic_MHW = self._everything(subject)
            after_HW = stuff_things_rule(
                subject.label_HW,
                automatic_MHW,
                own.labels,
                masks.masks_PCHW[:, 0].cpu().numpy(),
                stuff=self.classes.stuff,
            )
            outcomes.append(
                Outcome(
                    label_HW=after_HW,
                    prompted=own.labels,
                    iou=masks.iou_PC[:, 0].tolist(),
                    counts={"automatic": len(automatic_MHW)},
                )
            )
        return outcomes


_NOTHING = point_prompts([])


def load_refinement(
    config: StageConfig, class_names: Sequence[str], *, device: Device
) -> Refinement:
    """The recipe's rule with its SAM, for labels of these classes.

    Args:
        config: section `refine`.
        class_names: of the labels.
        device: where SAM runs.

    Raises:
        FileNotFoundError: SAM's weights are not there.
        ValueError: they do not fit, or the rule does not know one of the classes.
    """
    section = config.refine
    if (problem := rule_problem(section.rule, class_names)) is not None:
        raise ValueError(problem)
    classes = RuleClasses.of(class_names) if section.rule in BY_CLASS else None
    return Refinement(
        refiner=build_refiner(
            section.model, section.weights, device=device.device, seed=config.seed
        ),
        section=section,
        seed=item_seed(config.seed, "refine"),
        bf16=config.precision == "bf16",
        classes=classes,
    )


def _box(component: Component) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the component's pixels."""
    height, width = component.mask.shape
    left, top = component.left, component.top
    return left, top, left + width - 1, top + height - 1
