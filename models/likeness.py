"""How pictures look to simple measures and to CLIP: contrast, near copies, fit to a text.

hashes = [difference_hash(picture) for picture in pictures]
scorer = load_scorer("ViT-B-32", weights="laion2b_s34b_b79k")
similarity = scorer.score(pictures, texts)
"""

# B pictures with one text each, D width of the common space
import difflib
import itertools
import logging
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import nn

from models.config import name_path
from models.tensors import refusing_code

HASH_BITS = 64
_PARTS_MAX = 16
"""Near copies of more bits are looked for among all: shorter parts would hold most hashes."""


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


class NearCopies:
    """Hashes so far, kept so that a near one is found without looking at all of them.

    Two hashes that differ in at most n bits have one of n + 1 parts in common: only those that
    share a part are compared (multi-index hashing; Norouzi, Punjani and Fleet 2012).
    """

    def __init__(self, *, bits: int) -> None:
        """Nothing yet; hashes count as near that differ in at most `bits` bits."""
        self._bits = bits
        edges = [HASH_BITS * part // (bits + 1) for part in range(bits + 2)]
        parts = itertools.pairwise(edges if bits < _PARTS_MAX else [0, 0])
        self._parts = [(low, (1 << high - low) - 1) for low, high in parts]
        self._shelves: list[defaultdict[int, _Shelf]] = [defaultdict(_Shelf) for _ in self._parts]
        self._num_hashes = 0

    def add(self, value: int) -> None:
        """Keep a hash; its place is how many were kept before it."""
        for (low, mask), shelf in zip(self._parts, self._shelves, strict=True):
            shelf[value >> low & mask].add(value, self._num_hashes)
        self._num_hashes += 1

    def nearest(self, value: int) -> int | None:
        """Place of the near hash with the fewest differing bits (of several the first), or None."""
        found = []
        for (low, mask), shelf in zip(self._parts, self._shelves, strict=True):
            key = value >> low & mask
            if key in shelf:
                found.append(shelf[key].nearest(value))
        distance, place = min(found, default=(HASH_BITS + 1, 0))
        return place if distance <= self._bits else None


class _Shelf:
    """Hashes with a part in common, and their places."""

    def __init__(self) -> None:
        self._hashes, self._places = array("Q"), array("Q")

    def add(self, value: int, place: int) -> None:
        self._hashes.append(value)
        self._places.append(place)

    def nearest(self, value: int) -> tuple[int, int]:
        """Differing bits and place of the nearest, of several the first."""
        hashes = np.frombuffer(self._hashes, np.uint64)  # a view: adding copies nothing
        distances = np.bitwise_count(hashes ^ np.uint64(value))
        first = int(distances.argmin())
        return int(distances[first]), self._places[first]


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
        check_name(name, weights)
    try:
        with refusing_code(f"select.clip: {name}"), _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip tells the root logger of every step, with the machine's paths."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


def check_name(name: str, weights: str | None) -> None:
    """Look whether open_clip knows a model and how it is to get weights; loads nothing.

    Raises:
        ValueError: an unknown name, or a name without weights.
    """
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known[:5]
        raise ValueError(f"select.clip: open_clip has no {name!r}; nearest: {', '.join(near)}")
    if weights is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"select.clip: {name!r} needs select.clip_weights, a file or one of {', '.join(tags)}"
        )
