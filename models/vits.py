"""Plain vision transformers as encoders, and the pyramids that give them four strides.

CLIP's (open_clip), EVA-02, DINOv2 and DINOv3 (timm) and SAM's image encoder. Position embeddings
are interpolated to any input size; rotary ones are computed for it.
"""

# B batch, N patches, C channels, H W patches per side or size of a map
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from models.encoders import AfterBlock, Encoder


class PlainEncoder(Encoder):
    """Patches, one stack of blocks, four of their outputs as maps at the stride of the patches.

    Subclasses say how to embed, what the blocks are and how to run one.

    Args:
        trunk: the library's module; what follows the last block used is dropped.
        width: channels.
        depth: number of blocks.
        patch: patch size in pixels.
        features: blocks whose outputs are used; None: four equally spaced, the last included.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        width: int,
        depth: int,
        patch: int,
        mean: Sequence[float],
        std: Sequence[float],
        features: Sequence[int] | None = None,
        prefix: int = 1,
    ):
        super().__init__(mean=mean, std=std)
        self.features = tuple(features or ((depth * part) // 4 - 1 for part in (1, 2, 3, 4)))
        if len(self.features) != 4 or not all(0 <= f < depth for f in self.features):
            raise ValueError(
                f"encoder.features {self.features}: give four blocks between 0 and {depth - 1}"
            )
        self.trunk = trunk
        self.prefix = prefix
        self.patch = patch
        self.channels = (width,) * 4
        self.widths = (width,)
        self.blocks = (max(self.features) + 1,)
        del self.block_list()[self.blocks[0] :]

    @property
    def divisibility(self) -> int:
        """Two patches: the coarsest map of the pyramid has half as many positions."""
        return 2 * self.patch

    def block_list(self) -> nn.ModuleList:
        """The stack of blocks."""
        raise NotImplementedError

    def patch_embedding(self) -> nn.Conv2d:
        """The convolution that embeds patches."""
        raise NotImplementedError

    def early(self) -> list[nn.Module | nn.Parameter]:
        """Everything before the first block."""
        raise NotImplementedError

    def embed(self, patches_BCHW: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Tokens [B, prefix + N, C] from embedded patches, and more arguments of the blocks."""
        raise NotImplementedError

    def run(
        self, block: nn.Module, x: torch.Tensor, more: tuple[torch.Tensor, ...], grid: torch.Size
    ) -> torch.Tensor:
        """One block on tokens."""
        return self.run_block(block, x, *more)

    def forward(
        self, images_B3HW: torch.Tensor, after_block: AfterBlock | None = None
    ) -> list[torch.Tensor]:
        """Four maps [B, C, H, W], all at the stride of the patches."""
        patches_BCHW = self.patch_embedding()(images_B3HW)
        grid = patches_BCHW.shape[-2:]
        x, more = self.embed(patches_BCHW)
        maps = {}
        for index, block in enumerate(self.block_list()):
            x = self.run(block, x, more, grid)
            if after_block is not None:
                x = after_block(x, 0, index)
            if index in self.features:
                maps[index] = x[:, self.prefix :].transpose(1, 2).unflatten(2, grid)
        return [maps[index] for index in self.features]

    def groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """What comes before the blocks, then each block."""
        return [self.early(), *([block] for block in self.block_list())]

    @torch.no_grad()
    def resample_patches(self, patch: int) -> None:
        """Change the patch size by bicubic resampling of the embedding (Rein: DINOv2, 14 to 16)."""
        convolution = self.patch_embedding()
        weight = F.interpolate(
            convolution.weight.float(), size=(patch, patch), mode="bicubic", align_corners=False
        )
        convolution.weight = nn.Parameter(weight.to(convolution.weight.dtype))
        convolution.kernel_size = convolution.stride = (patch, patch)
        self.patch = patch


