"""Build `segment_anything`'s Sam from the sizes in a `config.json`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn

SIZES: dict[str, Any] = {
    "image_size": 128,
    "patch_size": 4,
    "vit_stem": "convolutions",
    "vit_embed_dim": 128,
    "vit_depth": 2,
    "vit_heads": 4,
    "vit_window": 16,
    "vit_global_attn_indexes": [],
    "prompt_embed_dim": 128,
    "mask_in_chans": 16,
    "decoder_depth": 2,
    "decoder_mlp_dim": 256,
    "decoder_heads": 4,
    "iou_head_depth": 3,
    "iou_head_hidden_dim": 64,
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}
"""The miniature's sizes. Pictures of 64x128 fill the upper half of the input, as SAM pads.

Patches of 4 make the mask grid as fine as the picture: with patches of 8 masks of regions below
256 pixels were hardly better than their prompts. Windows of 16 cut the 32x32 patches where the
picture ends, so that nothing of the padding enters the picture's embedding.
"""


TINY_SIZES = SIZES | {"patch_size": 8, "vit_window": 8}
"""A quarter of the patches: for tests, and the miniature's first SAM."""


class EarlyConvolutions(nn.Module):
    """Convolutions in place of the patch embedding: [B, 3, H, W] to [B, H/p, W/p, C], p 4 or 8.

    A transformer on bare patches learns edges slowly from few pictures; convolutions begin with
    them (Xiao et al., Early Convolutions Help Transformers See Better, NeurIPS 2021). Finer maps
    than the patches are folded into them, so that masks can be finer than a patch; coarser ones
    are repeated.
    """

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        if patch_size not in (4, 8):
            raise ValueError(f"vit_stem convolutions: patch_size {patch_size}, not 4 or 8")
        self.stride2 = ConvolutionBlock(3, 24)
        self.stride4 = ConvolutionBlock(24, 48)
        self.stride8 = ConvolutionBlock(48, 96)
        step2, step4 = patch_size // 2, patch_size // 4
        width2, width4 = (8, 24) if patch_size == 8 else (16, 48)
        self.fold2 = nn.Sequential(nn.Conv2d(24, width2, 1), nn.PixelUnshuffle(step2))
        self.fold4 = nn.Sequential(nn.Conv2d(48, width4, 1), nn.PixelUnshuffle(step4))
        self.repeat8 = nn.Upsample(scale_factor=8 // patch_size, mode="nearest")
        self.join = nn.Conv2d(96 + width2 * step2**2 + width4 * step4**2, dim, 1)

    def forward(self, x_B3HW: torch.Tensor) -> torch.Tensor:
        """Patch embeddings, channels last as `ImageEncoderViT` wants them."""
        fine = self.stride2(x_B3HW)
        middle = self.stride4(fine)
        coarse = self.repeat8(self.stride8(middle))
        joined = self.join(torch.cat([coarse, self.fold2(fine), self.fold4(middle)], 1))
        return joined.permute(0, 2, 3, 1)


class ConvolutionBlock(nn.Module):
    """A residual pair of 3x3 convolutions; the first steps down by two."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.down = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, width)
        self.refine = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, width)
        self.skip = nn.Conv2d(channels, width, 1, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Half the height and width, `width` channels."""
        hidden = torch.relu(self.norm1(self.down(x)))
        return torch.relu(self.skip(x) + self.norm2(self.refine(hidden)))


def build_sam(sizes: dict[str, Any]) -> Sam:
    """A Sam of the given sizes with fresh weights, in eval mode."""
    grid = sizes["image_size"] // sizes["patch_size"]
    dim = sizes["prompt_embed_dim"]
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
            embed_dim=sizes["vit_embed_dim"],
            depth=sizes["vit_depth"],
            num_heads=sizes["vit_heads"],
            out_chans=dim,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=sizes["vit_window"],
            global_attn_indexes=tuple(sizes["vit_global_attn_indexes"]),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(grid, grid),
            input_image_size=(sizes["image_size"], sizes["image_size"]),
            mask_in_chans=sizes["mask_in_chans"],
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=sizes["decoder_depth"],
                embedding_dim=dim,
                mlp_dim=sizes["decoder_mlp_dim"],
                num_heads=sizes["decoder_heads"],
            ),
            transformer_dim=dim,
            iou_head_depth=sizes["iou_head_depth"],
            iou_head_hidden_dim=sizes["iou_head_hidden_dim"],
        ),
        pixel_mean=sizes["pixel_mean"],
        pixel_std=sizes["pixel_std"],
    )
    _attend_to_positions(sam.mask_decoder.transformer)
    match sizes["vit_stem"]:
        case "convolutions":
            stem = EarlyConvolutions(sizes["vit_embed_dim"], sizes["patch_size"])
            sam.image_encoder.patch_embed = stem
            _begin_as_identity(sam.image_encoder.blocks)
        case "patches":
            pass
        case other:
            raise ValueError(f"vit_stem {other!r} is unknown; known: convolutions, patches")
    return sam.eval()


POSITION_SHARPNESS = 1.8
"""Scale of the first cross-attention: logits of about 6 where a prompt lies, 0 far from it."""


def _attend_to_positions(transformer: nn.Module) -> None:
    """Let prompts and pixels begin by attending to each other where they lie.

    Both carry the same position code, so equal orthonormal projections of queries and keys make
    attention fall off with distance (about ten pixels); learning that from nothing takes long.
    """
    crossings = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossings += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in crossings:
        nn.init.orthogonal_(attention.q_proj.weight, gain=POSITION_SHARPNESS)
        with torch.no_grad():
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.q_proj.bias.zero_()
            attention.k_proj.bias.zero_()


def _begin_as_identity(blocks: nn.ModuleList) -> None:
    """Let residual branches begin at nought, so that training begins with the convolutions."""
    for block in blocks:
        for layer in (block.attn.proj, block.mlp.lin2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def read_sizes(folder: Path) -> dict[str, Any]:
    """The sizes in `folder/config.json`."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
