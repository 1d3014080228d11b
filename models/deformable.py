"""Multi-scale deformable attention, built on grid_sample: no compiled operator is needed.

Source: Zhu et al., Deformable DETR (ICLR 2021), section 4; used as in Mask2Former.
"""

# B batch, N query positions, S positions of all levels together, M heads, D channels of a head,
# C = M * D channels, L levels, P points per level, H W height and width of a level
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


def deformable_attention(
    values_BSMD: torch.Tensor,
    shapes: Sequence[tuple[int, int]],
    locations_BMLPN2: torch.Tensor,
    weights_BMLPN: torch.Tensor,
) -> torch.Tensor:
    """Weighted sums of values sampled bilinearly at fractional places; zeros outside.

    Args:
        values_BSMD: values of all levels, one level after another, row-major.
        shapes: (height, width) of each level.
        locations_BMLPN2: (x, y) in [0, 1] across a level (pixel centres at (i + 0.5) / size).
        weights_BMLPN: attention weights; they sum to 1 over L and P.

    Returns:
        Attended values [B, N, M * D].
    """
    B, S, M, D = values_BSMD.shape
    _, _, L, P, N, _ = locations_BMLPN2.shape
    # Everything in the precision of the places: bf16 has 8 bits for 768 pixels.
    values_BSMD = values_BSMD.to(locations_BMLPN2.dtype)
    planes = values_BSMD.permute(0, 2, 3, 1).reshape(B * M, D, S)
    grids = (2 * locations_BMLPN2 - 1).reshape(B * M, L, P, N, 2)
    weights = weights_BMLPN.to(values_BSMD.dtype).reshape(B * M, L, P, N)
    attended = None
    for level, (plane, (height, width)) in enumerate(
        zip(planes.split([h * w for h, w in shapes], dim=2), shapes, strict=True)
    ):
        sampled = F.grid_sample(
            plane.unflatten(2, (height, width)), grids[:, level], align_corners=False
        )
        part = WeightedSum.apply(sampled, weights[:, level])
        attended = part if attended is None else attended + part
    return attended.reshape(B, M * D, N).transpose(1, 2)


class WeightedSum(torch.autograd.Function):
    """Sum over points of samples [X, D, P, N] times weights [X, P, N], without the products.

    A product of the size of the samples is never written in the forward pass, and only that which
    is a gradient in the backward pass: a third faster on a CPU than multiplying and summing.
    """

    @staticmethod
    def forward(ctx, samples_XDPN: torch.Tensor, weights_XPN: torch.Tensor) -> torch.Tensor:
        """The sums, [X, D, N]."""
        ctx.save_for_backward(samples_XDPN, weights_XPN)
        total = samples_XDPN[:, :, 0] * weights_XPN[:, None, 0]
        for point in range(1, samples_XDPN.shape[2]):
            total.addcmul_(samples_XDPN[:, :, point], weights_XPN[:, None, point])
        return total

    @staticmethod
    def backward(ctx, gradient_XDN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of samples and weights."""
        samples_XDPN, weights_XPN = ctx.saved_tensors
        of_weights = [
            (samples_XDPN[:, :, point] * gradient_XDN).sum(1)
            for point in range(samples_XDPN.shape[2])
        ]
        return gradient_XDN[:, :, None] * weights_XPN[:, None], torch.stack(of_weights, 1)


class DeformableAttention(nn.Module):
    """Attention of each position to a few learned places around it on every level."""

    def __init__(self, width: int, *, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._reset()

    def _reset(self) -> None:
        """Start with each head looking in its own direction, point p at distance p + 1."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = directions[:, None, None, :] * steps[None, None, :, None]
        bias = bias.expand(self.heads, self.levels, self.points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.reshape(-1))
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        queries_BNC: torch.Tensor,
        centres_N2: torch.Tensor,
        source_BSC: torch.Tensor,
        shapes: Sequence[tuple[int, int]],
        pixel_steps_L2: torch.Tensor,
    ) -> torch.Tensor:
        """Attend from each query, around its centre, to the source.

        Args:
            queries_BNC: positions that ask, position codes included.
            centres_N2: their places as (x, y) in [0, 1], the same on every level.
            source_BSC: what is sampled, level after level.
            shapes: (height, width) of each level.
            pixel_steps_L2: width and height of a pixel of each level, as shares of the level.

        Returns:
            Attended source, [B, N, C].
        """
        B, N, _ = queries_BNC.shape
        M, L, P = self.heads, self.levels, self.points
        values_BSMD = self.value_proj(source_BSC).unflatten(2, (M, -1))
        # Offsets are in pixels of their level.
        offsets = self.sampling_offsets(queries_BNC).float().view(B, N, M, L, P, 2)
        offsets_BMLPN2 = offsets.permute(0, 2, 3, 4, 1, 5)
        steps_L112 = pixel_steps_L2[:, None, None]
        locations_BMLPN2 = torch.addcmul(centres_N2.expand(L, P, N, 2), offsets_BMLPN2, steps_L112)
        weights = self.attention_weights(queries_BNC).view(B, N, M, L * P).softmax(-1)
        weights_BMLPN = weights.permute(0, 2, 3, 1).unflatten(2, (L, P))
        attended_BNC = deformable_attention(values_BSMD, shapes, locations_BMLPN2, weights_BMLPN)
        return self.output_proj(attended_BNC)
