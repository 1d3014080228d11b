"""The segmenter: images in, classes and masks (or scores per pixel) out.

segmenter = build_segmenter(SegmenterConfig(...), class_names=names)
scores_BKHW = segmenter.semantic(segmenter(images_B3HW))
"""

# B batch, Q mask queries, K classes, K1 classes and "nothing", C channels, H W height and width
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from models.decoder import Prediction
from models.encoders import Encoder

Size = tuple[int, int]


@dataclass(frozen=True)
class SegmenterOutput:
    """What one forward pass predicts for a batch; mask sizes are a quarter of the padded input."""

    image_size: Size
    """Height and width of the images as given."""
    padded_size: Size
    """Height and width after padding; masks and scores cover this area."""
    class_logits_BQK1: torch.Tensor | None = None
    """Class scores of the queries before softmax, last class "nothing"; None of a light decoder."""
    masks_BQHW: torch.Tensor | None = None
    """Mask logits of the queries; None of a light decoder."""
    aux: tuple[Prediction, ...] = ()
    """Earlier predictions, first to last, in training mode."""
    pixel_logits_BKHW: torch.Tensor | None = None
    """Class scores of a light decoder before softmax; None of a query decoder."""
    text_scores_BKHW: torch.Tensor | None = None
    """Cosine similarities of pixels and class names, where the decoder has language guidance."""

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The final prediction first, then the earlier ones from first to last."""
        return (Prediction(self.class_logits_BQK1, self.masks_BQHW), *self.aux)


class Segmenter(nn.Module):
    """Encoder, tuning and decoder as one module.

    Args:
        encoder: the image encoder.
        decoder: from four feature maps (and linked queries) to the fields of the output.
        class_names: names of the K classes, in the order of train ids.
        tokens: Rein's token modules, or None.
        neck: from a plain transformer's maps to a pyramid; None where the encoder has stages.
        trained_encoder: whether any weight of the encoder is trained.
        encoder_lr: factor on the learning rate of the encoder's own weights.
        layer_decay: further factor per block of the encoder, counted from the last.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: nn.Module,
        *,
        class_names: Sequence[str],
        tokens: nn.Module | None = None,
        neck: nn.Module | None = None,
        trained_encoder: bool = False,
        encoder_lr: float = 1.0,
        layer_decay: float = 1.0,
    ):
        super().__init__()
        self.encoder = encoder
        self.tokens = tokens
        self.neck = neck
        self.decoder = decoder
        self.class_names = tuple(class_names)
        self.trained_encoder = trained_encoder
        self.encoder_lr = encoder_lr
        self.layer_decay = layer_decay
        self.train()

    @property
    def num_classes(self) -> int:
        """Classes without "nothing"."""
        return len(self.class_names)

    def train(self, mode: bool = True) -> "Segmenter":
        """Training mode for what is trained; frozen parts stay in eval mode."""
        super().train(mode)
        if not self.trained_encoder:
            self.encoder.eval()
        else:
            for group in self.encoder.groups():
                for part in group:
                    freezable = isinstance(part, nn.Module) and any(True for _ in part.parameters())
                    if freezable and not any(p.requires_grad for p in part.parameters()):
                        part.eval()
            for part in self.encoder.modules():  # frozen norms inside what LoRA updates
                own = list(part.parameters(recurse=False))
                if isinstance(part, _BatchNorm) and own and not own[0].requires_grad:
                    part.eval()
        return self

    def forward(self, images: torch.Tensor | Sequence[torch.Tensor]) -> SegmenterOutput:
        """Segment a batch.

        Args:
            images: RGB on 0..255, uint8 or float, [B, 3, H, W]; or a sequence of [3, H, W] of
                several sizes, padded at the right and bottom to the largest.
        """
        padded_B3HW, image_size = self.prepare(images)
        features, queries_QC = self.encode(padded_B3HW)
        if self.neck is not None:
            features = self.neck(features)
        predicted = self.decoder(features, queries_QC)
        return SegmenterOutput(
            image_size=image_size, padded_size=tuple(padded_B3HW.shape[-2:]), **predicted
        )

    def encode(
        self, padded_B3HW: torch.Tensor
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        """The encoder's maps of prepared images, tokens applied, and the tokens' queries [Q, C].

        An encoder with stages gives strides 4, 8, 16, 32; a plain transformer's maps have one
        stride, the neck makes the pyramid of them.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._encoder_needs_graph()):
            if self.tokens is None:
                return self.encoder(padded_B3HW), None
            features = self.encoder(padded_B3HW, self.tokens.after_block(self.encoder.prefix))
            return features, self.tokens.queries()

    def _encoder_needs_graph(self) -> bool:
        return self.trained_encoder or self.tokens is not None

    def prepare(self, images: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, Size]:
        """Normalise, then pad with zeros to a multiple of the encoder's divisibility.

        Returns:
            The batch [B, 3, H, W] and the (largest) height and width before padding.
        """
        mean, std, step = self.encoder.mean, self.encoder.std, self.encoder.divisibility
        if isinstance(images, torch.Tensor):
            if images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(f"images must be [B, 3, H, W], got {tuple(images.shape)}")
            height, width = images.shape[-2:]
            normalised = (images.to(mean) - mean) / std
            padded = F.pad(normalised, (0, -width % step, 0, -height % step))
        else:
            height = max(image.shape[1] for image in images)
            width = max(image.shape[2] for image in images)
            padded = mean.new_zeros(len(images), 3, height + -height % step, width + -width % step)
            for row, image in zip(padded, images, strict=True):
                row[:, : image.shape[1], : image.shape[2]] = ((image.to(mean) - mean) / std)[0]
        if padded.is_cuda:
            padded = padded.contiguous(memory_format=torch.channels_last)
        return padded, (height, width)

    @staticmethod
    def semantic(
        output: SegmenterOutput,
        size: Size | None = None,
        *,
        summed: Literal["mask", "pixel"] = "mask",
    ) -> torch.Tensor:
        """Scores per class and pixel.

        Of queries: the sum over queries of class probability times mask probability (no
        probability itself: it may pass 1). Of a light decoder: class probabilities.

        Args:
            output: of this segmenter.
            size: (height, width) wanted; None: the image's.
            summed: at which resolution masks become probabilities and are summed over queries:
                `mask` (stride 4, then resized: fast), or `pixel` (at full size, as released; a few
                queries at a time, so that they are never held all at once).

        Returns:
            Scores [B, K, H, W], float32.
        """
        if output.pixel_logits_BKHW is not None:
            logits = resize(output.pixel_logits_BKHW.float(), output.padded_size)
            scores = crop(logits, output.image_size).softmax(1)
            return resize(scores, size or output.image_size)
        classes_BQK = output.class_logits_BQK1.float().softmax(-1)[..., :-1]
        masks_BQHW = output.masks_BQHW.float()
        if summed == "mask":
            scores = sum_over_queries(classes_BQK, masks_BQHW)
            scores = resize(scores, output.padded_size)
        else:
            parts = zip(classes_BQK.split(8, dim=1), masks_BQHW.split(8, dim=1), strict=True)
            scores = sum(sum_over_queries(c, resize(m, output.padded_size)) for c, m in parts)
        scores = crop(scores, output.image_size)
        return resize(scores, size or output.image_size)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained."""
        return ((n, p) for n, p in self.named_parameters() if p.requires_grad)

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Trained parameters and the persistent buffers beside them (running statistics)."""
        names = {name for name, _ in self.trainable_parameters()}
        beside = {name.rpartition(".")[0] for name in names}
        parameters = {name for name, _ in self.named_parameters()}
        return {
            name: value
            for name, value in self.state_dict().items()
            if name in names or (name not in parameters and name.rpartition(".")[0] in beside)
        }

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimizer, each with `name`, `params`, `lr` and `weight_decay`.

        Norms, embeddings and tokens do not decay. Encoder weights learn `encoder_lr` times as
        fast, early blocks slower still where there is a layer decay.
        """
        factors = self._encoder_factors()
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, parameter in self.trainable_parameters():
            factor = factors.get(parameter, 1.0)
            decays = not self._is_undecayed(name)
            group = groups.setdefault(
                (factor, decays),
                {
                    "name": f"lr x {factor:g}, {'decay' if decays else 'no decay'}",
                    "params": [],
                    "lr": lr * factor,
                    "weight_decay": weight_decay if decays else 0.0,
                },
            )
            group["params"].append(parameter)
        return list(groups.values())

    def _encoder_factors(self) -> dict[nn.Parameter, float]:
        """Learning rate factors of the encoder's own weights (not of LoRA's updates)."""
        factors = {p: self.encoder_lr for p in self.encoder.parameters()}
        parts = self.encoder.groups()
        for depth, group in enumerate(parts):
            factor = self.encoder_lr * self.layer_decay ** (len(parts) - 1 - depth)
            for part in group:
                owned = [part] if isinstance(part, nn.Parameter) else part.parameters()
                factors |= dict.fromkeys(owned, factor)
        return factors

    def _is_undecayed(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        kind = type(self.get_submodule(owner)).__name__
        return "Norm" in kind or kind == "Embedding" or leaf in UNDECAYED


UNDECAYED = {
    *("level_embed", "pos_embed", "cls_token", "reg_token", "class_embedding"),
    *("positional_embedding", "tokens_LTC", "tokens_a_LTR", "tokens_b_LRC", "scale"),
    *("rel_pos_h", "rel_pos_w", "void", "logit_scale", "gamma_text", "context"),
}
"""Parameters without weight decay, by the last part of their name."""


def sum_over_queries(classes_BQK: torch.Tensor, masks_BQHW: torch.Tensor) -> torch.Tensor:
    """Class probabilities times mask probabilities (from logits), summed over queries."""
    return torch.einsum("bqk,bqhw->bkhw", classes_BQK, masks_BQHW.sigmoid())


def resize(maps_BCHW: torch.Tensor, size: Size) -> torch.Tensor:
    """Bilinear, align_corners False; the same tensor if it has the size already."""
    if tuple(maps_BCHW.shape[-2:]) == tuple(size):
        return maps_BCHW
    return F.interpolate(maps_BCHW, size=tuple(size), mode="bilinear", align_corners=False)


def crop(maps_BCHW: torch.Tensor, size: Size) -> torch.Tensor:
    """The top-left part of this size."""
    return maps_BCHW[..., : size[0], : size[1]]
