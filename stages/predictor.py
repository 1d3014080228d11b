"""A trained segmenter in use, from Python:

    from stages.predictor import load
    result = load("artifacts/latest/model").predict("street.png")
    result.overlay.save("overlay.png")

`result.labels` are train ids, `result.shares` the share of each class. For many pictures there is
`predict_many`, and the command `clouds predict`, which writes files (`stages/predict.py`).
"""

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.checkpoints import describe_checkpoint, load_segmenter
from models.inference import label_of, predict, resize_in_bands, scores_by, slide_in_bands
from models.segmenter import Segmenter
from stages.devices import Device, device_for
from stages.judging import network_size
from stages.labels import (
    LabelClass,
    LabelSpace,
    known_labelspaces,
    load_labelspace,
    read_labelspace,
)
from stages.readers import read_image, to_rgb
from stages.use_config import PredictConfig


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a segmenter says of one picture."""

    picture: np.ndarray
    """uint8 RGB [H, W, 3]."""
    labels: np.ndarray
    """uint8 train ids [H, W]."""
    confidence: np.ndarray
    """uint8 [H, W]: the best class's share of all scores, 0..255 = 0..1."""
    space: LabelSpace
    """Names and colours of the train ids."""
    opacity: float = 0.5
    """Share of the class colours in the overlay."""

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of the pixels of each class, by name, in the order of train ids."""
        counts = np.bincount(self.labels.ravel(), minlength=self.space.num_classes)
        return {
            name: round(int(count) / self.labels.size, 6)
            for name, count in zip(self.space.names, counts, strict=False)
        }

    @cached_property
    def overlay(self) -> Image.Image:
        """The picture with the class colours over it."""
        colours = Image.fromarray(self.space.colourise(self.labels))
        return Image.blend(Image.fromarray(self.picture), colours, self.opacity)

    @cached_property
    def label_image(self) -> Image.Image:
        """The labels as a picture: value = train id, palette = class colours."""
        image = Image.fromarray(self.labels)
        image.putpalette(self.space.colours.tobytes())
        return image


class Predictor:
    """A segmenter on its device, with the names and colours of its classes.

    Args:
        segmenter: in eval mode.
        space: of its classes.
        device: where it is.
        config: how pictures are predicted.
    """

    def __init__(
        self, segmenter: Segmenter, *, space: LabelSpace, device: Device, config: PredictConfig
    ) -> None:
        self.segmenter, self.space, self.device, self.config = segmenter, space, device, config

    def predict(self, picture: str | Path | Image.Image | np.ndarray) -> Prediction:
        """Predict one picture.

        Args:
            picture: a file of any kind Pillow reads, a Pillow image, or uint8 RGB [H, W, 3].

        Raises:
            CorruptFileError: the file is no picture.
            ValueError: the array has not that form.
        """
        return self.predict_many([_pixels(picture)])[0]

    @torch.inference_mode()
    def predict_many(self, pictures: Sequence[np.ndarray]) -> list[Prediction]:
        """Predict pictures of one size in one batch: uint8 RGB [H, W, 3] each.

        Raises:
            ValueError: a single picture needs more memory than there is.
        """
        try:
            return self._predict_batch(pictures)
        except (torch.OutOfMemoryError, MemoryError) as error:
            height, width = pictures[0].shape[:2]
            if len(pictures) == 1:
                raise ValueError(
                    f"a picture of {width}x{height} pixels needs more memory than there is: "
                    "predict in smaller windows (--sliding --window 256), or shrink it "
                    "(--short-side 512)."
                ) from error
        return [self.predict_many([picture])[0] for picture in pictures]

    def _predict_batch(self, pictures: Sequence[np.ndarray]) -> list[Prediction]:
        images_B3HW = torch.stack([self._to_network(picture) for picture in pictures])
        size = pictures[0].shape[:2]
        if size[0] * size[1] <= self.config.whole_px:
            confidence_BHW, label_BHW = label_of(self._scores(images_B3HW, size))
        else:
            confidence_BHW, label_BHW = self._in_bands(images_B3HW, size)
        found = zip(pictures, label_BHW.cpu().numpy(), confidence_BHW.cpu().numpy(), strict=True)
        return [
            Prediction(
                picture=picture,
                labels=labels,
                confidence=confidence,
                space=self.space,
                opacity=self.config.opacity,
            )
            for picture, labels, confidence in found
        ]

    def is_large(self, size: tuple[int, int]) -> bool:
        """Whether a picture of (height, width) is predicted in windows because of its size."""
        height, width = network_size(size, self.config.short_side)
        return self.config.mode == "auto" and height * width > self.config.whole_px

    def batch_of(self, size: tuple[int, int]) -> int:
        """How many pictures of (height, width) share a forward pass."""
        return max(1, min(self.config.batch, self.config.whole_px // (size[0] * size[1])))

    def _to_network(self, picture: np.ndarray) -> torch.Tensor:
        """The picture at the network's input size, uint8 [3, h, w] on the device."""
        size = network_size(picture.shape[:2], self.config.short_side)
        if size != picture.shape[:2]:
            image = Image.fromarray(picture)
            picture = np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))
        return torch.from_numpy(picture).permute(2, 0, 1).to(self.device.device)

    def _scores(self, images_B3HW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Scores [B, K, *size], as a whole or in windows."""
        large = self.is_large(tuple(images_B3HW.shape[-2:]))
        return predict(
            self.segmenter,
            images_B3HW,
            size=size,
            mode="slide" if large or self.config.mode == "slide" else "whole",
            flip=self.config.flip,
            scales=self.config.scales,
            **self._windows(),
            bf16=self._bf16,
        )

    def _in_bands(
        self, images_B3HW: torch.Tensor, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Confidence and labels [B, *size] of pictures whose scores would not fit into memory."""
        found = []
        for image_13HW in images_B3HW.split(1):
            parts = [label_of(band) for band in self._bands(image_13HW, size)]
            found.append([torch.cat(maps, 1) for maps in zip(*parts, strict=True)])
        confidence_BHW, label_BHW = (torch.cat(maps) for maps in zip(*found, strict=True))
        return confidence_BHW, label_BHW

    def _bands(self, image_13HW: torch.Tensor, size: tuple[int, int]) -> Iterator[torch.Tensor]:
        own_size = tuple(image_13HW.shape[-2:])
        if own_size == size and self.config.scales != (1.0,):
            raise ValueError(
                f"a picture of {size[1]}x{size[0]} pixels is predicted in windows, band by band, "
                f"which scales {list(self.config.scales)} cannot: leave --scales out, or shrink it "
                "(--short-side 1024)."
            )
        if own_size == size:
            yield from slide_in_bands(
                scores_by(self.segmenter, bf16=self._bf16),
                image_13HW,
                flip=self.config.flip,
                **self._windows(),
            )
        else:
            rows = max(1, self.config.whole_px // size[1])
            yield from resize_in_bands(self._scores(image_13HW, own_size), size, rows=rows)

    def _windows(self) -> dict[str, int | tuple[int, int]]:
        config = self.config
        return {
            "window": (config.window, config.window),
            "stride": (config.stride, config.stride),
            "batch": config.batch,
        }

    @property
    def _bf16(self) -> bool:
        return self.device.dtype == torch.bfloat16


def load(
    model: str | Path, *, labels: str | Path | None = None, config: PredictConfig | None = None
) -> Predictor:
    """A trained segmenter, ready to predict.

    Args:
        model: folder of a checkpoint, such as `artifacts/latest/model`.
        labels: label space for the colours: a shipped name, a YAML file, or the folder that
            `prepare` left; None: the checkpoint's own, where it ships, else made-up colours.
        config: how pictures are predicted (None: `PredictConfig()`).

    Raises:
        FileNotFoundError: no checkpoint there, or no such label space.
        ValueError: the label space has other classes, or the device is not on this machine.
    """
    folder, config = Path(model), config or PredictConfig()
    description = describe_checkpoint(folder)
    space = space_of(description["label_space"], description["class_names"], labels)
    device = device_for(config.device, precision=config.precision)
    segmenter = load_segmenter(folder, device=device.device, which=config.weights)
    return Predictor(segmenter, space=space, device=device, config=config)


def space_of(name: str, class_names: Sequence[str], labels: str | Path | None) -> LabelSpace:
    """Names, colours and maps of a checkpoint's classes.

    Raises:
        FileNotFoundError: `labels` names no label space.
        ValueError: it has other classes than the checkpoint.
    """
    shipped = load_labelspace(name) if name in known_labelspaces() else None
    if labels is not None:
        folder = Path(labels)
        space = read_labelspace(folder) if folder.is_dir() else load_labelspace(str(labels))
        if list(space.names) != list(class_names):
            raise ValueError(
                f"label space {str(labels)!r} has the classes {', '.join(space.names)}; the "
                f"checkpoint tells apart {', '.join(class_names)}. Name its own label space."
            )
        # What `prepare` leaves has no maps.
        return shipped if shipped and shipped.classes == space.classes else space
    if shipped and list(shipped.names) == list(class_names):
        return shipped
    classes = [
        LabelClass(id=number, name=entry, colour=_made_up_colour(number))
        for number, entry in enumerate(class_names)
    ]
    return LabelSpace(name=name, classes=tuple(classes), maps={}, origin="made-up colours")


def _made_up_colour(number: int) -> tuple[int, int, int]:
    """Hues a golden angle apart, so that neighbours in the list differ most."""
    hue = number * 0.61803398875 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 0.55 + 0.4 * (number % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def _pixels(picture: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(picture, str | Path):
        if not Path(picture).is_file():
            raise FileNotFoundError(f"{picture}: there is no such picture.")
        return read_image(Path(picture))
    if isinstance(picture, Image.Image):
        return np.array(to_rgb(picture))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"a picture must be uint8 RGB [H, W, 3], got {picture.dtype} {list(picture.shape)}"
        )
    return picture
