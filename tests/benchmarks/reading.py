"""How fast a core reads and augments training pictures of real size, and how many cores that takes.

    python tests/benchmarks/reading.py [--recipe NAME] [--costs FILE] [--json]

Files are made up at the sizes of Cityscapes (1024x2048), GTA5 (1052x1914) and the painted pictures,
as PNGs of about the real number of bytes. Ours are the recipe's batches with nothing in the cache:
decoded, scaled, cropped, mirrored, coloured. Theirs is the plain way: Pillow, then torchvision's v2
transforms as its documentation composes them. `decode_*` sets Pillow's decoding of picture and
label against torchvision's, to see what a faster decoder could win (torchvision's is not used: a
damaged PNG ended the process with a segmentation fault, version 0.29). One thread, CPU seconds.

Training wants as many pictures a second as it has updates, times the batch. That rate is measured
by `recipe_cost.py --device cuda --json`, whose output `--costs` reads; without it, it is unknown.
What is known is the rate at which all training pictures of the recipe pass in `--hours`.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flows.pipeline import build
from flows.recipes import load_recipe
from stages.batches import Batches, MixedBatches, SourceBatches
from stages.config import AugmentConfig, Recipe
from stages.readers import Sample
from tests.benchmarks.batches import compare, transforms

SIZES = {"cityscapes": (1024, 2048), "gta5": (1052, 1914)}
"""Height and width of the pictures of two data sets."""
NOISE = 1.2
"""Standard deviation of the pixels' noise, in levels: about 2.3 MB a picture, as in both sets."""
SAMPLES, RUNS = 6, 3


