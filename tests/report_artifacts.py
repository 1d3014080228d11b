"""Small artifacts, true to the stages' contracts, for tests of the report."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.labels import load_labelspace
from stages.shards import ShardJob, write_json, write_jsonl, write_shards

SPACE = load_labelspace("cityscapes19")
TARGETS = ("dusk", "fog")
ROAD, SIDEWALK, BUILDING, POLE, TREE, SKY, PERSON, CAR = 0, 1, 2, 5, 8, 10, 11, 13

Street = tuple[np.ndarray, np.ndarray]
"""Picture uint8 [H, W, 3] and its true label map uint8 [H, W]."""


class Quiet:
    """A progress that keeps nothing."""

    def start(self, total: int, unit: str, *, done: int = 0) -> None: ...

    def advance(self, count: int = 1, **metrics: float) -> None: ...

    def note(self, text: str) -> None: ...


def street(seed: int, height: int = 48, width: int = 96) -> Street:
    """A toy street: sky, houses, a road with a car, a pole and a person."""
    rng = np.random.default_rng(seed)
    label = np.full((height, width), SKY, np.uint8)
    horizon = int(height * rng.uniform(0.4, 0.55))
    for left in range(0, width, width // 5):
        top = int(horizon * rng.uniform(0.2, 0.8))
        label[top:horizon, left : left + width // 6] = BUILDING
    label[horizon - 4 : horizon, :] = np.where(label[horizon - 4 : horizon] == SKY, TREE, BUILDING)
    label[horizon:] = SIDEWALK
    for row in range(horizon, height):
        half = int((row - horizon + 2) / (height - horizon) * width * 0.45)
        label[row, max(0, width // 2 - half) : width // 2 + half] = ROAD
    x = int(rng.uniform(0.3, 0.6) * width)
    label[horizon + 3 : horizon + 12, x : x + 18] = CAR
    label[horizon - 8 : horizon + 10, width // 8 : width // 8 + 2] = POLE
    label[horizon - 2 : horizon + 10, 7 * width // 8 : 7 * width // 8 + 4] = PERSON
    label[-2:] = 255
    picture = SPACE.colourise(label) * 0.6 + rng.normal(70, 9, (*label.shape, 3))
    return picture.clip(0, 255).astype(np.uint8), label


def worsened(label: np.ndarray, seed: int, share: float) -> np.ndarray:
    """The label map with blocks of wrong classes over about `share` of it."""
    rng = np.random.default_rng(seed)
    worse = label.copy()
    height, width = label.shape
    side = max(2, height // 8)
    for _ in range(int(share * label.size / side**2)):
        y, x = rng.integers(0, height - side), rng.integers(0, width - side)
        worse[y : y + side, x : x + side] = rng.choice([ROAD, BUILDING, TREE, CAR, SIDEWALK])
    return worse


class Builder:
    """Writes one artifact after the other, each with a manifest as the engine seals it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[str, Path] = {}

    def artifact(
        self,
        name: str,
        *,
        inputs: dict[str, str],
        config: dict[str, Any],
        run_id: str = "run-2",
        seconds: float = 12.5,
    ) -> Path:
        """A folder with its manifest; `inputs` are role -> instance."""
        key = f"{abs(hash_of(name)):016x}"
        folder = self.root / name / key
        folder.mkdir(parents=True)
        self.folders[name] = folder
        minute = len(self.folders)
        write_json(
            folder / "manifest.json",
            {
                "instance": name,
                "key": key,
                "config": config,
                "inputs": {
                    role: {"instance": maker, "part": None, "key": "k", "digest": "d" * 64}
                    for role, maker in inputs.items()
                },
                "recipe": "toy",
                "seed": 7,
                "precision": "fp32",
                "summary": {"text": f"{name} in a sentence", "numbers": {"things": 3}},
                "started": f"2026-03-01T10:{minute:02d}:00.000+00:00",
                "finished": f"2026-03-01T10:{minute:02d}:12.500+00:00",
                "seconds": seconds,
                "peak_memory_bytes": 512_000_000,
                "host": "desk",
                "versions": {"python": "3.11", "torch": "2.15"},
                "run_id": run_id,
            },
        )
        return folder


