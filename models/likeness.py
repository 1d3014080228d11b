"""How pictures look to simple measures and to CLIP: contrast, near copies, fit to a text.

hashes = [difference_hash(picture) for picture in pictures]
scorer = load_scorer("ViT-B-32", weights="laion2b_s34b_b79k")
similarity = scorer.score(pictures, texts)
"""

# B pictures with one text each, D width of the common space
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import nn

from models.config import name_path
from models.tensors import refusing_code

HASH_BITS = 64


def contrast(image: np.ndarray) -> float:
    """Standard deviation of a picture's luminance (ITU-R 601 weights), on 0..1.

    A blank picture has 0, black and white halves have 0.5.

    Args:
        image: uint8 RGB [H, W, 3].
    """
    luminance = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return float(luminance.std() / 255)


def difference_hash(image: np.ndarray) -> int:
    """A 64-bit perceptual hash: is each of 8x8 cells brighter than its right neighbour?

    Copies that are resized, recompressed or a little recoloured differ in a few bits. Source: the
    well-known "dHash" (gray, shrunk to 9x8, horizontal differences).

    Args:
        image: uint8 RGB [H, W, 3].
    """
    small = Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX)
    gray = np.asarray(small, np.int16)
    bits = (gray[:, :-1] > gray[:, 1:]).ravel()
    return int(np.packbits(bits).view(">u8")[0])


def nearest(value: int, others: np.ndarray) -> tuple[int, int] | None:
    """Place of the hash with the fewest differing bits, and how many differ; None without others.

    Args:
        value: a hash.
        others: uint64 hashes; of several equally near the first counts.
    """
    if not len(others):
        return None
    distances = np.bitwise_count(others ^ np.uint64(value))
    place = int(distances.argmin())
    return place, int(distances[place])


@dataclass(frozen=True, kw_only=True)
class ClipScorer:
    """A CLIP with its tokenizer and its picture transform."""

    model: nn.Module
    tokenize: Callable[[Sequence[str]], torch.Tensor]
    transform: Callable[[Image.Image], torch.Tensor]
    device: torch.device

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """Cosine similarity of every picture (uint8 RGB) with the text at the same place."""
        stacked = torch.stack([self.transform(Image.fromarray(image)) for image in images])
        images_BD = self.model.encode_image(stacked.to(self.device), normalize=True)
        tokens = self.tokenize(list(texts)).to(self.device)
        texts_BD = self.model.encode_text(tokens, normalize=True)
        return (images_BD * texts_BD).sum(1).float().cpu().tolist()


def load_scorer(
    name: str, *, weights: str | None = None, device: torch.device | str = "cpu"
) -> ClipScorer:
    """Load a CLIP through open_clip.

    Args:
        name: open_clip's model name, `hf-hub:` id, `local-dir:FOLDER` or builtin:NAME.
        weights: pre-trained tag or file, for a model name.
        device: where to.

    Raises:
        FileNotFoundError: a folder without a model, or weights that are not to be had.
        ValueError: an unknown name, or a name without weights.
    """
    local = name_path(name)
    if local is not None:
        if not (local / "open_clip_config.json").is_file():
            raise FileNotFoundError(
                f"select.clip: {name!r} is no open_clip folder: open_clip_config.json is missing."
            )
        name = f"local-dir:{local}"
    elif not name.startswith("hf-hub:"):
        _check_name(name, weights)
    try:
        with refusing_code(f"select.clip: {name}"):
            model, _, transform = open_clip.create_model_and_transforms(name, pretrained=weights)
        tokenize = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise FileNotFoundError(
            f"select.clip: {name!r} with weights {weights!r} cannot be loaded ({reason}). Fetch "
            "them where there is a network, or give a local folder."
        ) from error
    return ClipScorer(
        model=model.to(device).eval(),
        tokenize=tokenize,
        transform=transform,
        device=torch.device(device),
    )


def _check_name(name: str, weights: str | None) -> None:
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known[:5]
        raise ValueError(f"select.clip: open_clip has no {name!r}; nearest: {', '.join(near)}")
    if weights is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"select.clip: {name!r} needs select.clip_weights, a file or one of {', '.join(tags)}"
        )
