"""The recipes of the published systems: their settings, their true sizes, and a step of each.

True sizes are built on the meta device, which reads no weights. A twin is the recipe's segmenter
with a tiny encoder of the same family, a small decoder and random weights; tuning, pyramid,
normalisation, losses and optimiser are the recipe's own.
"""

import math
from functools import cache

import pytest
import torch

from flows.pipeline import build
from flows.recipes import load_recipe, recipe_files
from models.build import build_segmenter
from models.config import SegmenterConfig
from models.losses import SetCriterion
from models.towers import open_clip_architecture
from stages.labels import load_labelspace
from tests.small_segmenters import DECODER, ENCODERS

SYSTEMS = ("clouds_", "vltseg_", "rein_", "painted_")
PUBLISHED = sorted(name for name in recipe_files() if name.startswith(SYSTEMS))
FAMILIES = {
    "convnext_large_d_320": "CLIP ConvNeXt",
    "RN50": "CLIP ResNet",
    "RN101": "CLIP ResNet",
    "mit-b5": "MiT",
    "ViT-L-14": "CLIP ViT",
    "EVA02-L-14": "EVA-02-CLIP",
    "EVA02-B-16": "EVA-02-CLIP",
    "vit_large_patch14_dinov2": "DINOv2",
    "eva02_large_patch14_224": "EVA-02",
    "vit_h": "SAM",
}
SMALL = ENCODERS | {
    "EVA-02": {
        "name": "eva02_small_patch14_224",
        "architecture": {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 56},
    }
}
TRUE_SIZES = [
    # recipe, trained parameters: encoder, Rein's tokens, decoder (None: not published)
    ("clouds_convnext_l_gta5", 0, 0, 20.25e6),
    ("clouds_rn50_gta5", 0, 0, 20.50e6),
    ("clouds_rn101_gta5", 0, 0, 20.50e6),
    ("clouds_mit_b5_gta5", 0, 0, None),
    ("vltseg_l14_gta5", 304.0e6, 0, None),
    ("vltseg_b16_gta5", 86.0e6, 0, None),
    ("rein_dinov2_l_gta5", 0, 2_990_081, None),
    ("rein_eva02_l_gta5", 0, 2_990_081, None),
    ("rein_clip_l_gta5", 0, 2_990_081, None),
    ("rein_sam_h_gta5", 0, 4_510_721, None),
    ("painted_rein_dinov2_l", 0, 2_990_081, None),
    ("painted_rein_eva02_clip_l", 0, 2_990_081, None),
]


@cache
def class_names() -> tuple[str, ...]:
    return load_labelspace("cityscapes19").names


@cache
def true_size(config_json: str) -> dict[str, int]:
    """Trained parameters of each part, and the patches' side in pixels, on the meta device."""
    config = SegmenterConfig.model_validate_json(config_json)
    segmenter = build_segmenter(config, class_names=class_names(), device="meta")
    counts = dict.fromkeys(("encoder", "tokens", "decoder", "neck"), 0)
    for name, parameter in segmenter.trainable_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    return counts | {"patch": getattr(segmenter.encoder, "patch", 16)}


def twin(config: SegmenterConfig) -> SegmenterConfig:
    """The same segmenter with a tiny encoder of the same family and a small decoder."""
    small = SMALL[FAMILIES[config.encoder.name]]
    encoder = config.encoder.model_dump() | {"weights": None, "features": None}
    encoder |= {key: small[key] for key in ("name", "architecture") if key in small}
    tree = config.model_dump() | {"encoder": encoder}
    tree["decoder"] |= DECODER
    tree["losses"] |= {"points": 64}
    tree["tuning"] |= {"num_tokens": 6, "token_rank": 4, "lora_rank": 2}
    return SegmenterConfig.model_validate(tree)


