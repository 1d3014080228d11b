"""How fast training samples are read, scaled, cropped, mirrored and coloured.

    python tests/benchmarks/batches.py [--json]

`batches_*` is set against the same augmentation written with torchvision's v2 transforms, as its
documentation composes them, on uint8 tensors held in memory (ours come from its cache). `cold_*`
is the first pass, decoding included, against Pillow's decoding alone: what reading costs at least.
One thread of one process, in CPU seconds (nothing here waits but for files in the page cache); both
sides alternate after a warm-up.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.batches import SourceBatches
from stages.readers import Sample
from stages.training_config import AugmentConfig

RUNS = 7
BATCH = 16
SAMPLES = 48
CASES = {"64x128": ((64, 128), (64, 128)), "180x240_of_360x480": ((360, 480), (180, 240))}
"""Size of the files and size of the crop (height, width)."""


def write_samples(folder: Path, size: tuple[int, int]) -> list[Sample]:
    """Photograph-like pictures (smooth with noise) and block labels, as PNG."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(SAMPLES):
        coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))
        picture = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        blocks = rng.integers(0, 19, (9, 12), dtype=np.uint8)
        label = Image.fromarray(blocks).resize(size[::-1], Image.Resampling.NEAREST)
        image_path, label_path = folder / f"{number}.png", folder / f"{number}.label.png"
        Image.fromarray(picture).save(image_path)
        label.save(label_path)
        samples.append(
            Sample(
                id=f"bench/{number}",
                image=image_path,
                label=label_path,
                height=size[0],
                width=size[1],
            )
        )
    return samples


def transforms(config: AugmentConfig) -> v2.Transform:
    """The same augmentation in torchvision's words (hue in turns: 18 of 180 degrees is 0.1)."""
    crop = (config.crop_height, config.crop_width)
    return v2.Compose(
        [
            v2.ScaleJitter(crop, scale_range=(config.scale_min, config.scale_max)),
            v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Mask: 255, "others": 0}),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(
                brightness=(0.875, 1.125),
                contrast=(0.5, 1.5),
                saturation=(0.5, 1.5),
                hue=(-0.1, 0.1),
            ),
        ]
    )


def rate(work: Callable[[], int]) -> float:
    """Samples per CPU second of a piece of work that returns how many it made."""
    started = time.process_time()
    count = work()
    return count / (time.process_time() - started)


def compare(name: str, ours: Callable[[], int], theirs: Callable[[], int], runs: int) -> dict:
    """Median rates of both sides, run alternately after one warm-up."""
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for work, kept in zip((ours, theirs), rates, strict=True):
            found = rate(work)
            if number:
                kept.append(found)
    mine, other = (statistics.median(kept) for kept in rates)
    return {
        "name": name,
        "ours": round(mine, 1),
        "theirs": round(other, 1),
        "unit": "samples/CPU-s",
        "ratio": round(mine / other, 2),
        "spread_ours": [round(min(rates[0]), 1), round(max(rates[0]), 1)],
        "spread_theirs": [round(min(rates[1]), 1), round(max(rates[1]), 1)],
    }


def cases(folder: Path, runs: int) -> Iterator[dict]:
    """Every case's row."""
    for name, (size, crop) in CASES.items():
        place = folder / name
        place.mkdir()
        samples = write_samples(place, size)
        # Scales so that torchvision's (relative to the crop) and ours (to the picture) agree.
        factor = crop[0] / size[0]
        config = AugmentConfig(
            crop_height=crop[0], crop_width=crop[1], scale_min=factor * 0.8, scale_max=factor * 1.6
        )
        theirs_config = config.model_copy(update={"scale_min": 0.8, "scale_max": 1.6})
        yield _warm(name, samples, config, transforms(theirs_config), runs)
        yield _cold(name, samples, config, runs)


def _warm(
    name: str, samples: list[Sample], config: AugmentConfig, composed: v2.Transform, runs: int
) -> dict:
    batches = SourceBatches(samples, batch_size=BATCH, augment=config, seed=0)
    held = [
        (
            tv_tensors.Image(torch.from_numpy(sample.read_image().copy()).permute(2, 0, 1)),
            tv_tensors.Mask(torch.from_numpy(sample.read_label().copy())),
        )
        for sample in samples
    ]
    steps = len(samples) // BATCH

    def ours() -> int:
        return sum(len(batches.batch(step)) for step in range(steps))

    def theirs() -> int:
        for step in range(steps):
            views = [composed(*pair) for pair in held[step * BATCH : (step + 1) * BATCH]]
            torch.stack([image for image, _ in views])
            torch.stack([label for _, label in views])
        return steps * BATCH

    return compare(f"batches_{name}", ours, theirs, runs)


def _cold(name: str, samples: list[Sample], config: AugmentConfig, runs: int) -> dict:
    def ours() -> int:
        batches = SourceBatches(samples, batch_size=BATCH, augment=config, seed=0)
        return sum(len(batches.batch(step)) for step in range(len(samples) // BATCH))

    def theirs() -> int:
        for sample in samples:
            for path in (sample.image, sample.label):
                with Image.open(path) as image:
                    image.load()
        return len(samples)

    return compare(f"cold_{name}", ours, theirs, runs)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu", help="not used: samples are made on the CPU")
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(cases(Path(folder), arguments.runs))
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['name']:28} ours {row['ours']:8.1f}  theirs {row['theirs']:8.1f} {row['unit']}"
            f"  ratio {row['ratio']:.2f}  spread {row['spread_ours']} {row['spread_theirs']}"
        )


if __name__ == "__main__":
    main()
