"""Encoders: strides, position embeddings, published sizes, equality with their libraries."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.build import build_segmenter
from models.config import EncoderConfig, SegmenterConfig, TuningConfig
from models.towers import at_hand, build_encoder, create_timm, weights_file
from models.vits import interpolate_positions
from tests.small_segmenters import ENCODERS, NAMES, small_config, small_segmenter, some_images


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_takes_any_size_and_keeps_its_strides(encoder):
    segmenter = small_segmenter(encoder).eval()
    for size in ((64, 64), (49, 90)):
        output = segmenter(some_images(1, 3, *size))
        step = segmenter.encoder.divisibility
        assert output.padded_size == tuple(side + -side % step for side in size)
        stride = getattr(segmenter.encoder, "patch", 16) / 4
        assert output.masks_BQHW.shape[-2:] == tuple(
            int(side / stride) for side in output.padded_size
        )
        scores = segmenter.semantic(output)
        assert scores.shape == (1, len(NAMES), *size)
        assert scores.isfinite().all()


def test_drop_path_reaches_the_trunk_and_is_refused_where_there_is_none():
    segmenter = small_segmenter("EVA-02-CLIP", tuning={"kind": "full", "drop_path": 0.3})
    rates = [getattr(b.drop_path1, "drop_prob", 0) for b in segmenter.encoder.trunk.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="drop_path"):
        small_segmenter("CLIP ViT", tuning={"kind": "full", "drop_path": 0.3})


def test_positions_are_interpolated_and_kept_at_their_own_size():
    plane = torch.arange(4.0).view(1, 4, 1) + torch.zeros(1, 4, 3)
    positions = plane.flatten(0, 1)[None].repeat_interleave(4, 1)
    assert interpolate_positions(positions, (4, 4), (4, 4)) is positions
    larger = interpolate_positions(positions, (4, 4), (8, 6)).view(8, 6, 3)
    torch.testing.assert_close(larger[:, 0], larger[:, 5])
    assert (larger[1:, 0, 0] > larger[:-1, 0, 0]).all()
    assert larger[:, 0, 0].mean() == pytest.approx(1.5)


@pytest.mark.parametrize("encoder", ["CLIP ViT", "EVA-02-CLIP", "SAM", "DINOv2"])
def test_positions_matter_at_every_size(encoder):
    config = small_config(encoder).encoder
    model = build_encoder(config, TuningConfig()).eval()
    flat = torch.zeros(1, 3, 96, 64)
    feature = model(flat)[0]
    assert (feature - feature.mean((2, 3), keepdim=True)).abs().max() > 1e-4


def test_the_clip_vit_equals_open_clip_at_its_own_size():
    config = small_config("CLIP ViT").encoder
    encoder = build_encoder(config, TuningConfig()).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = encoder.trunk.forward_intermediates(images, intermediates_only=True)
    for ours, feature in zip(encoder(images), theirs["image_intermediates"], strict=True):
        torch.testing.assert_close(ours, feature)


@pytest.mark.parametrize("encoder", ["EVA-02-CLIP", "DINOv3"])
def test_timm_transformers_equal_timm_at_any_size(encoder):
    model = build_encoder(small_config(encoder).encoder, TuningConfig()).eval()
    trunk = model.trunk
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    # timm resamples learned positions with antialiasing: only rotary ones are compared here
    if trunk.pos_embed is not None:
        nn.init.zeros_(trunk.pos_embed)
    theirs = trunk.forward_intermediates(images, intermediates_only=True)
    for ours, feature in zip(model(images), theirs, strict=True):
        torch.testing.assert_close(ours, feature)


TRUE_SIZES = [
    # name, encoder, tuning, encoder parameters, decoder parameters, token parameters
    ("CLOUDS ConvNeXt-L", {"name": "convnext_large_d_320"}, "frozen", 196.2e6, 20.25e6, 0),
    ("CLOUDS RN50", {"name": "RN50"}, "frozen", 23.5e6, 20.50e6, 0),
    ("VLTSeg EVA-02-CLIP-L", {"name": "EVA02-L-14"}, "full", 303.9e6, 20.57e6, 0),
    (
        "Rein DINOv2-L",
        {"family": "timm", "name": "vit_large_patch14_dinov2", "patch_size": 16},
        "rein",
        303.6e6,
        None,
        2_990_081,
    ),
    ("Rein CLIP-L", {"name": "ViT-L-14"}, "rein", 303.0e6, None, 2_990_081),
    (
        "Rein EVA-02-L",
        {"family": "timm", "name": "eva02_large_patch14_224"},
        "rein",
        303.3e6,
        None,
        2_990_081,
    ),
    ("Rein SAM-H", {"family": "sam", "name": "vit_h"}, "rein", 636e6, None, 4_510_721),
    ("MiT-B5", {"family": "transformers", "name": "mit-b5"}, "full", 81.4e6, None, 0),
]


@pytest.mark.parametrize(("name", "encoder", "tuning", "trunk", "head", "tokens"), TRUE_SIZES)
def test_published_models_have_their_published_sizes(name, encoder, tuning, trunk, head, tokens):
    config = SegmenterConfig.model_validate({"encoder": encoder, "tuning": {"kind": tuning}})
    segmenter = build_segmenter(config, class_names=[str(k) for k in range(19)], device="meta")
    counts = {
        part: sum(p.numel() for n, p in segmenter.named_parameters() if n.startswith(part))
        for part in ("encoder.", "decoder.", "tokens.")
    }
    assert counts["tokens."] == tokens
    assert counts["encoder."] == pytest.approx(trunk, rel=0.01)
    if head is not None:
        assert counts["decoder."] == pytest.approx(head, rel=0.005)


HUB_FILES = {
    "CLIP ResNet": "open_clip_model.safetensors",
    "DINOv2": "model.safetensors",
    "MiT": "model.safetensors",
}


@pytest.mark.parametrize(
    ("encoder", "kind"),
    [(encoder, kind) for encoder in HUB_FILES for kind in ("file", "folder", "hub id")],
)
def test_weights_come_from_a_file_a_folder_or_the_hubs_cache(tmp_path, monkeypatch, encoder, kind):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = EncoderConfig.model_validate(ENCODERS[encoder] | {"patch_size": None})
    if config.family == "timm":  # with what is dropped behind the blocks
        source = create_timm(config.name, TuningConfig(), **config.architecture)
    else:
        source = build_encoder(config, TuningConfig()).trunk
    model = tmp_path / "models--someone--tower"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    prefix = "visual." if encoder.startswith("CLIP") else ""
    state = {f"{prefix}{n}": v + 1 for n, v in source.state_dict().items()}
    file = snapshot / HUB_FILES[encoder]
    save_file(state, file, metadata={"format": "pt"})
    if encoder == "MiT":
        source.config.save_pretrained(snapshot)
    weights = {"file": str(file), "folder": str(snapshot), "hub id": "someone/tower"}[kind]
    loaded = build_encoder(config.model_copy(update={"weights": weights}), TuningConfig())
    for name, value in loaded.trunk.state_dict().items():
        assert torch.equal(value, state[prefix + name]), name


def test_a_folder_called_as_a_tag_is_loaded_only_where_it_is_named_as_a_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "model.safetensors").touch()
    assert weights_file("openai", []) is None  # a tag
    config = at_hand(EncoderConfig(name="RN50", weights="local-dir:openai"))
    assert weights_file(config.weights, []) == Path("openai/model.safetensors")


def test_a_segformers_own_file_with_its_head_gives_its_encoder(tmp_path):
    config = EncoderConfig.model_validate(ENCODERS["MiT"])
    source = build_encoder(config, TuningConfig()).trunk
    state = {f"segformer.{n}": v + 1 for n, v in source.state_dict().items()}
    save_file(state | {"decode_head.x": torch.zeros(1)}, tmp_path / "whole.safetensors")
    weights = str(tmp_path / "whole.safetensors")
    loaded = build_encoder(config.model_copy(update={"weights": weights}), TuningConfig()).trunk
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[f"segformer.{name}"]), name


def test_a_torchscript_file_is_refused_with_the_way_out(tmp_path):
    file = tmp_path / "RN50.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    config = EncoderConfig.model_validate(ENCODERS["CLIP ResNet"] | {"weights": str(file)})
    with pytest.raises(ValueError, match=r"RN50\.pt is a TorchScript program.*tag \(openai\)"):
        build_encoder(config, TuningConfig())


@pytest.mark.parametrize("encoder", ["CLIP ResNet", "DINOv2"])
def test_weights_that_are_nowhere_are_named(monkeypatch, encoder):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = EncoderConfig.model_validate(ENCODERS[encoder] | {"weights": "someone/nothing"})
    with pytest.raises(FileNotFoundError, match=r"'someone/nothing' is no file or folder here"):
        build_encoder(config, TuningConfig())


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"name": "RN51"}, "nearest: RN50"),
        ({"name": "RN50", "weights": "opena1"}, "nearest: openai"),
        ({"family": "timm", "name": "resnet51"}, "nearest: resnet51q, resnet50"),
        ({"family": "timm", "name": "vgg11"}, "no encoder for timm's VGG"),
        ({"family": "transformers", "name": "mit-b7"}, "nearest: mit-b"),
        ({"name": "RN50", "patch_size": 16}, "no patch embedding"),
        (ENCODERS["CLIP ViT"] | {"features": [0, 1, 2]}, "give four blocks between 0 and 3"),
    ],
)
def test_unknown_encoders_are_named_with_the_nearest_known(encoder, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(EncoderConfig.model_validate(encoder), TuningConfig())
