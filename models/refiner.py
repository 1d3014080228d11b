"""Segment Anything behind one face: pictures and prompts in, masks and their scores out.

    refiner = build_refiner("vit_h", "sam_vit_h_4b8939.pth")
    best = refiner.masks(pictures, prompts, candidates="best")

The encoder runs on batches, the decoder on a bounded number of prompts at a time, always in eval
mode. Pictures are resized to SAM's longest side and padded as `SamPredictor` does it.
"""

# B pictures, P prompts of one picture, N points of a prompt, C candidate masks, H W picture size
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils.amg import calculate_stability_score
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torch.nn import functional as F

from models.config import weights_path
from models.masks import scale_points
from models.miniature.sam_network import TINY_SIZES, build_sam, read_sizes
from models.tensors import read_tensors

OFFICIAL = ("vit_b", "vit_l", "vit_h")
"""Sizes of the official checkpoints."""
TINY = "tiny"
"""A quarter of the miniature's patches, with seeded random weights: for tests."""
FROM_CONFIG = "config"
"""Sizes read from `config.json` beside the weights."""
MODELS = (*OFFICIAL, FROM_CONFIG, TINY)
_EMBED_DIMS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
STABILITY_OFFSET = 1.0
"""Logits that the cut is moved up and down for a stability score (as the automatic masks do)."""
MASK_LOGIT = 8.0
"""A rough mask prompts SAM with plus and minus this."""
PADDING = -1
"""Label of a point that is none; 1: positive, 0: negative."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to segment in one picture: P prompts of up to N points, and boxes by choice."""

    points_PN2: np.ndarray
    """float32 (x, y) in pixels of the picture."""
    labels_PN: np.ndarray
    """int: 1 positive, 0 negative, -1 no point."""
    boxes_P4: np.ndarray | None = None
    """float32 (left, top, right, bottom) in pixels of the picture."""
    masks_PHW: np.ndarray | None = None
    """bool, rough masks at the picture's size."""

    def __post_init__(self) -> None:
        if self.points_PN2.shape != (*self.labels_PN.shape, 2):
            raise ValueError(
                f"points have shape {self.points_PN2.shape}, their labels {self.labels_PN.shape}; "
                "expected [P, N, 2] and [P, N]"
            )

    def __len__(self) -> int:
        return len(self.labels_PN)


@dataclass(frozen=True, kw_only=True)
class Masks:
    """What SAM found for the prompts of one picture."""

    masks_PCHW: torch.Tensor
    """bool, at the picture's size; C candidates per prompt."""
    iou_PC: torch.Tensor
    """float32: SAM's own estimate of each mask's IoU."""
    index_PC: torch.Tensor
    """int64: which of the three candidates each mask is."""
    stability_PC: torch.Tensor | None = None
    """float32, 0..1: IoU of the masks cut a little above and below SAM's threshold; 0 for a mask
    without pixels; None: not asked for."""


def point_prompts(
    points: Sequence[np.ndarray],
    *,
    boxes_P4: np.ndarray | None = None,
    masks_PHW: np.ndarray | None = None,
) -> Prompts:
    """Prompts of positive points, with boxes or rough masks by choice.

    Args:
        points: float32 (x, y) [number, 2] for each prompt; missing ones are padded.
        boxes_P4: see `Prompts`.
        masks_PHW: see `Prompts`.
    """
    longest = max((len(own) for own in points), default=1)
    points_PN2 = np.zeros((len(points), longest, 2), np.float32)
    labels_PN = np.full((len(points), longest), PADDING, np.int64)
    for number, own in enumerate(points):
        points_PN2[number, : len(own)] = own
        labels_PN[number, : len(own)] = 1
    return Prompts(
        points_PN2=points_PN2, labels_PN=labels_PN, boxes_P4=boxes_P4, masks_PHW=masks_PHW
    )


