"""Judge a segmenter on labelled samples: read ahead, predict, count.

for items in read_batches(samples, config):
    predicted_BHW = count(score, items, segmenter, config, device)

Shared by `evaluate` (targets) and by the trainings (validation sets).
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from models.inference import predict
from models.segmenter import Segmenter
from stages.config import ProtocolConfig
from stages.devices import Device
from stages.metrics import DatasetScore, mean, scores
from stages.readers import Sample, resize_label

READERS = min(8, os.cpu_count() or 1)
"""Threads that read and decode ahead of the network."""
BATCHES_AHEAD = 3

Size = tuple[int, int]


@dataclass(frozen=True)
class Item:
    """A sample as the network and the matrix get it."""

    sample: Sample
    image_HW3: np.ndarray
    """uint8 RGB at the network's input size."""
    label_HW: np.ndarray
    """uint8 train ids at the size that is scored."""


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
    labels_BHW = _on(device, np.stack([item.label_HW for item in items]))
    images_BHW3 = _on(device, np.stack([item.image_HW3 for item in items]))
    predicted_BHW = predict_labels(
        segmenter, images_BHW3.permute(0, 3, 1, 2), labels_BHW, config, device
    )
    score.add(predicted_BHW, labels_BHW)
    return predicted_BHW


def _on(device: Device, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(device.device, non_blocking=True)


def predict_labels(
    segmenter: Segmenter,
    images_B3HW: torch.Tensor,
    labels_BHW: torch.Tensor,
    config: ProtocolConfig,
    device: Device,
) -> torch.Tensor:
    """Train ids (uint8 [B, H, W]) at the labels' size."""
    scores_BKHW = predict(
        segmenter,
        images_B3HW,
        size=tuple(labels_BHW.shape[-2:]),
        mode=config.mode,
        window=(config.window, config.window),
        stride=(config.stride, config.stride),
        bf16=device.dtype == torch.bfloat16,
        batch=config.batch_size,
    )
    return scores_BKHW.argmax(1).to(torch.uint8)


def read_batches(samples: Sequence[Sample], config: ProtocolConfig) -> Iterator[list[Item]]:
    """Items in batches of one picture size, read ahead; composed by the index alone."""
    by_size: dict[Size, list[Sample]] = {}
    for sample in samples:
        by_size.setdefault((sample.height, sample.width), []).append(sample)
    batches = [
        group[start : start + config.batch_size]
        for group in by_size.values()
        for start in range(0, len(group), config.batch_size)
    ]
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="evaluate")
    waiting: deque[list[Future[Item]]] = deque()
    try:
        for batch in batches:
            waiting.append([pool.submit(read_item, sample, config) for sample in batch])
            if len(waiting) > BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def read_item(sample: Sample, config: ProtocolConfig) -> Item:
    image_HW3, label_HW = sample.read_image(), sample.read_label()
    size = network_size((sample.height, sample.width), config.short_side)
    if size != image_HW3.shape[:2]:
        picture = Image.fromarray(image_HW3)
        image_HW3 = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
    if config.label_resolution == "network" and size != label_HW.shape:
        label_HW = resize_label(label_HW, size)
    return Item(sample, image_HW3, label_HW)


def network_size(size: Size, short_side: int | None) -> Size:
    """(height, width) of the network's input: the short side as asked, the aspect kept."""
    if short_side is None:
        return size
    scale = short_side / min(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))
