"""Whole decoders, from an encoder's four maps to the fields of `SegmenterOutput`."""

# B batch, Q mask queries, K classes, C channels, H W size of a map
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.decoder import QueryDecoder
from models.pixel_decoder import PixelDecoder
from models.text import LanguageGuidance


class MaskHead(nn.Module):
    """Deformable pixel decoder and masked-attention queries."""

    def __init__(self, pixel_decoder: PixelDecoder, query_decoder: QueryDecoder):
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.query_decoder = query_decoder

    def forward(
        self, features_BCHW: Sequence[torch.Tensor], linked_QC: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """Fields `class_logits_BQK1`, `masks_BQHW` and `aux`."""
        *aux, final = self.query_decoder(self.pixel_decoder(features_BCHW), linked_QC)
        return {
            "class_logits_BQK1": final.class_logits_BQK1,
            "masks_BQHW": final.masks_BQHW,
            "aux": tuple(aux),
        }


class GuidedHead(nn.Module):
    """Any head, with score maps of the class names beside the coarsest features."""

    def __init__(self, guidance: LanguageGuidance, head: nn.Module):
        super().__init__()
        self.guidance = guidance
        self.head = head

    def forward(
        self, features_BCHW: Sequence[torch.Tensor], linked_QC: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """The head's fields and `text_scores_BKHW`."""
        *finer, coarse = features_BCHW
        scores = self.guidance(coarse)
        guided = [*finer, torch.cat([coarse, scores.to(coarse.dtype)], 1)]
        return self.head(guided, linked_QC) | {"text_scores_BKHW": scores}


class LightHead(nn.Module):
    """Features of all levels joined at stride 16, two transposed convolutions, a score per class.

    Args:
        channels: channels of the encoder's features at strides 4, 8, 16, 32.
        width: channels inside.
        classes: number of classes.
        groups: groups of the GroupNorms.
    """

    def __init__(self, channels: Sequence[int], *, width: int, classes: int, groups: int):
        super().__init__()
        self.inputs = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.join = nn.Sequential(
            nn.Conv2d(4 * width, width, 1, bias=False),
            nn.GroupNorm(groups, width),
            nn.GELU(),
        )
        self.upsample = nn.Sequential(
            *upsampling(width, groups),
            *upsampling(width, groups),
        )
        self.lateral = nn.Conv2d(channels[0], width, 1)
        self.classify = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, classes, 1)
        )

    def forward(
        self, features_BCHW: Sequence[torch.Tensor], linked_QC: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """Field `pixel_logits_BKHW`, at stride 4."""
        size = features_BCHW[2].shape[-2:]
        # Projection and resizing commute (both linear): the cheaper of the two comes first.
        resized = [
            F.adaptive_avg_pool2d(project(x), size)
            if x.shape[-1] > size[-1]
            else F.interpolate(project(x), size=size, mode="bilinear", align_corners=False)
            for project, x in zip(self.inputs, features_BCHW, strict=True)
        ]
        upsampled = self.upsample(self.join(torch.cat(resized, 1)))
        fine = features_BCHW[0]
        if upsampled.shape[-2:] != fine.shape[-2:]:
            upsampled = F.interpolate(
                upsampled, size=fine.shape[-2:], mode="bilinear", align_corners=False
            )
        return {"pixel_logits_BKHW": self.classify(upsampled + self.lateral(fine))}


def upsampling(width: int, groups: int) -> list[nn.Module]:
    """A transposed convolution to twice the size, with norm and activation."""
    return [
        nn.ConvTranspose2d(width, width, 2, stride=2, bias=False),
        nn.GroupNorm(groups, width),
        nn.GELU(),
    ]
