"""Predict pictures, folders and videos with a trained segmenter: labels, overlays, class shares.

    clouds predict holiday/ --model latest --out predicted

Pictures of one size share a batch; what an interrupted run finished is not predicted again. A
picture that cannot be read is named and left out. See `stages/prediction_files.py` for the files.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from models.checkpoints import describe_checkpoint
from stages.contracts import Progress, Summary
from stages.labels import LabelSpace
from stages.predict_video import predict_video
from stages.prediction_files import (
    PredictionFiles,
    Source,
    digest_of_model,
    facts_of,
    find_sources,
    raw_table,
)
from stages.predictor import Prediction, Predictor, load, space_of
from stages.readers import image_size, read_image
from stages.shards import write_json
from stages.use_config import PredictConfig
from stages.video import VideoError, describe_video

WORKERS = 4
"""Threads that decode pictures ahead of the network and encode what it said."""
AHEAD_PX = 32_000_000
"""Pixels of decoded pictures that wait for the network."""

NAMED_MAX = 20
"""Failures that are told one by one; `summary.json` names them all, if anything was predicted."""

Size = tuple[int, int]


def run(
    config: PredictConfig,
    *,
    inputs: Sequence[Path],
    model: Path,
    out: Path,
    progress: Progress,
    labels: Path | str | None = None,
) -> Summary:
    """Predict everything that is named.

    Args:
        config: how, and what is written.
        inputs: pictures, folders, videos.
        model: folder of a checkpoint.
        out: folder of the predictions; what it holds whole is not made again.
        progress: told every picture and frame.
        labels: label space for the colours, see `stages.predictor.load`.

    Returns:
        A summary with the numbers `pictures`, `videos`, `done_before` and `failed`.

    Raises:
        FileNotFoundError: an input or the checkpoint is not there.
        NotADirectoryError: `out` is a file.
        ValueError: nothing to predict, unsuitable settings, or one picture exceeds the memory.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(
            f"{out} is a file: predictions need a folder of their own (--out)."
        )
    # 1. What there is, what of it is done, and whether the settings fit the model.
    sources = find_sources(inputs, out=out)
    description = describe_checkpoint(model)
    space = space_of(description["label_space"], description["class_names"], labels)
    if config.ids not in ("train", "palette"):
        raw_table(space, config.ids)
    files = PredictionFiles(out, config, made_by=digest_of_model(model, config))
    pending = [source for source in sources if files.whole_record(source) is None]
    failed: dict[str, str] = {}
    pictures = _by_size([s for s in pending if not s.is_video], failed)
    videos = [source for source in pending if source.is_video]
    frames = _frames_of(videos, failed)
    num_done = len(sources) - len(pending)
    total = num_done + sum(map(len, pictures.values())) + sum(frames.values())
    progress.start(total, "pictures and frames" if videos else "pictures", done=num_done)

    # 2. The network works only if there is work.
    if pictures or frames:
        predictor = load(model, labels=labels, config=config)
        progress.note(predictor.device.reason)
        if space.origin == "made-up colours":
            progress.note(
                f"label space {space.name!r} does not ship: made-up colours (see --labels)"
            )
        desk = _Desk(predictor, files, progress, failed)
        desk.predict_pictures(pictures)
        for source in frames:
            try:
                predict_video(source, predictor=predictor, files=files, progress=progress)
            except (VideoError, OSError) as error:
                failed[str(source.path)] = str(error)

    # 3. All of it in numbers.
    for path, why in islice(failed.items(), NAMED_MAX):
        progress.note(f"left out: {why}" if path in why else f"left out: {path}: {why}")
    return _sum_up(sources, files, failed, space, num_done=num_done)


def _by_size(sources: Sequence[Source], failed: dict[str, str]) -> dict[Size, list[Source]]:
    """Sources by (height, width), from the headers; those without a readable one fail."""
    groups: dict[Size, list[Source]] = {}
    for source in sources:
        try:
            groups.setdefault(image_size(source.path), []).append(source)
        except (ValueError, OSError) as error:
            failed[str(source.path)] = str(error)
    return groups


def _frames_of(videos: Sequence[Source], failed: dict[str, str]) -> dict[Source, int]:
    """Frames of each video that can be opened, as far as its header tells."""
    found = {}
    for source in videos:
        try:
            found[source] = describe_video(source.path).num_frames or 0
        except (VideoError, OSError) as error:
            failed[str(source.path)] = str(error)
    return found


