"""Settings of what one does with a trained model: predict, export, draw its features. No torch.

These commands lie outside the recipe: they read a checkpoint and leave files where they are told.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.section import (
    IN_KEY_IF_SET,
    NOT_IN_KEY,
    InKeyIfSet,
    NotInKey,
    Scales,
    Section,
    refuse_gaps,
)


class PredictConfig(Section):
    """How pictures are predicted and what is written of them."""

    weights: Literal["model", "ema"] = "model"
    """Which of the checkpoint's weights."""
    mode: Literal["auto", "slide"] = "auto"
    """auto: whole pictures, those above `whole_px` in sliding windows; slide: windows always."""
    window: int = Field(512, gt=0)
    """Side of the sliding window in pixels."""
    stride: int = Field(341, gt=0)
    """Step between windows in pixels."""
    flip: bool = False
    """Average with the mirrored picture."""
    scales: Annotated[Scales, IN_KEY_IF_SET] = (1.0,)
    """Scales of the network's input to average over."""
    short_side: int | None = Field(None, gt=0)
    """Resize pictures so that their short side has this many pixels for the network; labels keep
    the picture's size. None: as they are."""
    whole_px: int = Field(4_200_000, gt=0)
    """Largest picture, in pixels, whose scores are held at once."""
    ids: str = "train"
    """Values of label PNGs: `train` ids, train ids with the class colours as a `palette`, or a map
    of the label space (`cityscapes`) for the raw ids of its label files."""
    overlay: bool = True
    """Write the picture with the class colours over it."""
    opacity: float = Field(0.5, ge=0, le=1)
    """Share of the class colours in overlays."""
    confidence: bool = False
    """Write confidence PNGs (0..255 = 0..1)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast precision."""
    batch: Annotated[int, NOT_IN_KEY] = Field(4, gt=0)
    """Pictures of one size (or windows) in one forward pass."""
    device: Annotated[str, NOT_IN_KEY] = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda, cuda:N."""

    @model_validator(mode="after")
    def _covering(self) -> Self:
        refuse_gaps(window=self.window, stride=self.stride)
        return self

    def deciding(self) -> dict[str, Any]:
        """The settings that can change a result."""
        left_out = {
            name
            for name, field in type(self).model_fields.items()
            for mark in field.metadata
            if isinstance(mark, NotInKey)
            or (isinstance(mark, InKeyIfSet) and getattr(self, name) == field.default)
        }
        return self.model_dump(mode="json", exclude=left_out)


class ExportConfig(Section):
    """The form of an exported network."""

    weights: Literal["model", "ema"] = "model"
    """Which of the checkpoint's weights."""
    height: int = Field(512, gt=0)
    """Height of the images it takes, in pixels."""
    width: int = Field(1024, gt=0)
    """Width of the images it takes, in pixels."""
    batch: int | None = Field(1, gt=0)
    """Images it takes at once; None: any number."""
    opset: int = Field(20, ge=18)
    """ONNX operator set; grid_sample needs 16 or more, the exporter 18."""
    tolerance: float = Field(1e-4, gt=0)
    """Largest difference of a score from torch's that is accepted."""


class FeatureMapConfig(Section):
    """A t-SNE picture of dense features."""

    level: Literal[4, 8, 16, 32] = 16
    """Stride, in pixels, of the encoder's map that is drawn."""
    pictures: int = Field(20, gt=0)
    """Pictures per data set, evenly spaced."""
    points: int = Field(40, gt=1)
    """Pixels per class and data set, at most."""
    perplexity: float = Field(30.0, gt=0)
    """Neighbours that t-SNE weighs (cut to a third of the points)."""
    weights: Literal["model", "ema"] = "model"
    """Which of the checkpoints' weights."""
    seed: int = Field(0, ge=0)
    """Seed of drawn pixels and of t-SNE."""
