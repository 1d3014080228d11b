"""The multi-scale deformable pixel decoder: backbone features to mask features and three levels.

Source: Cheng et al., Mask2Former (CVPR 2022), section 3.2.2, in the form of CLOUDS.
"""

# B batch, C channels of the decoder, S positions of the levels together, H W size of a map
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.deformable import DeformableAttention
from models.positions import sine_positions


class PixelFeatures(NamedTuple):
    """What the query decoder works on."""

    masks_BCHW: torch.Tensor
    """Per-pixel embeddings at stride 4."""
    levels_BCHW: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Features at strides 32, 16, 8."""
    positions_NC: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Sine position codes of the three levels, [H * W, C] each, float32."""


class PixelDecoderLayer(nn.Module):
    """Deformable self-attention over all levels and a feed-forward block, post-norm."""

    def __init__(self, width: int, *, heads: int, levels: int, points: int, ffn: int):
        super().__init__()
        self.attention = DeformableAttention(width, heads=heads, levels=levels, points=points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, ffn)
        self.linear2 = nn.Linear(ffn, width)
        self.norm2 = nn.LayerNorm(width)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        source_BSC: torch.Tensor,
        positions_SC: torch.Tensor,
        centres_S2: torch.Tensor,
        shapes: Sequence[tuple[int, int]],
        pixel_steps_L2: torch.Tensor,
    ) -> torch.Tensor:
        """One layer; same shape out as `source_BSC` in."""
        attended = self.attention(
            source_BSC + positions_SC, centres_S2, source_BSC, shapes, pixel_steps_L2
        )
        source_BSC = self.norm1(source_BSC + attended)
        widened = F.relu(self.linear1(source_BSC), inplace=True)
        return self.norm2(source_BSC + self.linear2(widened))


class PixelDecoder(nn.Module):
    """Strides 32, 16 and 8 talk to each other; stride 4 joins through one lateral connection.

    Args:
        channels: channels of the encoder's features at strides 4, 8, 16, 32.
        width: channels inside and out.
        heads: attention heads.
        layers: deformable layers.
        ffn: hidden width of the feed-forward blocks.
        points: sampling points per head and level.
        groups: groups of the GroupNorms.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        width: int,
        heads: int,
        layers: int,
        ffn: int,
        points: int,
        groups: int,
    ):
        super().__init__()
        # Strides 32, 16, 8, in this order.
        self.inputs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1), nn.GroupNorm(groups, width))
            for c in reversed(channels[1:])
        )
        self.level_embed = nn.Parameter(torch.randn(3, width))
        self.layers = nn.ModuleList(
            PixelDecoderLayer(width, heads=heads, levels=3, points=points, ffn=ffn)
            for _ in range(layers)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(channels[0], width, 1, bias=False), nn.GroupNorm(groups, width)
        )
        self.output = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(groups, width),
            nn.ReLU(inplace=True),
        )
        self.mask_features = nn.Conv2d(width, width, 1)
        for projection in self.inputs:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for convolution in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, features_BCHW: Sequence[torch.Tensor]) -> PixelFeatures:
        """From the encoder's features at strides 4, 8, 16, 32."""
        # 1. The three coarse levels as one sequence.
        maps = [
            project(feature)
            for project, feature in zip(self.inputs, reversed(features_BCHW[1:]), strict=True)
        ]
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        sizes = [h * w for h, w in shapes]
        source_BSC = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)

        # 2. Where each position is, in numbers and in codes.
        device, channels = source_BSC.device, source_BSC.shape[2]
        sines = tuple(sine_positions(h, w, channels, device=device) for h, w in shapes)
        positions_SC = torch.cat([s + e for s, e in zip(sines, self.level_embed, strict=True)])
        centres_S2 = torch.cat([cell_centres(h, w, device=device) for h, w in shapes])

        pixel_steps_L2 = torch.tensor([[1 / w, 1 / h] for h, w in shapes], device=device)

        # 3. The levels talk.
        source_BSC = source_BSC.contiguous()
        for layer in self.layers:
            source_BSC = layer(source_BSC, positions_SC, centres_S2, shapes, pixel_steps_L2)
        levels = tuple(
            part.transpose(1, 2).unflatten(2, shape)
            for part, shape in zip(source_BSC.split(sizes, dim=1), shapes, strict=True)
        )

        # 4. Stride 4 joins.
        lateral = self.lateral(features_BCHW[0])
        upsampled = F.interpolate(
            levels[2].contiguous(), size=lateral.shape[-2:], mode="bilinear", align_corners=False
        )
        masks_BCHW = self.mask_features(self.output(lateral + upsampled))
        return PixelFeatures(masks_BCHW, levels, sines)


def cell_centres(height: int, width: int, *, device: torch.device) -> torch.Tensor:
    """Centres of a map's cells as (x, y) in [0, 1], row-major, [H * W, 2], float32."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], 2).view(-1, 2)
