"""Choose the best step of a training by validation sets, and stop when none gets better.

validation = Validation(judge=SegmenterJudge(segmenter, samples, section, device=device), every=500)
Trainer(segmenter, ..., validation=validation)

The sets are labelled and of many domains but never targets: choosing the step by what is later
called unseen would make the judgement worthless.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.ema import Ema
from models.segmenter import Segmenter
from stages.devices import Device
from stages.judging import mean_miou
from stages.judging_config import ValidationConfig
from stages.readers import load_index

Weights = Mapping[str, Mapping[str, torch.Tensor]]
"""Tensors by name, of "model" and, where there is an average, "ema"."""


@dataclass
class Validation:
    """When a training is judged, and the best that was found."""

    judge: Callable[[], float]
    """mIoU of the weights as they are now, 0..1."""
    every: int
    """Steps between judgements."""
    patience: int | None = None
    """Judgements in turn without a better one after which to stop; None: never."""
    best_step: int = field(default=0, init=False)
    """Updates behind the best weights; 0: none was judged yet."""
    best_miou: float = field(default=-1.0, init=False)
    since_best: int = field(default=0, init=False)
    """Judgements since the best one."""
    weights: Weights = field(default_factory=dict, init=False)
    """Copies of the best weights, on the CPU."""

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to judge after update `step` (from 1) of `steps`."""
        return step % self.every == 0 or step == steps

    def record(self, step: int, miou: float, weights: Weights) -> None:
        """Take note of a judgement; of equals the earlier one stays the best."""
        if miou > self.best_miou:
            self.best_step, self.best_miou, self.since_best = step, miou, 0
            self.weights = {
                kind: {name: value.detach().cpu().clone() for name, value in tensors.items()}
                for kind, tensors in weights.items()
            }
        else:
            self.since_best += 1

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.since_best >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to choose the same step."""
        return {
            "best_step": self.best_step,
            "best_miou": self.best_miou,
            "since_best": self.since_best,
            "weights": {kind: dict(tensors) for kind, tensors in self.weights.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.best_step, self.best_miou = state["best_step"], state["best_miou"]
        self.since_best, self.weights = state["since_best"], state["weights"]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint's card tells of the choice."""
        return {"step": self.best_step, "miou": self.best_miou}


def segmenter_validation(
    section: ValidationConfig | None,
    part: Path | None,
    segmenter: Segmenter,
    *,
    ema: Ema | None,
    device: Device,
) -> Validation | None:
    """The validation that a training's section asks for, or None.

    Args:
        section: of the training.
        part: the part `validation` of `prepare`.
        segmenter: what is trained.
        ema: its average.
        device: where, in which precision.

    Raises:
        ValueError: validation is asked for, but there is no sample to judge on.
    """
    if section is None:
        return None
    samples = load_index(part) if part else []
    if not samples:
        raise ValueError(
            "validation is asked for, but there is no validation sample: name labelled data sets "
            "under data.validation and run `clouds --stage prepare`."
        )

    def judge() -> float:
        followed = ema if section.weights == "ema" else None
        return judged(
            lambda: mean_miou(segmenter, samples, section, device), segmenter, ema=followed
        )

    return Validation(judge=judge, every=section.every, patience=section.patience)


def judged(score: Callable[[], float], segmenter: Segmenter, *, ema: Ema | None) -> float:
    """`score()` in eval mode, with the average's weights where one is given; all is put back."""
    trained = segmenter.trained_state() if ema else {}
    kept = {name: value.detach().clone() for name, value in trained.items()}
    was_training = segmenter.training
    segmenter.eval()
    try:
        if ema is not None:
            ema.apply_to(segmenter)
        return score()
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                trained[name].copy_(value)
        segmenter.train(was_training)


def told(validation: Validation | None) -> tuple[str, dict[str, float | int]]:
    """What a stage's summary says of the choice: a text to append, and numbers."""
    if validation is None:
        return "", {}
    percent = round(100 * validation.best_miou, 2)
    text = f", step {validation.best_step} kept (validation mIoU {percent:.2f})"
    return text, {"kept_step": validation.best_step, "validation_miou": percent}
