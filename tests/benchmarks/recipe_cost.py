"""What a whole recipe costs: measured rates added up, and the arithmetic floor beside them.

    python tests/benchmarks/recipe_cost.py [--recipe NAME] [--device cpu|cuda] [--json]

Counted are training steps, painting, labelling and refinement, as often as the recipe has them
(rounds and legs). The rate of each is measured in this run, with random weights and pictures that
lie on the device; on a GPU at the recipe's true size, networks of Stable Diffusion 2.1's size
standing in for a hub's painter. On a CPU what is too large is measured reduced (smaller crops, one
picture, the miniature's painter and SAM) and extrapolated by arithmetic, which says little about
a GPU: each row says at which size it was measured, and whether it is extrapolated.

The floor ("theirs") is the multiplications and additions of the networks (convolutions, linear
layers, attention; a training step with its backward pass) at the rate of a large matrix product
measured on the same device in the same precision. Not counted: reading files, prompts, selection,
evaluation, and in the floor SAM's prompt decoder, the text encoder, matching and losses.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flows.pipeline import build
from flows.recipes import load_recipe
from models.build import build_segmenter
from models.config import weights_path
from models.ema import Ema
from models.inference import predict
from models.losses import SetCriterion
from models.painter import RANDOM, Painter, load_painter
from models.refiner import OFFICIAL, build_refiner, point_prompts
from models.segmenter import Segmenter
from stages.config import Recipe
from stages.devices import Device, device_for
from stages.labels import load_labelspace
from tests.benchmarks.flops import (
    encoder_flops,
    inference_flops,
    official_flops,
    painting_flops,
    training_flops,
)
from tests.benchmarks.synthesize import networks_like_sd21, sized_like_sd21

PROMPTS_PER_PICTURE = 20
"""Components that SAM is asked for in a picture, with `refine.points` points each."""
REDUCED_SIDE_PX, REDUCED_BATCH = 128, 1
"""Largest crop or picture, and batch, that a CPU measures."""
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one unit of a part costs."""

    seconds: float
    """Measured, median, at the measured size; of one unit."""
    measured: str
    """At which size."""
    flops: float
    """Of one unit at the recipe's size."""
    measured_flops: float
    """Of one unit at the measured size."""
    extrapolated: bool
    peak_gib: float | None = None

    @property
    def unit_s(self) -> float:
        """Seconds of one unit at the recipe's size."""
        return self.seconds * self.flops / self.measured_flops


