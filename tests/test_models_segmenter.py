"""The segmenter as a whole: encoders, tunings, what is trained, padding, scores."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from models.build import build_segmenter
from models.config import EncoderConfig, SegmenterConfig, TuningConfig
from models.segmenter import Segmenter, SegmenterOutput
from models.towers import build_encoder
from models.vits import interpolate_positions

NAMES = ["road", "sky", "car", "tree", "person"]
DECODER = {
    "width": 32,
    "queries": 6,
    "layers": 3,
    "heads": 4,
    "ffn": 48,
    "pixel_layers": 1,
    "pixel_ffn": 48,
    "group_norm": 8,
}
ENCODERS = {
    "CLIP ResNet": {
        "architecture": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "embed_dim": 16}
    },
    "CLIP ConvNeXt": {
        "architecture": {
            "timm_model_name": "convnext_tiny",
            "timm_options": {"depths": [1, 1, 2, 1], "dims": [16, 24, 32, 48]},
        }
    },
    "CLIP ViT": {
        "architecture": {
            "layers": 4,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            "image_size": 32,
            "embed_dim": 16,
        }
    },
    "EVA-02-CLIP": {
        "architecture": {
            "timm_model_name": "eva02_base_patch16_clip_224",
            "timm_options": {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64},
        },
        "pyramid": "learned",
    },
    "DINOv2": {
        "family": "timm",
        "name": "vit_small_patch14_dinov2",
        "architecture": {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 56},
        "patch_size": 16,
    },
    "DINOv3": {
        "family": "timm",
        "name": "vit_small_patch16_dinov3",
        "architecture": {"embed_dim": 32, "depth": 4, "num_heads": 2},
    },
    "ResNet": {"family": "timm", "name": "resnet10t"},
    "MiT": {
        "family": "transformers",
        "name": "mit-b0",
        "architecture": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
    },
    "SAM": {
        "family": "sam",
        "name": "vit_b",
        "architecture": {
            "embed_dim": 32,
            "depth": 4,
            "num_heads": 2,
            "img_size": 64,
            "window_size": 3,
            "global_attn_indexes": [3],
        },
    },
}


def small_config(encoder: str = "CLIP ResNet", **sections: dict) -> SegmenterConfig:
    whole = {"encoder": ENCODERS[encoder], "decoder": DECODER} | sections
    return SegmenterConfig.model_validate(whole)


def small_segmenter(encoder: str = "CLIP ResNet", **sections: dict) -> Segmenter:
    return build_segmenter(small_config(encoder, **sections), class_names=NAMES)


def some_images(*size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def backward(output: SegmenterOutput) -> None:
    terms = [x for p in output.predictions for x in p]
    sum(term.float().square().mean() for term in terms).backward()


@pytest.mark.parametrize("tuning", ["frozen", "full", "rein", "lora"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_exactly_what_the_tuning_says_is_trained(encoder, tuning):
    if tuning == "lora" and "ResNet" in encoder:
        with pytest.raises(ValueError, match="no linear layers"):
            small_segmenter(encoder, tuning={"kind": tuning})
        return
    segmenter = small_segmenter(encoder, tuning={"kind": tuning, "num_tokens": 6})
    output = segmenter(some_images(2, 3, 50, 70))
    assert output.masks_BQHW.shape[:2] == (2, 6)
    backward(output)
    graded = {n for n, p in segmenter.named_parameters() if p.grad is not None}
    assert graded == {n for n, _ in segmenter.trainable_parameters()}
    own = {n for n in graded if n.startswith("encoder.")}
    everything = {n for n, _ in segmenter.named_parameters() if n.startswith("encoder.")}
    expected = {
        "frozen": set(),
        "rein": set(),
        "full": everything,
        "lora": {n for n in everything if "lora_" in n},
    }[tuning]
    assert own == expected
    assert any(n.startswith("tokens.") for n in graded) == (tuning == "rein")


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


@pytest.mark.parametrize("tuning", ["frozen", "rein"])
def test_frozen_networks_stay_in_eval_mode_when_the_whole_is_trained(tuning):
    segmenter = small_segmenter(tuning={"kind": tuning})
    segmenter.train()
    assert segmenter.decoder.training
    assert not any(m.training for m in segmenter.encoder.modules())
    before = {k: v.clone() for k, v in segmenter.encoder.state_dict().items()}
    segmenter(some_images(2, 3, 64, 64))
    after = segmenter.encoder.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_frozen_blocks_of_a_trained_encoder_stay_in_eval_mode():
    segmenter = small_segmenter(tuning={"kind": "full", "freeze_blocks": 2}).train()
    trunk = segmenter.encoder.trunk
    assert not trunk.bn1.training
    assert not trunk.layer2[0].bn1.training
    assert trunk.layer3[0].bn1.training


@pytest.mark.parametrize(
    ("freeze", "trained"), [(0, "1111"), (2, "0011"), (-1, "1110"), (-3, "1000")]
)
def test_blocks_freeze_from_either_end(freeze, trained):
    segmenter = small_segmenter("CLIP ViT", tuning={"kind": "full", "freeze_blocks": freeze})
    blocks = segmenter.encoder.block_list()
    found = "".join(str(int(all(p.requires_grad for p in b.parameters()))) for b in blocks)
    assert found == trained
    assert segmenter.encoder.trunk.conv1.weight.requires_grad == (freeze <= 0)


def test_a_frozen_encoder_keeps_no_activations():
    segmenter = small_segmenter()
    kept = []
    hook = segmenter.encoder.register_forward_hook(lambda *args: kept.extend(args[2]))
    segmenter(some_images(1, 3, 64, 64))
    hook.remove()
    assert len(kept) == 4
    assert not any(feature.requires_grad for feature in kept)


def test_checkpointing_changes_memory_and_not_gradients():
    gradients = []
    for checkpointing in (False, True):
        encoder = ENCODERS["CLIP ViT"] | {"checkpointing": checkpointing}
        whole = {"encoder": encoder, "decoder": DECODER, "tuning": {"kind": "full"}}
        segmenter = build_segmenter(SegmenterConfig.model_validate(whole), class_names=NAMES)
        backward(segmenter(some_images(1, 3, 64, 64)))
        gradients.append(dict(segmenter.named_parameters())["encoder.trunk.conv1.weight"].grad)
    torch.testing.assert_close(*gradients)


def test_initial_weights_depend_on_the_seeds_alone():
    first = small_segmenter()
    torch.rand(3)
    second = small_segmenter()
    other = small_segmenter(decoder=DECODER | {"seed": 1})
    states = [s.state_dict() for s in (first, second, other)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    different = {k for k in states[0] if not torch.equal(states[0][k], states[2][k])}
    assert different
    assert all(k.startswith("decoder.") for k in different)


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    small_segmenter()
    assert torch.equal(torch.rand(2), expected)


def test_learning_rates_and_decay_go_where_they_belong():
    tuning = {"kind": "full", "lr_multiplier": 0.1, "layer_decay": 0.5}
    segmenter = small_segmenter("CLIP ViT", tuning=tuning)
    groups = segmenter.parameter_groups(1e-3, 0.05)
    names = {p: n for n, p in segmenter.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == {n for n, _ in segmenter.trainable_parameters()}
    trunk, head = "encoder.trunk.", "decoder.query_decoder."
    expected = {
        f"{head}query_feat.weight": (1e-3, 0.0),
        f"{head}level_embed.weight": (1e-3, 0.0),
        f"{head}layers.0.ffn_norm.weight": (1e-3, 0.0),
        f"{head}layers.0.linear1.weight": (1e-3, 0.05),
        "decoder.pixel_decoder.level_embed": (1e-3, 0.0),
        "decoder.pixel_decoder.lateral.1.weight": (1e-3, 0.0),
        f"{trunk}transformer.resblocks.3.mlp.c_fc.weight": (1e-4, 0.05),
        f"{trunk}transformer.resblocks.2.mlp.c_fc.weight": (5e-5, 0.05),
        f"{trunk}transformer.resblocks.2.ln_1.weight": (5e-5, 0.0),
        f"{trunk}conv1.weight": (1e-4 / 16, 0.05),
        f"{trunk}positional_embedding": (1e-4 / 16, 0.0),
    }
    for name, (rate, decay) in expected.items():
        assert found[name] == (pytest.approx(rate), decay), name


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


def test_pictures_of_several_sizes_are_padded_after_normalising():
    segmenter = small_segmenter().eval()
    images = [some_images(3, 40, 50), some_images(3, 33, 64, seed=1)]
    padded, size = segmenter.prepare(images)
    assert padded.shape == (2, 3, 64, 64)
    assert size == (40, 64)
    alone, _ = segmenter.prepare(images[1][None])
    torch.testing.assert_close(padded[1], alone[0])
    assert padded[0, :, 40:].abs().max() == 0


def test_scores_summed_at_mask_size_are_near_those_summed_at_full_size():
    segmenter = small_segmenter().eval()
    with torch.no_grad():
        output = segmenter(some_images(2, 3, 60, 90))
        coarse = segmenter.semantic(output)
        fine = segmenter.semantic(output, summed="pixel")
        assert coarse.shape == fine.shape == (2, 5, 60, 90)
        assert (coarse - fine).abs().mean() < 0.02 * fine.abs().mean()
        slow = torch.einsum(
            "bqk,bqhw->bkhw",
            output.class_logits_BQK1.softmax(-1)[..., :-1],
            nn.functional.interpolate(output.masks_BQHW, (64, 96), mode="bilinear").sigmoid(),
        )[..., :60, :90]
        torch.testing.assert_close(fine, slow)


def test_a_light_decoder_scores_pixels():
    segmenter = small_segmenter(decoder=DECODER | {"kind": "light"}).eval()
    output = segmenter(some_images(2, 3, 60, 90))
    assert output.masks_BQHW is None
    scores = segmenter.semantic(output, (30, 45))
    assert scores.shape == (2, 5, 30, 45)
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 30, 45))


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


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"decoder": {"width": 250}}, "no multiple of decoder.heads"),
        ({"decoder": {"widht": 256}}, "widht"),
        ({"tuning": {"kind": "rain"}}, "tuning.kind"),
    ],
)
def test_bad_configs_are_refused(sections, message):
    with pytest.raises(ValidationError, match=message):
        SegmenterConfig.model_validate(sections)
