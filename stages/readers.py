"""Pictures, labels and sample indexes: from files to uint8 arrays, one face for every data set.

Between rooms a picture is uint8 RGB [H, W, 3] and a label map uint8 train ids [H, W], 255 = ignore.

    for sample in load_index(artifact / "sources"):
        image, label = read_image(sample.image), sample.read_label()
"""

import json
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from stages.labels import IdMap
from stages.shards import read_index, read_jsonl, stays_inside

MAX_PIXELS = 512_000_000
"""Larger pictures are refused (Pillow refuses above twice the number it is given)."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

_EXIF_ORIENTATION = 0x0112


class CorruptFileError(ValueError):
    """A picture or label that cannot be read; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture, with or without a label, from any data set or painted."""

    id: str
    """"dataset/stem", the same from disk to report."""
    image: Path
    label: Path | None = None
    height: int
    """Of the picture, in pixels."""
    width: int
    label_map: IdMap | None = None
    """How the label's raw values become train ids; None: they are train ids."""
    classes: dict[int, int] | None = None
    """Labelled pixels per train id; None: not counted."""
    painted: bool = False
    """A generated picture rather than a data set's."""
    weight: float = 1.0
    """Factor on its losses."""

    @property
    def dataset(self) -> str:
        return self.id.partition("/")[0]

    @property
    def stem(self) -> str:
        return self.id.partition("/")[2]

    def read_image(self) -> np.ndarray:
        """The picture: uint8 RGB [H, W, 3]. Raises `CorruptFileError`."""
        return read_image(self.image)

    def read_label(self) -> np.ndarray:
        """The label map: uint8 train ids [H, W] at the picture's size (nearest, where they differ).

        Raises:
            ValueError: the sample has no label, or its file cannot be read.
        """
        if self.label is None:
            raise ValueError(f"sample {self.id} has no label")
        raw_HW = read_label(self.label)
        if raw_HW.shape != (self.height, self.width):
            raw_HW = resize_label(raw_HW, (self.height, self.width))
        return raw_HW if self.label_map is None else self.label_map.apply(raw_HW)


def load_index(part: Path) -> list[Sample]:
    """All samples of a part that `prepare` left (sources, targets, ...), in order.

    Raises:
        FileNotFoundError: no index there, or no `roots.json` beside it.
        ValueError: an index line is not whole, or names a file outside its data set.
    """
    roots_file = part / "roots.json"
    if not roots_file.is_file():
        raise FileNotFoundError(f"{roots_file} is missing: run `clouds --stage prepare` again.")
    roots = json.loads(roots_file.read_text(encoding="utf-8"))
    return [
        sample for name in sorted(roots) for sample in _load_dataset(part, name, part / roots[name])
    ]


def _load_dataset(part: Path, name: str, root: Path) -> list[Sample]:
    _check_paths([name], place=part / "roots.json")
    index = part / f"{name}.jsonl"
    card = json.loads((part / f"{name}.json").read_text(encoding="utf-8"))
    id_map = IdMap.from_json(card["label_map"]) if card["label_map"] else None
    rows = read_jsonl(index)
    for row in rows:  # a data set's files may be links, but no path may lead out of its folder
        named = (row["id"], row["image"], row["label"])
        _check_paths([path for path in named if path is not None], place=index)
    return [_sample(row, root, id_map) for row in rows]


def _check_paths(paths: Sequence[str], *, place: Path) -> None:
    for path in paths:
        if not stays_inside(path):
            raise ValueError(
                f"{place} names {path!r}, which leads out of the data set's folder: it was altered."
                " Run `clouds --stage prepare --force prepare`."
            )


def _sample(row: dict[str, Any], root: Path, id_map: IdMap | None) -> Sample:
    classes = row.get("classes")
    return Sample(
        id=row["id"],
        image=root / row["image"],
        label=root / row["label"] if row["label"] else None,
        height=row["height"],
        width=row["width"],
        label_map=id_map,
        classes=None if classes is None else {int(key): value for key, value in classes.items()},
    )


def load_painted(
    pictures: Path, labels: Path | None, selection: Path | None = None
) -> list[Sample]:
    """Painted pictures paired with their labels, in the pictures' order.

    Args:
        pictures: the `synthesize` artifact.
        labels: the `pseudo_label` or `refine` artifact; None: samples without labels.
        selection: the `select` artifact; only what it keeps is taken. None: everything but the
            spare pictures, which only a selection asks for, and those that a safety checker
            flagged.

    Raises:
        ValueError: a kept picture has no label, or nothing is kept.
    """
    kept = None
    if selection is not None:
        rows = read_jsonl(selection / "selection.jsonl")
        kept = {row["id"] for row in rows if row["kept"]}
    files = {}
    if labels is not None:
        files = {row["id"]: row["folder"] / row["label"] for row in read_index(labels)}
    samples, missing, num_pictures = [], [], 0
    for row in read_index(pictures):
        num_pictures += 1
        left_out = row.get("spare", False) or row.get("flagged", False)
        if row["id"] not in kept if kept is not None else left_out:
            continue
        if labels is not None and row["id"] not in files:
            missing.append(row["id"])
            continue
        samples.append(_painted_sample(row, files.get(row["id"])))
    if missing:
        raise ValueError(
            f"{len(missing)} of {num_pictures} pictures in {pictures} have no label in {labels} "
            f"(the first: {missing[0]}): the two do not belong together."
        )
    if not samples:
        raise ValueError(
            f"no painted picture is left of {num_pictures}: the selection keeps none. Loosen "
            "`select`, or train without them (`self_train.labels=none`)."
        )
    return samples


