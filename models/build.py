"""From a config to a segmenter: tower, tuning, neck and decoder put together."""

from collections.abc import Sequence

import torch
from torch import nn

from models.config import EncoderConfig, SegmenterConfig, TuningConfig
from models.decoder import QueryDecoder
from models.encoders import Encoder
from models.heads import GuidedHead, LightHead, MaskHead
from models.pixel_decoder import PixelDecoder
from models.rein import ReinTokens
from models.segmenter import Segmenter
from models.text import LanguageGuidance, TextClassifier
from models.towers import (
    at_hand,
    build_context,
    build_encoder,
    embed_texts,
    open_clip_architecture,
)
from models.vits import LearnedPyramid, PlainEncoder, ResizePyramid


def build_segmenter(
    config: SegmenterConfig, *, class_names: Sequence[str], device: torch.device | str = "cpu"
) -> Segmenter:
    """Build a segmenter; initial weights depend on the config's seeds alone.

    Args:
        config: what to build.
        class_names: the classes in the order of train ids.
        device: where to; `meta` builds shapes only and reads no weights.

    Raises:
        ValueError: an unknown or unsuitable model name or option.
        FileNotFoundError: weights that are not where the config says.
    """
    on_meta = torch.device(device).type == "meta"
    with torch.device("meta" if on_meta else "cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.encoder.seed)
        encoder = build_encoder(config.encoder, config.tuning, load=not on_meta)
        torch.manual_seed(config.decoder.seed)
        tokens = build_tokens(encoder, config)
        decoder = build_decoder(config, encoder, class_names, load=not on_meta)
        segmenter = Segmenter(
            encoder,
            decoder,
            class_names=class_names,
            tokens=tokens,
            neck=build_neck(config.encoder, encoder),
            trained_encoder=set_trained(encoder, config.tuning),
            encoder_lr=config.tuning.lr_multiplier if config.tuning.kind == "full" else 1.0,
            layer_decay=config.tuning.layer_decay,
        )
    segmenter.config = config
    return segmenter.to(device)


def set_trained(encoder: Encoder, tuning: TuningConfig) -> bool:
    """Mark what of the encoder is trained; true if anything is."""
    encoder.requires_grad_(tuning.kind == "full")
    if tuning.kind == "lora":
        inject_lora(encoder, tuning)
    elif tuning.kind == "full":
        groups = encoder.groups()
        if abs(tuning.freeze_blocks) >= len(groups):
            raise ValueError(
                f"tuning.freeze_blocks {tuning.freeze_blocks}: the encoder has "
                f"{len(groups) - 1} blocks; tuning.kind=frozen freezes all"
            )
        early = tuning.freeze_blocks + 1 if tuning.freeze_blocks > 0 else 0
        frozen = groups[:early] if tuning.freeze_blocks >= 0 else groups[tuning.freeze_blocks :]
        for group in frozen:
            for part in group:
                part.requires_grad_(False)
    return any(p.requires_grad for p in encoder.parameters())


LORA_TARGETS = {
    "ClipVit": ("attn", "c_fc", "c_proj"),  # peft takes nn.MultiheadAttention as a whole
    "TimmVit": ("qkv", "q_proj", "k_proj", "v_proj", "proj", "fc1", "fc1_g", "fc1_x", "fc2"),
    "SamEncoder": ("qkv", "proj", "lin1", "lin2"),
    "ConvNextEncoder": ("fc1", "fc2"),
    "MitEncoder": ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
    "ClipResNetEncoder": ("conv1", "conv2", "conv3"),
    "ResNetEncoder": ("conv1", "conv2", "conv3"),
}
"""Layers inside the blocks that LoRA updates by default: of attention and feed-forward; residual
networks have neither, so their convolutions."""


def inject_lora(encoder: Encoder, tuning: TuningConfig) -> None:
    """Put peft's low-rank updates beside layers of the blocks; only they are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    names = "|".join(tuning.lora_targets or LORA_TARGETS[type(encoder).__name__])
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=rf".*(?:blocks\.|layer)\d+\.(?:.*\.)?(?:{names})",
    )
    inject_adapter_in_model(config, encoder.trunk)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


def build_neck(config: EncoderConfig, encoder: Encoder) -> nn.Module | None:
    """The pyramid of a plain transformer; None for an encoder with stages."""
    if not isinstance(encoder, PlainEncoder):
        return None
    if config.pyramid == "learned":
        return LearnedPyramid(encoder.channels[0])
    return ResizePyramid()


def build_tokens(encoder: Encoder, config: SegmenterConfig) -> ReinTokens | None:
    """Rein's token modules, where the tuning is Rein."""
    if config.tuning.kind != "rein":
        return None
    linked = config.tuning.link_queries and config.decoder.kind == "mask2former"
    return ReinTokens(
        encoder.blocks,
        encoder.widths,
        tokens=config.tuning.num_tokens,
        rank=config.tuning.token_rank,
        scale=config.tuning.token_scale,
        query_width=config.decoder.width if linked else None,
    )


def build_decoder(
    whole: SegmenterConfig, encoder: Encoder, class_names: Sequence[str], *, load: bool
) -> nn.Module:
    """The decoder that fits the encoder's channels, with language where the config asks for it."""
    config, channels = whole.decoder, list(encoder.channels)
    texts_SC = synonyms = guidance = None
    if config.text.classifier or (config.text.guidance and not config.text.context_words):
        with torch.random.fork_rng(devices=[]):
            texts_SC, synonyms = build_texts(whole, class_names, load=load)
    if config.text.guidance:
        if config.text.context_words:
            texts = build_context(whole.encoder, config.text, class_names, load=load)
        else:
            texts = texts_SC[[sum(synonyms[:k]) for k in range(len(synonyms))]]
        guidance = LanguageGuidance(texts, channels[-1])
        channels[-1] += len(class_names)
    if config.kind == "light":
        if config.text.classifier:
            raise ValueError("decoder.text.classifier needs decoder.kind=mask2former: no queries")
        head = LightHead(
            channels, width=config.width, classes=len(class_names), groups=config.group_norm
        )
    else:
        if config.text.classifier:
            classifier = TextClassifier(texts_SC, synonyms, width=config.width)
        else:
            classifier = nn.Linear(config.width, len(class_names) + 1)
        head = build_mask_head(whole, channels, classifier)
    return head if guidance is None else GuidedHead(guidance, head)


def build_texts(
    whole: SegmenterConfig, class_names: Sequence[str], *, load: bool
) -> tuple[torch.Tensor, list[int]]:
    """Text embeddings of the classes; on the meta device their shape alone."""
    text = whole.decoder.text
    strange = sorted(text.synonyms.keys() - set(class_names))
    if strange:
        raise ValueError(f"decoder.text.synonyms: no class is called {', '.join(strange)}")
    if load:
        return embed_texts(whole.encoder, text, class_names)
    counts = [1 + len(text.synonyms.get(name, ())) for name in class_names]
    width = open_clip_architecture(at_hand(whole.encoder))["embed_dim"]
    return torch.empty(sum(counts), width), counts


def build_mask_head(
    whole: SegmenterConfig, channels: Sequence[int], classifier: nn.Module
) -> MaskHead:
    """Pixel decoder and queries."""
    config = whole.decoder
    pixel_decoder = PixelDecoder(
        channels,
        width=config.width,
        heads=config.heads,
        layers=config.pixel_layers,
        ffn=config.pixel_ffn,
        points=config.points,
        groups=config.group_norm,
    )
    query_decoder = QueryDecoder(
        classifier,
        width=config.width,
        queries=config.queries,
        layers=config.layers,
        heads=config.heads,
        ffn=config.ffn,
        linked=whole.tuning.kind == "rein" and whole.tuning.link_queries,
    )
    return MaskHead(pixel_decoder, query_decoder)