class Bench:
    """Measures the parts of one recipe on one device."""

    def __init__(self, recipe: Recipe, device: str, runs: int):
        self.recipe, self.runs = recipe, runs
        precision = recipe.precision if device == "cuda" else "fp32"
        self.device: Device = device_for(device, precision=precision)
        self.on_gpu = device == "cuda"
        self.names = load_labelspace(recipe.data.labels).names
        encoder = recipe.segmenter.encoder.model_copy(update={"weights": None})
        self.config = recipe.segmenter.model_copy(update={"encoder": encoder})

    @property
    def precision(self) -> str:
        """As measured."""
        return "bf16" if self.device.dtype == torch.bfloat16 else "fp32"

    def reduced(self, size: tuple[int, int], batch: int) -> tuple[tuple[int, int], int]:
        """The size and batch that are measured for these."""
        if self.on_gpu or max(size) <= REDUCED_SIDE_PX:
            return size, batch
        return (REDUCED_SIDE_PX, REDUCED_SIDE_PX), REDUCED_BATCH

    def matmul_rate(self) -> float:
        """Operations per second of a large matrix product."""
        side = MATMUL_SIDE[self.device.device.type]
        a = torch.randn(side, side, device=self.device.device, dtype=self.device.dtype)
        seconds, _ = self.timed(lambda: a @ a, runs=10)
        return 2 * side**3 / seconds

    def timed(self, work: Callable[[], object], runs: int) -> tuple[float, float | None]:
        """Median seconds after a warm-up, and peak device memory in GiB."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for run in range(runs + 1):
            started = self._now()
            work()
            if run:
                times.append(self._now() - started)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None
        return statistics.median(times), peak

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def training(self, section: Any) -> Cost:
        """One update of `train_source` or `self_train`."""
        true = (section.augment.crop_height, section.augment.crop_width)
        size, batch = self.reduced(true, section.batch_size)
        segmenter = self._segmenter().train()
        groups = segmenter.parameter_groups(section.optimiser.lr, section.optimiser.weight_decay)
        optimizer = torch.optim.AdamW(groups, fused=True)
        criterion = SetCriterion(self.config.losses, len(self.names))
        ema = Ema(segmenter, section.ema.decay, section.ema.every) if section.ema else None
        trained = [p for p in segmenter.parameters() if p.requires_grad]
        images, labels = some_batch(batch, size, len(self.names), self.device.device)

        def update() -> None:
            optimizer.zero_grad(set_to_none=True)
            with self.device.autocast():
                losses = criterion(segmenter(images), labels, seeds=range(batch))
            losses["total"].backward()
            torch.nn.utils.clip_grad_norm_(trained, section.optimiser.clip_norm)
            optimizer.step()
            if ema is not None:
                ema.update(segmenter, 1)

        seconds, peak = self.timed(update, self.runs)
        return Cost(
            seconds=seconds,
            measured=f"batch {batch} of {size[0]}x{size[1]}",
            flops=training_flops(self.config, true, section.batch_size, self.names),
            measured_flops=training_flops(self.config, size, batch, self.names),
            extrapolated=(size, batch) != (true, section.batch_size),
            peak_gib=peak,
        )

    def labelling(self) -> Cost:
        """One picture of `pseudo_label`."""
        paint, section = self.recipe.synthesize, self.recipe.pseudo_label
        true = (paint.height, paint.width)
        size, batch = self.reduced(true, section.batch_size)
        segmenter = self._segmenter().eval()
        images, _ = some_batch(batch, size, len(self.names), self.device.device)
        bf16 = self.device.dtype == torch.bfloat16
        seconds, peak = self.timed(
            lambda: predict(segmenter, images, flip=section.flip, bf16=bf16), self.runs
        )
        passes = 2 if section.flip else 1
        return Cost(
            seconds=seconds / batch,
            measured=f"batch {batch} of {size[0]}x{size[1]}",
            flops=passes * inference_flops(self.config, true, self.names),
            measured_flops=passes * inference_flops(self.config, size, self.names),
            extrapolated=size != true or batch != section.batch_size,
            peak_gib=peak,
        )

    def painting(self) -> Cost:
        """One picture of `synthesize`."""
        section = self.recipe.synthesize
        painter, what, stands_in = self._painter()
        whole = (section.height, section.width), section.batch_size, section.steps
        size, batch, steps = whole
        if stands_in and not self.on_gpu:
            size, batch, steps = (64, 128), REDUCED_BATCH, 4

        def paint() -> None:
            painter.paint(
                ["A street."] * batch,
                seeds=range(batch),
                height=size[0],
                width=size[1],
                steps=steps,
                guidance=section.guidance,
            )

        seconds, peak = self.timed(paint, self.runs)
        own = painter.pipeline.unet, painter.pipeline.vae
        networks = own
        if stands_in:
            with torch.device("meta"):
                like = networks_like_sd21(vocabulary=49408)
            networks = like["unet"], like["vae"]
        return Cost(
            seconds=seconds / batch,
            measured=f"{what}, batch {batch} of {size[0]}x{size[1]}, {steps} steps",
            flops=painting_flops(*networks, whole[0], section.steps, section.guidance),
            measured_flops=painting_flops(*own, size, steps, section.guidance),
            extrapolated=(size, batch, steps) != whole,
            peak_gib=peak,
        )

    def _painter(self) -> tuple[Painter, str, bool]:
        """A painter, what it is, and whether it stands in for a hub's."""
        model = self.recipe.synthesize.model
        if model == RANDOM or weights_path(model) is not None:
            return load_painter(model, device=self.device.device), model, False
        if not self.on_gpu:
            return load_painter(RANDOM), "a tiny painter", True
        painter = sized_like_sd21()
        painter.pipeline.to(dtype=self.device.dtype)
        return painter, "a painter of SD 2.1's size", True

    def refinement(self) -> Cost:
        """One picture of `refine`: encoder, prompts decoded, best masks resized."""
        section, paint = self.recipe.refine, self.recipe.synthesize
        model, weights = section.model, section.weights
        reduced = model in OFFICIAL and not self.on_gpu
        if model in OFFICIAL:
            model, weights = ("tiny" if reduced else model), None
        refiner = build_refiner(model, weights, device=self.device.device)
        size, batch = (paint.height, paint.width), section.batch_size
        if reduced:
            size, batch = (REDUCED_SIDE_PX, REDUCED_SIDE_PX), REDUCED_BATCH
        images, prompts = some_prompts(batch, size, section.points)
        bf16 = self.device.dtype == torch.bfloat16
        seconds, peak = self.timed(
            lambda: refiner.masks(
                images,
                prompts,
                candidates="best",
                prompt_batch=section.prompt_batch,
                bf16=bf16,
            ),
            self.runs,
        )
        own = encoder_flops(refiner)
        return Cost(
            seconds=seconds / batch,
            measured=f"SAM {model}, batch {batch} of {size[0]}x{size[1]}, "
            f"{PROMPTS_PER_PICTURE} prompts a picture",
            flops=official_flops(section.model) if reduced else own,
            measured_flops=own,
            extrapolated=reduced,
            peak_gib=peak,
        )

    def _segmenter(self) -> Segmenter:
        segmenter = build_segmenter(self.config, class_names=self.names).to(self.device.device)
        if self.on_gpu:
            segmenter.encoder.to(memory_format=torch.channels_last)
        return segmenter

    def rows(self) -> list[dict[str, Any]]:
        """A row per part that the recipe has, and their sum."""
        rate = self.matmul_rate()
        units = Counter()
        for instance in build(self.recipe).values():
            units[instance.stage] += instance.contract.units(instance.recipe) or 0
        parts = {
            "train_source": lambda: self.training(self.recipe.train_source),
            "synthesize": self.painting,
            "pseudo_label": self.labelling,
            "refine": self.refinement,
            "self_train": lambda: self.training(self.recipe.self_train),
        }
        if self.recipe.synthesize.mode != "paint":
            del parts["synthesize"]
        rows, known = [], {}
        for name, measured in parts.items():
            if not units[name]:
                continue
            # both trainings of one size cost the same
            twin = self._same_as(name, known)
            known[name] = known[twin] if twin else measured()
            rows.append(row_of(name, known[name], units[name], rate))
            if self.on_gpu:
                torch.cuda.empty_cache()
        return [*rows, total_of(rows, rate, self.precision)]

    def _same_as(self, name: str, known: dict[str, Cost]) -> str | None:
        if name != "self_train" or "train_source" not in known:
            return None
        first, second = self.recipe.train_source, self.recipe.self_train
        fields = [
            (s.augment.crop_height, s.augment.crop_width, s.batch_size, s.ema is None)
            for s in (first, second)
        ]
        return "train_source" if fields[0] == fields[1] else None


