"""What a segmenter is made of, as frozen pydantic models; no torch is imported here.

`models/build.py` is the only reader of these sections inside `models/`; recipes write them under
the key `segmenter`. Defaults are the CLOUDS settings (frozen CLIP tower, Mask2Former decoder).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen, keyword-only section whose field docstrings become descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class EncoderConfig(Section):
    """Which image encoder, with which weights."""

    family: Literal["open_clip", "timm", "transformers", "sam"] = "open_clip"
    """Library that builds the image tower; only the tower is built and stored."""
    name: str = "convnext_large_d_320"
    """Model name in that library: open_clip `RN50`, `ViT-B-16`, `EVA02-B-16`, `local-dir:FOLDER`;
    timm `vit_large_patch14_dinov2`; transformers `mit-b5`; SAM `vit_h`."""
    weights: str | None = None
    """Pre-trained tag, file, folder or hub id (owner/name) of weights (transformers: `default`, the
    name's own; SAM: a file); None: seeded random weights."""
    architecture: dict[str, Any] | None = None
    """Replaces the architecture that `name` stands for, for small encoders: open_clip's
    `vision_cfg` (plus `embed_dim`, and `timm_options` of its timm model), or keyword arguments of
    the timm model, the SegFormer config, SAM's image encoder."""
    seed: int = Field(0, ge=0)
    """Seed of random encoder weights, used where `weights` is None."""
    features: tuple[int, ...] | None = None
    """Zero-based blocks whose outputs feed the pyramid (plain ViTs only); None: four equally
    spaced ones, the last included."""
    pyramid: Literal["resize", "learned"] = "resize"
    """Neck of a plain ViT: bilinear resizing x4, x2, x1, x0.5 (Rein), or transposed convolutions
    and a max-pool (VLTSeg). Encoders with stages of their own need none."""
    patch_size: int | None = Field(None, gt=0)
    """Resample the patch embedding of a plain ViT to this patch size in pixels (Rein: DINOv2 14 to
    16); None: as pre-trained."""
    normalisation: Literal["pretrained", "imagenet"] = "pretrained"
    """Mean and spread of pixels: as the weights were trained with, or ImageNet's (VLTSeg)."""
    output_norm: bool = False
    """A LayerNorm on each of the four outputs of a ConvNeXt (mmpretrain's, Rein's)."""
    checkpointing: bool = False
    """Recompute encoder activations in the backward pass to save memory."""


class TuningConfig(Section):
    """What of the encoder is trained."""

    kind: Literal["frozen", "full", "rein", "lora"] = "frozen"
    """frozen: nothing, without gradients or activation memory; full: all of it; rein: token
    modules after every block; lora: low-rank updates of its layers (peft)."""
    lr_multiplier: float = Field(0.1, gt=0)
    """Factor on the learning rate of encoder weights under `full`."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Under `full`: factor on the learning rate per block, counted from the last; 1: none."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth rate of the last block under `full`, rising linearly from 0."""
    freeze_blocks: int = 0
    """Under `full`: keep this many blocks frozen, the stem with them when counted from the early
    end; negative: counted from the deep end."""
    num_tokens: int = Field(100, gt=1)
    """Rein: tokens per block."""
    token_rank: int | None = Field(16, gt=0)
    """Rein: rank of the token matrices; None: full matrices."""
    link_queries: bool = True
    """Rein: the tokens give the decoder its queries."""
    token_scale: float = Field(0.001, gt=0)
    """Rein: initial value of the learned factor on the correction."""
    lora_rank: int = Field(16, gt=0)
    """LoRA: rank of each update."""
    lora_alpha: float = Field(32.0, gt=0)
    """LoRA: the update is scaled by alpha / rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """LoRA: dropout before the update."""
    lora_targets: tuple[str, ...] | None = None
    """LoRA: layers inside the blocks, by the last part of their name; None: all of attention and
    feed-forward (residual networks: all convolutions)."""


class TextConfig(Section):
    """Language in the decoder: a classifier of text embeddings, or DenseCLIP-style guidance."""

    classifier: bool = False
    """Classify queries by similarity with text embeddings of the class names instead of a linear
    layer (a void embedding and the scale are learned)."""
    guidance: bool = False
    """Add pixel-text score maps to one feature level, with an auxiliary pixel-text loss."""
    context_words: int = Field(0, ge=0)
    """Under `guidance`: learned words in front of every class name, which the encoder's frozen text
    tower reads (DenseCLIP: 8); 0: the texts of `templates`, fixed."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Sentences a class name is put into; embeddings are averaged over them."""
    synonyms: dict[str, tuple[str, ...]] = {}
    """More words for a class; the best one counts. The class name itself is always used."""
    seed: int = Field(0, ge=0)
    """Seed of a random text tower, used where the encoder has no weights."""
    temperature: float = Field(0.07, gt=0)
    """Divisor of cosine similarities in the pixel-text loss."""

    @model_validator(mode="after")
    def _context_guides(self) -> Self:
        if self.context_words and not self.guidance:
            raise ValueError("context_words are of use under guidance only: set guidance to true")
        return self


class DecoderConfig(Section):
    """The decoder above the encoder's features; defaults as in CLOUDS."""

    kind: Literal["mask2former", "light"] = "mask2former"
    """mask2former: deformable pixel decoder and masked-attention queries; light: multi-level
    features and two transposed convolutions, one score per pixel and class."""
    width: int = Field(256, gt=0)
    """Channels of pixel decoder, queries and masks."""
    heads: int = Field(8, gt=0)
    """Attention heads, in both halves."""
    queries: int = Field(100, gt=0)
    """Mask queries."""
    layers: int = Field(9, ge=1)
    """Query layers; they visit strides 32, 16, 8 in turn."""
    ffn: int = Field(2048, gt=0)
    """Hidden width of the query layers' feed-forward blocks."""
    pixel_layers: int = Field(6, ge=0)
    """Deformable layers of the pixel decoder."""
    pixel_ffn: int = Field(1024, gt=0)
    """Hidden width of the pixel decoder's feed-forward blocks."""
    points: int = Field(4, gt=0)
    """Sampling points per head and level of the deformable attention."""
    group_norm: int = Field(32, gt=0)
    """Groups of the pixel decoder's GroupNorms."""
    text: TextConfig = TextConfig()
    """Text-embedding classifier and language guidance."""
    seed: int = Field(0, ge=0)
    """Seed of the decoder's initial weights (and of everything else that is trained)."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        for name in ("heads", "group_norm"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"decoder.width {self.width} is no multiple of decoder.{name} "
                    f"{getattr(self, name)}: choose a multiple, or another {name}"
                )
        if self.width % 4:
            raise ValueError(f"decoder.width {self.width} is no multiple of 4 (position codes)")
        return self


class LossConfig(Section):
    """Matching and losses; defaults as published (Mask2Former, CLOUDS, Rein)."""

    class_weight: float = Field(2.0, ge=0)
    """Weight of the query classification, in the losses and in the matching."""
    mask_weight: float = Field(5.0, ge=0)
    """Weight of the point-wise binary cross-entropy, in losses and matching."""
    dice_weight: float = Field(5.0, ge=0)
    """Weight of the dice loss, in losses and matching."""
    no_object: float = Field(0.1, gt=0)
    """Weight of the class "nothing" in the classification loss."""
    points: int = Field(12544, gt=0)
    """Points at which masks are compared."""
    oversample: float = Field(3.0, ge=1)
    """Candidates per point, of which the most uncertain are kept."""
    importance: float = Field(0.75, ge=0, le=1)
    """Share of points that are chosen by uncertainty; the rest is uniform."""
    unlabelled: Literal["negative", "ignore"] = "negative"
    """Pixels with label 255: negative for every mask (released CLOUDS), or left out of all
    mask losses."""
    text_weight: float = Field(1.0, ge=0)
    """Weight of the pixel-text loss, where the decoder has language guidance."""


class SegmenterConfig(Section):
    """One segmenter: encoder, its tuning, decoder, losses."""

    encoder: EncoderConfig = EncoderConfig()
    """The image encoder."""
    tuning: TuningConfig = TuningConfig()
    """What of the encoder is trained."""
    decoder: DecoderConfig = DecoderConfig()
    """The decoder above it."""
    losses: LossConfig = LossConfig()
    """Matching and losses."""


def names_safety_checker(model_index: Mapping[str, Any]) -> bool:
    """Whether a pipeline's `model_index.json` names a safety checker: [library, class] of it."""
    return any(model_index.get("safety_checker") or ())


MINIATURE_DIR = Path(__file__).parent / "miniature"
_LOCAL_PREFIX = "local-dir:"
_BUILTIN_PREFIX = "builtin:"


NAME_FIELDS = frozenset({"segmenter.encoder.name", "select.clip"})
"""Fields that name an architecture of a library rather than weights: a folder that happens to be
called as one ("RN50") does not count."""


KEYWORDS = frozenset({"bank", "random", "default", "openai"})
"""References that mean something of their own: a folder that happens to be called as one does not
count (`local-dir:FOLDER` names it)."""


def weights_path(reference: str) -> Path | None:
    """The file or folder that a reference to weights names, or None if it names a hub's model.

    `builtin:NAME` is a network that ships with this package, `local-dir:FOLDER` and every existing
    path are local; all else ("RN50", "owner/name", one of `KEYWORDS`) is a hub id, a library's tag
    or a keyword.
    """
    found = name_path(reference)
    if found is None and reference and reference not in KEYWORDS and Path(reference).exists():
        return Path(reference)
    return found


def name_path(reference: str) -> Path | None:
    """The same of a name as in `NAME_FIELDS`: a bare word is never a path."""
    if reference.startswith(_BUILTIN_PREFIX):
        return MINIATURE_DIR / reference.removeprefix(_BUILTIN_PREFIX)
    if reference.startswith(_LOCAL_PREFIX):
        rest = reference.removeprefix(_LOCAL_PREFIX)
        return name_path(rest) or Path(rest)
    path = Path(reference)
    looks_local = path.is_absolute() or len(path.parts) > 1 or path.suffix != ""
    return path if looks_local and path.exists() else None


_WEIGHT_SUFFIXES = frozenset({".pth", ".pt", ".pkl", ".bin", ".ckpt", ".safetensors"})


def meant_as_path(reference: str) -> bool:
    """Whether a reference that leads nowhere here is a path rather than a hub id or a tag.

    A hub id is at most `owner/name`, begins with a letter or digit and has no ending of a file.
    """
    path = Path(reference)
    return (
        reference.startswith((".", "~", "/"))
        or reference.endswith("/")
        or len(path.parts) > 2
        or path.suffix in _WEIGHT_SUFFIXES
    )
