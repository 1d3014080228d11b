"""Image and text towers of other libraries, built from an `EncoderConfig` and made encoders.

open_clip, timm, transformers (SegFormer) and segment_anything; weights by tag, file or folder.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from models.config import (
    KEYWORDS,
    EncoderConfig,
    TextConfig,
    TuningConfig,
    name_path,
    weights_path,
)
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
from models.hub import hub_file, loading
from models.tensors import read_tensors, refusing_code
from models.text import LearnedContext
from models.vits import ClipVit, PlainEncoder, SamEncoder, TimmVit


def at_hand(config: EncoderConfig) -> EncoderConfig:
    """The same encoder with references to local folders (builtin:NAME too) as plain paths."""
    found = {}
    if (folder := name_path(config.name)) is not None:
        found["name"] = f"local-dir:{folder}"
    if config.weights is not None and (path := weights_path(config.weights)) is not None:
        # a folder called as a keyword stays a path
        found["weights"] = f"./{path}" if str(path) in KEYWORDS else str(path)
    return config.model_copy(update=found)


def build_encoder(config: EncoderConfig, tuning: TuningConfig, *, load: bool = True) -> Encoder:
    """The encoder, with its weights where the config names some and `load` is set."""
    with refusing_code(f"encoder.weights: {config.weights}"):
        encoder = _of_family(config, tuning, load=load)
    if config.patch_size is not None:
        if not isinstance(encoder, PlainEncoder):
            raise ValueError(
                f"encoder.patch_size: {config.name} has no patch embedding to resample"
            )
        encoder.resample_patches(config.patch_size)
    if config.normalisation == "imagenet":
        encoder.normalise_by(IMAGENET_MEAN, IMAGENET_STD)
    encoder.checkpointing = config.checkpointing
    return encoder


def _of_family(config: EncoderConfig, tuning: TuningConfig, *, load: bool) -> Encoder:
    match config.family:
        case "open_clip":
            return build_open_clip(config, tuning, load=load)
        case "timm":
            return build_timm(config, tuning, load=load)
        case "transformers":
            return build_mit(config, tuning, load=load)
        case "sam":
            return build_sam(config, tuning, load=load)
        case other:
            raise unknown("encoder.family", other, ["open_clip", "timm", "transformers", "sam"])


def build_open_clip(config: EncoderConfig, tuning: TuningConfig, *, load: bool) -> Encoder:
    """open_clip's image tower alone: the text tower is neither built nor stored."""
    from open_clip.model import _build_vision_tower

    config = at_hand(config)
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
        quick = uses_quick_gelu(config, model)
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
    """open_clip's model description: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`."""
    import open_clip

    if config.architecture is not None:
        vision = dict(config.architecture)
        text = {"width": 32, "heads": 2, "layers": 1} | vision.pop("text_cfg", {})
        embed_dim = vision.pop("embed_dim", 64)
        return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}
    if config.name.startswith("local-dir:"):
        path = Path(config.name.removeprefix("local-dir:")) / "open_clip_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"encoder.name {config.name!r}: there is no {path}")
        return json.loads(path.read_text())["model_cfg"]
    found = open_clip.get_model_config(config.name)
    if found is None:
        raise unknown("encoder.name", config.name, open_clip.list_models())
    return found


def check_names(config: EncoderConfig) -> None:
    """Look whether the library knows the encoder's name and tag; builds and reads nothing.

    Raises:
        FileNotFoundError: a folder without a description.
        ValueError: an unknown name or tag; names the nearest ones.
    """
    config = at_hand(config)
    tagged = config.weights is not None and weights_path(config.weights) is None
    tagged = tagged and "/" not in config.weights
    match config.family:
        case "open_clip":
            open_clip_architecture(config)
            if tagged:
                _require_open_clip_tag(config)
        case "timm":
            import timm

            base = config.name.partition(".")[0]
            if not timm.is_model(base):
                raise unknown("encoder.name", base, timm.list_models())
            if tagged:
                _require_timm_tag(f"{base}.{config.weights}")
        case "transformers" if config.name not in MIT_SIZES:
            raise unknown("encoder.name", config.name, list(MIT_SIZES))
        case "sam" if config.name not in SAM_SIZES:
            raise unknown("encoder.name", config.name, list(SAM_SIZES))