class ClipVit(PlainEncoder):
    """open_clip's VisionTransformer, without its pooling and projection."""

    def __init__(self, trunk: nn.Module, **options: object):
        trunk.ln_post = nn.Identity()
        trunk.proj = None
        trunk.attn_pool = None
        super().__init__(
            trunk,
            width=trunk.conv1.out_channels,
            depth=len(trunk.transformer.resblocks),
            patch=trunk.patch_size[0],
            **options,
        )

    def block_list(self) -> nn.ModuleList:
        """The residual attention blocks."""
        return self.trunk.transformer.resblocks

    def patch_embedding(self) -> nn.Conv2d:
        """A convolution without bias."""
        return self.trunk.conv1

    def early(self) -> list[nn.Module | nn.Parameter]:
        """Patch, class and position embeddings and the first norm."""
        t = self.trunk
        return [t.conv1, t.class_embedding, t.positional_embedding, t.ln_pre]

    def embed(self, patches_BCHW: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Class token first, then patches, with positions, normalised."""
        t, size = self.trunk, patches_BCHW.shape[-2:]
        patches_BNC = patches_BCHW.flatten(2).transpose(1, 2)
        tokens = t.class_embedding.to(patches_BNC.dtype).expand(len(patches_BNC), 1, -1)
        positions = t.positional_embedding[None]
        positions = torch.cat(
            [positions[:, :1], interpolate_positions(positions[:, 1:], t.grid_size, size)], 1
        )
        x = torch.cat([tokens, patches_BNC], 1)
        return t.ln_pre(x + positions.to(x.dtype)), ()

    def run(
        self, block: nn.Module, x: torch.Tensor, more: tuple[torch.Tensor, ...], grid: torch.Size
    ) -> torch.Tensor:
        """One block; open_clip's transformers come in both memory layouts."""
        if self.trunk.transformer.batch_first:
            return self.run_block(block, x)
        return self.run_block(block, x.transpose(0, 1)).transpose(0, 1)


class TimmVit(PlainEncoder):
    """timm's VisionTransformer (DINOv2, CLIP) and Eva (EVA-02 and DINOv3, with rotary positions).

    EVA's inner norms and position embeddings are kept; head and final norms are dropped.
    """

    def __init__(self, trunk: nn.Module, **options: object):
        for name in ("norm", "fc_norm", "head"):
            setattr(trunk, name, nn.Identity())
        trunk.attn_pool = None
        if getattr(trunk, "rope_mixed", False):
            raise ValueError("rotary positions that differ per block are not supported")
        super().__init__(
            trunk,
            width=trunk.embed_dim,
            depth=len(trunk.blocks),
            patch=trunk.patch_embed.patch_size[0],
            prefix=trunk.num_prefix_tokens,
            **options,
        )
        self.pretrained_grid = tuple(trunk.patch_embed.grid_size)

    def block_list(self) -> nn.ModuleList:
        """The blocks."""
        return self.trunk.blocks

    def patch_embedding(self) -> nn.Conv2d:
        """A convolution with bias."""
        return self.trunk.patch_embed.proj

    def early(self) -> list[nn.Module | nn.Parameter]:
        """Patch, token and position embeddings and a first norm."""
        t = self.trunk
        embeddings = (t.cls_token, t.reg_token, t.pos_embed)
        return [t.patch_embed, *(e for e in embeddings if e is not None), t.norm_pre]

    def embed(self, patches_BCHW: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Class and register tokens first, then patches, with positions."""
        t, size = self.trunk, tuple(patches_BCHW.shape[-2:])
        x = patches_BCHW.flatten(2).transpose(1, 2)
        extra = [e.expand(len(x), -1, -1) for e in (t.cls_token, t.reg_token) if e is not None]
        positions = t.pos_embed
        if positions is not None:
            # Some models give positions to the extra tokens as well.
            count = 0 if t.no_embed_class else t.num_prefix_tokens
            patches = interpolate_positions(positions[:, count:], self.pretrained_grid, size)
            x = x + patches.to(x.dtype)
            if count:
                extra = [torch.cat(extra, 1) + positions[:, :count]]
        x = torch.cat([*(e.to(x.dtype) for e in extra), x], 1)
        rope = getattr(t, "rope", None)
        return t.norm_pre(x), (() if rope is None else (rope.get_embed(shape=size),))


class SamEncoder(PlainEncoder):
    """Segment Anything's image encoder: windowed blocks with relative positions, no extra token."""

    def __init__(self, trunk: nn.Module, **options: object):
        trunk.neck = nn.Identity()
        super().__init__(
            trunk,
            width=trunk.patch_embed.proj.out_channels,
            depth=len(trunk.blocks),
            patch=trunk.patch_embed.proj.kernel_size[0],
            prefix=0,
            **options,
        )

    def block_list(self) -> nn.ModuleList:
        """The blocks."""
        return self.trunk.blocks

    def patch_embedding(self) -> nn.Conv2d:
        """A convolution with bias."""
        return self.trunk.patch_embed.proj

    def early(self) -> list[nn.Module | nn.Parameter]:
        """Patch and position embeddings."""
        return [self.trunk.patch_embed, self.trunk.pos_embed]

    def embed(self, patches_BCHW: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Patches with positions."""
        grid, size = self.trunk.pos_embed.shape[1:3], patches_BCHW.shape[-2:]
        positions = interpolate_positions(self.trunk.pos_embed.flatten(1, 2), grid, size)
        x = patches_BCHW.flatten(2).transpose(1, 2)
        return x + positions.to(x.dtype), ()

    def run(
        self, block: nn.Module, x: torch.Tensor, more: tuple[torch.Tensor, ...], grid: torch.Size
    ) -> torch.Tensor:
        """One block; SAM's work on [B, H, W, C]."""
        return self.run_block(block, x.unflatten(1, grid)).flatten(1, 2)


def interpolate_positions(
    positions_1NC: torch.Tensor, grid: Sequence[int], size: Sequence[int]
) -> torch.Tensor:
    """Position embeddings of a grid of patches, bicubic to another size, [1, N, C]."""
    if tuple(grid) == tuple(size):
        return positions_1NC
    plane = positions_1NC.float().transpose(1, 2).unflatten(2, tuple(grid))
    resized = F.interpolate(plane, size=tuple(size), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


class ResizePyramid(nn.Module):
    """Four maps of one stride to four strides by bilinear resizing: x4, x2, x1, x0.5 (Rein)."""

    def forward(self, maps_BCHW: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps at a quarter, a half, once and twice the stride of the patches."""
        return [
            x
            if factor == 1
            else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
            for x, factor in zip(maps_BCHW, (4, 2, 1, 0.5), strict=True)
        ]


class LearnedPyramid(nn.Module):
    """Four maps of one stride to four strides by transposed convolutions and a pool (VLTSeg)."""

    def __init__(self, width: int):
        super().__init__()
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.fpn2 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.fpn4 = nn.MaxPool2d(2)

    def forward(self, maps_BCHW: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps at a quarter, a half, once and twice the stride of the patches."""
        first, second, third, fourth = maps_BCHW
        return [self.fpn1(first), self.fpn2(second), third, self.fpn4(fourth)]