class Refiner(nn.Module):
    """A frozen Sam that stays in eval mode."""

    def __init__(self, sam: Sam, *, untrained: bool = False) -> None:
        super().__init__()
        self.sam = sam
        self.untrained = untrained
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Refiner":
        """Stays in eval mode whatever is asked: batch statistics would change the masks."""
        return super().train(False)

    @property
    def image_size(self) -> int:
        """Longest side in pixels that the encoder sees."""
        return self.sam.image_encoder.img_size

    @torch.inference_mode()
    def masks(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Prompts],
        *,
        candidates: Literal["all", "best", "single"] = "all",
        stability: bool = False,
        prompt_batch: int = 64,
        bf16: bool = False,
    ) -> list[Masks]:
        """Masks for the prompts of every picture.

        Args:
            images: uint8 RGB [H, W, 3], of any sizes; encoded as one batch.
            prompts: one `Prompts` per picture; a picture with none is not encoded.
            candidates: all three masks of a prompt; the best by predicted IoU (C = 1; the others
                are not even resized); or the single one that SAM gives for clear prompts (C = 1).
            stability: also measure how stable each mask is.
            prompt_batch: prompts per decoder call.
            bf16: run in bfloat16 autocast; mask logits are resized in float32.
        """
        asked = [number for number, own in enumerate(prompts) if len(own)]
        context = torch.autocast(self.sam.device.type, torch.bfloat16) if bf16 else nullcontext()
        with context:
            embeddings = self._encode([images[number] for number in asked]) if asked else []
        num_candidates = 3 if candidates == "all" else 1
        found = [self._nothing(image.shape[:2], num_candidates, stability) for image in images]
        for number, embedding in zip(asked, embeddings, strict=True):
            size = images[number].shape[:2]
            parts = []
            for part in _split(prompts[number], prompt_batch):
                with context:
                    logits, iou = self._decode(
                        embedding, part, size, multimask=candidates != "single"
                    )
                best_only = candidates == "best"
                parts.append(self._finish(logits.float(), iou.float(), size, best_only, stability))
            found[number] = _joined(parts)
        return found

    @torch.inference_mode()
    def everything(
        self,
        image: np.ndarray,
        *,
        points_per_side: int = 32,
        min_iou: float = 0.86,
        min_stability: float = 0.92,
        crop_layers: int = 1,
        min_area_px: int = 100,
        prompt_batch: int = 64,
        bf16: bool = False,
    ) -> np.ndarray:
        """Masks of everything SAM finds in a picture, bool [M, H, W], from large to small.

        segment_anything's automatic generator; the defaults are SAM4UDASS's settings (but that
        masks below `min_area_px` are dropped whole instead of having their specks removed).

        Args:
            image: uint8 RGB [H, W, 3].
            points_per_side: grid of point prompts.
            min_iou: predicted IoU that a mask must have.
            min_stability: stability under another threshold that a mask must have.
            crop_layers: layers of crops that are looked at enlarged.
            min_area_px: smallest mask.
            prompt_batch: prompts per decoder call.
            bf16: run in bfloat16 autocast.
        """
        generator = SamAutomaticMaskGenerator(
            self.sam,
            points_per_side=points_per_side,
            points_per_batch=prompt_batch,
            pred_iou_thresh=min_iou,
            stability_score_thresh=min_stability,
            crop_n_layers=crop_layers,
            crop_n_points_downscale_factor=2,
        )
        if bf16:
            generator.predictor = _RoundedPredictor(self.sam)
        try:
            found = generator.generate(image)
        except IndexError:  # segment_anything, where no crop of a picture has any mask
            found = []
        return from_large_to_small(found, min_area_px=min_area_px, size=image.shape[:2])

    def _encode(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        resize = ResizeLongestSide(self.image_size)
        inputs = [
            torch.from_numpy(resize.apply_image(image)).permute(2, 0, 1).to(self.sam.device)
            for image in images
        ]
        return self.sam.image_encoder(torch.stack([self.sam.preprocess(each) for each in inputs]))

    def _decode(
        self,
        embedding_CHW: torch.Tensor,
        prompts: Prompts,
        size: tuple[int, int],
        *,
        multimask: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.sam.device
        points = scale_points(prompts.points_PN2, size, longest_px=self.image_size)
        boxes = None
        if prompts.boxes_P4 is not None:
            corners = prompts.boxes_P4.reshape(-1, 2, 2)
            boxes = torch.from_numpy(scale_points(corners, size, longest_px=self.image_size))
            boxes = boxes.reshape(-1, 4).to(device)
        sparse, dense = self.sam.prompt_encoder(
            points=(
                torch.from_numpy(points).to(device),
                torch.from_numpy(prompts.labels_PN).to(device),
            ),
            boxes=boxes,
            masks=self._mask_logits(prompts.masks_PHW, size),
        )
        return self.sam.mask_decoder(
            image_embeddings=embedding_CHW[None],
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )

    def _mask_logits(
        self, masks_PHW: np.ndarray | None, size: tuple[int, int]
    ) -> torch.Tensor | None:
        """Rough masks as logits [P, 1, G, G] on the prompt encoder's grid, padded like pictures."""
        if masks_PHW is None:
            return None
        grid = self.sam.prompt_encoder.mask_input_size[0]
        seen = ResizeLongestSide.get_preprocess_shape(*size, self.image_size)
        height, width = (max(1, round(side * grid / self.image_size)) for side in seen)
        shares = torch.from_numpy(masks_PHW).to(self.sam.device)[:, None].float()
        logits = (2 * F.interpolate(shares, (height, width), mode="area") - 1) * MASK_LOGIT
        return F.pad(logits, (0, grid - width, 0, grid - height), value=-MASK_LOGIT)

    def _finish(
        self,
        logits_PChw: torch.Tensor,
        iou_PC: torch.Tensor,
        size: tuple[int, int],
        best_only: bool,
        stability: bool,
    ) -> Masks:
        index_PC = torch.arange(iou_PC.shape[1], device=iou_PC.device).expand_as(iou_PC)
        if best_only:
            index_PC = iou_PC.argmax(1, keepdim=True)
            iou_PC = iou_PC.gather(1, index_PC)
            prompts_P = torch.arange(len(index_PC), device=index_PC.device)
            logits_PChw = logits_PChw[prompts_P, index_PC[:, 0]][:, None]
        seen = ResizeLongestSide.get_preprocess_shape(*size, self.image_size)
        full = self.sam.postprocess_masks(logits_PChw, input_size=seen, original_size=size)
        threshold = self.sam.mask_threshold
        stability_PC = None
        if stability:
            shares_PC = calculate_stability_score(full, threshold, STABILITY_OFFSET)
            stability_PC = shares_PC.nan_to_num(0.0)
        return Masks(
            masks_PCHW=full > threshold,
            iou_PC=iou_PC,
            index_PC=index_PC,
            stability_PC=stability_PC,
        )

    def _nothing(self, size: tuple[int, int], num_candidates: int, stability: bool) -> Masks:
        device = self.sam.device
        empty = torch.zeros((0, num_candidates), device=device)
        return Masks(
            masks_PCHW=torch.zeros((0, num_candidates, *size), dtype=torch.bool, device=device),
            iou_PC=empty,
            index_PC=empty.long(),
            stability_PC=empty if stability else None,
        )


class _RoundedPredictor(SamPredictor):
    """Runs in bfloat16 autocast; answers in float32, of which the generator makes numpy arrays."""

    def set_torch_image(self, *args: Any, **kwargs: Any) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            super().set_torch_image(*args, **kwargs)

    def predict_torch(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        with torch.autocast(self.device.type, torch.bfloat16):
            return tuple(each.float() for each in super().predict_torch(*args, **kwargs))


def from_large_to_small(
    found: Sequence[Mapping[str, Any]], *, min_area_px: int, size: tuple[int, int]
) -> np.ndarray:
    """Records of the automatic generator as bool masks [M, H, W], without the small ones.

    Masks of one area stand in the order of their boxes, whatever the records' order was.
    """
    kept = [entry for entry in found if entry["area"] >= min_area_px]
    kept.sort(key=lambda entry: (-entry["area"], *entry["bbox"], *entry["point_coords"][0]))
    masks = [entry["segmentation"] for entry in kept]
    return np.stack(masks) if masks else np.zeros((0, *size), bool)


def _split(prompts: Prompts, size: int) -> list[Prompts]:
    def part(values: np.ndarray | None, start: int) -> np.ndarray | None:
        return None if values is None else values[start : start + size]

    return [
        Prompts(
            points_PN2=prompts.points_PN2[start : start + size],
            labels_PN=prompts.labels_PN[start : start + size],
            boxes_P4=part(prompts.boxes_P4, start),
            masks_PHW=part(prompts.masks_PHW, start),
        )
        for start in range(0, len(prompts), size)
    ]


def _joined(parts: Sequence[Masks]) -> Masks:
    stability = [part.stability_PC for part in parts if part.stability_PC is not None]
    return Masks(
        masks_PCHW=torch.cat([part.masks_PCHW for part in parts]),
        iou_PC=torch.cat([part.iou_PC for part in parts]),
        index_PC=torch.cat([part.index_PC for part in parts]),
        stability_PC=torch.cat(stability) if stability else None,
    )


def build_refiner(
    model: str, weights: str | None, *, device: torch.device | str = "cpu", seed: int = 0
) -> Refiner:
    """Build a Sam and load its weights.

    Args:
        model: vit_b, vit_l, vit_h; "config" (sizes in `config.json` beside the weights); or "tiny".
        weights: checkpoint file (.pth, loaded weights-only, or .safetensors), folder with
            `sam.safetensors`, or builtin:NAME; None: seeded random weights.
        device: where to.
        seed: of random weights.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: an unknown model, or weights of another size.
    """
    if model not in MODELS:
        raise ValueError(f"refine.model: {model!r} is unknown; known are {', '.join(MODELS)}.")
    file = None if weights is None else _weights_file(weights, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = _build(model, file)
    if file is not None:
        state = read_tensors(file, option="refine.weights")
        _load_strictly(sam, state, model=model, file=file)
    return Refiner(sam, untrained=file is None).to(device)


def _build(model: str, file: Path | None) -> Sam:
    if model in OFFICIAL:
        return sam_model_registry[model]()
    if model == TINY:
        return build_sam(TINY_SIZES)
    if file is None:
        raise ValueError(
            "refine.model=config reads the sizes beside the weights: set refine.weights to a "
            "folder with config.json and sam.safetensors."
        )
    return build_sam(read_sizes(file.parent))


def _weights_file(weights: str, model: str) -> Path:
    path = weights_path(weights) or Path(weights)
    file = path / "sam.safetensors" if path.is_dir() else path
    missing = [file] if not file.is_file() else []
    if model == FROM_CONFIG and not (file.parent / "config.json").is_file():
        missing.append(file.parent / "config.json")
    if missing:
        raise FileNotFoundError(
            f"refine.weights: {weights!r} has no {missing[0].name}. The official checkpoints are "
            "linked from the segment-anything project's page (sam_vit_b_01ec64.pth, "
            "sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth); give the file's path."
        )
    return file


def _load_strictly(sam: Sam, state: Mapping[str, torch.Tensor], *, model: str, file: Path) -> None:
    own = sam.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshapen = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if not (missing or unexpected or misshapen):
        sam.load_state_dict({name: value.float() for name, value in state.items()})
        return
    size = state.get("image_encoder.pos_embed", torch.zeros(1)).shape[-1]
    hint = f" It looks like {_EMBED_DIMS[size]}." if size in _EMBED_DIMS else ""
    faults = [*misshapen[:2], *(f"{name} is missing" for name in missing[:2])]
    faults += [f"{name} is not part of it" for name in unexpected[:2]]
    raise ValueError(
        f"refine.weights: {file} does not fit refine.model={model}: {'; '.join(faults)} "
        f"({len(misshapen)} tensors of another shape, {len(missing)} missing, "
        f"{len(unexpected)} unexpected).{hint}"
    )