def some_batch(
    batch: int, size: tuple[int, int], classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures uint8 [B, 3, H, W], and labels uint8 [B, H, W] of coarse blocks."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, *size), generator=generator, dtype=torch.uint8)
    coarse = torch.randint(0, classes, (batch, 1, 4, 4), generator=generator).float()
    labels = nn.functional.interpolate(coarse, size=size)[:, 0].to(torch.uint8)
    return images.to(device), labels.to(device)


def some_prompts(batch: int, size: tuple[int, int], points: int) -> tuple[list, list]:
    """Random pictures, and random positive points for each."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(batch)]
    low = min(size)
    prompts = [
        point_prompts([rng.integers(0, low, (points, 2)).astype(np.float32)] * PROMPTS_PER_PICTURE)
        for _ in images
    ]
    return images, prompts


def row_of(name: str, cost: Cost, units: int, rate: float) -> dict[str, Any]:
    """A part's hours, measured and at least."""
    hours, floor = units * cost.unit_s / 3600, units * cost.flops / rate / 3600
    return {
        "name": name,
        "ours": round(hours, 6),
        "theirs": round(floor, 6),
        "unit": "h",
        "ratio": round(floor / hours, 3),
        "units": units,
        "unit_s": round(cost.unit_s, 6),
        "unit_tflop": round(cost.flops / 1e12, 5),
        "measured": cost.measured,
        "measured_s": round(cost.seconds, 6),
        "extrapolated": cost.extrapolated,
        "peak_gib": None if cost.peak_gib is None else round(cost.peak_gib, 2),
    }


def total_of(rows: list[dict[str, Any]], rate: float, precision: str) -> dict[str, Any]:
    """The sum of the parts."""
    hours, floor = (sum(row[side] for row in rows) for side in ("ours", "theirs"))
    return {
        "name": "recipe",
        "ours": round(hours, 6),
        "theirs": round(floor, 6),
        "unit": "h",
        "ratio": round(floor / hours, 3),
        "precision": precision,
        "matmul_tflop_s": round(rate / 1e12, 4),
        "extrapolated": any(row["extrapolated"] for row in rows),
    }


def show(recipe: Recipe, bench: Bench, rows: list[dict[str, Any]]) -> None:
    """The table."""
    *parts, total = rows
    print(
        f"recipe {recipe.name}: {bench.device.reason}; measured in {total['precision']}, "
        f"matrix product {total['matmul_tflop_s']:.3g} TFLOP/s"
    )
    for row in parts:
        how = "extrapolated from" if row["extrapolated"] else "measured at"
        peak = "" if row["peak_gib"] is None else f", peak {row['peak_gib']} GiB"
        cost = f"{row['units']:>6} x {row['unit_s']:>9.4f} s = {row['ours']:>10.3f} h"
        floor = f"floor {row['theirs']:>9.4f} h ({100 * row['ratio']:.0f} %)"
        size = f"{how} {row['measured']} ({row['measured_s']:.4f} s){peak}"
        print(f"{row['name']:<13} {cost}   {floor}   {size}")
    print(
        f"{'whole recipe':<13} {total['ours']:>31.3f} h   floor {total['theirs']:>9.4f} h "
        f"({100 * total['ratio']:.0f} %)"
        + ("   EXTRAPOLATED: a guess, no measurement" if total["extrapolated"] else "")
    )


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="clouds_convnext_l_gta5")
    parser.add_argument("--device", default="cpu", choices=list(MATMUL_SIDE))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: its own choice")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe)
    bench = Bench(recipe, arguments.device, arguments.runs)
    rows = bench.rows()
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        show(recipe, bench, rows)


if __name__ == "__main__":
    main()
