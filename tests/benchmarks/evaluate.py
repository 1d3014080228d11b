"""How fast predictions are judged, and how long the network waits for pictures.

    python tests/benchmarks/evaluate.py [--device cpu|cuda] [--json]

`confusion_*`: one confusion matrix of a 1024x2048 map of 19 classes. Theirs: torchmetrics as its
documentation says, and the steps of cityscapesScripts' pure-Python path (encode pairs, np.unique,
a loop over the pairs found). All start from uint8 maps. `wait`: share of `evaluate`'s time in which
the network waits for reading and decoding, against reading in turn (`theirs`); ours / theirs are
shares, so that the ratio says how many times less it waits.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.build import build_segmenter
from models.config import DecoderConfig, EncoderConfig, SegmenterConfig
from models.segmenter import Segmenter
from stages import judging
from stages.devices import Device, device_for
from stages.judging_config import EvaluateConfig
from stages.metrics import DatasetScore
from stages.readers import Sample

RUNS = 7
CLASSES = 19
SIZE = (1024, 2048)
"""Height and width of the maps."""
PICTURES = 16
SEGMENTER = SegmenterConfig(
    encoder=EncoderConfig(
        name="RN50", architecture={"embed_dim": 64, "layers": [1, 2, 2, 1], "width": 16}
    ),
    decoder=DecoderConfig(
        width=64,
        heads=4,
        queries=20,
        layers=3,
        ffn=128,
        pixel_layers=2,
        pixel_ffn=128,
        group_norm=16,
    ),
)


def maps(size: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction and a truth of large regions that mostly agree (uint8 [1, H, W])."""
    rng = np.random.default_rng(seed)
    regions = rng.integers(0, CLASSES, (size[0] // 32, size[1] // 32), dtype=np.uint8)
    truth = np.kron(regions, np.ones((32, 32), np.uint8))
    predicted = np.roll(truth, 5, axis=1)
    truth[: size[0] // 20] = 255
    return torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None]


def scripts_steps(predicted_HW: np.ndarray, truth_HW: np.ndarray, matrix: np.ndarray) -> None:
    """What cityscapesScripts does without its compiled helper, in the same order."""
    base = int(max(truth_HW.max(), predicted_HW.max())) + 1
    encoded = truth_HW.astype(np.int32) * base + predicted_HW
    values, counts = np.unique(encoded, return_counts=True)
    for value, count in zip(values, counts, strict=True):
        matrix[value // base, value % base] += count


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call; on a GPU until the device is done."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - started)


def compare(
    name: str, ours: Callable[[], float], theirs: Callable[[], float], unit: str, runs: int
) -> dict:
    """Medians of two measurements, taken alternately after a warm-up; less is better."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for measure, kept in zip((ours, theirs), found, strict=True):
            value = measure()
            if number:
                kept.append(value)
    mine, other = (statistics.median(kept) for kept in found)
    return {
        "name": name,
        "ours": round(mine, 3),
        "theirs": round(other, 3),
        "unit": unit,
        "ratio": round(other / mine, 2) if mine else None,
        "spread_ours": [round(min(found[0]), 3), round(max(found[0]), 3)],
        "spread_theirs": [round(min(found[1]), 3), round(max(found[1]), 3)],
    }


def confusion_cases(device: torch.device, runs: int) -> Iterator[dict]:
    """Our matrix against two others; the results are compared first."""
    # In deterministic mode torchmetrics counts by a loop, thousands of times slower.
    torch.use_deterministic_algorithms(False)
    predicted, truth = (labels.to(device) for labels in maps(SIZE))
    score = DatasetScore(CLASSES, device)
    metric = MulticlassConfusionMatrix(CLASSES, ignore_index=255, validate_args=False).to(device)
    matrix = np.zeros((256, 256), np.int64)
    score.add(predicted, truth)
    metric.update(predicted.long(), truth.long())
    scripts_steps(predicted[0].cpu().numpy(), truth[0].cpu().numpy(), matrix)
    ours = np.array(score.to_json()["confusion"])
    assert (ours == metric.compute().cpu().numpy()).all(), "torchmetrics counts otherwise"
    assert (ours == matrix[:CLASSES, :CLASSES]).all(), "the scripts' steps count otherwise"

    def add() -> float:
        return milliseconds(lambda: score.add(predicted, truth), device)

    def update() -> float:
        return milliseconds(lambda: metric.update(predicted.long(), truth.long()), device)

    def steps() -> float:
        arrays = predicted[0].cpu().numpy(), truth[0].cpu().numpy()
        return milliseconds(lambda: scripts_steps(*arrays, matrix), device)

    yield compare("confusion_cityscapesscripts", add, steps, "ms", runs)
    yield compare("confusion_torchmetrics", add, update, "ms", runs)


def write_samples(folder: Path, size: tuple[int, int]) -> list[Sample]:
    """Photograph-like PNG pictures with labels."""
    samples = []
    for number in range(PICTURES):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))
        picture = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        image_path, label_path = folder / f"{number}.png", folder / f"{number}.label.png"
        Image.fromarray(picture).save(image_path, compress_level=3)
        Image.fromarray(maps(size, number)[1][0].numpy()).save(label_path)
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


def wait_share(
    batches: Iterator[Sequence], segmenter: Segmenter, config: EvaluateConfig, device: Device
) -> float:
    """Share (%) of the time in which the network waits for the next batch."""
    score = DatasetScore(CLASSES, device.device)
    waited_s, started = 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        items = next(batches, None)
        waited_s += time.perf_counter() - asked
        if items is None:
            break
        judging.count(score, items, segmenter, config, device)
    score.to_json()
    return 100 * waited_s / (time.perf_counter() - started)


def wait_case(device: Device, folder: Path, runs: int) -> dict:
    """Reading ahead against reading in turn, with a small network on 256x512 (a GPU: 1024x2048)."""
    size = SIZE if device.device.type == "cuda" else (256, 512)
    samples = write_samples(folder, size)
    config, sizes = EvaluateConfig(batch_size=2), judging.Sizes()
    names = [str(number) for number in range(CLASSES)]
    segmenter = build_segmenter(SEGMENTER, class_names=names, device=device.device).eval()

    def ahead() -> float:
        return wait_share(judging.read_batches(samples, config, sizes), segmenter, config, device)

    def in_turn() -> float:
        pairs = (samples[start : start + 2] for start in range(0, len(samples), 2))
        batches = ([judging.read_item(sample, config, sizes) for sample in pair] for pair in pairs)
        return wait_share(batches, segmenter, config, device)

    return compare("wait", ahead, in_turn, "%", runs)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(confusion_cases(torch.device(arguments.device), arguments.runs))
    device = device_for(arguments.device, precision="fp32")
    with tempfile.TemporaryDirectory() as folder:
        rows.append(wait_case(device, Path(folder), max(1, arguments.runs // 3)))
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['name']:28} ours {row['ours']:8.2f}  theirs {row['theirs']:8.2f} {row['unit']}"
            f"  ratio {row['ratio']}  spread {row['spread_ours']} {row['spread_theirs']}"
        )


if __name__ == "__main__":
    main()
