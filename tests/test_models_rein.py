"""Rein's tokens: the formula step by step, and what they leave alone."""

import math

import pytest
import torch

from models.rein import ReinTokens, TokenCorrection


def test_the_correction_follows_the_formula():
    torch.manual_seed(0)
    module = TokenCorrection(3, 8, tokens=5, rank=2, query_width=None, scale=0.3)
    features = torch.randn(2, 7, 8)
    corrected = module(features, 1)
    tokens = module.tokens_a_LTR[1] @ module.tokens_b_LRC[1]
    for b in range(2):
        for n in range(7):
            f = features[b, n]
            attention = torch.softmax(torch.stack([f @ t for t in tokens]) / math.sqrt(8), 0)
            found = sum(
                a * module.token_to_feature(t)
                for a, t in zip(attention[1:], tokens[1:], strict=True)
            )
            expected = f + 0.3 * module.correction(found + f)
            torch.testing.assert_close(corrected[b, n], expected)


@pytest.mark.parametrize("rank", [None, 4])
def test_initial_tokens_keep_within_their_bound(rank):
    torch.manual_seed(0)
    module = TokenCorrection(4, 64, tokens=50, rank=rank)
    spread = 64 if rank is None else math.sqrt(64 * rank)
    bound = math.sqrt(6 / (3 * 256 + spread))
    factors = [p for n, p in module.named_parameters() if n.startswith("tokens")]
    for factor in factors:
        assert factor.abs().max() <= bound
        assert factor.abs().max() > 0.95 * bound


def test_class_tokens_and_maps_keep_their_place():
    torch.manual_seed(0)
    tokens = ReinTokens([2, 1], [8, 6], tokens=5, rank=2, query_width=4)
    x = torch.randn(2, 10, 8)
    out = tokens.after_block(2)(x, 0, 1)
    assert torch.equal(out[:, :2], x[:, :2])
    torch.testing.assert_close(out[:, 2:], tokens.stages[0](x[:, 2:], 1))
    feature = torch.randn(2, 6, 3, 5)
    out = tokens.after_block(0)(feature, 1, 0)
    expected = tokens.stages[1](feature.flatten(2).mT, 0)
    torch.testing.assert_close(out.flatten(2).mT, expected)


def test_queries_of_the_stages_are_summed():
    torch.manual_seed(0)
    tokens = ReinTokens([2, 1], [8, 6], tokens=5, rank=2, query_width=4)
    expected = tokens.stages[0].queries() + tokens.stages[1].queries()
    torch.testing.assert_close(tokens.queries(), expected)
    assert tokens.queries().shape == (5, 4)
    assert ReinTokens([2], [8], query_width=None).queries() is None
