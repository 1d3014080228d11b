"""Judge a segmenter on labelled samples: read ahead, predict, count.

    for items in read_batches(samples, config):
        predicted_BHW = count(score, items, segmenter, config, device)

Shared by `evaluate` (targets), by the trainings (validation sets) and by `submit` (no labels).
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from models.inference import predict, resize_in_bands, scores_by, slide_in_bands
from models.segmenter import Segmenter
from stages.devices import Device
from stages.judging_config import EvaluateConfig, ProtocolConfig
from stages.metrics import DatasetScore, mean, scores
from stages.readers import Sample, network_size, resize_label

READERS = min(8, os.cpu_count() or 1)
"""Threads that read and decode ahead of the network."""
BATCHES_AHEAD = 3
LARGE_PX = 40_000_000
"""Predictions of more pixels are made band by band (Mapillary Vistas: about 24 million)."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """To which size a data set's pictures are brought, and how."""

    short_side: int | None = None
    """None: native size."""
    long_side: int | None = None
    """At most; None: any."""
    halve: bool = False
    """Picture (bicubic) and label (nearest) are halved first; that is the native size then."""
    resize: Literal["antialias", "plain"] = "antialias"
    """See `resize_image`."""


@dataclass(frozen=True)
class Item:
    """A sample as the network and the confusion matrix get it."""

    sample: Sample
    image_HW3: np.ndarray
    """uint8 RGB at the network's input size."""
    label_HW: np.ndarray | None
    """uint8 train ids at the size that is scored; None: the sample has no label."""
    size: Size
    """(height, width) of the prediction that is asked for."""


def sizes_for(layout: str, config: EvaluateConfig) -> Sizes:
    """The sizes of data sets in a layout."""
    if layout not in config.layouts:
        return Sizes(config.short_side, config.long_side, resize=config.resize)
    own = config.layouts[layout]
    return Sizes(own.short_side, own.long_side, own.halve, config.resize)


def mean_miou(
    segmenter: Segmenter, samples: Sequence[Sample], config: ProtocolConfig, device: Device
) -> float:
    """Mean over the data sets of their mIoU, a fraction.

    Args:
        segmenter: in eval mode, on the device.
        samples: labelled, sorted by data set.
        config: the protocol.
        device: where, in which precision.

    Raises:
        ValueError: no data set has a labelled pixel.
    """
    found = []
    for _, group in itertools.groupby(samples, key=lambda sample: sample.dataset):
        score = DatasetScore(segmenter.num_classes, device.device)
        for items in read_batches(list(group), config):
            count(score, items, segmenter, config, device)
        found.append(scores(score.to_json()["confusion"], config.absent)["miou"])
    value = mean(found)
    if value is None:
        raise ValueError(
            "the validation sets have no labelled pixel: look at their label_map, and at what "
            "`prepare` counted."
        )
    return value


def count(
    score: DatasetScore,
    items: Sequence[Item],
    segmenter: Segmenter,
    config: ProtocolConfig,
    device: Device,
) -> torch.Tensor:
    """Predict a batch at the labels' size, count it, and return the train ids (uint8 [B, H, W])."""
    labels_BHW = _on(device, [item.label_HW for item in items])
    predicted_BHW = predict_labels(segmenter, items, config, device)
    score.add(predicted_BHW, labels_BHW)
    return predicted_BHW


def predict_labels(
    segmenter: Segmenter, items: Sequence[Item], config: ProtocolConfig, device: Device
) -> torch.Tensor:
    """Train ids (uint8 [B, H, W]) of a batch at the size that its items ask for.

    Raises:
        ValueError: pictures are too large to go through the network as the protocol asks.
    """
    images_B3HW = _on(device, [item.image_HW3 for item in items]).permute(0, 3, 1, 2)
    size = items[0].size
    if size[0] * size[1] > LARGE_PX:
        parts = [_in_bands(segmenter, one, size, config, device) for one in images_B3HW.split(1)]
        return torch.cat(parts)
    scores_BKHW = _scores(segmenter, images_B3HW, size, config, device)
    return scores_BKHW.argmax(1).to(torch.uint8)


def _scores(
    segmenter: Segmenter,
    images_B3HW: torch.Tensor,
    size: Size,
    config: ProtocolConfig,
    device: Device,
) -> torch.Tensor:
    """Scores [B, K, *size] as the protocol asks for them."""
    return predict(
        segmenter,
        images_B3HW,
        size=size,
        mode=config.mode,
        window=(config.window, config.window),
        stride=(config.stride, config.stride),
        flip=config.flip,
        scales=config.scales,
        bf16=device.dtype == torch.bfloat16,
        batch=config.batch_size,
    )


