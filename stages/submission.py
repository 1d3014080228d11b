"""Predictions for a test server: its file names, its values, zipped.

    clouds submit cityscapes --root FOLDER --out DIR --model self_train@1

Each server takes 8-bit PNGs at the picture's own size, but with values of its own: Cityscapes label
ids (cityscapesScripts, `evalPixelLevelSemanticLabeling.py`: files named like
`<city>_123456_123456*.png` in any folder), ACDC train ids (folder `labelTrainIds`, files named as
the pictures).
"""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.checkpoints import describe_checkpoint, load_segmenter
from models.evaluators import CITYSCAPES_IDS
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.data_config import DatasetConfig
from stages.devices import choose_device
from stages.judging import predict_labels, read_batches, sizes_for
from stages.judging_config import EvaluateConfig
from stages.labels import load_labelspace
from stages.layouts import Pair, list_pairs
from stages.protocols import WHOLE_SPACE, protocol_name
from stages.readers import Sample, image_size
from stages.shards import file_digest, write_json


@dataclass(frozen=True, kw_only=True)
class Server:
    """What a test server takes."""

    folder: str
    """Folder of the predictions in the archive."""
    values: tuple[int, ...]
    """Value in the PNG of each of the 19 train ids."""
    says: str
    """What these values are called."""


SERVERS: Mapping[str, Server] = {
    "cityscapes": Server(folder="results", values=CITYSCAPES_IDS, says="label ids"),
    "acdc": Server(folder="labelTrainIds", values=tuple(range(19)), says="train ids"),
}
"""By the name of the layout that their pictures lie in."""


def run(
    config: StageConfig,
    *,
    out: Path,
    progress: Progress,
    model: Path,
    root: Path,
    server: str,
    split: str = "test",
) -> Summary:
    """Predict a benchmark's pictures and pack them for its server.

    Args:
        config: section `evaluate` (network size, windows, weights); always at the pictures' size.
        out: gets the server's folder of predictions, an archive of it, and `submission.json`.
            Predictions that are there are not made again.
        progress: told every picture.
        model: checkpoint of `train_source` or `self_train`.
        root: folder of the data set.
        server: a name of `SERVERS`.
        split: which pictures.

    Raises:
        FileNotFoundError: pictures or the checkpoint are missing.
        ValueError: the checkpoint tells other classes apart, or `out` holds the predictions of
            another model or other settings.
    """
    # 1. Model, settings and folder belong together.
    takes = SERVERS[server]
    section = config.evaluate.model_copy(update={"label_resolution": "native"})
    checkpoint = describe_checkpoint(model)
    if tuple(checkpoint["class_names"]) != load_labelspace(WHOLE_SPACE).names:
        raise ValueError(
            f"the checkpoint in {model} does not tell the 19 classes of {WHOLE_SPACE} apart, which "
            f"the {server} server judges: train it with `data.labels={WHOLE_SPACE}`."
        )
    dataset = DatasetConfig(name=server, layout=server, root=str(root), split=split)
    pairs = list_pairs(dataset, root, role="unlabelled", labelled=False).pairs
    _own(out, _header(config, section, model=model, server=server, split=split))

    # 2. Predict what is not there yet.
    folder = out / takes.folder
    folder.mkdir(exist_ok=True)
    missing = [pair for pair in pairs if not (folder / pair.image.name).is_file()]
    progress.start(len(pairs), "pictures", done=len(pairs) - len(missing))
    if missing:
        device = choose_device(config)
        progress.note(device.reason)
        segmenter = load_segmenter(model, device=device.device, which=section.weights)
        table = np.array(takes.values, np.uint8)
        samples = [_sample(pair, server) for pair in missing]
        for items in read_batches(samples, section, sizes_for(server, section)):
            predicted_BHW = predict_labels(segmenter, items, section, device).cpu().numpy()
            for item, predicted_HW in zip(items, predicted_BHW, strict=True):
                _write(folder / item.sample.image.name, table[predicted_HW])
            progress.advance(len(items))

    # 3. One archive of exactly these files.
    names = [pair.image.name for pair in pairs]
    _pack(out / f"{server}_{split}.zip", folder, names)
    return Summary(
        text=f"{len(pairs)} predictions as {takes.says}, {server}_{split}.zip",
        numbers={"pictures": len(pairs)},
    )


def _sample(pair: Pair, server: str) -> Sample:
    height, width = image_size(pair.image)
    return Sample(id=f"{server}/{pair.stem}", image=pair.image, height=height, width=width)


def _header(
    config: StageConfig, section: EvaluateConfig, *, model: Path, server: str, split: str
) -> dict[str, Any]:
    """What the predictions depend on."""
    plain = section.model_dump(mode="json")
    return {
        "server": server,
        "split": split,
        "model": file_digest(model / f"{section.weights}.safetensors"),
        "protocol": protocol_name(section.protocol, plain),
        "precision": config.precision,
        "evaluate": plain,
    }


def _own(out: Path, header: Mapping[str, Any]) -> None:
    """Mark the folder as these predictions', or refuse to mix two kinds."""
    file = out / "submission.json"
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(name for name in header if there.get(name) != header[name])
        if differing:
            raise ValueError(
                f"{out} holds predictions with another {', '.join(differing)}: give another "
                "folder with --out, or remove this one."
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no submission: give another with --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(header))


def _write(path: Path, labels_HW: np.ndarray) -> None:
    """The whole file or none, so that a restart can trust what it finds."""
    part = path.with_name(f".{path.name}.tmp")
    Image.fromarray(labels_HW).save(part, format="PNG")
    os.replace(part, path)


def _pack(archive: Path, folder: Path, names: Sequence[str]) -> None:
    part = archive.with_name(f".{archive.name}.tmp")
    # PNGs do not shrink further
    with zipfile.ZipFile(part, mode="w", compression=zipfile.ZIP_STORED) as packed:
        for name in names:
            packed.write(folder / name, f"{folder.name}/{name}")
    os.replace(part, archive)
