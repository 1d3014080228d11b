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

SIZES: dict[str, Any] = {
    "image_size": 128,
    "patch_size": 8,
    "vit_embed_dim": 128,
    "vit_depth": 5,
    "vit_heads": 4,
    "vit_window": 8,
    "vit_global_attn_indexes": [1, 4],
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
"""The shipped sizes. Pictures of 64x128 fill the upper half of the 128x128 input, as SAM pads."""


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
    return sam.eval()


def read_sizes(folder: Path) -> dict[str, Any]:
    """The sizes in `folder/config.json`."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
