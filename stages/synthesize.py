"""Paint street scenes with a diffusion model, one picture per (prompt, number), or collect some.

    clouds --stage synthesize --set synthesize.num_images=48

Batches are composed by config alone and every picture has a seed of its own, so that pictures are
the same for any interruption. Each picture file carries its prompt, seed, model and steps.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from models.hub import model_label
from models.painter import Painted, Painter, load_painter
from stages.config import StageConfig, SynthesizeConfig
from stages.contracts import Progress, Summary
from stages.devices import choose_device
from stages.prompt_files import read_prompts
from stages.readers import Sample, load_index
from stages.shards import Row, ShardJob, Work, item_seed, read_index, write_shards

JPEG_QUALITY = 95
SAVE_THREADS = 4
_COPIED = {".png": ".png", ".jpg": ".jpg", ".jpeg": ".jpg"}
"""Suffixes of pictures that are collected byte by byte -> the suffix they get."""


@dataclass(frozen=True, kw_only=True)
class Commission:
    """One picture to be painted."""

    id: str
    prompt_id: str
    prompt: str
    seed: int
    spare: bool = False
    """Whether it is painted beyond those asked for, for `select` to fall back on."""


def run(
    config: StageConfig,
    *,
    out: Path,
    progress: Progress,
    prompts: Path | None = None,
    unlabelled: Path | None = None,
) -> Summary:
    """Write picture shards.

    Args:
        config: reads `synthesize`.
        out: the stage's folder.
        progress: told each picture.
        prompts: artifact of `write_prompts`, for mode "paint".
        unlabelled: part of `prepare`, for mode "collect".

    Raises:
        FileNotFoundError: the model, or the pictures to collect, are not to be had.
        ValueError: the prompts' file has broken lines, or an option is unknown.
    """
    job = shards(config, progress=progress, prompts=prompts, unlabelled=unlabelled)
    num_shards = write_shards(out, job, progress=progress)
    verb = "collected" if config.synthesize.mode == "collect" else "painted"
    noise = any(row["untrained"] for row in islice(read_index(out), 1))
    remark = ", by an untrained model: noise" if noise else ""
    numbers = {"pictures": len(job.items), "shards": num_shards}
    if config.synthesize.safety_checker:
        numbers["flagged"] = sum(row.get("flagged", False) for row in read_index(out))
        remark += f", {numbers['flagged']} flagged by the safety checker"
    return Summary(
        text=f"{len(job.items)} pictures {verb} in {num_shards} shards{remark}", numbers=numbers
    )


def shards(
    config: StageConfig,
    *,
    progress: Progress,
    prompts: Path | None = None,
    unlabelled: Path | None = None,
) -> ShardJob:
    """The work shard by shard; arguments and errors as of `run`."""
    if config.synthesize.mode == "collect":
        return _collecting(config.synthesize, progress=progress, unlabelled=unlabelled)
    return _painting(config, prompts=prompts)


def _painting(config: StageConfig, *, prompts: Path | None) -> ShardJob:
    section = config.synthesize
    if prompts is None:
        raise ValueError("synthesize.mode=paint needs prompts: run `clouds --stage write_prompts`.")
    commissions = commission(
        read_prompts(prompts / "prompts.jsonl"),
        num_images=section.num_images,
        num_spares=section.num_spares,
        seed=config.seed,
        round_=config.round or 0,
    )

    def at_easel(progress: Progress) -> Work:
        device = choose_device(config)
        painter = load_painter(
            section.model,
            revision=section.revision,
            scheduler=section.scheduler,
            safety_checker=section.safety_checker,
            device=device.device,
            dtype=device.dtype,
            seed=config.seed,
        )
        if section.vae_tiling:
            painter.decode_in_tiles()
        if section.negative_prompt and not painter.minds_negative_prompt(section.guidance):
            progress.note(
                f"synthesize.negative_prompt has no effect: {section.model} at guidance "
                f"{section.guidance:g} asks only for what is wanted"
            )
        texts = sorted({each.prompt for each in commissions})
        if cut := painter.longer_than_read(texts):
            progress.note(
                f"{len(cut)} of {len(texts)} prompts are longer than {section.model} reads; "
                f"their last words do not count, as in: {cut[0]}"
            )
        return Easel(painter=painter, section=section, progress=progress).paint_shard

    return ShardJob(
        items=commissions, shard_size=section.shard_size, unit="pictures", open=at_easel
    )


def commission(
    prompts: Sequence[Row], *, num_images: int, num_spares: int = 0, seed: int, round_: int
) -> list[Commission]:
    """Spread pictures evenly over the prompts: each once, then each a second time, and so on.

    Spare ones come last, so that more or fewer of them change no other picture.
    """
    pictures = []
    for number in range(num_images + num_spares):
        repeat, place = divmod(number, len(prompts))
        row = prompts[place]
        pictures.append(
            Commission(
                id=f"{row['id']}-{repeat:03d}",
                prompt_id=row["id"],
                prompt=row["text"],
                seed=item_seed(seed, "synthesize", round_, row["id"], repeat),
                spare=number >= num_images,
            )
        )
    return pictures


@dataclass(frozen=True, kw_only=True)
class Easel:
    """Paints the pictures of one shard after the other."""

    painter: Painter
    section: SynthesizeConfig
    progress: Progress

    def paint_shard(self, commissions: Sequence[Commission], folder: Path) -> list[Row]:
        """Paint batch by batch, while other threads compress and write the pictures before."""
        rows, saved = [], []
        size = self.section.batch_size
        with ThreadPoolExecutor(max_workers=SAVE_THREADS) as pool:
            for start in range(0, len(commissions), size):
                batch = commissions[start : start + size]
                for ordered, painted, painted_with in self._paint(batch):
                    row = self._row(ordered)
                    if painted.flagged:
                        row["flagged"] = True
                    if painted_with < len(batch):
                        row["batch_size"] = painted_with
                    if self.painter.in_tiles:
                        row["tiled"] = True
                    path = folder / row["file"]
                    saved.append(pool.submit(save_picture, path, painted.image_HW3, row))
                    rows.append(row)
                self.progress.advance(len(batch))
            for future in saved:
                future.result()
        return rows

    def _paint(self, batch: Sequence[Commission]) -> Iterator[tuple[Commission, Painted, int]]:
        """Paint a batch; where memory does not suffice, with less at a time."""
        section = self.section
        try:
            pictures = self.painter.paint_checked(
                [ordered.prompt for ordered in batch],
                seeds=[ordered.seed for ordered in batch],
                height=section.height,
                width=section.width,
                steps=section.steps,
                guidance=section.guidance,
                negative_prompt=section.negative_prompt,
            )
        except torch.OutOfMemoryError as error:
            relief = self._relieve(batch)
            if relief is None:
                raise MemoryError(
                    f"a single picture of {section.height}x{section.width} does not fit into the "
                    "device's memory: choose a smaller size or model, or precision=bf16."
                ) from error
            pictures = None
        if pictures is None:  # outside of `except`: the error would keep the memory
            torch.cuda.empty_cache()
            for part in relief:
                yield from self._paint(part)
            return
        yield from (
            (ordered, picture, len(batch)) for ordered, picture in zip(batch, pictures, strict=True)
        )

    def _relieve(self, batch: Sequence[Commission]) -> list[Sequence[Commission]] | None:
        """The batches to paint instead of one that did not fit; None: there is no way left.

        What changes the pictures least comes first: decoding one by one, halves, tiles.
        """
        count = len(batch)
        if count > 1 and self.painter.decode_singly():
            self.progress.note(f"out of memory with {count} pictures at once: decoded one by one")
            return [batch]
        if count > 1:
            half = (count + 1) // 2
            self.progress.note(f"out of memory with {count} pictures at once: {half} instead")
            return [batch[:half], batch[half:]]
        if self.painter.decode_in_tiles():
            self.progress.note("out of memory with a single picture: decoded in tiles")
            return [batch]
        return None

    def _row(self, ordered: Commission) -> Row:
        told = {"spare": True} if ordered.spare else {}
        if self.section.safety_checker:
            told["safety_checker"] = True
        return told | {
            "id": ordered.id,
            "file": f"{ordered.id}.{self.section.format}",
            "prompt_id": ordered.prompt_id,
            "prompt": ordered.prompt,
            "seed": ordered.seed,
            "model": model_label(self.section.model),
            "steps": self.section.steps,
            "guidance": self.section.guidance,
            "negative_prompt": self.section.negative_prompt,
            "scheduler": self.painter.scheduler,
            "untrained": self.painter.untrained,
        }


def save_picture(path: Path, picture: np.ndarray, row: Row) -> None:
    """Save a picture (uint8 RGB [H, W, 3]) with how it was made inside the file.

    PNG: text chunks "prompt", "seed", "model", ...; JPEG: the same as JSON in the comment.
    """
    told = {name: value for name, value in row.items() if name not in ("id", "file")}
    image = Image.fromarray(picture)
    if path.suffix == ".png":
        info = PngInfo()
        for name, value in told.items():
            info.add_itxt(name, str(value))
        image.save(path, pnginfo=info)
    else:
        comment = json.dumps(told, sort_keys=True).encode()
        image.save(path, quality=JPEG_QUALITY, comment=comment)


def _collecting(
    section: SynthesizeConfig, *, progress: Progress, unlabelled: Path | None
) -> ShardJob:
    if unlabelled is None:
        raise ValueError(
            "synthesize.mode=collect needs pictures: name data sets under data.unlabelled."
        )
    samples = load_index(unlabelled)
    if not samples:
        raise FileNotFoundError(
            "synthesize.mode=collect found no picture: name data sets under data.unlabelled."
        )
    chosen = evenly_spaced(samples, section.num_images)
    if len(chosen) < section.num_images:
        progress.note(
            f"synthesize.num_images is {section.num_images}; data.unlabelled has {len(chosen)}"
        )
    _check_names(chosen)

    def at_album(progress: Progress) -> Work:
        def collect_shard(part: Sequence[Sample], folder: Path) -> list[Row]:
            rows = []
            for sample in part:
                rows.append(_copy(sample, folder))
                progress.advance()
            return rows

        return collect_shard

    return ShardJob(items=chosen, shard_size=section.shard_size, unit="pictures", open=at_album)


def evenly_spaced(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, at even distances over all of them."""
    count = min(count, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def _check_names(samples: Sequence[Sample]) -> None:
    owners: dict[str, str] = {}
    for sample in samples:
        name = _file_stem(sample.id)
        if name in owners:
            raise ValueError(
                f"pictures {owners[name]!r} and {sample.id!r} would get the same file name "
                f"{name!r}: rename one of them."
            )
        owners[name] = sample.id


def _file_stem(sample_id: str) -> str:
    return sample_id.replace("/", "+")


def _copy(sample: Sample, folder: Path) -> Row:
    suffix = _COPIED.get(sample.image.suffix.lower())
    name = f"{_file_stem(sample.id)}{suffix or '.png'}"
    if suffix:
        shutil.copyfile(sample.image, folder / name)
    else:
        Image.fromarray(sample.read_image()).save(folder / name)
    truth = {}
    if sample.label is not None:
        truth = {"truth_file": f"{_file_stem(sample.id)}.truth.png"}
        Image.fromarray(sample.read_label()).save(folder / truth["truth_file"])
    return truth | {
        "id": sample.id,
        "file": name,
        "prompt_id": None,
        "prompt": None,
        "seed": None,
        "model": None,
        "steps": None,
        "collected": True,
        "untrained": False,
    }
