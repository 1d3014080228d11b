"""From a config to networks: the only reader of `models.config` among the networks."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.config import DecoderConfig, EncoderConfig, SegmenterConfig, TuningConfig
from models.decoder import QueryDecoder
from models.encoders import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClipResNetEncoder,
    ConvNextEncoder,
    Encoder,
    MitEncoder,
    ResNetEncoder,
)
from models.heads import LightHead, MaskHead
from models.pixel_decoder import PixelDecoder
from models.rein import ReinTokens
from models.segmenter import Segmenter
from models.vits import ClipVit, LearnedPyramid, PlainEncoder, ResizePyramid, SamEncoder, TimmVit


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
        decoder = build_decoder(config.decoder, encoder, config, len(class_names))
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
}
"""Layers inside the blocks that LoRA updates by default."""


def inject_lora(encoder: Encoder, tuning: TuningConfig) -> None:
    """Put peft's low-rank updates beside linear layers of the blocks; only they are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    kind = type(encoder).__name__
    targets = tuning.lora_targets or LORA_TARGETS.get(kind)
    if targets is None:
        raise ValueError(
            f"tuning.kind=lora: {kind} has no linear layers in its blocks; "
            f"encoders with them: {', '.join(LORA_TARGETS)}"
        )
    names = "|".join(targets)
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=rf".*blocks\.\d+\.(?:.*\.)?(?:{names})",
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
    config: DecoderConfig, encoder: Encoder, whole: SegmenterConfig, classes: int
) -> nn.Module:
    """The decoder that fits the encoder's channels."""
    if config.kind == "light":
        return LightHead(
            encoder.channels, width=config.width, classes=classes, groups=config.group_norm
        )
    linked = whole.tuning.kind == "rein" and whole.tuning.link_queries
    pixel_decoder = PixelDecoder(
        encoder.channels,
        width=config.width,
        heads=config.heads,
        layers=config.pixel_layers,
        ffn=config.pixel_ffn,
        points=config.points,
        groups=config.group_norm,
    )
    query_decoder = QueryDecoder(
        nn.Linear(config.width, classes + 1),
        width=config.width,
        queries=config.queries,
        layers=config.layers,
        heads=config.heads,
        ffn=config.ffn,
        linked=linked,
    )
    return MaskHead(pixel_decoder, query_decoder)


def build_encoder(config: EncoderConfig, tuning: TuningConfig, *, load: bool = True) -> Encoder:
    """The encoder, with its weights where the config names some and `load` is set."""
    match config.family:
        case "open_clip":
            encoder = build_open_clip(config, tuning, load=load)
        case "timm":
            encoder = build_timm(config, tuning, load=load)
        case "transformers":
            encoder = build_mit(config, tuning, load=load)
        case "sam":
            encoder = build_sam(config, tuning, load=load)
        case other:
            raise unknown("encoder.family", other, ["open_clip", "timm", "transformers", "sam"])
    if config.patch_size is not None:
        if not isinstance(encoder, PlainEncoder):
            raise ValueError(
                f"encoder.patch_size: {config.name} has no patch embedding to resample"
            )
        encoder.resample_patches(config.patch_size)
    encoder.checkpointing = config.checkpointing
    return encoder


def build_open_clip(config: EncoderConfig, tuning: TuningConfig, *, load: bool) -> Encoder:
    """open_clip's image tower alone: the text tower is neither built nor stored."""
    import open_clip
    from open_clip.model import _build_vision_tower

    model = open_clip_architecture(config)
    vision = dict(model["vision_cfg"])
    normalisation = {"mean": CLIP_MEAN, "std": CLIP_STD}
    if "timm_model_name" in vision:
        options = vision.pop("timm_options", {})
        trunk = create_timm(vision["timm_model_name"], tuning, **options)
        encoder = wrap_timm(trunk, config, **normalisation)
        prefix = "visual.trunk."
    else:
        refuse_drop_path(tuning, "open_clip's own towers")
        quick = model.get("quick_gelu", False)
        if config.weights and open_clip.get_pretrained_cfg(config.name, config.weights):
            tag = open_clip.get_pretrained_cfg(config.name, config.weights)
            quick = tag.get("quick_gelu", quick)
        trunk = _build_vision_tower(model["embed_dim"], vision, quick_gelu=quick)
        if isinstance(vision["layers"], (list, tuple)):
            encoder = ClipResNetEncoder(trunk, **normalisation)
        else:
            encoder = ClipVit(trunk, features=config.features, **normalisation)
        prefix = "visual."
    if load and config.weights:
        load_trunk(encoder.trunk, open_clip_weights(config), prefix)
    return encoder