def write_samples(folder: Path, size: tuple[int, int], *, painted: bool) -> list[Sample]:
    """Smooth pictures with a little noise, and labels of blocks, as PNG."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    height, width = size
    samples = []
    for number in range(SAMPLES):
        coarse = rng.integers(0, 256, (height // 48, width // 48, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
        picture = (smooth + rng.normal(0, NOISE, smooth.shape)).clip(0, 255).astype(np.uint8)
        blocks = rng.integers(0, 19, (height // 24, width // 24), dtype=np.uint8)
        label = Image.fromarray(blocks).resize((width, height), Image.NEAREST)
        image_path, label_path = folder / f"{number}.png", folder / f"{number}.label.png"
        Image.fromarray(picture).save(image_path)
        label.save(label_path)
        samples.append(
            Sample(
                id=f"bench/{number}",
                image=image_path,
                label=label_path,
                height=height,
                width=width,
                painted=painted,
            )
        )
    return samples


class Uncached(SourceBatches):
    """Source batches that keep nothing: a real set is far larger than the cache."""

    _cache_limit = property(lambda _: 0, lambda *_: None)


class UncachedPainted(MixedBatches):
    """Painted pictures alone, and none kept."""

    _cache_limit = property(lambda _: 0, lambda *_: None)


def ours(batches: Batches) -> Callable[[], int]:
    """Batch after batch, never the same twice."""
    steps = itertools.count()
    return lambda: len(batches.batch(next(steps)))


def plain(samples: Sequence[Sample], config: AugmentConfig) -> Callable[[], int]:
    """Pillow and torchvision, sample by sample, stacked."""
    size = (samples[0].height, samples[0].width)
    crop = (config.crop_height, config.crop_width)
    # torchvision's scales are relative to the crop, ours to the picture
    fitting = min(side / whole for side, whole in zip(crop, size, strict=True))
    relative = {"scale_min": config.scale_min / fitting, "scale_max": config.scale_max / fitting}
    composed = transforms(config.model_copy(update=relative))
    to_image = v2.ToImage()

    def work() -> int:
        views = []
        for sample in samples:
            with Image.open(sample.image) as image, Image.open(sample.label) as label:
                mask = tv_tensors.Mask(torch.from_numpy(np.array(label)))
                views.append(composed(to_image(image.convert("RGB")), mask))
        for column in zip(*views, strict=True):
            torch.stack(column)
        return len(samples)

    return work


def by_pillow(samples: Sequence[Sample]) -> Callable[[], int]:
    """Decoding as our readers do."""
    return lambda: sum(bool(s.read_image().size + s.read_label().size) for s in samples)


def by_torchvision(samples: Sequence[Sample]) -> Callable[[], int]:
    """Decoding by libpng, to the layout that our augmentation takes."""

    def work() -> int:
        for sample in samples:
            image = decode_image(read_file(str(sample.image)), mode=ImageReadMode.RGB)
            image.permute(1, 2, 0).contiguous()
            decode_image(read_file(str(sample.label)), mode=ImageReadMode.GRAY)
        return len(samples)

    return work


def measure(folder: Path, recipe: Recipe, runs: int) -> Iterator[dict[str, Any]]:
    """A row per kind of picture, and what decoding alone takes."""
    section, paint = recipe.train_source, recipe.synthesize
    for name, size in SIZES.items():
        samples = write_samples(folder / name, size, painted=False)
        batches = Uncached(samples, batch_size=SAMPLES, augment=section.augment, seed=0)
        row = compare(f"read_{name}", ours(batches), plain(samples, section.augment), runs)
        megabytes = sum(os.path.getsize(s.image) for s in samples) / len(samples) / 1e6
        yield row | {"ms": round(1e3 / row["ours"], 1), "file_mb": round(megabytes, 2)}
        yield compare(f"decode_{name}", by_pillow(samples), by_torchvision(samples), runs)
    if "synthesize" not in {instance.stage for instance in build(recipe).values()}:
        return
    samples = write_samples(folder / "painted", (paint.height, paint.width), painted=True)
    config = recipe.self_train.painted_augment
    batches = UncachedPainted(
        [],
        samples,
        batch_size=SAMPLES,
        painted_share=1.0,
        augment=config,
        painted_augment=config,
        seed=0,
    )
    row = compare("read_painted", ours(batches), plain(samples, config), runs)
    yield row | {"ms": round(1e3 / row["ours"], 1)}


def training_pictures(recipe: Recipe) -> dict[str, int]:
    """Pictures that pass in all updates of a stage, over rounds and legs."""
    steps = dict.fromkeys(("train_source", "self_train"), 0)
    for instance in build(recipe).values():
        if instance.stage in steps:
            steps[instance.stage] += instance.contract.units(instance.recipe) or 0
    return {name: steps[name] * getattr(recipe, name).batch_size for name in steps if steps[name]}


def wanted(
    recipe: Recipe, rows: Sequence[dict[str, Any]], costs: Path | None, hours: float
) -> Iterator[dict[str, Any]]:
    """Pictures a second that each training stage takes, and cores that make them."""
    per_core = {row["name"]: row["ours"] for row in rows}
    source = min(per_core[f"read_{name}"] for name in SIZES)
    measured = {}
    if costs is not None:
        measured = {row["name"]: row for row in json.loads(costs.read_text(encoding="utf-8"))}
    pictures = training_pictures(recipe)
    pace = sum(pictures.values()) / (3600 * hours)
    for name in pictures:
        section = getattr(recipe, name)
        share = section.painted_share if name == "self_train" else 0.0
        painted = per_core.get("read_painted", source)
        rate = 1 / ((1 - share) / source + share / painted)
        row = {
            "name": f"wanted_{name}",
            "pictures_per_s_and_core": round(rate, 2),
            "pace_pictures_per_s": round(pace, 1),
            "pace_cores": round(pace / rate, 1),
            "recipe_workers": section.data_workers,
            "training_pictures_per_s": None,
            "training_cores": None,
        }
        known = measured.get(name)
        if known is not None and not known["extrapolated"]:
            needs = section.batch_size / known["unit_s"]
            row |= {
                "training_pictures_per_s": round(needs, 1),
                "training_cores": round(needs / rate, 1),
            }
        yield row


def show(rows: Sequence[dict[str, Any]], needs: Sequence[dict[str, Any]], hours: float) -> None:
    """The tables."""
    for row in rows:
        more = f"  {row['ms']} ms a picture" if "ms" in row else ""
        more += f", {row['file_mb']} MB a file" if "file_mb" in row else ""
        print(
            f"{row['name']:18} ours {row['ours']:7.2f}  theirs {row['theirs']:7.2f} {row['unit']}"
            f"  ratio {row['ratio']:.2f}  spread {row['spread_ours']} {row['spread_theirs']}{more}"
        )
    for row in needs:
        if row["training_cores"] is None:
            told = "training takes: unknown without a GPU (recipe_cost.py --device cuda --json)"
        else:
            told = (
                f"training takes {row['training_pictures_per_s']} pictures/s = "
                f"{row['training_cores']} cores"
            )
        print(
            f"{row['name']:18} a core makes {row['pictures_per_s_and_core']} pictures/s; {told}; "
            f"all training in {hours:g} h: {row['pace_pictures_per_s']} pictures/s = "
            f"{row['pace_cores']} cores; the recipe has {row['recipe_workers']}"
        )


def main() -> None:
    """Print the tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="clouds_convnext_l_gta5")
    parser.add_argument("--costs", type=Path, help="output of recipe_cost.py --device cuda --json")
    parser.add_argument("--hours", type=float, default=2.0, help="in which all training is to pass")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--device", default="cpu", help="not used: pictures are read on the CPU")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(arguments.recipe)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(Path(folder), recipe, arguments.runs))
    needs = list(wanted(recipe, rows, arguments.costs, arguments.hours))
    if arguments.json:
        print(json.dumps([*rows, *needs], indent=1))
    else:
        show(rows, needs, arguments.hours)


if __name__ == "__main__":
    main()
