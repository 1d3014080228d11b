"""Checkpoints with random weights that tell classes apart, for tests of what uses a model."""

import torch

from models.build import build_segmenter
from models.checkpoints import save_segmenter
from models.config import SegmenterConfig
from models.segmenter import Segmenter
from tests.tiny import CLASSES, SEGMENTER

LIGHT = SEGMENTER.model_copy(
    update={"decoder": SEGMENTER.decoder.model_copy(update={"kind": "light"})}
)


def spread_segmenter(config: SegmenterConfig = LIGHT, names=tuple(CLASSES)) -> Segmenter:
    """Random weights, spread out: an untrained network would give one class to every pixel."""
    segmenter = build_segmenter(config, class_names=names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in segmenter.named_parameters():
            if name.startswith("decoder"):
                spread = 2 * parameter.std().nan_to_num(0.1).clamp(min=0.05)
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return segmenter.eval()


def save_checkpoint(folder, *, config=LIGHT, names=tuple(CLASSES), label_space="tiny", **options):
    """A checkpoint of `spread_segmenter`; returns its folder."""
    segmenter = spread_segmenter(config, names)
    save_segmenter(folder, segmenter, label_space=label_space, step=7, **options)
    return folder
