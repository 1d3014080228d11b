"""The mask decoder's parts against plain slow versions, forward and backward."""

import pytest
import torch
from torch import nn

from models.decoder import QueryDecoder, seen_places
from models.deformable import DeformableAttention, deformable_attention
from models.heads import LightHead, MaskHead
from models.pixel_decoder import PixelDecoder
from models.positions import sine_positions

SHAPES = [(2, 3), (4, 5)]


def slow_deformable_attention(values_BSMD, shapes, locations_BMLPN2, weights_BMLPN):
    """Bilinear sampling pixel by pixel, as the formula says; zeros outside."""
    B, _, M, D = values_BSMD.shape
    _, _, L, P, N, _ = locations_BMLPN2.shape
    starts = [0]
    for height, width in shapes:
        starts.append(starts[-1] + height * width)
    rows = []
    for b in range(B):
        for n in range(N):
            heads = []
            for m in range(M):
                total = torch.zeros(D, dtype=values_BSMD.dtype)
                for level, (height, width) in enumerate(shapes[:L]):
                    for p in range(P):
                        x, y = locations_BMLPN2[b, m, level, p, n]
                        x, y = x * width - 0.5, y * height - 0.5
                        left, top = int(torch.floor(x)), int(torch.floor(y))
                        for row in (top, top + 1):
                            for column in (left, left + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    share = (1 - (x - column).abs()) * (1 - (y - row).abs())
                                    place = starts[level] + row * width + column
                                    weight = weights_BMLPN[b, m, level, p, n]
                                    total = total + weight * share * values_BSMD[b, place, m]
                heads.append(total)
            rows.append(torch.cat(heads))
    return torch.stack(rows).view(B, N, M * D)


def test_deformable_attention_equals_sampling_pixel_by_pixel_forward_and_backward():
    torch.manual_seed(0)
    positions = sum(h * w for h, w in SHAPES)
    inputs = [
        torch.randn(2, positions, 2, 3, dtype=torch.float64, requires_grad=True),
        # some places lie outside of the map
        (torch.rand(2, 2, 2, 2, 4, 2, dtype=torch.float64) * 1.6 - 0.3).requires_grad_(),
        torch.rand(2, 2, 2, 2, 4, dtype=torch.float64, requires_grad=True),
    ]
    values, locations, weights = inputs
    upstream = torch.randn(2, 4, 6, dtype=torch.float64)
    results = []
    for function in (deformable_attention, slow_deformable_attention):
        out = function(values, SHAPES, locations, weights)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for ours, slow in zip(*results, strict=True):
        torch.testing.assert_close(ours, slow)


def test_deformable_attention_starts_with_each_head_looking_its_own_way():
    attention = DeformableAttention(16, heads=4, levels=1, points=2)
    offsets = attention.sampling_offsets.bias.view(4, 2, 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    torch.testing.assert_close(offsets[:, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(offsets[:, 1], 2 * expected, atol=1e-6, rtol=0)


def test_sine_positions_follow_their_formula():
    codes = sine_positions(3, 4, 8).view(3, 4, 8)
    y, x = 2, 1
    for axis, (place, size) in enumerate(((y, 3), (x, 4))):
        angle = torch.tensor((place + 1) / (size + 1e-6) * 2 * torch.pi)
        part = codes[y, x, 4 * axis : 4 * axis + 4]
        expected = torch.stack([angle.sin(), angle.cos(), (angle / 100).sin(), (angle / 100).cos()])
        torch.testing.assert_close(part, expected)


def test_a_query_that_sees_nothing_sees_everything():
    embeddings = torch.tensor([[[1.0], [-1.0]]])
    features = torch.tensor([[[0.5, -0.5, 2.0]]])
    seen = seen_places(embeddings, features)
    assert seen[0, 0].tolist() == [True, False, True]
    assert seen[0, 1].tolist() == [False, True, False]
    assert seen_places(embeddings, features.abs())[0].tolist() == [[True] * 3, [True] * 3]


def small_head(layers: int = 4) -> MaskHead:
    torch.manual_seed(0)
    pixel_decoder = PixelDecoder(
        (4, 8, 12, 16), width=16, heads=2, layers=1, ffn=32, points=2, groups=4
    )
    query_decoder = QueryDecoder(
        nn.Linear(16, 6), width=16, queries=5, layers=layers, heads=2, ffn=32
    )
    return MaskHead(pixel_decoder, query_decoder)


def some_features(batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(batch, c, s, s + 2) for c, s in zip((4, 8, 12, 16), (16, 8, 4, 2), strict=True)
    ]


def test_evaluation_gives_the_last_prediction_of_training():
    head, features = small_head(), some_features()
    trained, evaluated = head.train()(features), head.eval()(features)
    assert len(trained["aux"]) == 4
    assert evaluated["aux"] == ()
    for name in ("class_logits_BQK1", "masks_BQHW"):
        torch.testing.assert_close(trained[name], evaluated[name])


def test_a_picture_is_decoded_the_same_alone_and_in_a_batch():
    head, features = small_head().eval(), some_features()
    together = head(features)["masks_BQHW"]
    alone = head([f[1:] for f in features])["masks_BQHW"]
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_every_parameter_of_the_decoder_gets_a_gradient():
    head = small_head().train()
    for layer in head.pixel_decoder.layers:  # zero at first, so that positions have no effect yet
        nn.init.normal_(layer.attention.sampling_offsets.weight)
        nn.init.normal_(layer.attention.attention_weights.weight)
    out = head(some_features())
    terms = [out["class_logits_BQK1"], out["masks_BQHW"], *(x for pair in out["aux"] for x in pair)]
    sum(term.square().sum() for term in terms).backward()
    without = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("size", [(16, 18), (15, 17)])
def test_light_head_scores_every_place_of_the_finest_map(size):
    torch.manual_seed(0)
    head = LightHead((4, 8, 12, 16), width=16, classes=5, groups=4)
    height, width = size
    features = [
        torch.randn(2, c, -(-height // s), -(-width // s))
        for c, s in zip((4, 8, 12, 16), (1, 2, 4, 8), strict=True)
    ]
    logits = head(features)["pixel_logits_BKHW"]
    assert logits.shape == (2, 5, *size)
