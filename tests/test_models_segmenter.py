"""The segmenter as a whole: encoders, tunings, what is trained, padding, scores."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from models.build import build_segmenter
from models.config import SegmenterConfig
from models.segmenter import SegmenterOutput
from tests.small_segmenters import (
    DECODER,
    ENCODERS,
    NAMES,
    small_segmenter,
    some_images,
)


def backward(output: SegmenterOutput) -> None:
    terms = [x for p in output.predictions for x in p]
    sum(term.float().square().mean() for term in terms).backward()


@pytest.mark.parametrize("tuning", ["frozen", "full", "rein", "lora"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_exactly_what_the_tuning_says_is_trained(encoder, tuning):
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
    assert bool(own) == (tuning in ("full", "lora"))
    assert any(n.startswith("tokens.") for n in graded) == (tuning == "rein")


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


def test_norms_keep_their_statistics_beside_low_rank_updates():
    segmenter = small_segmenter(tuning={"kind": "lora", "lora_rank": 2}).train()
    before = {k: v.clone() for k, v in segmenter.encoder.state_dict().items() if "running" in k}
    segmenter(some_images(2, 3, 64, 64))
    after = segmenter.encoder.state_dict()
    assert before
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
