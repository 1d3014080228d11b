"""Small segmenters of every kind, for tests."""

import torch

from models.build import build_segmenter
from models.config import SegmenterConfig
from models.segmenter import Segmenter

NAMES = ["road", "sky", "car", "tree", "person"]
DECODER = {
    "width": 32,
    "queries": 6,
    "layers": 3,
    "heads": 4,
    "ffn": 48,
    "pixel_layers": 1,
    "pixel_ffn": 48,
    "group_norm": 8,
}
ENCODERS = {
    "CLIP ResNet": {
        "architecture": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "embed_dim": 16}
    },
    "CLIP ConvNeXt": {
        "architecture": {
            "timm_model_name": "convnext_tiny",
            "timm_options": {"depths": [1, 1, 2, 1], "dims": [16, 24, 32, 48]},
        }
    },
    "CLIP ViT": {
        "architecture": {
            "layers": 4,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            "image_size": 32,
            "embed_dim": 16,
        }
    },
    "EVA-02-CLIP": {
        "architecture": {
            "timm_model_name": "eva02_base_patch16_clip_224",
            "timm_options": {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64},
        },
        "pyramid": "learned",
    },
    "DINOv2": {
        "family": "timm",
        "name": "vit_small_patch14_dinov2",
        "architecture": {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 56},
        "patch_size": 16,
    },
    "DINOv3": {
        "family": "timm",
        "name": "vit_small_patch16_dinov3",
        "architecture": {"embed_dim": 32, "depth": 4, "num_heads": 2},
    },
    "ResNet": {"family": "timm", "name": "resnet10t"},
    "MiT": {
        "family": "transformers",
        "name": "mit-b0",
        "architecture": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
    },
    "SAM": {
        "family": "sam",
        "name": "vit_b",
        "architecture": {
            "embed_dim": 32,
            "depth": 4,
            "num_heads": 2,
            "img_size": 64,
            "window_size": 3,
            "global_attn_indexes": [3],
        },
    },
}


def small_config(encoder: str = "CLIP ResNet", **sections: dict) -> SegmenterConfig:
    whole = {"encoder": ENCODERS[encoder], "decoder": DECODER} | sections
    return SegmenterConfig.model_validate(whole)


def small_segmenter(encoder: str = "CLIP ResNet", **sections: dict) -> Segmenter:
    return build_segmenter(small_config(encoder, **sections), class_names=NAMES)


def some_images(*size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
