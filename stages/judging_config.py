"""Settings of how a model is judged, while it trains and at the end. No torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.data_config import LayoutName
from stages.protocols import PROTOCOLS
from stages.section import IN_KEY_IF_SET, Scales, Section, refuse_gaps


class ProtocolConfig(Section):
    """How pictures reach the network and what is counted when a model is judged."""

    short_side: int | None = Field(None, gt=0)
    """Resize pictures to this short side before the network; None: native size."""
    label_resolution: Literal["native", "network"] = "native"
    """Score at the label's own size, or at the network's input size (labels resized by nearest)."""
    mode: Literal["whole", "slide"] = "whole"
    """Whole pictures, or sliding windows."""
    window: int = Field(512, gt=0)
    """Side of the sliding window in pixels of the scaled picture."""
    stride: int = Field(341, gt=0)
    """Stride of the sliding window in pixels."""
    flip: Annotated[bool, IN_KEY_IF_SET] = False
    """Average with the mirrored picture."""
    scales: Annotated[Scales, IN_KEY_IF_SET] = (1.0,)
    """Scales of the network's input to average over."""
    absent: Literal["mmseg", "detectron2", "cityscapes"] = "cityscapes"
    """What a class absent from the truth counts (see `models/evaluators`)."""
    batch_size: int = Field(4, gt=0)
    """Pictures per forward pass (pictures of one size)."""

    @model_validator(mode="after")
    def _covering(self) -> Self:
        if self.mode == "slide":
            refuse_gaps(window=self.window, stride=self.stride)
        return self


class ValidationConfig(ProtocolConfig):
    """Judge on `data.validation` while training, and keep the weights that judge best."""

    every: int = Field(500, gt=0)
    """Steps between judgements; the last step is always judged."""
    patience: int | None = Field(None, gt=0)
    """Stop after so many judgements in turn without a better one; None: train all steps."""
    weights: Literal["model", "ema"] = "model"
    """Which weights are judged (ema needs the training's `ema`)."""


class SizeConfig(Section):
    """Size of the network's input."""

    short_side: int | None = Field(None, gt=0)
    """Resize pictures to this short side; None: native size."""
    long_side: int | None = Field(None, gt=0)
    """Make pictures smaller than that where the long side would exceed this; None: no limit."""
    halve: bool = False
    """First halve picture (bicubic) and label (nearest), which is then the native size."""


ProtocolName = Literal["clouds_released", "rein", "vltseg", "high_resolution", "native"]


class EvaluateConfig(ProtocolConfig):
    """Judge a checkpoint on the targets."""

    protocol: ProtocolName | None = None
    """Published protocol (`stages/protocols.py`): fixes size, windows, label resolution, absent
    classes and Mapillary's map where they are not set here; None: the settings below alone."""
    weights: Literal["model", "ema"] = "model"
    """Which of the checkpoint's weights."""
    long_side: int | None = Field(None, gt=0)
    """Make pictures smaller than that where the long side would exceed this; None: no limit."""
    layouts: dict[LayoutName, SizeConfig] = Field({})
    """Sizes for data sets of single layouts: {bdd100k: {short_side: 720}}."""
    resize: Literal["antialias", "plain"] = "antialias"
    """Bilinear over all pixels of a shrinking picture (antialias: Pillow, detectron2), or over the
    four nearest (plain: OpenCV, mmseg)."""
    classes: Literal["all", 16, 13] = "all"
    """Classes of the mean: all, or the 16 or 13 of Cityscapes' 19 that tables from SYNTHIA use (all
    three stand in the results of those 19)."""
    training_domain: str | None = None
    """Target of the domain trained on: left out of the mean, and what rPD (relative performance
    under domain shift) compares the others with."""
    num_predictions: int = Field(6, ge=0)
    """Predictions per data set kept for the report."""

    @model_validator(mode="after")
    def _covering(self) -> Self:
        """Filled by the protocol before it is looked at. Fields that are not set stay "not set", so
        that another protocol can fill them anew."""
        if self.protocol is not None:
            settings = PROTOCOLS[self.protocol].settings
            fixed = type(self)(**settings)
            for name in settings.keys() - self.model_fields_set:
                self.__dict__[name] = getattr(fixed, name)
        return super()._covering()
