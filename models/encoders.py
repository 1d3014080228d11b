"""Image encoders behind one face: four feature maps at strides 4, 8, 16, 32.

Here are the encoders with stages of their own (ResNets, ConvNeXts, MiT); plain transformers are
in `models/vits.py`. Which library model becomes which encoder is decided in `models/build.py`.
"""

# B batch, C channels, H W size of a map
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CLIP_MEAN = (122.7709383, 116.7460125, 104.09373615)
CLIP_STD = (68.5005327, 66.6321579, 70.32316305)
"""CLIP's normalisation, on 0..255 (OpenAI CLIP, `clip.py`)."""
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
"""ImageNet's normalisation, on 0..255."""

AfterBlock = Callable[[torch.Tensor, int, int], torch.Tensor]
"""Applied to what a block puts out: (features, stage, block in the stage) -> features. Features
are [B, C, H, W] of encoders with stages, [B, prefix + N, C] of plain transformers."""


class Encoder(nn.Module):
    """The face: subclasses give `forward(images, after_block) -> four maps`.

    Attributes:
        channels: channels of the maps at strides 4, 8, 16, 32.
        blocks: number of blocks of each stage, and `widths` their channels, for token modules.
        mean, std: normalisation on 0..255 RGB.
        divisibility: images are padded to a multiple of this many pixels.
        prefix: tokens before the patches (class and register tokens); 0 of encoders with stages.
    """

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    divisibility: int = 32
    prefix: int = 0

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.checkpointing = False
        self.normalise_by(mean, std)

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the normalisation, on 0..255 RGB."""
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(
        self, images_B3HW: torch.Tensor, after_block: AfterBlock | None = None
    ) -> list[torch.Tensor]:
        """Features of normalised, padded images at strides 4, 8, 16, 32."""
        raise NotImplementedError

    def groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """The parts from early to deep: stem, then one entry per block."""
        raise NotImplementedError

    def run_block(self, block: nn.Module, *args: torch.Tensor | int) -> torch.Tensor:
        """One block; its activations are recomputed in the backward pass if so configured."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class StagedEncoder(Encoder):
    """An encoder made of a stem and four stages of blocks, each stage with a step down before it.

    Args:
        trunk: the library's module; kept whole (less its head), so that its parameter names stay.
        channels: channels after each stage.
        output_norm: a LayerNorm over channels on every output (mmpretrain's ConvNeXt, Rein).
    """

    def __init__(
        self,
        trunk: nn.Module,
        channels: Sequence[int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        output_norm: bool = False,
    ):
        super().__init__(mean=mean, std=std)
        self.trunk = trunk
        self.channels = tuple(channels)
        self.widths = self.channels
        self.blocks = tuple(len(blocks) for _, blocks in self.stages())
        self.norms = nn.ModuleList(ChannelNorm(c) for c in channels) if output_norm else None

    def stem(self) -> list[nn.Module]:
        """Modules before the first stage, in order."""
        raise NotImplementedError

    def stages(self) -> list[tuple[list[nn.Module], list[nn.Module]]]:
        """(what steps down, blocks) of each of the four stages."""
        raise NotImplementedError

    def forward(
        self, images_B3HW: torch.Tensor, after_block: AfterBlock | None = None
    ) -> list[torch.Tensor]:
        """Features of normalised, padded images at strides 4, 8, 16, 32."""
        x = images_B3HW
        for module in self.stem():
            x = module(x)
        outputs = []
        for stage, (down, blocks) in enumerate(self.stages()):
            for module in down:
                x = module(x)
            for index, block in enumerate(blocks):
                x = self.run_block(block, x)
                if after_block is not None:
                    x = after_block(x, stage, index)
            outputs.append(x if self.norms is None else self.norms[stage](x))
        return outputs

    def groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """The stem, then each block together with the step down before it."""
        parts: list[list[nn.Module | nn.Parameter]] = [list(self.stem())]
        for down, blocks in self.stages():
            parts.append([*down, blocks[0]])
            parts.extend([block] for block in blocks[1:])
        return parts


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a [B, C, H, W] map, epsilon 1e-6."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Same shape out as in."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ClipResNetEncoder(StagedEncoder):
    """open_clip's ModifiedResNet: three-convolution stem, average pools for strides."""

    def __init__(self, trunk: nn.Module, **normalisation: Sequence[float]):
        trunk.attnpool = None
        channels = [getattr(trunk, f"layer{n}")[-1].conv3.out_channels for n in (1, 2, 3, 4)]
        super().__init__(trunk, channels, **normalisation)

    def stem(self) -> list[nn.Module]:
        """Three convolutions with norms and the average pool."""
        t = self.trunk
        return [
            *(t.conv1, t.bn1, t.act1),
            *(t.conv2, t.bn2, t.act2),
            *(t.conv3, t.bn3, t.act3),
            t.avgpool,
        ]

    def stages(self) -> list[tuple[list[nn.Module], list[nn.Module]]]:
        """Bottlenecks step down by themselves."""
        return [([], list(getattr(self.trunk, f"layer{n}"))) for n in (1, 2, 3, 4)]


class ConvNextEncoder(StagedEncoder):
    """timm's ConvNeXt, the trunk of open_clip's ConvNeXt models as well."""

    def __init__(self, trunk: nn.Module, **options: Sequence[float] | bool):
        trunk.head = nn.Identity()
        trunk.norm_pre = nn.Identity()
        super().__init__(trunk, [info["num_chs"] for info in trunk.feature_info], **options)

    def stem(self) -> list[nn.Module]:
        """Patch convolution and norm."""
        return [self.trunk.stem]

    def stages(self) -> list[tuple[list[nn.Module], list[nn.Module]]]:
        """Norm and strided convolution, then blocks."""
        return [([stage.downsample], list(stage.blocks)) for stage in self.trunk.stages]


class ResNetEncoder(StagedEncoder):
    """timm's ResNet (ImageNet weights)."""

    def __init__(self, trunk: nn.Module, **normalisation: Sequence[float]):
        trunk.fc = nn.Identity()
        trunk.global_pool = nn.Identity()
        channels = [info["num_chs"] for info in trunk.feature_info[-4:]]
        super().__init__(trunk, channels, **normalisation)

    def stem(self) -> list[nn.Module]:
        """Convolution, norm, activation, pool."""
        return [self.trunk.conv1, self.trunk.bn1, self.trunk.act1, self.trunk.maxpool]

    def stages(self) -> list[tuple[list[nn.Module], list[nn.Module]]]:
        """Blocks step down by themselves."""
        return [([], list(getattr(self.trunk, f"layer{n}"))) for n in (1, 2, 3, 4)]


class MitEncoder(Encoder):
    """transformers' SegFormer encoder (MiT-B0..B5): tokens in the blocks, a norm after each stage.

    Args:
        trunk: a `SegformerModel`.
    """

    def __init__(self, trunk: nn.Module, *, mean: Sequence[float], std: Sequence[float]):
        super().__init__(mean=mean, std=std)
        self.trunk = trunk
        self.channels = self.widths = tuple(trunk.config.hidden_sizes)
        self.blocks = tuple(trunk.config.depths)

    def forward(
        self, images_B3HW: torch.Tensor, after_block: AfterBlock | None = None
    ) -> list[torch.Tensor]:
        """Features of normalised, padded images at strides 4, 8, 16, 32."""
        x, outputs = images_B3HW, []
        for stage, module in enumerate(self.trunk.stages):
            tokens, height, width = module.patch_embeddings(x)
            for index, block in enumerate(module.blocks):
                tokens = self.run_block(block, tokens, height, width)
                if after_block is not None:
                    tokens = after_block(tokens, stage, index)
            x = module.layer_norm(tokens).transpose(1, 2).unflatten(2, (height, width))
            outputs.append(x)
        return outputs

    def groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """An empty stem, then each block; a stage's embedding and norm go with its first block."""
        parts: list[list[nn.Module | nn.Parameter]] = [[]]
        for stage in self.trunk.stages:
            parts.append([stage.patch_embeddings, stage.layer_norm, stage.blocks[0]])
            parts.extend([block] for block in stage.blocks[1:])
        return parts