def open_clip_architecture(config: EncoderConfig) -> dict[str, Any]:
    """open_clip's model description: `vision_cfg`, `embed_dim` and perhaps `quick_gelu`."""
    import json

    import open_clip

    if config.architecture is not None:
        vision = dict(config.architecture)
        return {"embed_dim": vision.pop("embed_dim", 64), "vision_cfg": vision}
    if config.name.startswith("local-dir:"):
        path = Path(config.name.removeprefix("local-dir:")) / "open_clip_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"encoder.name {config.name!r}: there is no {path}")
        return json.loads(path.read_text())["model_cfg"]
    found = open_clip.get_model_config(config.name)
    if found is None:
        raise unknown("encoder.name", config.name, open_clip.list_models())
    return found


def open_clip_weights(config: EncoderConfig) -> dict[str, torch.Tensor]:
    """The state dict that `weights` names: a tag, a file, or a folder with one."""
    import open_clip
    from open_clip.factory import load_state_dict

    path = Path(config.weights)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not files:
            raise FileNotFoundError(f"encoder.weights: no .safetensors or .bin file in {path}")
        path = files[0]
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(config.name)
        if config.weights not in tags:
            raise unknown(
                f"encoder.weights of {config.name} (no such file or folder either)",
                config.weights,
                tags,
            )
        path = open_clip.download_pretrained(
            open_clip.get_pretrained_cfg(config.name, config.weights)
        )
    return load_state_dict(str(path), weights_only=True)


def build_timm(config: EncoderConfig, tuning: TuningConfig, *, load: bool) -> Encoder:
    """A timm backbone with its own normalisation; `weights` is a tag or a local file."""
    name, options = config.name, dict(config.architecture or {})
    if load and config.weights:
        options["pretrained"] = True
        if Path(config.weights).is_file():
            options["pretrained_cfg_overlay"] = {"file": config.weights}
        else:
            name = f"{name.partition('.')[0]}.{config.weights}"
    trunk = create_timm(name, tuning, **options)
    mean, std = (
        tuple(255 * value for value in trunk.pretrained_cfg[key]) for key in ("mean", "std")
    )
    return wrap_timm(trunk, config, mean=mean, std=std)


def create_timm(name: str, tuning: TuningConfig, **options: Any) -> nn.Module:
    """A timm model without classifier, for any input size."""
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise unknown("encoder.name", base, timm.list_models())
    if options.get("pretrained") and not timm.models.is_model_pretrained(name):
        tags = [n.partition(".")[2] for n in timm.list_models(f"{base}.*", pretrained=True)]
        if "pretrained_cfg_overlay" not in options:
            raise unknown(f"encoder.weights of {base} (no such file either)", tag, tags)
    if base.startswith(("vit_", "eva", "deit")):
        options = {"dynamic_img_size": True} | options
    if tuning.drop_path:
        options["drop_path_rate"] = tuning.drop_path
    return timm.create_model(name, num_classes=0, **options)


def wrap_timm(trunk: nn.Module, config: EncoderConfig, **normalisation: Any) -> Encoder:
    """The encoder class for a timm trunk."""
    match type(trunk).__name__:
        case "ConvNeXt":
            return ConvNextEncoder(trunk, output_norm=config.output_norm, **normalisation)
        case "ResNet":
            return ResNetEncoder(trunk, **normalisation)
        case "VisionTransformer" | "Eva":
            return TimmVit(trunk, features=config.features, **normalisation)
        case other:
            raise ValueError(
                f"encoder.name {config.name!r}: no encoder for timm's {other}; there are some for "
                "ConvNeXt, ResNet, VisionTransformer, Eva"
            )


