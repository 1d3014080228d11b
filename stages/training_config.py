"""Settings that both trainings share, and those of the first. No torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.judging_config import ValidationConfig
from stages.section import NOT_IN_KEY, Section


class AugmentConfig(Section):
    """What happens to a source sample before the network sees it."""

    crop_height: int = Field(512, ge=32)
    """Crop height in pixels."""
    crop_width: int = Field(512, ge=32)
    """Crop width in pixels."""
    scale_min: float = Field(0.5, gt=0)
    """Smallest random scale."""
    scale_max: float = Field(2.0, gt=0)
    """Largest random scale."""
    flip: bool = True
    """Mirror half of the samples."""
    colour: float = Field(1.0, ge=0)
    """Strength of the SSD colour jitter (brightness 32, contrast and saturation 0.5, hue 18); 0:
    none."""
    blur: float = Field(0.0, ge=0, le=1)
    """Share of samples with Gaussian blur."""
    max_class_share: float = Field(1.0, gt=0, le=1)
    """Draw another crop (up to 10 times) while one class fills more than this share of the
    labelled pixels."""

    @model_validator(mode="after")
    def _smallest_first(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(
                f"scale_min {self.scale_min:g} is above scale_max {self.scale_max:g}: set both"
            )
        return self


class OptimiserConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay; none on norms, biases of norms, embeddings and tokens."""
    schedule: Literal["constant", "poly"] = "poly"
    """Learning rate over the steps."""
    poly_power: float = Field(0.9, gt=0)
    """Power of the poly schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up."""
    clip_norm: float = Field(0.01, gt=0)
    """Largest gradient norm over all trained parameters (0.01 as published for Mask2Former
    decoders)."""
    accumulate: int = Field(1, ge=1)
    """Forward passes per update; each takes batch_size / accumulate samples."""


class EmaConfig(Section):
    """Exponential moving average of what is trained: the teacher."""

    decay: float = Field(0.999, ge=0, lt=1)
    """Share of the old average kept at each update."""
    every: int = Field(1, ge=1)
    """Update every so many steps (the released CLOUDS: 100)."""


class TrainSourceConfig(Section):
    """Train the segmenter on the labelled sources."""

    steps: int = Field(40_000, gt=0)
    """Updates."""
    batch_size: int = Field(8, gt=0)
    """Samples per update, over all processes."""
    rare_class_sampling: float = Field(0.0, ge=0)
    """Temperature of rare-class sampling (DAFormer: 0.01); 0: uniform."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of source samples."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """Optimiser and schedule."""
    ema: EmaConfig | None = None
    """Average of the weights beside the weights themselves; None: none."""
    validation: ValidationConfig | None = None
    """Keep the step with the best mIoU on `data.validation` (mean over its sets) instead of the
    last one, and stop early by patience; None: all steps, the last one."""
    checkpoint_every: Annotated[int, NOT_IN_KEY] = Field(500, gt=0)
    """Steps between resumable checkpoints."""
    log_every: Annotated[int, NOT_IN_KEY] = Field(20, gt=0)
    """Steps between lines of `logs/metrics.jsonl`."""
    data_workers: Annotated[int, NOT_IN_KEY] = Field(0, ge=0)
    """Processes that read and augment batches ahead; 0: in the training process."""

    @model_validator(mode="after")
    def _average_to_judge(self) -> Self:
        return with_average(self, "train_source")


def with_average(section: Any, name: str) -> Any:
    """The section, if there is an average wherever validation judges one."""
    if section.validation and section.validation.weights == "ema" and section.ema is None:
        raise ValueError(
            f"{name}.validation.weights=ema, but {name}.ema is null: there is no average to judge; "
            f"set {name}.ema, or judge the model"
        )
    return section