@torch.inference_mode()
def _in_bands(
    segmenter: Segmenter,
    image_13HW: torch.Tensor,
    size: Size,
    config: ProtocolConfig,
    device: Device,
) -> torch.Tensor:
    """Train ids (uint8 [1, *size]) of a picture whose scores would not fit into memory.

    What is averaged over scales is averaged at the network's size, which is resized then.
    """
    network: Size = tuple(image_13HW.shape[-2:])
    if network[0] * network[1] <= LARGE_PX:
        scores_1Khw = _scores(segmenter, image_13HW, network, config, device)
        bands = resize_in_bands(scores_1Khw, size, rows=max(1, LARGE_PX // size[1]))
    elif config.mode == "slide" and network == size and config.scales != (1.0,):
        raise ValueError(
            f"a picture of {network[0]}x{network[1]} (height x width) goes through the network in "
            f"windows, band by band, which evaluate.scales={list(config.scales)} cannot: set "
            "evaluate.scales=[1], or evaluate.short_side=1024."
        )
    elif config.mode == "slide" and network == size:
        bands = slide_in_bands(
            scores_by(segmenter, bf16=device.dtype == torch.bfloat16),
            image_13HW,
            window=(config.window, config.window),
            stride=(config.stride, config.stride),
            flip=config.flip,
            batch=config.batch_size,
        )
    else:
        raise ValueError(
            f"a picture of {network[0]}x{network[1]} (height x width) does not go through the "
            "network as a whole: set evaluate.short_side=1024, or evaluate.mode=slide at its own "
            "size."
        )
    return torch.cat([band.argmax(1).to(torch.uint8) for band in bands], 1)


def _on(device: Device, arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device.device, non_blocking=True)


def read_batches(
    samples: Sequence[Sample], config: ProtocolConfig, sizes: Sizes | None = None
) -> Iterator[list[Item]]:
    """Items in batches of one picture size, read ahead; composed by the index alone.

    Args:
        samples: with or without labels.
        config: the protocol.
        sizes: of this data set; None: the protocol's short side.
    """
    sizes = sizes or Sizes(config.short_side)
    by_size: dict[Size, list[Sample]] = {}
    for sample in samples:
        by_size.setdefault((sample.height, sample.width), []).append(sample)
    batches = [
        group[start : start + config.batch_size]
        for group in by_size.values()
        for start in range(0, len(group), config.batch_size)
    ]
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="judging")
    waiting: deque[list[Future[Item]]] = deque()
    try:
        for batch in batches:
            waiting.append([pool.submit(read_item, sample, config, sizes) for sample in batch])
            if len(waiting) > BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def read_item(sample: Sample, config: ProtocolConfig, sizes: Sizes) -> Item:
    """Read a sample and bring picture and label to the sizes that the protocol asks for."""
    image_HW3 = sample.read_image()
    label_HW = sample.read_label() if sample.label is not None else None
    if sizes.halve:
        half = max(1, image_HW3.shape[0] // 2), max(1, image_HW3.shape[1] // 2)
        smaller = Image.fromarray(image_HW3).resize(half[::-1], Image.Resampling.BICUBIC)
        image_HW3 = np.array(smaller)
        label_HW = None if label_HW is None else resize_label(label_HW, half)
    native: Size = image_HW3.shape[:2]
    network = network_size(native, sizes.short_side, sizes.long_side)
    image_HW3 = resize_image(image_HW3, network, kind=sizes.resize)
    if config.label_resolution == "native":
        return Item(sample, image_HW3, label_HW, native)
    if label_HW is not None and network != label_HW.shape:
        label_HW = resize_label(label_HW, network)
    return Item(sample, image_HW3, label_HW, network)


def resize_image(
    image_HW3: np.ndarray, size: Size, *, kind: Literal["antialias", "plain"]
) -> np.ndarray:
    """Bilinear to (height, width), uint8 RGB.

    Args:
        image_HW3: uint8 RGB.
        size: (height, width).
        kind: "antialias": every pixel counts when a picture shrinks (Pillow, detectron2);
            "plain": the four nearest ones do (OpenCV, mmseg).
    """
    if size == image_HW3.shape[:2]:
        return image_HW3
    if kind == "antialias":
        smaller = Image.fromarray(image_HW3).resize(size[::-1], Image.Resampling.BILINEAR)
        return np.array(smaller)  # asarray would give a read-only view, which torch dislikes
    image_13HW = torch.from_numpy(image_HW3).permute(2, 0, 1)[None].float()
    resized = F.interpolate(image_13HW, size, mode="bilinear", align_corners=False)
    return resized[0].round().byte().permute(1, 2, 0).contiguous().numpy()