def _require_open_clip_tag(config: EncoderConfig) -> None:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(config.name)
    if config.weights not in tags:
        raise unknown(
            f"encoder.weights of {config.name} (no such file or folder either)",
            config.weights,
            tags,
        )


def _require_timm_tag(name: str) -> None:
    import timm

    base, _, tag = name.partition(".")
    if not timm.models.is_model_pretrained(name):
        tags = [n.partition(".")[2] for n in timm.list_models(f"{base}.*", pretrained=True)]
        raise unknown(f"encoder.weights of {base} (no such file either)", tag, tags)


def uses_quick_gelu(config: EncoderConfig, model: dict[str, Any]) -> bool:
    """Whether activations are OpenAI's fast approximation: as pre-trained, else as described."""
    import open_clip

    quick = model.get("quick_gelu", False)
    if config.weights is None or config.architecture is not None:
        return quick
    tag = open_clip.get_pretrained_cfg(config.name, config.weights)
    return tag.get("quick_gelu", quick) if tag else quick


OPEN_CLIP_FILES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    "open_clip_pytorch_model.bin",
)
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files with the weights of a hub's model, the preferred one first."""


def weights_file(reference: str, hub_names: Sequence[str]) -> Path | None:
    """The file that `weights` names: itself, one in a folder, or a hub's; None: it is a tag.

    Raises:
        FileNotFoundError: a folder without weights, or a path or hub id that leads nowhere.
    """
    path = weights_path(reference)
    if path is not None and path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not files:
            raise FileNotFoundError(f"encoder.weights: no .safetensors or .bin file in {path}")
        return files[0]
    if path is not None and path.is_file():
        return path
    return hub_file(reference, hub_names, option="encoder.weights") if "/" in reference else None


def open_clip_weights(config: EncoderConfig) -> dict[str, torch.Tensor]:
    """The state dict that `weights` names: a tag, or a file (see `weights_file`)."""
    import open_clip
    from open_clip.factory import load_state_dict

    path = weights_file(config.weights, OPEN_CLIP_FILES)
    if path is None:
        _require_open_clip_tag(config)
        path = open_clip.download_pretrained(
            open_clip.get_pretrained_cfg(config.name, config.weights)
        )
    return load_state_dict(str(path), weights_only=True)


@torch.no_grad()
def embed_texts(
    config: EncoderConfig, text: TextConfig, class_names: Sequence[str]
) -> tuple[torch.Tensor, list[int]]:
    """Embeddings of the class names and their synonyms, by the encoder's own text tower.

    Each is the mean over the templates, of normalised embeddings. The tower is dropped afterwards.

    Returns:
        Normalised embeddings [S, C], one class after another, and the number of each class.

    Raises:
        ValueError: an encoder without a text tower of open_clip's own.
    """
    words = [[name, *text.synonyms.get(name, ())] for name in class_names]
    tower, tokenize = build_text_tower(config, seed=text.seed)
    found = []
    for word in (w for synonyms in words for w in synonyms):
        tokens = tokenize([template.format(word) for template in text.templates])
        found.append(F.normalize(F.normalize(tower(tokens), dim=-1).mean(0), dim=-1))
    return torch.stack(found), [len(synonyms) for synonyms in words]


