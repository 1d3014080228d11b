"""The segmenter against transformers' Mask2Former and against the released step, written plainly.

    python tests/benchmarks/segmenter.py [--device cpu|cuda] [--case losses_hf ...] [--json]

All that wants a GPU, in one line (made to fit 10 minutes of an H200, where it has not run yet):

    python tests/benchmarks/segmenter.py --device cuda && python tests/benchmarks/recipe_cost.py
    --device cuda --json > costs.json && python tests/benchmarks/reading.py --costs costs.json

Cases `losses`, `train_step` and `inference`, each `_hf` (transformers' pixel decoder, transformer
module and loss on the same encoder) and `_released` (CLOUDS' step: those modules in float32, losses
that match prediction by prediction and picture by picture with a round trip to the host, and a
second trunk pass for the clean view of the generated pictures). Names with `_bf16` run ours in
bfloat16 autocast against float32; all others run both sides in float32. Both sides run
alternately in one process after a warm-up; medians, spread, ratio, absolute rates, peak memory.

Two more rows are shares. `trunk_of_matmul` (on a GPU in bfloat16) sets the frozen trunk against
large matrix products of as many operations: its ratio is the share of the device's matrix rate that
the trunk reaches (goal on an H200: 0.4). `step_of_losses` sets matching and losses with their
backward pass (`losses_released`) against our whole step (`train_step_released`): its ratio is how
many times they fit into it (goal on an H200: 10, under a tenth).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.build import build_segmenter
from models.config import SegmenterConfig
from models.decoder import Prediction
from models.inference import predict
from models.losses import SetCriterion
from models.segmenter import Segmenter
from tests.benchmarks.flops import flops_of
from tests.benchmarks.mask2former import CLASSES, HfHead, released_loss

GENERATED_SHARE = 0.25
"""Share of generated pictures in a batch of the joint phase (the released GTA5 recipe: 25-29 %)."""


@dataclass(frozen=True)
class Setting:
    """What is measured on a device."""

    encoder: str
    crop_px: int
    batch: int
    runs: int
    matmul_side: int
    """Rows and columns of the matrices that show the device's rate."""


SETTINGS = {
    "cpu": Setting(encoder="RN50", crop_px=256, batch=2, runs=3, matmul_side=1024),
    "cuda": Setting(
        encoder="convnext_large_d_320", crop_px=768, batch=8, runs=10, matmul_side=8192
    ),
}