@cache
def twin_step(config_json: str, lr: float, weight_decay: float, clip: float) -> tuple[float, int]:
    """Loss of one training step of the twin, and how many trained tensors it moved."""
    torch.set_num_threads(1)
    config = twin(SegmenterConfig.model_validate_json(config_json))
    segmenter = build_segmenter(config, class_names=class_names()).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 19, (2, 4, 4), generator=generator, dtype=torch.uint8)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    before = {name: p.detach().clone() for name, p in segmenter.named_parameters()}
    optimizer = torch.optim.AdamW(segmenter.parameter_groups(lr, weight_decay))
    criterion = SetCriterion(config.losses, len(class_names()))
    loss = criterion(segmenter(images), labels, seeds=[0, 1])["total"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in segmenter.parameters() if p.requires_grad], clip)
    optimizer.step()
    moved = {n for n, p in segmenter.named_parameters() if not torch.equal(p, before[n])}
    trained = {name for name, _ in segmenter.trainable_parameters()}
    assert moved <= trained, f"frozen weights moved: {sorted(moved - trained)[:3]}"
    return loss.item(), len(moved)


def test_every_published_system_has_its_recipes():
    encoders = ("convnext_l", "rn50", "rn101", "mit_b5")
    sources = ("gta5", "synthia", "cityscapes")
    clouds = {f"clouds_{e}_{s}{r}" for e in encoders for s in sources for r in ("", "_released")}
    vltseg = {f"vltseg_{size}_{s}" for size in ("l14", "b16") for s in sources}
    rein = {f"rein_{e}_gta5" for e in ("dinov2_l", "eva02_l", "clip_l", "sam_h")}
    painted = {f"painted_{t}_{e}" for t in ("rein", "lora") for e in ("dinov2_l", "eva02_clip_l")}
    assert clouds | vltseg | rein | painted <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_of_a_published_system_is_whole(name):
    recipe = load_recipe(name)
    assert recipe.data.sources
    targets = [target.name for target in recipe.data.targets]
    assert targets == ["cityscapes", "bdd100k", "mapillary", "acdc"]
    sets = [*recipe.data.sources, *recipe.data.targets]
    assert len({dataset.name for dataset in sets}) == len(sets)
    encoder = recipe.segmenter.encoder
    assert encoder.weights, "a published system begins with pre-trained weights"
    assert encoder.architecture is None
    instances = build(recipe)
    painted = name.startswith(("clouds_", "painted_"))
    assert ("synthesize" in instances) == painted
    assert "evaluate@0" in instances
    assert not painted or recipe.refine.weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_pretrained_tags_are_known_to_the_libraries(name):
    import open_clip
    import timm

    encoder = load_recipe(name).segmenter.encoder
    if encoder.family == "open_clip":
        assert open_clip_architecture(encoder)
        assert encoder.weights in open_clip.list_pretrained_tags_by_model(encoder.name)
    elif encoder.family == "timm":
        assert timm.models.is_model_pretrained(f"{encoder.name}.{encoder.weights}")


