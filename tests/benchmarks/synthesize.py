"""How fast pictures are painted: batched against one by one, and what is not painting.

    python tests/benchmarks/synthesize.py [--device cpu|cuda] [--json]
    python tests/benchmarks/synthesize.py --device cuda --runs 3     on a GPU: nothing to download

`paint_batched`: pictures per second of the stage's painter, batched with one seed per picture,
against the same pipeline called picture by picture as its documentation says. `overhead`: share of
a shard's time outside text encoder, UNet and VAE, saving included (ours), against the same shard
with pictures saved one after the other (theirs). On CUDA both use a network of Stable Diffusion
2.1's size with random weights in bf16; on a CPU the miniature's painter where it ships, else a tiny
random one, whose networks are so small that the overhead says little.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.config import MINIATURE_DIR
from models.painter import Painter, load_painter, save_random_painter
from prompts.loader import load_bank
from stages.config import SynthesizeConfig
from stages.synthesize import Easel, commission, save_picture


class Silent:
    """Progress that nobody hears."""

    def start(self, total: int, unit: str, *, done: int = 0) -> None: ...
    def advance(self, count: int = 1, **metrics: float) -> None: ...
    def note(self, text: str) -> None: ...


def networks_like_sd21(vocabulary: int) -> dict[str, torch.nn.Module]:
    """UNet, VAE and text encoder of Stable Diffusion 2.1's sizes with random weights."""
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}


def sized_like_sd21() -> Painter:
    """A pipeline of Stable Diffusion 2.1's sizes with random weights, in bf16 on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_painter(Path(folder), seed=0)
        small = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline = StableDiffusionPipeline(
        **networks_like_sd21(len(small.tokenizer)),
        tokenizer=small.tokenizer,
        scheduler=small.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to("cuda", torch.bfloat16)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return Painter(pipeline=pipeline, untrained=True)


def subject(device: str) -> tuple[Painter, SynthesizeConfig]:
    """What is painted with, and how."""
    if device == "cuda":
        section = SynthesizeConfig(num_images=32, steps=20, batch_size=16, shard_size=32)
        return sized_like_sd21(), section
    shipped = MINIATURE_DIR / "painter"
    model = "builtin:painter" if shipped.is_dir() else "random"
    section = SynthesizeConfig(
        num_images=16, model=model, height=64, width=128, steps=8, batch_size=8, shard_size=16
    )
    return load_painter(model), section


def now() -> float:
    """Seconds, after what the GPU was asked to do is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(
    first: Callable[[], float], second: Callable[[], float], *, runs: int
) -> tuple[list[float], list[float]]:
    """Results of both, run in turn, after one warm-up of each."""
    found: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for work, kept in zip((first, second), found, strict=True):
            value = work()
            if run:
                kept.append(value)
    return found


def rate(paint: Callable[[], None], count: int) -> Callable[[], float]:
    """Pictures per second of one call."""

    def measured() -> float:
        started = now()
        paint()
        return count / (now() - started)

    return measured


def paint_batched(painter: Painter, section: SynthesizeConfig, runs: int) -> dict:
    """Batches against one by one."""
    orders = _orders(section)
    how = {"height": section.height, "width": section.width}

    def batched() -> None:
        for start in range(0, len(orders), section.batch_size):
            batch = orders[start : start + section.batch_size]
            painter.paint(
                [order.prompt for order in batch],
                seeds=[order.seed for order in batch],
                steps=section.steps,
                guidance=section.guidance,
                **how,
            )

    def one_by_one() -> None:
        for order in orders:
            _ = painter.pipeline(
                order.prompt,
                num_inference_steps=section.steps,
                guidance_scale=section.guidance,
                generator=torch.Generator("cpu").manual_seed(order.seed),
                **how,
            ).images[0]

    rates = alternate(rate(batched, len(orders)), rate(one_by_one, len(orders)), runs=runs)
    return _row("paint_batched", rates, unit="pictures/s", smaller_is_better=False)


@contextmanager
def networks_timed(painter: Painter) -> Iterator[list[float]]:
    """Collects the seconds spent in text encoder, UNet and VAE decoder."""
    pipeline, spent = painter.pipeline, []
    originals = {
        pipeline.text_encoder: "forward",
        pipeline.unet: "forward",
        pipeline.vae: "decode",
    }
    for part, name in originals.items():
        setattr(part, name, _timed(getattr(part, name), spent))
    try:
        yield spent
    finally:
        for part, name in originals.items():
            delattr(part, name)


def _timed(call: Callable, spent: list[float]) -> Callable:
    def timed(*args, **kwargs):
        started = now()
        result = call(*args, **kwargs)
        spent.append(now() - started)
        return result

    return timed


def overhead(painter: Painter, section: SynthesizeConfig, runs: int) -> dict:
    """Share of a shard's time outside the networks."""
    orders = _orders(section)
    easel = Easel(painter=painter, section=section, progress=Silent())

    def share(paint: Callable[[Path], None]) -> Callable[[], float]:
        def measured() -> float:
            with tempfile.TemporaryDirectory() as folder, networks_timed(painter) as spent:
                started = now()
                paint(Path(folder))
                return 1 - sum(spent) / (now() - started)

        return measured

    def in_turn(folder: Path) -> None:
        for start in range(0, len(orders), section.batch_size):
            for order, picture, _ in easel._paint(orders[start : start + section.batch_size]):
                row = easel._row(order)
                save_picture(folder / row["file"], picture, row)

    shares = alternate(
        share(lambda folder: easel.paint_shard(orders, folder)), share(in_turn), runs=runs
    )
    return _row("overhead", shares, unit="share of time", smaller_is_better=True)


def _orders(section: SynthesizeConfig) -> list:
    rows = [{"id": f"p{n}", "text": prompt.text} for n, prompt in enumerate(load_bank())]
    return commission(rows, num_images=section.num_images, seed=0, round_=0)


def _row(
    name: str, found: tuple[list[float], list[float]], *, unit: str, smaller_is_better: bool
) -> dict:
    mine, other = (statistics.median(kept) for kept in found)
    return {
        "name": name,
        "ours": round(mine, 4),
        "theirs": round(other, 4),
        "unit": unit,
        "ratio": round(other / mine if smaller_is_better else mine / other, 3),
        "spread_ours": [round(min(found[0]), 4), round(max(found[0]), 4)],
        "spread_theirs": [round(min(found[1]), 4), round(max(found[1]), 4)],
    }


CASES: dict[str, Callable[[Painter, SynthesizeConfig, int], dict]] = {
    "paint_batched": paint_batched,
    "overhead": overhead,
}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    painter, section = subject(arguments.device)
    rows = [CASES[name](painter, section, arguments.runs) for name in arguments.cases]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        low, high = row["spread_ours"]
        print(
            f"{row['name']:>15}: ours {row['ours']} {row['unit']} ({low} to {high}), theirs "
            f"{row['theirs']}, ratio {row['ratio']}"
        )


if __name__ == "__main__":
    main()
