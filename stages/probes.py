"""Light heads above CLIP towers, by which the miniature's networks are judged."""

# B pictures, H W height and width

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.config import DecoderConfig, EncoderConfig, SegmenterConfig, TuningConfig
from models.miniature.renderer import Picture
from models.segmenter import Segmenter
from stages.pretrain_config import ProbeConfig


def probe_config(clip: Path | str, *, weights: bool, trained: bool) -> SegmenterConfig:
    """A light head above a CLIP's tower.

    Args:
        clip: folder of the CLIP.
        weights: with its weights, else fresh ones of the same sizes.
        trained: whether the tower learns too.
    """
    return SegmenterConfig(
        encoder=EncoderConfig(name=f"local-dir:{clip}", weights=str(clip) if weights else None),
        tuning=TuningConfig(kind="full" if trained else "frozen", lr_multiplier=1.0),
        decoder=DecoderConfig(kind="light", width=64, group_norm=8),
    )


def learn(segmenter: Segmenter, pictures: list[Picture], config: ProbeConfig, seed: int) -> None:
    """Train whatever of a segmenter is not frozen on rendered pictures and their true labels."""
    parameters = [p for p in segmenter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.head_steps, pct_start=0.1
    )
    segmenter.train()
    for step in range(config.head_steps):
        generator = np.random.default_rng([seed, step])
        chosen = [pictures[i] for i in generator.integers(0, len(pictures), config.batch_size)]
        images, labels = batch_of(chosen)
        images = _jitter(images, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = segmenter(images)
        logits = output.pixel_logits_BKHW.float()
        logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels.long(), ignore_index=255)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def _jitter(images_B3HW: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast and saturation of each picture, as every case sees it."""
    shape = (len(images_B3HW), 1, 1, 1)
    gain, contrast, colour = (
        torch.from_numpy(generator.uniform(0.6, 1.4, shape).astype(np.float32)) for _ in range(3)
    )
    images = images_B3HW.float() * gain
    images = (images - 128) * contrast + 128
    grey = images.mean(1, keepdim=True)
    return ((images - grey) * colour + grey).clamp(0, 255)


def batch_of(pictures: list[Picture]) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pictures [B, 3, H, W] and miniature train ids [B, H, W]."""
    images = np.stack([picture.image_HW3 for picture in pictures])
    labels = np.stack([picture.labels_HW for picture in pictures])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