def build_context(
    config: EncoderConfig, text: TextConfig, class_names: Sequence[str], *, load: bool
) -> LearnedContext:
    """Learned words before the class names, and the encoder's text tower to read them.

    Raises:
        ValueError: an encoder without a text tower of open_clip's own, or with one in which words
            see those behind them.
    """
    with torch.random.fork_rng(devices=[]):
        tower, tokenize = build_text_tower(config, seed=text.seed, load=load)
    if tower.attn_mask is None or tower.cls_emb is not None or tower.pool_type != "argmax":
        raise ValueError(
            f"decoder.text.context_words: the text tower of {config.name} is not of CLIP's kind "
            "(causal, read at the end of the sentence); set it to 0"
        )
    with torch.device("cpu"):
        tokens_KN = tokenize(list(class_names))
    return LearnedContext(tower, tokens_KN, words=text.context_words)


def build_text_tower(
    config: EncoderConfig, *, seed: int, load: bool = True
) -> tuple[nn.Module, Callable[[list[str]], torch.Tensor]]:
    """The text tower that belongs to an image encoder, in eval mode, and its tokenizer.

    Args:
        config: of the image encoder.
        seed: of random weights, used where the encoder has none of its own.
        load: whether to read weights.

    Raises:
        ValueError: an encoder without a text tower of open_clip's own.
    """
    import open_clip
    from open_clip.model import _build_text_tower

    if config.family != "open_clip":
        raise ValueError(f"decoder.text: an encoder of {config.family} has no text tower")
    config = at_hand(config)
    model = open_clip_architecture(config)
    if "hf_model_name" in model["text_cfg"]:
        raise ValueError(f"decoder.text: {config.name} has a text tower of another library")
    torch.manual_seed(seed)
    tower = _build_text_tower(
        model["embed_dim"], model["text_cfg"], quick_gelu=uses_quick_gelu(config, model)
    ).eval()
    if load and config.weights:
        weights = open_clip_weights(config)
        load_trunk(tower, weights, "text." if any(k.startswith("text.") for k in weights) else "")
    tokenizer = (
        open_clip.get_tokenizer(config.name) if config.architecture is None else open_clip.tokenize
    )
    return tower, tokenizer


def build_timm(config: EncoderConfig, tuning: TuningConfig, *, load: bool) -> Encoder:
    """A timm backbone with its own normalisation; `weights` is a tag or a file."""
    name, options = config.name, dict(config.architecture or {})
    if load and config.weights:
        options["pretrained"] = True
        path = weights_file(at_hand(config).weights, TIMM_FILES)
        if path is not None:
            options["pretrained_cfg_overlay"] = {"file": str(path)}
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

    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise unknown("encoder.name", base, timm.list_models())
    if options.get("pretrained") and "pretrained_cfg_overlay" not in options:
        _require_timm_tag(name)
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
    """transformers' SegFormer encoder; `weights` is a hub id, a folder, a file, or `default`."""
    from transformers import SegformerConfig, SegformerModel

    if config.name not in MIT_SIZES:
        raise unknown("encoder.name", config.name, list(MIT_SIZES))
    depths, widths = MIT_SIZES[config.name]
    options = {"depths": depths, "hidden_sizes": widths} | (config.architecture or {})
    architecture = SegformerConfig(drop_path_rate=tuning.drop_path, **options)
    file = weights_path(config.weights) if config.weights else None
    if load and file is not None and file.is_file():
        trunk = SegformerModel(architecture)
        state = read_tensors(file, option="encoder.weights")
        whole = any(name.startswith("segformer.") for name in state)  # with a head above it
        load_trunk(trunk, state, "segformer." if whole else "")
    elif load and config.weights:
        source = f"nvidia/{config.name}" if config.weights == "default" else config.weights
        with loading(source, option="encoder.weights"):
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
        path = weights_path(config.weights) or Path(config.weights)
        if not path.is_file():
            raise FileNotFoundError(f"encoder.weights: there is no file {path}")
        load_trunk(trunk, read_tensors(path, option="encoder.weights"), "image_encoder.")
    return encoder


def load_trunk(trunk: nn.Module, weights: Mapping[str, torch.Tensor], prefix: str) -> None:
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
