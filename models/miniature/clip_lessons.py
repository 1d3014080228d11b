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
    label_ids_HW: np.ndarray
    """uint8 Cityscapes label ids, of which captions are made."""
    named_L: np.ndarray
    """bool, which of `LABELS` the caption names."""


def whole_view(picture: Picture, rng: random.Random) -> View:
    """The whole picture with its caption."""
    ids_HW = picture.label_ids_HW
    caption = describe(ids_HW, picture.attributes, rng)
    return View(
        image_HW3=picture.image_HW3,
        caption=caption,
        label_ids_HW=ids_HW,
        named_L=_named(ids_HW),
    )


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
            View(
                image_HW3=np.asarray(image),
                caption=caption or "",
                label_ids_HW=ids_HW,
                named_L=_named(ids_HW),
            )
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
        self.bias = nn.Parameter(torch.full((3,), -3.0))


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
    """Unit vectors of all patches per stride, each [B, D, h, w] float32."""
    stride8, stride16, stride32 = features
    pool = clip.visual.attnpool
    deep = pool.c_proj(pool.v_proj(stride32.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    maps = heads.stride8(stride8), heads.stride16(stride16), deep
    return [F.normalize(x.float(), dim=1) for x in maps]


def word_losses(
    patches: list[torch.Tensor],
    words_LD: torch.Tensor,
    named: list[torch.Tensor],
    heads: PatchHeads,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Words match patches, patches match words, region by region; from region captions alone.

    1. Pooled over a region's patches (log-mean-exp), a word's similarity says whether the region's
       caption names it.
    2. Each patch, choosing among all words, chooses one that its region's caption names.

    Args:
        patches: per stride, unit vectors [B, D, h, w].
        words_LD: unit vectors of the words.
        named: per stride, bool [B, r, c, L]: what the captions of a grid of regions name.
        heads: scales and biases.

    Returns:
        The two losses, averaged over the strides.
    """
    found, chosen = [], []
    for index, (patches_BDhw, named_BrcL) in enumerate(zip(patches, named, strict=True)):
        scale = heads.log_scale[index].clamp(max=4.0).exp()
        scores_BLhw = scale * torch.einsum("bdhw,ld->blhw", patches_BDhw, words_LD)
        named_BLrc = named_BrcL.permute(0, 3, 1, 2)
        pooled_BLrc = F.adaptive_avg_pool2d((scores_BLhw - scale).exp(), named_BLrc.shape[-2:])
        logits_BLrc = (pooled_BLrc + 1e-20).log() + scale + heads.bias[index]
        found.append(F.binary_cross_entropy_with_logits(logits_BLrc, named_BLrc.float()))
        allowed_BLhw = F.interpolate(named_BLrc.float(), scores_BLhw.shape[-2:]) > 0.5
        some_Bhw = allowed_BLhw.any(1)
        shares_BLhw = scores_BLhw.log_softmax(1).masked_fill(~allowed_BLhw, -1e4)
        chosen.append(-torch.logsumexp(shares_BLhw, 1)[some_Bhw].mean())
    return torch.stack(found).mean(), torch.stack(chosen).mean()


def crop_words(views: list[View]) -> list[torch.Tensor]:
    """What crops' captions name, as one region per crop and stride: [B, 1, 1, L] each."""
    named = torch.stack([torch.from_numpy(view.named_L) for view in views])
    return [named[:, None, None]] * 3


def window_words(views: list[View]) -> list[torch.Tensor]:
    """What captions of windows name: windows of 16 pixels for strides 8 and 16, of 32 for 32.

    A word stands for a label with at least a twentieth of its window.
    """
    ids_BHW = np.stack([view.label_ids_HW for view in views])
    hits_BHWL = ids_BHW[..., None] == np.array(LABELS, dtype=np.uint8)
    shares = []
    for size in (16, 32):
        batch, height, width, labels = hits_BHWL.shape
        cells = hits_BHWL.reshape(batch, height // size, size, width // size, size, labels)
        shares.append(torch.from_numpy(cells.mean(axis=(2, 4)) >= 0.05))
    return [shares[0], shares[0], shares[1]]


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
