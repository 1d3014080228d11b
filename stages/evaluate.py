"""Judge a checkpoint on every target: one confusion matrix per data set, by a stated protocol.

    clouds --stage evaluate --round 1

Leaves `results.json` (numbers with the protocol that made them) and a few predictions per data set
beside their pictures and truths.
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.checkpoints import describe_checkpoint, load_segmenter
from models.segmenter import Segmenter
from stages.config import EvaluateConfig, StageConfig
from stages.contracts import Progress, Summary
from stages.devices import Device, choose_device
from stages.judging import Item, count, read_batches
from stages.labels import LabelSpace, read_labelspace
from stages.metrics import DatasetScore, mean, scores
from stages.readers import Sample, load_index
from stages.shards import Row, write_json, write_jsonl

SHOWN_SIDE_PX = 1024
"""Longest side of the pictures kept for the report."""


def run(
    config: StageConfig,
    *,
    out: Path,
    progress: Progress,
    model: Path,
    targets: Path,
    labelspace: Path,
) -> Summary:
    """Score a checkpoint on every target.

    Args:
        config: section `evaluate`.
        out: the artifact; data sets that an interrupted attempt finished are not run again.
        progress: told every picture.
        model: checkpoint of `train_source` or `self_train`.
        targets: part of the `prepare` artifact.
        labelspace: part of the `prepare` artifact.

    Raises:
        FileNotFoundError: the checkpoint or its weights are missing.
        ValueError: the checkpoint's classes are not the label space's, or there are no targets.
    """
    # 1. Model, label space and samples belong together.
    space = read_labelspace(labelspace)
    checkpoint = describe_checkpoint(model)
    _check_classes(checkpoint["class_names"], space, model)
    samples = load_index(targets)
    if not samples:
        raise ValueError(f"{targets} lists no samples: name data sets under `data.targets`.")
    device = choose_device(config)
    progress.note(device.reason)
    segmenter = load_segmenter(model, device=device.device, which=config.evaluate.weights)

    # 2. One data set after the other; what an earlier attempt finished stays.
    state = out / "state"
    state.mkdir(parents=True, exist_ok=True)
    sets = {
        name: list(group) for name, group in itertools.groupby(samples, key=lambda s: s.dataset)
    }
    done = {name: state / f"{name}.json" for name in sets}
    finished = sum(len(group) for name, group in sets.items() if done[name].is_file())
    progress.start(len(samples), "pictures", done=finished)
    for name, group in sets.items():
        if not done[name].is_file():
            counted = _score_dataset(
                group, segmenter, config.evaluate, device, space, out / "predictions", progress
            )
            write_json(done[name], counted)

    # 3. Numbers with their protocol.
    results = {
        "protocol": _protocol(config, checkpoint, space),
        "classes": list(space.names),
        "sets": {name: _result(done[name], config.evaluate, targets, name) for name in sets},
    }
    results["miou_mean"] = mean([entry["miou"] for entry in results["sets"].values()])
    write_json(out / "results.json", results)
    _index_predictions(out, sets)
    shutil.rmtree(state)
    return _summary(results)


def _check_classes(names: Sequence[str], space: LabelSpace, model: Path) -> None:
    if tuple(names) == space.names:
        return
    here, there = set(space.names), set(names)
    if here == there:
        difference = "the order differs"
    else:
        difference = (
            f"only in the checkpoint: {', '.join(sorted(there - here)) or '-'}; "
            f"only in the label space: {', '.join(sorted(here - there)) or '-'}"
        )
    raise ValueError(
        f"the checkpoint in {model} tells {len(names)} classes apart, label space {space.name!r} "
        f"{space.num_classes}: {difference}. Judge it with the label space it was trained for "
        "(`data.labels`), or train again."
    )


def _score_dataset(
    samples: Sequence[Sample],
    segmenter: Segmenter,
    config: EvaluateConfig,
    device: Device,
    space: LabelSpace,
    predictions: Path,
    progress: Progress,
) -> dict[str, Any]:
    score = DatasetScore(space.num_classes, device.device)
    shown = {sample.id for sample in _evenly(samples, config.num_predictions)}
    rows: list[Row] = []
    for items in read_batches(samples, config):
        predicted_BHW = count(score, items, segmenter, config, device)
        for item, predicted_HW in zip(items, predicted_BHW, strict=True):
            if item.sample.id in shown:
                rows.append(_keep(item, predicted_HW.cpu().numpy(), space, predictions))
        progress.advance(len(items))
    id_map = samples[0].label_map
    label_map = id_map.name if id_map else None
    return {**score.to_json(), "predictions": rows, "label_map": label_map}


def _evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    count = min(count, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def _keep(item: Item, predicted_HW: np.ndarray, space: LabelSpace, predictions: Path) -> Row:
    """Write prediction and truth (PNG, value = train id, palette = class colours) and picture."""
    folder = predictions / item.sample.dataset
    folder.mkdir(parents=True, exist_ok=True)
    stem = item.sample.stem
    files = {
        "file": f"{stem}.png",
        "truth_file": f"{stem}.truth.png",
        "image_file": f"{stem}.image.jpg",
    }
    for key, labels_HW in (("file", predicted_HW), ("truth_file", item.label_HW)):
        picture = Image.fromarray(labels_HW)
        picture.putpalette(space.colours.tobytes())
        picture.save(folder / files[key])
    picture = Image.fromarray(item.image_HW3)
    picture.thumbnail((SHOWN_SIDE_PX, SHOWN_SIDE_PX))
    picture.save(folder / files["image_file"], quality=90)
    paths = {key: f"predictions/{item.sample.dataset}/{name}" for key, name in files.items()}
    return {"dataset": item.sample.dataset, "id": item.sample.id, **paths}


def _protocol(config: StageConfig, checkpoint: dict[str, Any], space: LabelSpace) -> dict[str, Any]:
    section = config.evaluate
    protocol = {
        "label_space": space.name,
        "num_classes": space.num_classes,
        "weights": section.weights,
        "step": checkpoint["step"],
        "short_side": section.short_side,
        "label_resolution": section.label_resolution,
        "mode": section.mode,
        "absent": section.absent,
        "precision": config.precision,
        "batch_size": section.batch_size,
    }
    if section.mode == "slide":
        protocol |= {"window": section.window, "stride": section.stride}
    return protocol


def _result(counted_file: Path, config: EvaluateConfig, targets: Path, name: str) -> dict[str, Any]:
    counted = json.loads(counted_file.read_text(encoding="utf-8"))
    card = json.loads((targets / f"{name}.json").read_text(encoding="utf-8"))
    return {
        "confusion": counted["confusion"],
        "num_images": counted["num_images"],
        "label_map": counted["label_map"],
        "split": card["split"],
        "num_also_in_sources": len(card["also_in_sources"]),
        **scores(counted["confusion"], config.absent),
    }


def _index_predictions(out: Path, sets: Sequence[str]) -> None:
    rows: list[Row] = []
    for name in sets:
        counted = json.loads((out / "state" / f"{name}.json").read_text(encoding="utf-8"))
        rows += sorted(counted["predictions"], key=lambda row: row["id"])
    (out / "predictions").mkdir(exist_ok=True)
    write_jsonl(out / "predictions" / "index.jsonl", rows)


def _summary(results: dict[str, Any]) -> Summary:
    numbers: dict[str, float | int | str] = {}
    parts = []
    for name, entry in results["sets"].items():
        if entry["miou"] is not None:
            numbers[f"miou_{name}"] = round(100 * entry["miou"], 2)
        shown = "-" if entry["miou"] is None else f"{100 * entry['miou']:.1f}"
        parts.append(f"{name} {shown} ({entry['num_images']} pictures)")
    if results["miou_mean"] is not None:
        numbers["miou_mean"] = round(100 * results["miou_mean"], 2)
    return Summary(text="mIoU " + ", ".join(parts), numbers=numbers)
