"""Judge a checkpoint on every target: one confusion matrix per data set, by a stated protocol.

    clouds --stage evaluate --round 1

Leaves `results.json` (numbers with the protocol that made them) and a few predictions per data set
beside their pictures and truths.
"""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.checkpoints import describe_checkpoint, load_segmenter
from models.segmenter import Segmenter
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.devices import Device, choose_device
from stages.judging import Item, count, read_batches, sizes_for
from stages.judging_config import EvaluateConfig
from stages.labels import LabelSpace, load_labelspace, read_labelspace
from stages.layouts import condition_of
from stages.metrics import (
    DatasetScore,
    mean,
    miou_without,
    relative_performance,
    scores,
    sum_of,
)
from stages.protocols import LEFT_OUT, OWN, WHOLE_SPACE, protocol_name, say_layouts
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
        ValueError: the checkpoint's classes are not the label space's, there are no targets, or a
            setting asks for what they do not have.
    """
    # 1. Model, label space and samples belong together.
    section = config.evaluate
    space = read_labelspace(labelspace)
    checkpoint = describe_checkpoint(model)
    _check_classes(checkpoint["class_names"], space, model)
    _check_settings(section, space, model)
    samples = load_index(targets)
    if not samples:
        raise ValueError(f"{targets} lists no samples: name data sets under `data.targets`.")
    sets = {
        name: list(group) for name, group in itertools.groupby(samples, key=lambda s: s.dataset)
    }
    cards = {name: _card(targets, name) for name in sets}
    protocol = _protocol(config, checkpoint, space, cards)
    progress.note(f"protocol: {protocol['name']}")
    device = choose_device(config)
    progress.note(device.reason)
    segmenter = load_segmenter(model, device=device.device, which=section.weights)

    # 2. One data set after the other; what an earlier attempt finished stays.
    state = out / "state"
    state.mkdir(parents=True, exist_ok=True)
    done = {name: state / f"{name}.json" for name in sets}
    finished = sum(len(group) for name, group in sets.items() if done[name].is_file())
    progress.start(len(samples), "pictures", done=finished)
    for name, group in sets.items():
        if not done[name].is_file():
            counted = _score_dataset(
                group, cards[name], segmenter, section, device, space, out / "predictions", progress
            )
            write_json(done[name], counted)

    # 3. Numbers with their protocol.
    results = {
        "protocol": protocol,
        "classes": list(space.names),
        "sets": {name: _result(done[name], section, cards[name], space) for name in sets},
    }
    results |= _over_sets(results["sets"], section.training_domain)
    write_json(out / "results.json", results)
    _index_predictions(out, sets)
    shutil.rmtree(state)
    return _summary(results)


def _card(targets: Path, name: str) -> dict[str, Any]:
    return json.loads((targets / f"{name}.json").read_text(encoding="utf-8"))


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


def _check_settings(config: EvaluateConfig, space: LabelSpace, model: Path) -> None:
    """What the config asks of this checkpoint and label space, before anything is loaded."""
    if config.weights == "ema" and not (model / "ema.safetensors").is_file():
        raise FileNotFoundError(
            f"evaluate.weights is ema, but {model} holds no average (no ema.safetensors): it was "
            "trained with `ema: null`. Judge its weights themselves (`evaluate.weights=model`), or "
            "train with an average (`train_source.ema.decay=0.999`, `self_train.ema.decay=0.999`)."
        )
    if config.classes != "all" and not _has_subsets(space):
        raise ValueError(
            f"evaluate.classes is {config.classes}, a choice of the 19 classes of {WHOLE_SPACE}; "
            f"label space {space.name!r} has {space.num_classes} others: set evaluate.classes=all."
        )


def _has_subsets(space: LabelSpace) -> bool:
    return space.names == load_labelspace(WHOLE_SPACE).names


def _score_dataset(
    samples: Sequence[Sample],
    card: Mapping[str, Any],
    segmenter: Segmenter,
    config: EvaluateConfig,
    device: Device,
    space: LabelSpace,
    predictions: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Matrices of the whole set and of its conditions, where it has any."""
    shown = {sample.id for sample in _evenly(samples, config.num_predictions)}
    rows: list[Row] = []
    found: dict[str | None, DatasetScore] = {}
    for condition, group in _by_condition(samples, card["layout"]).items():
        score = found[condition] = DatasetScore(space.num_classes, device.device)
        for items in read_batches(group, config, sizes_for(card["layout"], config)):
            predicted_BHW = count(score, items, segmenter, config, device)
            for item, predicted_HW in zip(items, predicted_BHW, strict=True):
                if item.sample.id in shown:
                    rows.append(_keep(item, predicted_HW.cpu().numpy(), space, predictions))
            progress.advance(len(items))
    parts = {condition: score.to_json() for condition, score in found.items()}
    return {
        "confusion": sum_of([part["confusion"] for part in parts.values()]),
        "num_images": len(samples),
        "conditions": {name: part for name, part in parts.items() if name is not None},
        "predictions": rows,
    }