class Bench:
    """Both sides on one device, with the same encoder and the same batch."""

    def __init__(self, device: str, setting: Setting):
        self.device, self.setting = device, setting
        config = SegmenterConfig.model_validate({"encoder": {"name": setting.encoder}})
        names = [str(k) for k in range(CLASSES)]
        self.segmenter: Segmenter = build_segmenter(config, class_names=names, device=device)
        torch.manual_seed(0)
        self.hf = HfHead(self.segmenter.encoder.channels).to(device)
        if device == "cuda":
            self.segmenter.encoder.to(memory_format=torch.channels_last)
        self.criterion = SetCriterion(config.losses, CLASSES)
        side, batch = setting.crop_px, setting.batch
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, side, side)
        self.images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        coarse = torch.randint(0, CLASSES, (batch, 4, 4), generator=generator, dtype=torch.uint8)
        self.labels = coarse.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.optimizers = {
            "ours": torch.optim.AdamW(self.segmenter.parameter_groups(1e-4, 0.05)),
            "theirs": torch.optim.AdamW(self.hf.parameters(), lr=1e-4, weight_decay=0.05),
        }

    def autocast(self, bf16: bool):
        """bfloat16 autocast, or nothing."""
        return torch.autocast(self.device, torch.bfloat16) if bf16 else nullcontext()

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The frozen trunk's maps."""
        padded, _ = self.segmenter.prepare(images)
        with torch.no_grad():
            return self.segmenter.encoder(padded)

    def ours_step(self, bf16: bool = False) -> None:
        """One training step of ours."""
        self.segmenter.train()
        with self.autocast(bf16):
            output = self.segmenter(self.images)
        seeds = range(len(self.images))
        self.criterion(output, self.labels, seeds=seeds)["total"].backward()
        self.update("ours", self.segmenter)

    def their_step(self, loss: Callable, clean: bool, bf16: bool = False) -> None:
        """One training step on transformers' modules; `clean`: the second trunk pass."""
        self.hf.train()
        with self.autocast(bf16):
            features = self.features(self.images)
            if clean:
                self.features(self.images[: max(1, round(GENERATED_SHARE * len(self.images)))])
            predictions = self.hf(features)
        predictions = [(c.float(), m.float()) for c, m in predictions]
        loss(predictions, self.labels).backward()
        self.update("theirs", self.hf)

    def update(self, side: str, module: nn.Module) -> None:
        """Clip and step."""
        nn.utils.clip_grad_norm_(module.parameters(), 0.01)
        self.optimizers[side].step()
        self.optimizers[side].zero_grad()

    def losses(self) -> Iterator[tuple[str, Callable, Callable]]:
        """Losses alone, with their backward pass, on fixed predictions."""
        self.segmenter.train()
        with torch.no_grad():
            output = self.segmenter(self.images)
        leaves = [Prediction(*(x.float().requires_grad_() for x in p)) for p in output.predictions]
        fields = vars(output) | {
            "class_logits_BQK1": leaves[0][0],
            "masks_BQHW": leaves[0][1],
            "aux": tuple(leaves[1:]),
        }
        given = type(output)(**fields)
        theirs = [*leaves[1:], leaves[0]]

        def ours() -> None:
            seeds = range(len(self.images))
            total = self.criterion(given, self.labels, seeds=seeds)["total"]
            clear(leaves, total)

        yield "losses_hf", ours, lambda: clear(leaves, self.hf.loss(theirs, self.labels))
        yield "losses_released", ours, lambda: clear(leaves, released_loss(theirs, self.labels))

    def steps(self) -> Iterator[tuple[str, Callable, Callable]]:
        """Whole training steps."""
        hf, released = self.hf.loss, released_loss
        yield "train_step_hf", self.ours_step, lambda: self.their_step(hf, False)
        yield "train_step_released", self.ours_step, lambda: self.their_step(released, True)
        if self.device == "cuda":
            ours = lambda: self.ours_step(True)  # noqa: E731
            # transformers in the same dtype, the released step in its own float32
            yield "train_step_hf_same_bf16", ours, lambda: self.their_step(hf, False, True)
            yield "train_step_released_bf16", ours, lambda: self.their_step(released, True)

    def inference(self) -> Iterator[tuple[str, Callable, Callable]]:
        """Label maps of a batch."""
        size = tuple(self.images.shape[-2:])

        def ours(bf16: bool = False) -> torch.Tensor:
            return predict(self.segmenter.eval(), self.images, bf16=bf16).argmax(1)

        def scores(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
            classes = logits.softmax(-1)[..., :-1]
            return torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid())

        @torch.inference_mode()
        def hf() -> torch.Tensor:
            # as its image processor does: summed at mask size, then resized picture by picture
            logits, masks = self.hf.eval()(self.features(self.images))[-1]
            maps = scores(logits, masks)
            resized = [F.interpolate(m[None], size=size, mode="bilinear") for m in maps]
            return torch.cat([m.argmax(1) for m in resized])

        @torch.inference_mode()
        def released() -> torch.Tensor:
            # one picture at a time, all masks at full size
            found = []
            for image in self.images:
                logits, masks = self.hf.eval()(self.features(image[None]))[-1]
                masks = F.interpolate(masks, size=size, mode="bilinear")
                found.append(scores(logits, masks).argmax(1))
            return torch.cat(found)

        yield "inference_hf", ours, hf
        yield "inference_released", ours, released
        if self.device == "cuda":
            yield "inference_released_bf16", lambda: ours(True), released

    def trunk(self) -> Iterator[tuple[str, Callable, Callable]]:
        """The frozen trunk, and matrix products of as many operations."""
        on_gpu, side = self.device == "cuda", self.setting.matmul_side
        dtype = torch.bfloat16 if on_gpu else torch.float32
        left, right = torch.randn(2, side, side, device=self.device, dtype=dtype)
        names = self.segmenter.class_names
        shapes = build_segmenter(self.segmenter.config, class_names=names, device="meta")
        pictures = torch.empty(self.images.shape, device="meta")
        operations = flops_of(lambda: shapes.encode(shapes.prepare(pictures)[0]))
        share = operations / (2 * side**3)

        def ours() -> None:
            with self.autocast(on_gpu):
                self.features(self.images)

        def products() -> None:
            for _ in range(int(share)):
                left @ right
            left[: round(share % 1 * side)] @ right

        yield "trunk_of_matmul", ours, products

    def cases(self) -> Iterator[tuple[str, Callable, Callable]]:
        """All cases: name, ours, theirs."""
        yield from self.trunk()
        yield from self.losses()
        yield from self.steps()
        yield from self.inference()


