"""Small data sets written in the real on-disk formats, for tests of reading and judging."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (20, 32)
"""Height and width of the pictures."""

CITYSCAPES_IDS = (7, 8, 11, 21, 23, 24, 26, 0)
"""Raw ids that occur in `raw_label`: seven classes and one without a class."""


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Smooth colours with noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BILINEAR)
    noise = rng.integers(-8, 9, (*size, 3))
    return np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)


def raw_label(seed: int, values=CITYSCAPES_IDS, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Blocks of raw values, uint8 [H, W]."""
    rng = np.random.default_rng(1000 + seed)
    blocks = np.asarray(values, np.uint8)[rng.integers(0, len(values), (5, 8))]
    return np.kron(blocks, np.ones((4, 4), np.uint8))[: size[0], : size[1]]


def save(path: Path, array: np.ndarray, *, palette: bool = False) -> Path:
    """Write a picture or label by its suffix; 16-bit colour arrays as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.dtype == np.uint16 and array.ndim == 3:
        path.write_bytes(colour_png16(array))
        return path
    image = Image.fromarray(array)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)
    return path


def colour_png16(array: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write: unfiltered rows, big endian."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def cityscapes(
    root: Path, split: str = "val", *, count: int = 3, kind: str = "labelIds", first: int = 0
) -> Path:
    """`leftImg8bit/<split>/<city>` and `gtFine/<split>/<city>`, two cities in turn."""
    for number in range(first, first + count):
        city = ("bonn", "aachen")[number % 2]
        stem = f"{city}_{number:06d}_000019"
        label = raw_label(number)
        if kind == "labelTrainIds":
            label = np.where(label == 0, 255, label % 19).astype(np.uint8)
        save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", picture(number))
        save(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", label)
    return root


def gta5(root: Path, *, count: int = 3) -> Path:
    """`images/00001.png` and palette PNGs `labels/00001.png`."""
    for number in range(1, count + 1):
        save(root / "images" / f"{number:05d}.png", picture(number))
        save(root / "labels" / f"{number:05d}.png", raw_label(number), palette=True)
    return root


def synthia(root: Path, *, count: int = 2) -> Path:
    """`RGB/*.png` and 16-bit colour PNGs `GT/LABELS/*.png`: class in red, instance in green."""
    for number in range(count):
        save(root / "RGB" / f"{number:07d}.png", picture(number))
        label = np.zeros((*SIZE, 3), np.uint16)
        label[..., 0] = raw_label(number, (0, 1, 3, 8, 21, 22))
        label[..., 1] = np.arange(SIZE[1]) * 300
        save(root / "GT" / "LABELS" / f"{number:07d}.png", label)
    return root


def bdd100k(root: Path, split: str = "val", *, count: int = 2) -> Path:
    """`images/10k/<split>/*.jpg` and `labels/sem_seg/masks/<split>/*.png`."""
    for number in range(count):
        save(root / "images" / "10k" / split / f"7d{number:06x}-00000000.jpg", picture(number))
        label = raw_label(number, (0, 2, 10, 13, 18, 255))
        save(root / "labels" / "sem_seg" / "masks" / split / f"7d{number:06x}-00000000.png", label)
    return root


def mapillary(root: Path, split: str = "validation", *, count: int = 2, v2: bool = False) -> Path:
    """`<split>/images/*.jpg` and palette PNGs `<split>/labels` (in v2.0: `<split>/v1.2/labels`)."""
    for number in range(count):
        save(root / split / "images" / f"_a{number}.jpg", picture(number))
        label = raw_label(number, (7, 13, 17, 41, 44, 55, 65))
        folder = root / split / ("v1.2/labels" if v2 else "labels")
        save(folder / f"_a{number}.png", label, palette=True)
    return root


def acdc(root: Path, split: str = "val") -> Path:
    """`rgb_anon/<condition>/<split>/<sequence>` and `gt/...`, one picture per condition."""
    for number, condition in enumerate(("fog", "night", "rain", "snow")):
        sequence, stem = f"GOPR0{number}", f"GOPR0{number}_frame_000{number}"
        folder = root / "rgb_anon" / condition / split / sequence
        save(folder / f"{stem}_rgb_anon.png", picture(number))
        folder = root / "gt" / condition / split / sequence
        label = raw_label(number, (0, 2, 10, 255))
        save(folder / f"{stem}_gt_labelTrainIds.png", label)
    return root


def urbansyn(root: Path, *, count: int = 2) -> Path:
    """`rgb/rgb_0001.png` and `ss/ss_0001.png`."""
    for number in range(1, count + 1):
        save(root / "rgb" / f"rgb_{number:04d}.png", picture(number))
        save(root / "ss" / f"ss_{number:04d}.png", raw_label(number, (0, 2, 18, 19)))
    return root
