"""Small checkpoints, and the stage `evaluate` run on them, for tests of judging."""

import json

import torch

from models.build import build_segmenter
from models.checkpoints import save_segmenter
from stages import evaluate
from stages.config import Recipe
from tests.tiny import SEGMENTER, Told, stage_config

LIGHT = SEGMENTER.model_copy(
    update={"decoder": SEGMENTER.decoder.model_copy(update={"kind": "light"})}
)


def save_checkpoint(folder, names, **options):
    """Random weights, spread out: an untrained network would give one class to every pixel."""
    segmenter = build_segmenter(LIGHT, class_names=names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in segmenter.named_parameters():
            if name.startswith("decoder"):
                spread = 2 * parameter.std().nan_to_num(0.1).clamp(min=0.05)
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    save_segmenter(folder, segmenter, label_space="cityscapes19", step=7, **options)


def evaluated(inputs, out, *, told=None, model=None, precision="fp32", **section):
    recipe = Recipe(evaluate=section, run={"device": "cpu"}, precision=precision)
    out.mkdir(exist_ok=True)
    summary = evaluate.run(
        stage_config(recipe, "evaluate"),
        out=out,
        progress=told or Told(),
        model=model or inputs / "model",
        targets=inputs / "prepared" / "targets",
        labelspace=inputs / "prepared" / "labelspace",
    )
    return summary, json.loads((out / "results.json").read_text())