def hash_of(name: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(name.encode()[:7].ljust(7, b"x"), "big") * 31 + len(name)


def build(
    root: Path,
    *,
    rounds: int = 1,
    legs: Sequence[str | None] = ("control", "raw", "refined"),
    untrained: bool = False,
    pictures: int = 6,
    prompt: Callable[[int], str] = lambda n: f"a dashcam photo of street {n}, a car, a pole",
    draw: Callable[[int], Street] = street,
    targets: Callable[[str, int], Street] | None = None,
    steps: int = 200,
) -> dict[str, Path]:
    """Artifacts of a whole run: instance name -> folder."""
    make = Builder(root)
    target = targets or (lambda name, n: draw(1000 + 50 * TARGETS.index(name) + n))

    prepare = make.artifact(
        "prepare", inputs={}, config={"data": {"labels": "cityscapes19"}}, run_id="run-1"
    )
    (prepare / "labelspace").mkdir()
    SPACE.save(prepare / "labelspace")
    _training(make, "train_source", {"sources": "prepare"}, {}, steps, start=3.0)
    _evaluate(make, "evaluate@0", "train_source", 0.5, target)

    prompts = make.artifact(
        "write_prompts", inputs={"labelspace": "prepare"}, config={"write_prompts": {}}
    )
    write_jsonl(
        prompts / "prompts.jsonl",
        [
            {
                "id": f"p{n}",
                "text": prompt(n),
                "attributes": {"weather": "rain", "time": "dusk"},
                "classes": ["car", "pole"],
                "model": "bank",
                "seed": n,
            }
            for n in range(pictures)
        ],
    )
    _synthesize(make, pictures, prompt, draw, untrained)

    teachers = {leg: "train_source" for leg in legs}
    for number in range(1, rounds + 1):
        teacher = teachers[legs[-1]]
        _labels(make, number, teacher, pictures, draw)
        for leg in legs:
            name = f"self_train@{number}" + (f"#{leg}" if leg else "")
            kind = {"control": "none", "raw": "raw"}.get(leg or "", "refined")
            inputs = {"sources": "prepare", "teacher": teachers[leg]}
            if kind != "none":
                inputs |= {"pictures": "synthesize", "selection": f"select@{number}"}
                inputs["labels"] = f"{'refine' if kind == 'refined' else 'pseudo_label'}@{number}"
            _training(make, name, inputs, {"self_train": {"labels": kind}}, steps, start=2.0)
            share = {"none": 0.47, "raw": 0.4, "refined": 0.3}[kind] - 0.04 * number
            _evaluate(make, name.replace("self_train", "evaluate"), name, share, target)
            teachers[leg] = name
    return make.folders


def _training(
    make: Builder,
    name: str,
    inputs: dict[str, str],
    config: dict[str, Any],
    steps: int,
    *,
    start: float,
) -> None:
    section = {"segmenter": {"encoder": {"name": "RN50", "weights": None}}, **config}
    section["segmenter"]["tuning"] = {"kind": "full"}
    folder = make.artifact(name, inputs=inputs, config=section, seconds=754.2)
    rng = np.random.default_rng(hash_of(name) % 2**31)
    (folder / "logs").mkdir()
    rows = [
        {
            "step": step,
            "loss": start * math.exp(-step / steps) + 0.3 + float(rng.normal(0, 0.06)),
            "loss_ce": math.exp(-step / steps) + float(rng.normal(0, 0.03)),
            "loss_ce_0": 1.1 * math.exp(-step / steps),
            "lr": 1e-4 * (1 - step / steps) ** 0.9,
        }
        for step in range(1, steps, 2)
    ]
    rows[3]["loss"] = float("nan")
    (folder / "logs" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _evaluate(
    make: Builder, name: str, model: str, share: float, target: Callable[[str, int], Street]
) -> None:
    folder = make.artifact(
        name, inputs={"model": model, "targets": "prepare"}, config={"evaluate": {}}
    )
    sets, index = {}, []
    for dataset in TARGETS:
        (folder / "predictions" / dataset).mkdir(parents=True)
        confusion = np.zeros((19, 19), np.int64)
        for number in range(3):
            picture, truth = target(dataset, number)
            said = worsened(np.where(truth == 255, ROAD, truth), number, share)
            known = truth != 255
            np.add.at(confusion, (truth[known], said[known]), 1)
            paths = {
                key: f"predictions/{dataset}/s{number}{end}"
                for key, end in (
                    ("file", ".png"),
                    ("truth_file", ".truth.png"),
                    ("image_file", ".image.jpg"),
                )
            }
            Image.fromarray(said).save(folder / paths["file"])
            Image.fromarray(truth).save(folder / paths["truth_file"])
            Image.fromarray(picture).save(folder / paths["image_file"], quality=90)
            index.append({"dataset": dataset, "id": f"{dataset}/s{number}", **paths})
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        iou = [
            int(c) / int(u) if u else None for c, u in zip(confusion.diagonal(), union, strict=True)
        ]
        known_iou = [one for one in iou if one is not None]
        sets[dataset] = {
            "confusion": confusion.tolist(),
            "iou": iou,
            "miou": sum(known_iou) / len(known_iou),
            "num_images": 3,
        }
    write_jsonl(folder / "predictions" / "index.jsonl", index)
    write_json(
        folder / "results.json",
        {
            "protocol": {"mode": "whole", "short_side": None, "absent": "cityscapes"},
            "classes": list(SPACE.names),
            "sets": sets,
            "miou_mean": sum(one["miou"] for one in sets.values()) / len(sets),
        },
    )


def _synthesize(
    make: Builder,
    pictures: int,
    prompt: Callable[[int], str],
    draw: Callable[[int], Street],
    untrained: bool,
) -> None:
    folder = make.artifact(
        "synthesize",
        inputs={"prompts": "write_prompts"},
        config={"synthesize": {"mode": "paint", "model": "toy", "guidance": 7.5}},
        run_id="run-1",
        seconds=3725,
    )

    def work(items: Sequence[int], shard: Path) -> list[dict[str, Any]]:
        rows = []
        for number in items:
            Image.fromarray(draw(number)[0]).save(shard / f"pic{number}.png")
            rows.append(
                {
                    "id": f"pic{number}",
                    "file": f"pic{number}.png",
                    "prompt_id": f"p{number}",
                    "prompt": prompt(number),
                    "seed": 100 + number,
                    "model": "toy",
                    "steps": 20,
                    "untrained": untrained,
                }
            )
        return rows

    write_shards(
        folder,
        ShardJob(items=range(pictures), shard_size=4, unit="pictures", open=lambda _: work),
        progress=Quiet(),
    )


def _labels(
    make: Builder, round_: int, teacher: str, pictures: int, draw: Callable[[int], Street]
) -> None:
    raw = make.artifact(
        f"pseudo_label@{round_}",
        inputs={"pictures": "synthesize", "teacher": teacher},
        config={"pseudo_label": {}},
    )
    select = make.artifact(
        f"select@{round_}",
        inputs={"pictures": "synthesize", "labels": f"pseudo_label@{round_}"},
        config={"select": {}},
    )
    refined = make.artifact(
        f"refine@{round_}",
        inputs={
            "pictures": "synthesize",
            "labels": f"pseudo_label@{round_}",
            "selection": f"select@{round_}",
        },
        config={"refine": {"model": "vit_b", "weights": None}},
    )

    def labelled(share: float) -> Callable[[Sequence[int], Path], list[dict[str, Any]]]:
        def work(items: Sequence[int], shard: Path) -> list[dict[str, Any]]:
            rows = []
            for number in items:
                label = worsened(draw(number)[1], number, share)
                Image.fromarray(label).save(shard / f"pic{number}.label.png")
                confidence = np.where(label == draw(number)[1], 230, 90).astype(np.uint8)
                Image.fromarray(confidence).save(shard / f"pic{number}.confidence.png")
                values, counts = np.unique(label[label != 255], return_counts=True)
                rows.append(
                    {
                        "id": f"pic{number}",
                        "label": f"pic{number}.label.png",
                        "confidence": f"pic{number}.confidence.png",
                        "mean_confidence": 0.8,
                        "classes": {str(v): int(c) for v, c in zip(values, counts, strict=True)},
                    }
                )
            return rows

        return work

    for folder, share in ((raw, 0.3), (refined, 0.1)):
        work = labelled(share)
        job = ShardJob(
            items=range(pictures), shard_size=4, unit="pictures", open=lambda _, work=work: work
        )
        write_shards(folder, job, progress=Quiet())
    write_jsonl(
        select / "selection.jsonl",
        [
            {
                "id": f"pic{n}",
                "kept": n != 1,
                "scores": {"confidence": 0.8},
                "reasons": ["low confidence"] if n == 1 else [],
            }
            for n in range(pictures)
        ],
    )