def _painted_sample(row: dict[str, Any], label: Path | None) -> Sample:
    path = row["folder"] / row["file"]
    height, width = image_size(path)
    return Sample(
        id=f"painted/{row['id']}", image=path, label=label, height=height, width=width, painted=True
    )


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from a picture's header, EXIF rotation honoured.

    Raises:
        CorruptFileError: the header cannot be read.
    """
    with _open(path) as image:
        width, height = image.size
        # Pillow decodes a whole PNG to look for EXIF that its header does not announce.
        turned = "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def network_size(
    size: tuple[int, int], short_side: int | None, long_side: int | None = None
) -> tuple[int, int]:
    """(height, width) of the network's input: the short side as asked, the aspect kept.

    Args:
        size: the picture's (height, width).
        short_side: of the result; None: the picture's own.
        long_side: what the long side may be at most; None: any.
    """
    scale = 1.0 if short_side is None else short_side / min(size)
    if long_side is not None:
        scale = min(scale, long_side / max(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def read_image(path: Path) -> np.ndarray:
    """A picture as uint8 RGB [H, W, 3].

    EXIF rotation is applied; gray, 16-bit, palette and CMYK pictures are converted, transparent
    ones laid on black.

    Raises:
        CorruptFileError: the file is no picture, is cut off, or is larger than `MAX_PIXELS`.
    """
    with _open(path) as image:
        try:
            if image.mode != "RGB" or image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                image = to_rgb(ImageOps.exif_transpose(image))
            return np.array(image)  # asarray would give a read-only view, which torch dislikes
        except (OSError, ValueError, SyntaxError, struct.error) as error:
            raise CorruptFileError(f"{path}: the picture cannot be read ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: 16-bit levels are halved in depth, transparency laid on black.

    Raises:
        ValueError: its pixels are floating-point numbers.
    """
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        levels = np.asarray(image).clip(0, 65535).astype(np.uint16)
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it as 8 or 16 bit")
    return image.convert("RGB")


def read_label(path: Path) -> np.ndarray:
    """A label file's raw values: uint8 or uint16 [H, W].

    Palette pictures give their indices; 16-bit colour PNGs (SYNTHIA) their first channel; colour
    pictures whose channels are equal that channel.

    Raises:
        CorruptFileError: the file cannot be read.
        ValueError: it holds colours, not values.
    """
    if _is_colour_png16(path):
        return _read_png16(path)
    with _open(path) as image:
        try:
            image.load()
        except (OSError, ValueError, SyntaxError, struct.error) as error:
            raise CorruptFileError(f"{path}: the label cannot be read ({error})") from error
        raw = np.asarray(image)
        mode = image.mode
    if raw.ndim == 3 and (raw[..., :3] == raw[..., :1]).all():
        raw = raw[..., 0]
    if raw.ndim != 2 or mode == "F":
        raise ValueError(
            f"{path}: a label must hold one class value per pixel, but this is a picture of mode "
            f"{mode} (colours?). Use the data set's palette or gray PNGs (in GTA5's `labels` the "
            "palette index is the class id), or convert the colours to ids first."
        )
    if raw.dtype == bool:
        return raw.astype(np.uint8)
    if raw.dtype not in (np.uint8, np.uint16):
        if raw.min() < 0 or raw.max() > 65535:
            raise ValueError(f"{path}: label values {raw.min()}..{raw.max()} exceed 0..65535.")
        return raw.astype(np.uint16)
    return raw


def resize_label(labels_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour at pixel centres to (height, width); any integer dtype."""
    height, width = labels_HW.shape
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(np.intp)
    columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(np.intp)
    return labels_HW[rows[:, None], columns]


def _open(path: Path) -> Image.Image:
    """Open a picture by its header. A file that is not there is a plain `FileNotFoundError`."""
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is gone since it was indexed: run `clouds --stage prepare` again."
        ) from None
    except Image.DecompressionBombError as error:
        raise CorruptFileError(f"{path}: {error}") from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise CorruptFileError(
            f"{path}: not a picture, or its beginning is damaged ({error})"
        ) from error


def _is_colour_png16(path: Path) -> bool:
    """Whether a file is a PNG of 16-bit colour, which Pillow would cut to 8 bits."""
    try:
        with path.open("rb") as file:
            header = file.read(26)
    except OSError:
        return False
    return header[:8] == b"\x89PNG\r\n\x1a\n" and len(header) == 26 and header[24:26] in _COLOUR_16


_COLOUR_16 = (b"\x10\x02", b"\x10\x06")
"""PNG header bytes bit depth and colour type: 16-bit RGB and RGBA."""


def _read_png16(path: Path) -> np.ndarray:
    """The first channel. Pillow keeps one byte of two, so the file is read as either byte order."""
    halves = []
    for order in ("B", "L"):
        with _open(path) as image:
            tile = image.tile[0]
            image.tile = [tile._replace(args=tile.args.replace(";16B", f";16{order}"))]
            try:
                halves.append(np.asarray(image)[..., 0].astype(np.uint16))
            except (OSError, ValueError, SyntaxError, struct.error) as error:
                raise CorruptFileError(f"{path}: the label cannot be read ({error})") from error
    return halves[0] << 8 | halves[1]
