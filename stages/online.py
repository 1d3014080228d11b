"""Labels made inside self-training: the average as teacher, then SAM, anew in every step.

The paper's way (CLOUDS, section 3.3): the EMA teacher predicts on the clean painted picture, SAM
refines what it says, the student learns it on the strong view. The functions are those of the
stages `pseudo_label` and `refine`, so that for the same teacher the labels are the same.
"""

import copy
from collections.abc import Sequence

import numpy as np

from models.ema import Ema
from models.segmenter import Segmenter
from stages.batches import Fresh
from stages.config import StageConfig
from stages.devices import Device
from stages.labelling import Labelled, Labeller
from stages.readers import Sample
from stages.refinement import Refinement, Subject, load_refinement
from stages.trust import sure_share


class OnlineTeacher:
    """Labels painted pictures by the average of the student as it is now, refined by SAM.

    A `Labelling` of `stages/batches.py`. It draws no random numbers, and what it says follows from
    the average alone, so that a resumed training sees the same labels.

    Args:
        config: sections `self_train`, `pseudo_label` and, for refined labels, `refine`.
        student: what is trained; its frozen parameters are shared with the teacher.
        ema: the student's average.
        device: where, in which precision.

    Raises:
        FileNotFoundError: SAM's weights are not there.
        ValueError: SAM's weights do not fit, or the rule is for other classes.
    """

    def __init__(
        self, config: StageConfig, student: Segmenter, ema: Ema, *, device: Device
    ) -> None:
        self.section, self.ema = config.self_train, ema
        shared = {id(p): p for p in student.parameters() if not p.requires_grad}
        self.teacher = copy.deepcopy(student, memo=shared).eval()
        self.labeller = Labeller(
            segmenter=self.teacher,
            section=config.pseudo_label,
            device=device,
            bf16=config.precision == "bf16",
        )
        self.refinement: Refinement | None = None
        if self.section.labels == "refined":
            self.refinement = load_refinement(config, student.class_names, device=device)

    def __call__(self, samples: Sequence[Sample], images: Sequence[np.ndarray]) -> list[Fresh]:
        """Label maps and weights of painted pictures (uint8 RGB [H, W, 3])."""
        self.ema.apply_to(self.teacher)
        labelled = self.labeller.label(images)
        maps = [found.label_HW for found in labelled]
        if self.refinement is not None:
            maps = self._refined(self.refinement, samples, images, labelled)
        return [
            Fresh(label_HW=label_HW, weight=self._weight(found))
            for label_HW, found in zip(maps, labelled, strict=True)
        ]

    def _refined(
        self,
        refinement: Refinement,
        samples: Sequence[Sample],
        images: Sequence[np.ndarray],
        labelled: Sequence[Labelled],
    ) -> list[np.ndarray]:
        subjects = [
            Subject(
                # The picture's own id, by which `refine` draws its points too.
                id=sample.stem,
                image=image,
                label_HW=found.label_HW,
                confidence_HW=found.confidence_HW.astype(np.float32) / 255,
            )
            for sample, image, found in zip(samples, images, labelled, strict=True)
        ]
        size = refinement.section.batch_size
        outcomes = []
        for start in range(0, len(subjects), size):
            outcomes += refinement.refine(subjects[start : start + size])
        return [outcome.label_HW for outcome in outcomes]

    def _weight(self, found: Labelled) -> float:
        if self.section.weighting == "none":
            return 1.0
        return sure_share(found.confidence_HW, self.section.sure_above)
