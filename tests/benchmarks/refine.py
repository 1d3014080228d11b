"""How fast labels are refined: the steps around SAM, and the whole with SAM.

    python tests/benchmarks/refine.py [--device cpu|cuda] [--json] [--cases labels_768 ...]
    python tests/benchmarks/refine.py --device cuda      on a GPU: nothing to download

`labels_768`: components, points, selection and merging (no network) on a 768x768 map with 2000
components of which 40 are kept, against the released steps written out plainly (per-class scipy
labelling, full-frame copies). `end_to_end`: pictures per second through SAM, batched, against
`SamPredictor` used as its documentation says, same dtype; ViT-H on CUDA, a small one on a CPU, both
with random weights. Both sides run alternately after a warm-up.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from segment_anything import SamPredictor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.masks import (
    best_masks,
    draw_indices,
    find_components,
    pick_points,
    refined_label_map,
)
from models.refiner import Refiner, build_refiner, point_prompts

SIDE, NUM_LARGE, NUM_COMPONENTS, MIN_AREA, POINTS = 768, 40, 2000, 5000, 5
VOID = 255


def label_map() -> np.ndarray:
    """A 768x768 map: a grid of 40 large blocks with 1960 specks of other classes in them."""
    rng = np.random.default_rng(0)
    rows, columns = 5, 8
    grid = (np.arange(rows * columns).reshape(rows, columns) * 7) % 17
    labels = np.kron(grid, np.ones((SIDE // rows + 1, SIDE // columns + 1)))[:SIDE, :SIDE]
    labels = labels.astype(np.uint8)
    places = rng.permutation((SIDE // 8 - 2) ** 2)[: NUM_COMPONENTS - NUM_LARGE]
    for number, place in enumerate(places):
        y, x = (8 * (int(part) + 1) for part in divmod(place, SIDE // 8 - 2))
        labels[y : y + 3, x : x + 3] = 17 + number % 2
    return labels


def candidates(num_prompts: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-ins for SAM's output: three boxes per prompt, and scores."""
    rng = np.random.default_rng(1)
    masks = torch.zeros((num_prompts, 3, size, size), dtype=torch.bool)
    for prompt in range(num_prompts):
        for candidate in range(3):
            y, x = rng.integers(0, size - 150, 2)
            masks[prompt, candidate, y : y + 150, x : x + 150] = True
    return masks, torch.from_numpy(rng.random((num_prompts, 3), np.float32))


def ours(labels: np.ndarray, masks: torch.Tensor, scores: torch.Tensor) -> np.ndarray:
    """Our steps around SAM."""
    components = find_components(labels, min_area_px=MIN_AREA, void=(VOID,))
    point_prompts(
        [
            pick_points(component, draw_indices(component, POINTS, seed=number))
            for number, component in enumerate(components)
        ]
    )
    best, _ = best_masks(masks, scores)
    return refined_label_map(labels, components, best, void=VOID)


def plain(labels: np.ndarray, masks: torch.Tensor, scores: torch.Tensor) -> np.ndarray:
    """The released steps, written out: per class, whole frames, masks on the CPU as integers."""
    components, classes, points = [], [], []
    for train_id in np.unique(labels):
        numbered, count = ndimage.label((labels == train_id).astype(np.int64))
        for number in range(1, count + 1):
            component = (numbered == number).astype(np.int64)
            if component.sum() > MIN_AREA:
                components.append(component)
                classes.append(train_id)
    for number, component in enumerate(components):
        rows, columns = np.nonzero(component)
        drawn = np.random.default_rng(number).choice(len(rows), POINTS, replace=False)
        points.append(np.stack([columns[drawn], rows[drawn]], axis=1))
    chosen = [masks[number, scores[number].argmax()] for number in range(len(components))]
    stacked = torch.stack(chosen).to(torch.int64)
    claims = stacked.sum(0)
    stacked[:, claims > 1] = 0
    after = np.full_like(labels, VOID)
    for train_id in np.unique(classes):
        members = [stacked[n] for n, other in enumerate(classes) if other == train_id]
        after[torch.stack(members).sum(0).numpy() > 0] = train_id
    return after


def alternate(
    first: Callable[[], object], second: Callable[[], object], *, runs: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, run in turn, after one warm-up of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for work, kept in zip((first, second), times, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run:
                kept.append(time.perf_counter() - started)
    return times


def report(name: str, times: tuple[list[float], list[float]], *, items: int, unit: str) -> dict:
    """A row of the table; rates per second, ratio above 1 when ours is better."""
    mine, other = (items / statistics.median(kept) for kept in times)
    return {
        "name": name,
        "ours": round(mine, 3),
        "theirs": round(other, 3),
        "unit": unit,
        "ratio": round(mine / other, 3),
        "spread_ours": [round(items / max(times[0]), 3), round(items / min(times[0]), 3)],
        "spread_theirs": [round(items / max(times[1]), 3), round(items / min(times[1]), 3)],
    }


def labels_768(_device: str, runs: int) -> dict:
    """The steps around SAM."""
    labels = label_map()
    kept = find_components(labels, min_area_px=MIN_AREA)
    total = len(find_components(labels, min_area_px=0))
    assert (len(kept), total) == (NUM_LARGE, NUM_COMPONENTS), (len(kept), total)
    masks, scores = candidates(NUM_LARGE, SIDE)
    assert np.array_equal(ours(labels, masks, scores), plain(labels, masks, scores))
    times = alternate(
        lambda: ours(labels, masks, scores), lambda: plain(labels, masks, scores), runs=runs
    )
    return report("labels_768", times, items=1, unit="maps/s")


def end_to_end(device: str, runs: int) -> dict:
    """Pictures through SAM: one batch of ours against `SamPredictor`, prompt by prompt."""
    on_gpu = device == "cuda"
    refiner = build_refiner("vit_h" if on_gpu else "tiny", None, device=device, seed=0)
    size, count = (SIDE, 8) if on_gpu else (128, 8)
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]
    points = [
        [rng.integers(0, size, (POINTS, 2)).astype(np.float32) for _ in range(20)] for _ in images
    ]
    prompts = [point_prompts(own) for own in points]
    times = alternate(
        lambda: refiner.masks(images, prompts, candidates="best", bf16=on_gpu),
        lambda: _predictor(refiner, images, points, bf16=on_gpu),
        runs=runs,
    )
    name = f"end_to_end_{'vit_h' if on_gpu else 'tiny'}"
    return report(name, times, items=count, unit="pictures/s")


@torch.inference_mode()
def _predictor(refiner: Refiner, images: list, points: list, *, bf16: bool) -> None:
    """SamPredictor as documented: set_image, then one batched predict_torch per picture."""
    device = refiner.sam.device
    context = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    predictor = SamPredictor(refiner.sam)
    for image, own in zip(images, points, strict=True):
        with context:
            predictor.set_image(image)
            coordinates = predictor.transform.apply_coords(np.stack(own), image.shape[:2])
            masks, iou, _ = predictor.predict_torch(
                point_coords=torch.as_tensor(coordinates, dtype=torch.float, device=device),
                point_labels=torch.ones(coordinates.shape[:2], device=device),
                multimask_output=True,
            )
        best_masks(masks, iou)


CASES = {"labels_768": labels_768, "end_to_end": end_to_end}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    rows = [CASES[name](arguments.device, arguments.runs) for name in arguments.cases]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        low, high = row["spread_ours"]
        print(
            f"{row['name']:>20}: ours {row['ours']} {row['unit']} ({low} to {high}), theirs "
            f"{row['theirs']}, ratio {row['ratio']}"
        )


if __name__ == "__main__":
    main()
