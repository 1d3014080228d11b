"""One video, frame by frame: label PNGs, class shares per frame, and an overlay video.

Shares are noted in a journal beside the record as frames are written, so that an interrupted video
goes on: its first frames are then read and shown again, but not predicted again.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stages.contracts import Progress
from stages.prediction_files import PredictionFiles, Source, facts_of
from stages.predictor import Prediction, Predictor
from stages.shards import Row
from stages.video import FrameWriter, VideoError, describe_video, read_frames


def predict_video(
    source: Source, *, predictor: Predictor, files: PredictionFiles, progress: Progress
) -> None:
    """Predict every frame of a video.

    Raises:
        VideoError: it cannot be read to its end; frames that were predicted stay for the next try.
    """
    rate = describe_video(source.path).rate
    frames = read_frames(source.path)
    first = next(frames)
    overlay = f"overlays/{source.name}.mp4"
    with _Journal(files, source) as journal, contextlib.ExitStack() as opened:
        video = None
        if files.config.overlay:
            path = files.out / overlay
            path.parent.mkdir(parents=True, exist_ok=True)
            video = opened.enter_context(FrameWriter(path, rate=rate, size=first.shape[:2]))
        count = predictor.batch_of(first.shape[:2])
        for batch in _batches(itertools.chain([first], frames), count, source.path):
            for prediction in _predicted(batch, predictor, journal, files):
                if video is not None:
                    video.write(np.asarray(prediction.overlay))
                progress.advance()
    rows = [journal.rows[number] for number in sorted(journal.rows)]
    written = {name: size for row in rows for name, size in row["files"].items()}
    if files.config.overlay:
        written[overlay] = (files.out / overlay).stat().st_size
    files.finish(source, written, _facts_of_video(rows, rate=float(rate)))
    journal.remove()


Frame = tuple[int, np.ndarray]


def _batches(frames: Iterator[np.ndarray], count: int, path: Path) -> Iterator[list[Frame]]:
    numbered = enumerate(frames)
    size = None
    while batch := list(itertools.islice(numbered, count)):
        for number, frame in batch:
            size = size or frame.shape
            if frame.shape != size:
                raise VideoError(f"{path}: frame {number} is {frame.shape}, the first was {size}.")
        yield batch


def _predicted(
    batch: list[Frame], predictor: Predictor, journal: "_Journal", files: PredictionFiles
) -> list[Prediction]:
    """Predictions of a batch of frames: those of an earlier attempt are read, the others made."""
    found: dict[int, Prediction] = {}
    for number, frame in batch:
        labels = journal.labels_of(number, predictor)
        if labels is not None and labels.shape == frame.shape[:2]:
            found[number] = Prediction(
                picture=frame,
                labels=labels,
                confidence=np.zeros_like(labels),  # in its file, where it is wanted
                space=predictor.space,
                opacity=predictor.config.opacity,
            )
    fresh = [(number, frame) for number, frame in batch if number not in found]
    if fresh:
        made = predictor.predict_many([frame for _, frame in fresh])
        for (number, _), prediction in zip(fresh, made, strict=True):
            saved = files.save_maps(journal.name_of(number), prediction)
            journal.add(number, saved, prediction)
            found[number] = prediction
    return [found[number] for number, _ in batch]


def _facts_of_video(rows: list[Row], *, rate: float) -> dict[str, Any]:
    names = rows[0]["shares"].keys()
    frames = [
        {"time_s": round(number / rate, 3)}
        | {key: row[key] for key in ("shares", "mean_confidence")}
        for number, row in enumerate(rows)
    ]
    return {
        "height": rows[0]["height"],
        "width": rows[0]["width"],
        "num_frames": len(rows),
        "frames_per_s": rate,
        "shares": {
            name: round(sum(row["shares"][name] for row in rows) / len(rows), 6) for name in names
        },
        "frames": frames,
    }


class _Journal:
    """What is known of the frames so far, one JSON a line; the first line says of which video."""

    def __init__(self, files: PredictionFiles, source: Source) -> None:
        self.files, self.source = files, source
        record = files.record_path(source)
        self.path = record.with_name(record.name.removesuffix(".json") + ".frames.jsonl")
        self.rows: dict[int, Row] = {}

    def __enter__(self) -> "_Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = {"made_by": self.files.made_by, "source": self.source.stamp()}
        known = self._read()
        if known and known[0] == head:
            self.rows = {row["frame"]: row for row in known[1:]}
        self._file = self.path.open("w", encoding="utf-8")
        for row in [head, *self.rows.values()]:
            self._tell(row)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> list[Row]:
        """The lines that an earlier attempt wrote whole."""
        rows = []
        with contextlib.suppress(OSError, ValueError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                rows.append(json.loads(line))
        return rows

    def _tell(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def name_of(self, number: int) -> str:
        return f"{self.source.name}/{number:06d}"

    def labels_of(self, number: int, predictor: Predictor) -> np.ndarray | None:
        """Train ids of a frame that was predicted before and whose files are whole."""
        row = self.rows.get(number)
        if row is None:
            return None
        for name, size in row["files"].items():
            path = self.files.out / name
            if not path.is_file() or path.stat().st_size != size:
                return None
        return self.files.labels_of(self.name_of(number), predictor.space)

    def add(self, number: int, files: dict[str, int], prediction: Prediction) -> None:
        """Note a frame whose files are written."""
        row = {"frame": number, "files": files, **facts_of(prediction)}
        self.rows[number] = row
        self._tell(row)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
