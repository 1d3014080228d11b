"""A very small world for tests of training: streets of four classes, in the stages' own formats.

Sky above, road below, a building at one side and a car: colours follow classes, with noise, so that
a small network can learn them in a few steps.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from models.config import DecoderConfig, EncoderConfig, LossConfig, SegmenterConfig
from stages.config import Recipe, StageConfig
from stages.contracts import CONTRACTS
from stages.shards import file_digest, write_json, write_jsonl
from stages.training_config import AugmentConfig, EmaConfig, OptimiserConfig

CLASSES = {
    "road": (128, 64, 128),
    "building": (70, 70, 70),
    "sky": (70, 130, 180),
    "car": (0, 0, 142),
}
SIZE = (64, 96)
"""Height and width of the pictures."""

SEGMENTER = SegmenterConfig(
    encoder=EncoderConfig(
        name="RN50", architecture={"embed_dim": 32, "layers": [1, 1, 1, 1], "width": 8}
    ),
    decoder=DecoderConfig(
        width=16, heads=2, queries=8, layers=2, ffn=32, pixel_layers=1, pixel_ffn=32, group_norm=4
    ),
    losses=LossConfig(points=64),
)
AUGMENT = AugmentConfig(crop_height=32, crop_width=64, scale_min=0.75, scale_max=1.25)
OPTIMISER = OptimiserConfig(lr=1e-3, clip_norm=1.0, warmup_steps=2)


def tiny_recipe(**sections) -> Recipe:
    """A recipe with tiny settings; `sections` update single sections: train_source={"steps": 3}."""
    training = {
        "steps": 4,
        "batch_size": 4,
        "augment": AUGMENT,
        "optimiser": OPTIMISER,
        "ema": EmaConfig(decay=0.9),
        "checkpoint_every": 2,
        "log_every": 1,
    }
    values = {
        "segmenter": SEGMENTER,
        "train_source": training,
        "self_train": training | {"painted_augment": AUGMENT, "painted_share": 0.5},
        "run": {"device": "cpu"},
    }
    for name, update in sections.items():
        changed = isinstance(update, dict) and name in values and isinstance(values[name], dict)
        values[name] = values[name] | update if changed else update
    return Recipe(**values)


def stage_config(recipe: Recipe, stage: str, *, round: int = 0) -> StageConfig:
    """What the engine hands to a stage."""
    contract = next(contract for contract in CONTRACTS if contract.name == stage)
    return StageConfig(recipe, stage=stage, sections=contract.sections_of(recipe), round=round)


def street(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture (uint8 RGB [H, W, 3]) and its label map (uint8 [H, W]; 255 along the bottom)."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    labels = np.zeros(SIZE, np.uint8)
    horizon = int(rng.integers(height // 3, height // 2))
    labels[:horizon] = 2
    left = int(rng.integers(0, width // 2))
    labels[horizon // 2 : horizon + 8, left : left + width // 3] = 1
    x = int(rng.integers(0, width - 24))
    labels[horizon + 6 : horizon + 20, x : x + 24] = 3
    colours = np.array(list(CLASSES.values()), np.float32)
    noise = rng.normal(0, 20, (*SIZE, 3))
    image = (colours[labels] + noise).clip(0, 255).astype(np.uint8)
    labels[-3:] = 255
    return image, labels


def write_labelspace(folder: Path, classes: dict[str, tuple[int, int, int]] = CLASSES) -> Path:
    """The part `labelspace` of a `prepare` artifact."""
    folder.mkdir(parents=True)
    rows = [
        {"id": number, "name": name, "colour": list(colour)}
        for number, (name, colour) in enumerate(classes.items())
    ]
    write_json(folder / "labelspace.json", {"name": "tiny", "classes": rows})
    return folder


def write_sources(folder: Path, *, data: Path, num_samples: int = 6) -> Path:
    """The part `sources` of a `prepare` artifact, its pictures below `data`."""
    folder.mkdir(parents=True)
    data.mkdir(parents=True)
    rows = []
    for number in range(num_samples):
        image, labels = street(number)
        Image.fromarray(image).save(data / f"{number}.png")
        Image.fromarray(labels).save(data / f"{number}.label.png")
        rows.append(
            {
                "id": f"streets/{number}",
                "image": f"{number}.png",
                "label": f"{number}.label.png",
                "height": SIZE[0],
                "width": SIZE[1],
                "classes": {str(c): int((labels == c).sum()) for c in np.unique(labels[:-3])},
            }
        )
    write_jsonl(folder / "streets.jsonl", rows)
    write_json(folder / "streets.json", {"label_map": None, "num_samples": num_samples})
    write_json(folder / "roots.json", {"streets": str(data)})
    return folder


def write_pictures(folder: Path, *, num_pictures: int = 5) -> Path:
    """A `synthesize` artifact of one shard."""
    shard = folder / "shard-00000"
    shard.mkdir(parents=True)
    rows = []
    for number in range(num_pictures):
        Image.fromarray(street(1000 + number)[0]).save(shard / f"p{number}.png")
        rows.append({"id": f"p{number}", "file": f"p{number}.png"})
    _finish_shard(shard, rows)
    return folder


def write_labels(folder: Path, *, num_pictures: int = 5, classes=CLASSES) -> Path:
    """A `pseudo_label` (or `refine`) artifact of one shard, for `write_pictures`."""
    shard = folder / "shard-00000"
    shard.mkdir(parents=True)
    rows = []
    for number in range(num_pictures):
        Image.fromarray(street(1000 + number)[1]).save(shard / f"p{number}.label.png")
        rows.append({"id": f"p{number}", "label": f"p{number}.label.png"})
    _finish_shard(shard, rows)
    card = {"format": 1, "class_names": list(classes)}
    (folder / "checkpoint.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def write_selection(folder: Path, *, kept: list[str], num_pictures: int = 5) -> Path:
    """A `select` artifact."""
    folder.mkdir(parents=True)
    ids = [f"p{number}" for number in range(num_pictures)]
    rows = [{"id": i, "kept": i in kept, "scores": {}, "reasons": []} for i in ids]
    write_jsonl(folder / "selection.jsonl", rows)
    return folder


def _finish_shard(shard: Path, rows: list[dict]) -> None:
    write_jsonl(shard / "index.jsonl", rows)
    files = {
        path.name: {"bytes": path.stat().st_size, "digest": file_digest(path)}
        for path in sorted(shard.iterdir())
    }
    write_json(shard / "shard.json", {"num_items": len(rows), "files": files})


class Told:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[tuple[int, str, int]] = []
        self.advanced = 0
        self.metrics: list[dict[str, float]] = []
        self.notes: list[str] = []

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        self.started.append((total, unit, done))

    def advance(self, count: int = 1, **metrics: float) -> None:
        self.advanced += count
        self.metrics.append(metrics)

    def note(self, text: str) -> None:
        self.notes.append(text)