MIT_SIZES = {
    "mit-b0": ([2, 2, 2, 2], [32, 64, 160, 256]),
    "mit-b1": ([2, 2, 2, 2], [64, 128, 320, 512]),
    "mit-b2": ([3, 4, 6, 3], [64, 128, 320, 512]),
    "mit-b3": ([3, 4, 18, 3], [64, 128, 320, 512]),
    "mit-b4": ([3, 8, 27, 3], [64, 128, 320, 512]),
    "mit-b5": ([3, 6, 40, 3], [64, 128, 320, 512]),
}
"""Blocks and channels of the four stages (Xie et al., SegFormer, NeurIPS 2021, table 6)."""


def build_mit(config: EncoderConfig, tuning: TuningConfig, *, load: bool) -> Encoder:
    """transformers' SegFormer encoder; `weights` is a hub id, a folder, or `default`."""
    from transformers import SegformerConfig, SegformerModel

    if config.name not in MIT_SIZES:
        raise unknown("encoder.name", config.name, list(MIT_SIZES))
    depths, widths = MIT_SIZES[config.name]
    options = {"depths": depths, "hidden_sizes": widths} | (config.architecture or {})
    architecture = SegformerConfig(drop_path_rate=tuning.drop_path, **options)
    if load and config.weights:
        source = f"nvidia/{config.name}" if config.weights == "default" else config.weights
        trunk = SegformerModel.from_pretrained(source, config=architecture)
    else:
        trunk = SegformerModel(architecture)
    return MitEncoder(trunk, mean=IMAGENET_MEAN, std=IMAGENET_STD)


SAM_SIZES = {
    "vit_b": (768, 12, 12, (2, 5, 8, 11)),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
}
"""Width, depth, heads and global blocks (segment_anything's `build_sam.py`)."""


def build_sam(config: EncoderConfig, tuning: TuningConfig, *, load: bool) -> Encoder:
    """Segment Anything's image encoder; `weights` is a file with a whole SAM in it."""
    from functools import partial

    from segment_anything.modeling import ImageEncoderViT

    refuse_drop_path(tuning, "SAM's encoder")
    if config.name not in SAM_SIZES:
        raise unknown("encoder.name", config.name, list(SAM_SIZES))
    width, depth, heads, global_blocks = SAM_SIZES[config.name]
    options = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "global_attn_indexes": global_blocks,
        "window_size": 14,
        "use_rel_pos": True,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    } | (config.architecture or {})
    trunk = ImageEncoderViT(**options)
    encoder = SamEncoder(trunk, features=config.features, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if load and config.weights:
        path = Path(config.weights)
        if not path.is_file():
            raise FileNotFoundError(f"encoder.weights: there is no file {path}")
        load_trunk(trunk, torch.load(path, map_location="cpu", weights_only=True), "image_encoder.")
    return encoder


def load_trunk(trunk: nn.Module, weights: dict[str, torch.Tensor], prefix: str) -> None:
    """Load a trunk strictly from the keys of `weights` that begin with `prefix`."""
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    missing = sorted(trunk.state_dict().keys() - found.keys())
    if missing:
        raise ValueError(
            f"the weights lack {len(missing)} of the encoder's {len(trunk.state_dict())} tensors "
            f"(prefix {prefix!r}), first: {', '.join(missing[:5])}"
        )
    trunk.load_state_dict({k: found[k] for k in trunk.state_dict()}, strict=True)


def refuse_drop_path(tuning: TuningConfig, what: str) -> None:
    """Raise if drop path is asked of a tower that has none."""
    if tuning.drop_path:
        raise ValueError(f"tuning.drop_path {tuning.drop_path}: {what} have none; set it to 0")


def unknown(what: str, value: str, known: Sequence[str]) -> ValueError:
    """An error that names the nearest known values."""
    near = difflib.get_close_matches(value, known, n=3)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(list(known)[:20])}"
    return ValueError(f"{what}: unknown {value!r}; {hint}")
