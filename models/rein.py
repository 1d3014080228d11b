"""Rein's token modules: a few learned tokens correct the features after every frozen block.

Source: Wei et al., Rein (CVPR 2024), sections 3.2 and 3.3; written from the paper's formulae.
"""

# B batch, N patches, C channels, L blocks, T tokens, R rank of the token matrices, Q width of the
# linked queries
import math
from collections.abc import Sequence

import torch
from torch import nn

from models.encoders import AfterBlock

PATCH = 16
"""Patch size in the bound of the initial token values (the released code's constant)."""


class TokenCorrection(nn.Module):
    """Tokens for the L blocks of one width; the correction's two linear layers are shared.

    Args:
        blocks: number of blocks L.
        width: channels C of the features.
        tokens: tokens per block.
        rank: rank of the token matrices; None: full matrices.
        query_width: channels of the linked queries; None: no link.
        scale: initial value of the learned factor on the correction; None: fixed at 1, and the
            correction starts at zero instead.
        softmax: normalise the similarities over the tokens.
    """

    def __init__(
        self,
        blocks: int,
        width: int,
        *,
        tokens: int = 100,
        rank: int | None = 16,
        query_width: int | None = 256,
        scale: float | None = 0.001,
        softmax: bool = True,
    ):
        super().__init__()
        self.softmax = softmax
        if rank is None:
            self.tokens_LTC = nn.Parameter(torch.empty(blocks, tokens, width))
            factors, spread = [self.tokens_LTC], width
        else:
            self.tokens_a_LTR = nn.Parameter(torch.empty(blocks, tokens, rank))
            self.tokens_b_LRC = nn.Parameter(torch.empty(blocks, rank, width))
            factors, spread = [self.tokens_a_LTR, self.tokens_b_LRC], math.sqrt(width * rank)
        bound = math.sqrt(6 / (3 * PATCH**2 + spread))
        for factor in factors:
            nn.init.uniform_(factor, -bound, bound)
        self.scale = None if scale is None else nn.Parameter(torch.tensor(float(scale)))
        self.token_to_feature = nn.Linear(width, width)
        self.correction = nn.Linear(width, width)
        for linear in (self.token_to_feature, self.correction):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        if scale is None:
            nn.init.zeros_(self.correction.weight)
            nn.init.zeros_(self.correction.bias)
        if query_width is not None:
            self.to_query = nn.Linear(width, query_width)
            self.merge = nn.Linear(3 * query_width, query_width)
        self.linked = query_width is not None

    def all_tokens(self) -> torch.Tensor:
        """The tokens of all blocks, [L, T, C]."""
        if hasattr(self, "tokens_LTC"):
            return self.tokens_LTC
        return self.tokens_a_LTR @ self.tokens_b_LRC

    def forward(self, features_BNC: torch.Tensor, block: int) -> torch.Tensor:
        """Correct the patch features after one block; same shape out as in."""
        if hasattr(self, "tokens_LTC"):
            tokens_TC = self.tokens_LTC[block]
        else:
            tokens_TC = self.tokens_a_LTR[block] @ self.tokens_b_LRC[block]
        similarity_BNT = features_BNC @ tokens_TC.T
        if self.softmax:
            similarity_BNT = (similarity_BNT * features_BNC.shape[-1] ** -0.5).softmax(-1)
        # The first token only absorbs: features that need no correction attend to it.
        found_BNC = similarity_BNT[..., 1:] @ self.token_to_feature(tokens_TC[1:])
        correction_BNC = self.correction(found_BNC + features_BNC)
        if self.scale is None:
            return features_BNC + correction_BNC
        return torch.addcmul(features_BNC, correction_BNC, self.scale.to(correction_BNC.dtype))

    def queries(self) -> torch.Tensor | None:
        """Linked queries [T, Q]: maximum, mean and last over the blocks, merged; None if unlinked.

        The three are interleaved channel by channel, as in released checkpoints.
        """
        if not self.linked:
            return None
        queries_LTQ = self.to_query(self.all_tokens())
        three = [queries_LTQ.amax(0), queries_LTQ.mean(0), queries_LTQ[-1]]
        return self.merge(torch.stack(three, -1).flatten(-2))


class ReinTokens(nn.Module):
    """Token modules of a whole encoder: one module per width (plain transformers have one).

    Args:
        blocks: blocks of each stage.
        widths: channels of each stage.
        options: of each `TokenCorrection`.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], **options: int | float | bool | None
    ):
        super().__init__()
        self.stages = nn.ModuleList(
            TokenCorrection(n, c, **options) for n, c in zip(blocks, widths, strict=True)
        )

    def after_block(self, prefix: int) -> AfterBlock:
        """What the encoder calls after each block; `prefix` tokens pass unchanged."""

        def correct(x: torch.Tensor, stage: int, block: int) -> torch.Tensor:
            module = self.stages[stage]
            if x.ndim == 4:
                corrected_BNC = module(x.flatten(2).transpose(1, 2), block)
                return corrected_BNC.transpose(1, 2).unflatten(2, x.shape[-2:])
            if prefix == 0:
                return module(x, block)
            return torch.cat([x[:, :prefix], module(x[:, prefix:], block)], 1)

        return correct

    def queries(self) -> torch.Tensor | None:
        """Linked queries [T, Q], summed over the stages; None if unlinked."""
        found = [stage.queries() for stage in self.stages]
        return None if found[0] is None else torch.stack(found).sum(0)
