"""A segmenter as an ONNX graph: images in, scores per class and pixel out, normalisation inside.

Needs `onnx`, `onnxscript` and `onnxruntime` (the extra `export`).
"""

# B batch, K classes, H W height and width of the images
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.segmenter import Segmenter, Size

INPUT, OUTPUT = "images", "scores"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
SINGLE_FILE_MAX_BYTES = 1_500_000_000
"""Weights above this go into a file beside the graph: protobuf cannot hold more than 2 GiB."""


class ScoresOfImages(nn.Module):
    """From uint8 RGB [B, 3, H, W] to scores [B, K, H, W], summed over the mask queries."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The scores of `Segmenter.semantic`."""
        return self.segmenter.semantic(self.segmenter(images_B3HW))


def write_onnx(
    segmenter: Segmenter,
    path: Path,
    *,
    size: Size,
    batch: int | None,
    opset: int,
    properties: Mapping[str, Any],
) -> None:
    """Write the graph of a segmenter for images of one size.

    Args:
        segmenter: in eval mode, on the CPU.
        path: of the file; very large weights go into a second one, `<name>.data`.
        size: (height, width) of the images.
        batch: images at once; None: any number.
        opset: ONNX operator set.
        properties: metadata of the file; values are written as JSON.

    Raises:
        ValueError: the network cannot be put into a graph, or not for any number of images.
    """
    network = ScoresOfImages(segmenter).eval().requires_grad_(False)
    images = some_images(batch or 2, size, seed=0)
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    for name in ("onnxscript", "onnx_ir"):  # they tell of every constant that they do not fold
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"the network cannot be put into an ONNX graph: {first}") from error
    if batch is None and isinstance(program.model.graph.inputs[0].shape[0], int):
        raise ValueError(
            f"the graph of encoder {segmenter.config.encoder.name!r} holds for one number of "
            "images only: name it with --batch."
        )
    for name, value in properties.items():
        program.model.metadata_props[name] = json.dumps(value, ensure_ascii=False)
    num_bytes = sum(v.numel() * v.element_size() for v in segmenter.state_dict().values())
    program.save(str(path), external_data=num_bytes > SINGLE_FILE_MAX_BYTES)


def differences(
    segmenter: Segmenter, path: Path, *, size: Size, batch: int, seed: int = 1
) -> tuple[float, float]:
    """Run the file by onnxruntime and hold it against torch.

    Returns:
        The largest difference of a score, and the share of pixels with another label.
    """
    import onnxruntime

    images = some_images(batch, size, seed=seed)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run([OUTPUT], {INPUT: images.numpy()})
    with torch.no_grad():
        expected = segmenter.semantic(segmenter(images)).numpy()
    if found.shape != expected.shape:
        raise AssertionError(f"the graph gives {found.shape}, the network {expected.shape}")
    other = (found.argmax(1) != expected.argmax(1)).mean()
    return float(np.abs(found - expected).max()), float(other)


def some_images(batch: int, size: Size, *, seed: int) -> torch.Tensor:
    """Coloured patches with noise, uint8 [batch, 3, *size]: flat pictures would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(batch, 3, 6, 6, generator=generator)
    smooth = nn.functional.interpolate(patches, size=size, mode="nearest")
    noise = torch.rand(batch, 3, *size, generator=generator)
    return (255 * (0.7 * smooth + 0.3 * noise)).to(torch.uint8)
