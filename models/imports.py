"""Checkpoints of the published systems made segmenters of ours: CLOUDS, Rein, VLTSeg.

Files are read weights-only: pickled helper objects become inert stand-ins. Every tensor is
accounted for, and a partial match is refused.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.build import build_segmenter
from models.checkpoints import KeyReport, compare_keys, saved_state
from models.config import SegmenterConfig
from models.convert import (
    CLOUDS_DECODER,
    EVA_ENCODER,
    MMDET_DECODER,
    MMPRETRAIN_CONVNEXT,
    MMSEG_PYRAMID,
    REIN_TOKENS,
    rename,
    unfuse,
)
from models.segmenter import Segmenter
from models.tensors import unreadable
from models.towers import at_hand, open_clip_architecture

Origin = Literal["clouds", "rein", "vltseg"]


@dataclass(frozen=True)
class Translation:
    """A foreign state dict in our names."""

    origin: Origin
    """Which system the names belong to."""
    state: dict[str, torch.Tensor]
    """Tensors by our names."""
    left_out: tuple[str, ...]
    """Foreign names that are not needed (text tower, SAM, teacher, precomputed tables)."""
    strange: tuple[str, ...]
    """Foreign names that no rule knows."""


class Inert:
    """Stands in for a pickled helper object; takes anything, does nothing."""

    def __init__(self, *args: object, **options: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file, by name; no code of the file is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = [(type("Inert", (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(unreadable(str(path), error)) from error
    for key in ("state_dict", "model"):
        if isinstance(whole, dict) and isinstance(whole.get(key), dict):
            whole = whole[key]
    if not isinstance(whole, dict):
        raise ValueError(f"{path} holds no state dict but a {type(whole).__name__}")
    return {k: v for k, v in whole.items() if isinstance(v, torch.Tensor)}


def translate(state: Mapping[str, torch.Tensor]) -> Translation:
    """Recognise whose names these are, and translate them.

    Raises:
        ValueError: names of none of the known systems.
    """
    names = list(state)
    if any(n.startswith("sem_seg_head.predictor.") for n in names):
        return translate_clouds(state)
    if any(n.startswith("backbone.reins.") for n in names):
        return translate_rein(state)
    if any(n.startswith("decode_head.transformer_decoder.") for n in names):
        return translate_vltseg(state)
    raise ValueError(
        "no names of CLOUDS (sem_seg_head.predictor.*), Rein (backbone.reins.*) or VLTSeg "
        f"(decode_head.transformer_decoder.*); the file has e.g. {', '.join(names[:4])}"
    )


def translate_clouds(state: Mapping[str, torch.Tensor]) -> Translation:
    """detectron2 names: `sem_seg_head.*` and the whole CLIP under `backbone.clip_model.*`."""
    ours, strange = rename(state, CLOUDS_DECODER, prefix="sem_seg_head.", new_prefix="decoder.")
    visual = "backbone.clip_model.visual."
    inner = f"{visual}trunk." if any(n.startswith(f"{visual}trunk.") for n in state) else visual
    left_out = []
    for name, value in state.items():
        unused = name.startswith((f"{inner}head.", f"{inner}attnpool."))
        if name.startswith(inner) and not unused:
            ours[f"encoder.trunk.{name.removeprefix(inner)}"] = value
        elif not name.startswith("sem_seg_head."):
            known = ("backbone.", "sam.", "teacher", "criterion.", "pixel_", "text", "void")
            (left_out if name.startswith(known) else strange).append(name)
    return Translation("clouds", ours, tuple(left_out), tuple(strange))


def translate_rein(state: Mapping[str, torch.Tensor]) -> Translation:
    """mmdetection names, and `backbone.reins.*`; ConvNeXt has a number after `reins.`."""
    ours, strange, left_out = translate_mmdet(state)
    prefix = "backbone.reins."
    staged = f"{prefix}0.scale" in state
    for stage in range(4) if staged else (None,):
        inner = prefix if stage is None else f"{prefix}{stage}."
        more, unknown = rename(
            state, REIN_TOKENS, prefix=inner, new_prefix=f"tokens.stages.{stage or 0}."
        )
        ours |= more
        strange += unknown
    for name, value in state.items():
        if not name.startswith("backbone.") or name.startswith(prefix):
            continue
        if staged:
            more, unknown = rename(
                {name: value}, MMPRETRAIN_CONVNEXT, prefix="backbone.", new_prefix="encoder."
            )
            ours |= more
            left_out += unknown
        else:
            left_out.append(name)
    return Translation("rein", ours, tuple(left_out), tuple(strange))


def translate_vltseg(state: Mapping[str, torch.Tensor]) -> Translation:
    """mmdetection names of the head, EVA-02's or mmpretrain's under `backbone.`, and the pyramid.

    The pyramid lies in the backbone (as in the published checkpoints) or in mmsegmentation's neck.

    Raises:
        ValueError: attention with biased keys.
    """
    neck, unknown_neck = rename(state, MMSEG_PYRAMID, prefix="neck.", new_prefix="neck.")
    ours, strange, left_out = translate_mmdet(
        {n: v for n, v in state.items() if not n.startswith("neck.")}
    )
    tables = [n for n in state if n.startswith("backbone.") and "rope." in n]
    rest = unfuse({n: v for n, v in state.items() if n not in set(tables)})
    more, unknown = rename(rest, EVA_ENCODER, prefix="backbone.")
    strange = [*strange, *unknown_neck, *unknown]
    return Translation("vltseg", ours | more | neck, tuple(left_out + tables), tuple(strange))


def translate_mmdet(
    state: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """The head of mmdetection: ours, strange names, names that are not needed."""
    ours, strange = rename(state, MMDET_DECODER, prefix="decode_head.", new_prefix="decoder.")
    unused = ("decode_head.conv_seg.", "decode_head.loss_")
    left_out = [n for n in strange if n.startswith(unused)]
    other = [n for n in state if not n.startswith(("decode_head.", "backbone."))]
    for name in other:
        known = name.startswith(("data_preprocessor.", "teacher", "auxiliary_head."))
        (left_out if known else strange).append(name)
    return ours, [n for n in strange if n not in set(left_out)], left_out


@dataclass(frozen=True)
class ImportReport:
    """What became of every tensor of a foreign checkpoint."""

    origin: Origin
    keys: KeyReport
    """How the translated tensors fit what our checkpoint stores."""
    left_out: tuple[str, ...]
    """Foreign names that are not needed."""
    strange: tuple[str, ...] = ()
    """Foreign names that no rule knows."""
    verified: int = 0
    """Frozen tensors of the file that equal the configured pre-trained weights."""

    @property
    def complete(self) -> bool:
        """Every tensor that we need was found, and every one of the file is accounted for."""
        return self.keys.complete and not self.strange

    def __str__(self) -> str:
        return (
            f"{self.origin} checkpoint: {self.keys}; {self.verified} frozen tensors verified; "
            f"{len(self.left_out)} not needed"
        )


class PartialMatchError(ValueError):
    """A checkpoint that does not fit as a whole; `report` says all of it."""

    def __init__(self, message: str, report: ImportReport) -> None:
        super().__init__(message)
        self.report = report


def import_segmenter(
    path: Path, *, config: SegmenterConfig, class_names: Sequence[str]
) -> tuple[Segmenter, ImportReport]:
    """A segmenter with the weights of a published checkpoint, in eval mode.

    Args:
        path: the authors' file.
        config: what it is a checkpoint of (a `*_released` recipe's segmenter).
        class_names: classes in the order of train ids.

    Raises:
        PartialMatchError: names that no rule knows, tensors that are missing or misshapen.
        ValueError: names of none of the known systems, or frozen weights that differ from those
            of the config.
    """
    translation = translate(read_state(path))
    # names and shapes are compared first, before any pre-trained weights are fetched
    shapes = build_segmenter(config, class_names=class_names, device="meta")
    stored, whole = saved_state(shapes), shapes.state_dict()
    needed = {n: v for n, v in translation.state.items() if n in stored or n not in whole}
    report = ImportReport(
        origin=translation.origin,
        keys=compare_keys(needed, stored),
        left_out=translation.left_out,
        strange=translation.strange,
    )
    if report.strange:
        listed = ", ".join(report.strange[:8])
        raise PartialMatchError(f"{path}: {len(report.strange)} unknown names: {listed}", report)
    if not report.complete:
        hint = ""
        bare = not any(n.startswith("encoder.") for n in translation.state)
        wanted = any(n.startswith("encoder.") for n in report.keys.missing)
        if config.encoder.weights is None and bare and wanted:
            hint = "; the file has no encoder: name its pre-trained weights in encoder.weights"
        unfit = (*report.keys.missing, *report.keys.unexpected, *report.keys.misshapen)
        if translation.origin == "vltseg" and any(n.startswith("encoder.") for n in unfit):
            hint = other_encoder(translation.state, config)
        raise PartialMatchError(f"{path} does not fit the segmenter: {report}{hint}", report)
    segmenter = build_segmenter(config, class_names=class_names)
    stored, whole = saved_state(segmenter), segmenter.state_dict()
    verified = verify_frozen(path, translation.state, whole, stored)
    with torch.no_grad():
        for name, value in needed.items():
            stored[name].copy_(value)
    return segmenter.eval(), replace(report, verified=verified)


def other_encoder(found: Mapping[str, torch.Tensor], config: SegmenterConfig) -> str:
    """What a file's EVA-02 has that the config's has not, and the settings to import it; or "".

    The public checkpoints of VLTSeg have patches of 14 pixels, position embeddings of the training
    crop's size, and no norm inside attention.
    """
    encoder, trunk = config.encoder, "encoder.trunk."
    patches = found.get(f"{trunk}patch_embed.proj.weight")
    positions = found.get(f"{trunk}pos_embed")
    if encoder.family != "open_clip" or patches is None or positions is None:
        return ""
    tower = open_clip_architecture(at_hand(encoder))["vision_cfg"]
    patch, side = patches.shape[-1], math.isqrt(positions.shape[1] - 1)
    normed = f"{trunk}blocks.0.attn.norm.weight" in found
    options = tower.get("timm_options", {}) | {"img_size": side * patch}
    options |= {"scale_attn_inner": normed}
    architecture = {"timm_model_name": tower.get("timm_model_name"), "timm_options": options}
    return (
        f"; the file's encoder has patches of {patch} pixels, positions for {side}x{side} patches "
        f"and {'a' if normed else 'no'} norm inside attention; an encoder like that: --set "
        "segmenter.encoder.weights=null --set segmenter.encoder.patch_size=null --set "
        f"segmenter.encoder.architecture='{json.dumps(architecture)}'"
    )


def verify_frozen(
    path: Path,
    found: Mapping[str, torch.Tensor],
    whole: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
) -> int:
    """Count the file's tensors that the config's frozen weights have as well, with equal values.

    Raises:
        ValueError: a tensor that differs.
    """
    frozen = [n for n in found if n in whole and n not in stored]
    for name in frozen:
        ours, theirs = whole[name], found[name]
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs.to(ours), atol=1e-5):
            raise ValueError(
                f"{path}: {name} is not what the config's pre-trained weights hold; "
                "set encoder.weights to none to take the file's"
            )
    return len(frozen)