@pytest.mark.parametrize(
    ("source", "steps", "lr", "schedule", "pictures_of_source", "repeat"),
    [
        ("gta5", (40_000, 40_000), 1e-5, "constant", 24_966, 2.0),
        ("synthia", (30_000, 30_000), 1e-5, "poly", 9_400, 0.7),
        ("cityscapes", (5_000, 10_000), 1e-4, "constant", 2_975, 0.2),
    ],
)
@pytest.mark.parametrize("encoder", ["convnext_l", "rn50", "rn101", "mit_b5"])
def test_released_recipes_hold_the_authors_settings(
    encoder, source, steps, lr, schedule, pictures_of_source, repeat
):
    recipe = load_recipe(f"clouds_{encoder}_{source}_released")
    first, second = recipe.train_source, recipe.self_train
    assert (first.steps, second.steps) == steps
    for section in (first, second):
        assert (section.optimiser.lr, section.optimiser.schedule) == (lr, schedule)
        assert (section.optimiser.clip_norm, section.optimiser.weight_decay) == (0.01, 0.05)
        assert section.optimiser.warmup_steps == 0
        assert section.batch_size == 8
        crop = section.augment
        assert (crop.crop_height, crop.crop_width) == (768, 768)
        assert (crop.scale_min, crop.scale_max) == (0.5, 2.0)
    generated = repeat * recipe.synthesize.num_images
    share = generated / (generated + pictures_of_source)
    assert second.painted_share == pytest.approx(share, abs=5e-4)
    assert (second.ema.decay, second.ema.every) == (0.999, 100)
    assert second.unlabelled == recipe.segmenter.losses.unlabelled == "negative"
    assert recipe.segmenter.tuning.kind == "frozen"
    paint = recipe.synthesize
    assert (paint.num_images, paint.steps, paint.guidance) == (5000, 50, 7.5)
    assert (paint.height, paint.width) == (768, 768)
    assert recipe.pseudo_label.threshold == 0
    refine = recipe.refine
    assert (refine.rule, refine.min_area, refine.points) == ("released", 5000, 5)
    assert (recipe.precision, recipe.rounds.count) == ("fp32", 1)
    assert (recipe.evaluate.short_side, recipe.evaluate.mode) == (1024, "whole")


@pytest.mark.parametrize(
    ("source", "crop", "batch", "steps"),
    [("gta5", 512, 16, 5_000), ("synthia", 512, 16, 5_000), ("cityscapes", 1024, 8, 20_000)],
)
@pytest.mark.parametrize("size", ["l14", "b16"])
def test_vltseg_recipes_hold_the_published_settings(size, source, crop, batch, steps):
    recipe = load_recipe(f"vltseg_{size}_{source}")
    section, tuning = recipe.train_source, recipe.segmenter.tuning
    assert section.augment.crop_height == section.augment.crop_width == crop
    assert (section.batch_size, section.steps) == (batch, steps)
    assert (section.optimiser.lr, section.optimiser.warmup_steps) == (1e-4, 500)
    assert (tuning.kind, tuning.lr_multiplier, tuning.drop_path) == ("full", 0.1, 0.2)
    assert recipe.segmenter.encoder.pyramid == "learned"


def test_painted_recipes_compare_with_as_many_steps_on_the_source_alone():
    for name in (name for name in PUBLISHED if name.startswith("painted_")):
        instances = build(load_recipe(name))
        control = instances["self_train@1#control"]
        assert {entry.role for entry in control.inputs} == {"sources", "labelspace", "teacher"}
        assert {"self_train@1#raw", "self_train@1#refined"} <= set(instances)


@pytest.mark.parametrize(("name", "encoder", "tokens", "decoder"), TRUE_SIZES)
def test_recipes_have_the_published_sizes(name, encoder, tokens, decoder):
    counts = true_size(load_recipe(name).segmenter.model_dump_json())
    assert counts["encoder"] == pytest.approx(encoder, rel=0.01)
    assert counts["tokens"] == tokens
    if decoder is not None:
        assert counts["decoder"] == pytest.approx(decoder, rel=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_builds_at_true_size(name):
    config = load_recipe(name).segmenter
    counts = true_size(config.model_dump_json())
    assert counts["decoder"] > 18e6
    assert counts["patch"] == 16, "the pyramid's strides are 4, 8, 16, 32 for patches of 16 pixels"
    assert (counts["encoder"] > 0) == (config.tuning.kind in ("full", "lora"))
    assert (counts["tokens"] > 0) == (config.tuning.kind == "rein")
    assert (counts["neck"] > 0) == (config.encoder.pyramid == "learned")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_scaled_down_twin_takes_a_step(name):
    recipe = load_recipe(name)
    optimiser = recipe.train_source.optimiser
    loss, moved = twin_step(
        recipe.segmenter.model_dump_json(),
        optimiser.lr,
        optimiser.weight_decay,
        optimiser.clip_norm,
    )
    assert math.isfinite(loss)
    assert moved > 40
