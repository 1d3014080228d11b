"""What the miniature CLIP learns from: crops with captions, and words that must find their patches.

The captions name everything that is visible, because the pictures are rendered: they are nearer to
weak region labels than to text from the web.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from torch import nn

from models.miniature import materials as m
from models.miniature.captions import describe, describe_crop, visible_labels
from models.miniature.renderer import Picture

# B pictures or crops, C channels, D width of the joint space, P patches, L labels, H W pixels

LABELS: tuple[int, ...] = tuple(m.WORDS)
"""The Cityscapes label ids that captions name."""

CROP_PX = 64
"""Size of the network's square crops."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A picture or crop with its caption."""

    image_HW3: np.ndarray
    """uint8 RGB."""
    caption: str
    named_L: np.ndarray
    """bool, which of `LABELS` the caption names."""


def whole_view(picture: Picture, rng: random.Random) -> View:
    """The whole picture with its caption."""
    ids_HW = picture.label_ids_HW
    caption = describe(ids_HW, picture.attributes, rng)
    return View(image_HW3=picture.image_HW3, caption=caption, named_L=_named(ids_HW))


def crop_views(picture: Picture, rng: random.Random, count: int) -> list[View]:
    """Square crops, resized to `CROP_PX`: the first as high as the picture, the others closer."""
    height, width = picture.label_ids_HW.shape
    views: list[View] = []
    while len(views) < count:
        side = height if not views else rng.randint(3 * height // 8, 3 * height // 4)
        row, column = rng.randint(0, height - side), rng.randint(0, width - side)
        window = slice(row, row + side), slice(column, column + side)
        ids_HW = picture.label_ids_HW[window]
        caption = describe_crop(ids_HW, rng)
        if views and caption is None:
            continue
        if not views:
            caption = describe(ids_HW, picture.attributes, rng)
        image = Image.fromarray(picture.image_HW3[window])
        if side != CROP_PX:
            image = image.resize((CROP_PX, CROP_PX), Image.Resampling.BICUBIC)
        views.append(
            View(image_HW3=np.asarray(image), caption=caption or "", named_L=_named(ids_HW))
        )
    return views


def _named(ids_HW: np.ndarray) -> np.ndarray:
    named = set(visible_labels(ids_HW))
    return np.array([label in named for label in LABELS])


def images_tensor(views: list[View], config: dict[str, object]) -> torch.Tensor:
    """Normalised pictures [B, 3, H, W] float32."""
    images = torch.from_numpy(np.stack([view.image_HW3 for view in views]))
    mean = torch.tensor(config["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(config["std"]).view(1, 3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


class PatchHeads(nn.Module):
    """Training aids, not shipped: map the features of strides 8 and 16 into the joint space.

    Deep patches go through the tower's own attention pool, value and output projection, as in
    dense CLIP
    (Zhou et al., Extract Free Dense Labels from CLIP, section 3.2).
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.stride8 = nn.Conv2d(width * 8, dim, 1)
        self.stride16 = nn.Conv2d(width * 16, dim, 1)
        self.log_scale = nn.Parameter(torch.full((3,), 2.5))
        self.bias = nn.Parameter(torch.full((3,), -2.0))


def tower_features(clip: CLIP, images_B3HW: torch.Tensor) -> list[torch.Tensor]:
    """Features of the image tower at strides 8, 16, 32."""
    tower = clip.visual
    x = tower.layer1(tower.stem(images_B3HW))
    stride8 = tower.layer2(x)
    stride16 = tower.layer3(stride8)
    return [stride8, stride16, tower.layer4(stride16)]


def patch_embeddings(
    clip: CLIP, heads: PatchHeads, features: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Unit vectors of all patches per stride, each [B, P, D] float32."""
    stride8, stride16, stride32 = features
    pool = clip.visual.attnpool
    deep = pool.c_proj(pool.v_proj(stride32.flatten(2).transpose(1, 2)))
    maps = [heads.stride8(stride8), heads.stride16(stride16)]
    return [
        F.normalize(x.float(), dim=-1)
        for x in (*(y.flatten(2).transpose(1, 2) for y in maps), deep)
    ]


def word_losses(
    patches: list[torch.Tensor],
    words_LD: torch.Tensor,
    named_BL: torch.Tensor,
    heads: PatchHeads,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Words match patches, patches match words; both from captions alone.

    1. Pooled over the patches (log-mean-exp), a word's similarity says whether the caption names
    it.
    2. Each patch, choosing among all words, chooses one that the caption names.

    Returns:
        The two losses, averaged over the strides.
    """
    found, chosen = [], []
    for index, patches_BPD in enumerate(patches):
        scale = heads.log_scale[index].clamp(max=4.0).exp()
        scores_BPL = scale * patches_BPD @ words_LD.T
        pooled_BL = torch.logsumexp(scores_BPL, 1) - np.log(scores_BPL.shape[1])
        pooled_BL = 2 * pooled_BL + heads.bias[index]
        found.append(F.binary_cross_entropy_with_logits(pooled_BL, named_BL.float()))
        shares_BPL = scores_BPL.log_softmax(-1)
        allowed_BPL = shares_BPL.masked_fill(~named_BL[:, None], float("-inf"))
        some_B = named_BL.any(1)
        if some_B.any():
            chosen.append(-torch.logsumexp(allowed_BPL[some_B], -1).mean())
    return torch.stack(found).mean(), torch.stack(chosen).mean()


def contrastive_loss(
    images_BD: torch.Tensor, texts_BD: torch.Tensor, scale: torch.Tensor, views: list[View]
) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's loss; other crops that show the very same labels are no negatives.

    Returns:
        The loss, and the share of crops whose own caption is the nearest.
    """
    logits_BB = scale * images_BD @ texts_BD.T
    named = np.stack([view.named_L for view in views])
    same = torch.from_numpy((named[:, None] == named[None]).all(-1))
    same.fill_diagonal_(False)
    logits_BB = logits_BB.masked_fill(same, float("-inf"))
    target = torch.arange(len(logits_BB))
    loss = 0.5 * (F.cross_entropy(logits_BB, target) + F.cross_entropy(logits_BB.T, target))
    return loss, (logits_BB.argmax(1) == target).float().mean()