class _Desk:
    """Takes batches of pictures to the network and what it says to the disk."""

    def __init__(
        self,
        predictor: Predictor,
        files: PredictionFiles,
        progress: Progress,
        failed: dict[str, str],
    ) -> None:
        self.predictor, self.files, self.progress = predictor, files, progress
        self.failed = failed
        self.config = predictor.config

    def predict_pictures(self, groups: dict[Size, list[Source]]) -> None:
        """All pictures, read ahead; unreadable ones fail."""
        large = sum(len(group) for size, group in groups.items() if self.predictor.is_large(size))
        if large:
            self.progress.note(
                f"{large} pictures have more than {self.config.whole_px / 1e6:g} megapixels: "
                f"predicted in windows of {self.config.window} (--short-side shrinks instead)"
            )
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="predict") as pool:
            written: deque[Future[None]] = deque()
            for batch in self._batches(groups, pool):
                predictions = self.predictor.predict_many([image for _, image in batch])
                for (source, _), prediction in zip(batch, predictions, strict=True):
                    written.append(pool.submit(self._write, source, prediction))
                while len(written) > 2 * self.config.batch or (written and written[0].done()):
                    written.popleft().result()
            for future in written:
                future.result()

    def _batches(
        self, groups: dict[Size, list[Source]], pool: ThreadPoolExecutor
    ) -> Iterator[list[tuple[Source, np.ndarray]]]:
        """Batches of pictures of one size, decoded ahead within `AHEAD_PX`."""
        plan = deque(
            (size[0] * size[1], group[start : start + count])
            for size, group in groups.items()
            for count in [self.predictor.batch_of(size)]
            for start in range(0, len(group), count)
        )
        waiting: deque[tuple[int, list[tuple[Source, Future[np.ndarray]]]]] = deque()
        while plan or waiting:
            while plan and (not waiting or sum(px for px, _ in waiting) < AHEAD_PX):
                each_px, batch = plan.popleft()
                reading = [(source, pool.submit(read_image, source.path)) for source in batch]
                waiting.append((each_px * len(batch), reading))
            reading = waiting.popleft()[1]
            read = [(source, self._got(source, future)) for source, future in reading]
            if batch := [(source, image) for source, image in read if image is not None]:
                yield batch

    def _got(self, source: Source, reading: Future[np.ndarray]) -> np.ndarray | None:
        try:
            return reading.result()
        except (ValueError, OSError) as error:
            self.failed[str(source.path)] = str(error)
            self.progress.advance()
            return None

    def _write(self, source: Source, prediction: Prediction) -> None:
        files = self.files.save_maps(source.name, prediction)
        files |= self.files.save_overlay(source.name, prediction)
        self.files.finish(source, files, facts_of(prediction))
        self.progress.advance()


def _sum_up(
    sources: Sequence[Source],
    files: PredictionFiles,
    failed: Mapping[str, str],
    space: LabelSpace,
    *,
    num_done: int,
) -> Summary:
    """Write `summary.json`: classes, shares over all pictures (each counts the same), failures.

    Where nothing was ever written, there is nothing to sum up either.
    """
    records = {source: files.whole_record(source) for source in sources}
    whole = {source: record for source, record in records.items() if record is not None}
    shares = {
        name: round(sum(record["shares"][name] for record in whole.values()) / len(whole), 6)
        for name in (space.names if whole else ())
    }
    classes = [{"id": c.id, "name": c.name, "colour": list(c.colour)} for c in space.classes]
    account = {
        "made_by": files.made_by,
        "settings": files.config.deciding(),
        "classes": classes,
        "shares": shares,
        "predicted": {source.name: str(source.path) for source in whole},
        "failed": dict(failed),
    }
    if files.out.is_dir():  # else nothing could be read: no folder for that
        write_json(files.out / "summary.json", account)
    num_videos = sum(source.is_video for source in whole)
    numbers = {"pictures": len(whole) - num_videos, "videos": num_videos}
    counted = [
        f"{count} {what.removesuffix('s') if count == 1 else what}"
        for what, count in numbers.items()
        if count
    ]
    most = sorted(shares, key=lambda name: -shares[name])[:3]
    text = (", ".join(counted) or "nothing") + (f" ({num_done} done before)" if num_done else "")
    if most:
        text += "; most of it " + ", ".join(f"{name} {100 * shares[name]:.0f} %" for name in most)
    if failed:
        text += f"; {len(failed)} left out"
    return Summary(text=text, numbers={**numbers, "done_before": num_done, "failed": len(failed)})