def clear(leaves: list, total: torch.Tensor) -> None:
    """Backward pass, then forget the gradients."""
    total.backward()
    for pair in leaves:
        for leaf in pair:
            leaf.grad = None


def seconds(function: Callable, device: str, clock: Callable[[], float]) -> float:
    """Time of one call, device work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def peak_gib(function: Callable, device: str) -> float | None:
    """Peak device memory of one call; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def measure(
    name: str,
    ours: Callable,
    theirs: Callable,
    device: str,
    setting: Setting,
    clock: Callable[[], float],
) -> dict:
    """Both sides alternately, after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(setting.runs + 1):
        for function, kept in zip((ours, theirs), times, strict=True):
            elapsed_s = seconds(function, device, clock)
            if number:
                kept.append(elapsed_s)
    mine, other = (statistics.median(kept) for kept in times)
    return {
        "name": name,
        "ours": round(mine, 4),
        "theirs": round(other, 4),
        "unit": "s",
        "ratio": round(other / mine, 3),
        "spread_ours": [round(min(times[0]), 4), round(max(times[0]), 4)],
        "spread_theirs": [round(min(times[1]), 4), round(max(times[1]), 4)],
        "pictures_per_s": round(setting.batch / mine, 2),
        "peak_gib": [peak_gib(f, device) for f in (ours, theirs)],
    }


def step_of_losses(rows: list[dict]) -> dict | None:
    """Our losses against our step, in bfloat16 where that was measured."""
    found = {row["name"]: row for row in rows}
    step = found.get("train_step_released_bf16") or found.get("train_step_released")
    losses = found.get("losses_released")
    if step is None or losses is None:
        return None
    mine, whole = losses["ours"], step["ours"]
    ratio = round(whole / mine, 3)
    return {"name": "step_of_losses", "ours": mine, "theirs": whole, "unit": "s", "ratio": ratio}


def show(row: dict) -> None:
    """A line of the table."""
    line = f"{row['name']:<26} ours {row['ours']:.3f} s  theirs {row['theirs']:.3f} s"
    line += f"  ratio {row['ratio']:.2f}"
    if "pictures_per_s" in row:
        line += (
            f"  spread {row['spread_ours']} {row['spread_theirs']}  "
            f"{row['pictures_per_s']} pictures/s  peak {row['peak_gib']} GiB"
        )
    print(line, flush=True)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=list(SETTINGS))
    parser.add_argument("--case", nargs="*", default=[], help="only names that begin so")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: its own choice")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time, for a machine that others use as well",
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    setting = SETTINGS[arguments.device]
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    bench = Bench(arguments.device, setting)
    rows = []
    for name, ours, theirs in bench.cases():
        if arguments.case and not name.startswith(tuple(arguments.case)):
            continue
        rows.append(measure(name, ours, theirs, arguments.device, setting, clock))
        if not arguments.json:
            show(rows[-1])
    if share := step_of_losses(rows):
        rows.append(share)
        if not arguments.json:
            show(share)
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