def _by_condition(samples: Sequence[Sample], layout: str) -> dict[str | None, list[Sample]]:
    groups: dict[str | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(condition_of(layout, sample.image), []).append(sample)
    return dict(sorted(groups.items(), key=lambda entry: entry[0] or ""))


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


def _protocol(
    config: StageConfig,
    checkpoint: Mapping[str, Any],
    space: LabelSpace,
    cards: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    section = config.evaluate
    plain = section.model_dump(mode="json")
    maps = [(card["layout"], (card["label_map"] or {}).get("name")) for card in cards.values()]
    protocol = {
        "name": protocol_name(section.protocol, plain, maps),
        "label_space": space.name,
        "num_classes": space.num_classes,
        "classes": section.classes,
        "weights": section.weights,
        "step": checkpoint["step"],
        "short_side": section.short_side,
        "long_side": section.long_side,
        "resize": section.resize,
        "label_resolution": section.label_resolution,
        "mode": section.mode,
        "absent": section.absent,
        "precision": config.precision,
        "batch_size": section.batch_size,
    }
    if section.layouts:
        protocol["layouts"] = say_layouts(plain["layouts"])
    if section.mode == "slide":
        protocol |= {"window": section.window, "stride": section.stride}
    if section.flip:
        protocol["flip"] = True
    if section.scales != (1.0,):
        protocol["scales"] = plain["scales"]
    return protocol


def _result(
    counted_file: Path, config: EvaluateConfig, card: Mapping[str, Any], space: LabelSpace
) -> dict[str, Any]:
    counted = json.loads(counted_file.read_text(encoding="utf-8"))
    left_out = LEFT_OUT.get(config.classes, ())
    result = {
        "confusion": counted["confusion"],
        "num_images": counted["num_images"],
        "label_map": (card["label_map"] or {}).get("name"),
        "layout": card["layout"],
        "split": card["split"],
        "num_also_in_sources": len(card["also_in_sources"]),
        **scores(counted["confusion"], config.absent, left_out=left_out),
    }
    if _has_subsets(space):
        kept = {space.num_classes: (), **LEFT_OUT}
        result["miou_by_classes"] = {
            str(count): miou_without(result["iou"], without) for count, without in kept.items()
        }
    if counted["conditions"]:
        conditions = {
            name: {**part, **scores(part["confusion"], config.absent, left_out=left_out)}
            for name, part in counted["conditions"].items()
        }
        result["conditions"] = conditions
        result["miou_mean_of_conditions"] = mean([part["miou"] for part in conditions.values()])
    return result


def _over_sets(sets: Mapping[str, Any], training_domain: str | None) -> dict[str, Any]:
    """Mean over the unseen sets, and rPD where one set is of the domain trained on."""
    if training_domain is None:
        return {"miou_mean": mean([entry["miou"] for entry in sets.values()])}
    if training_domain not in sets:
        raise ValueError(
            f"evaluate.training_domain is {training_domain!r}, which is none of the targets "
            f"({', '.join(sets)})."
        )
    unseen = [entry["miou"] for name, entry in sets.items() if name != training_domain]
    return {
        "miou_mean": mean(unseen),
        "training_domain": training_domain,
        "rpd": relative_performance(unseen, sets[training_domain]["miou"]),
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
            numbers[f"miou_{name}"] = _percent(entry["miou"])
        shown = "-" if entry["miou"] is None else f"{100 * entry['miou']:.1f}"
        parts.append(f"{name} {shown} ({entry['num_images']} pictures)")
    for name in ("miou_mean", "rpd"):
        if results.get(name) is not None:
            numbers[name] = _percent(results[name])
    if results.get("rpd") is not None:
        parts.append(f"rPD {100 * results['rpd']:.1f}")
    name = results["protocol"]["name"]
    by = "" if name == OWN else f" by {name}"
    return Summary(text=f"mIoU{by}: " + ", ".join(parts), numbers=numbers)


def _percent(share: float) -> float:
    return round(100 * share, 2)
