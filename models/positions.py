"""Sine position codes of a feature map, as Mask2Former and CLOUDS use them."""

# C channels, H W height and width of the feature map
import math

import torch


def sine_positions(
    height: int, width: int, channels: int, *, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Position codes [H * W, C], float32: half of the channels for y, then half for x.

    Rows and columns are counted from 1, normalised to 2 pi over the map; sine on even and cosine
    on odd channels, temperature 10000 (Carion et al., DETR, ECCV 2020).
    """
    half = channels // 2
    frequency = torch.arange(half, dtype=torch.float32, device=device)
    frequency = 10000 ** (2 * torch.div(frequency, 2, rounding_mode="floor") / half)

    def code(size: int) -> torch.Tensor:
        steps = torch.arange(1, size + 1, dtype=torch.float32, device=device)
        angles = (steps / (size + 1e-6) * (2 * math.pi))[:, None] / frequency
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1)

    codes_HWC = torch.cat(
        [
            code(height)[:, None].expand(height, width, half),
            code(width)[None, :].expand(height, width, half),
        ],
        dim=2,
    )
    return codes_HWC.reshape(height * width, channels)
