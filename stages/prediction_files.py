"""What `clouds predict` finds and leaves: pictures and videos in, label maps and shares out.

    OUT/labels/NAME.png        train ids (or palette, or raw ids)
    OUT/overlays/NAME.jpg      the picture with the class colours over it
    OUT/confidence/NAME.png    0..255 = 0..1, if asked for
    OUT/shares/NAME.json       share of each class; written last: with it the picture is whole
    OUT/summary.json           classes with colours, shares of all pictures, what failed

Of a video NAME is a folder of frames (`000000.png`), and the overlay one MP4.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.checkpoints import names_in
from stages.labels import LabelSpace
from stages.layouts import IMAGE_ENDINGS
from stages.predictor import Prediction
from stages.shards import file_digest, write_json
from stages.use_config import PredictConfig
from stages.video import VIDEO_ENDINGS

JPEG_SIDE_MAX_PX = 65_500
"""JPEG cannot hold longer sides: such overlays are made smaller."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One picture or video to predict."""

    path: Path
    name: str
    """Of its outputs: the path below the folder that was given, without the ending."""

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_ENDINGS

    def stamp(self) -> dict[str, int]:
        """Size and time of the file: another stamp means another picture."""
        found = self.path.stat()
        return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def find_sources(inputs: Sequence[Path], *, out: Path) -> list[Source]:
    """Pictures and videos that are named, or lie below folders that are named; sorted, once each.

    Args:
        inputs: files (of any ending) and folders (searched for known endings; hidden files and
            `out` itself are left out).
        out: where predictions go.

    Raises:
        FileNotFoundError: an input is not there.
        ValueError: nothing is found, or two files would be written under one name.
    """
    found: dict[Path, str] = {}
    for given in inputs:
        if not given.exists():
            raise FileNotFoundError(f"{given}: there is no such picture, folder or video.")
        root = given if given.is_dir() else given.parent
        for path in _below(given, out) if given.is_dir() else [given]:
            found.setdefault(path.resolve(), path.relative_to(root).as_posix())
    if not found:
        endings = " ".join([*IMAGE_ENDINGS, *VIDEO_ENDINGS])
        where = ", ".join(str(given) for given in inputs)
        raise ValueError(f"{where}: nothing to predict; known endings are {endings}.")
    return _named(found)


def _below(folder: Path, out: Path) -> list[Path]:
    own = out.resolve()
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_ENDINGS + VIDEO_ENDINGS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and own not in path.resolve().parents
    ]


def _named(found: Mapping[Path, str]) -> list[Source]:
    """Sources named without their ending, or with it where two would be called the same."""
    stems = [relative.rpartition(".")[0] or relative for relative in found.values()]
    names: dict[str, Path] = {}
    for (path, relative), stem in zip(found.items(), stems, strict=True):
        name = stem if stems.count(stem) == 1 else relative
        if name in names:
            raise ValueError(
                f"{names[name]} and {path} would both be written as {name!r}: predict them into "
                "different folders (--out)."
            )
        names[name] = path
    return [Source(path=path, name=name) for name, path in names.items()]


def digest_of_model(folder: Path, config: PredictConfig) -> str:
    """What made a prediction: the checkpoint's bytes and the settings that can change a result.

    Raises:
        FileNotFoundError: the checkpoint has no such weights.
    """
    weights = folder / f"{config.weights}.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; the folder holds {names_in(folder)}.")
    settings = json.dumps(config.deciding(), sort_keys=True)
    parts = [file_digest(weights), file_digest(folder / "checkpoint.json"), settings]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


class PredictionFiles:
    """The folder of predictions.

    Args:
        out: the folder.
        config: what is written.
        made_by: `digest_of_model`; records of another are made again.
    """

    def __init__(self, out: Path, config: PredictConfig, *, made_by: str) -> None:
        self.out, self.config, self.made_by = out, config, made_by

    def record_path(self, source: Source) -> Path:
        return self.out / "shares" / f"{source.name}.json"

    def whole_record(self, source: Source) -> dict[str, Any] | None:
        """The record of a finished source; None where anything is missing or other than it was."""
        try:
            record = json.loads(self.record_path(source).read_text(encoding="utf-8"))
            sizes = {name: (self.out / name).stat().st_size for name in record["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        same = record.get("made_by") == self.made_by and record.get("source") == source.stamp()
        return record if same and sizes == record["files"] else None

    def save_maps(self, name: str, prediction: Prediction) -> dict[str, int]:
        """Write label and confidence PNGs under a name; returns file -> bytes."""
        files = {f"labels/{name}.png": self._label_image(prediction)}
        if self.config.confidence:
            files[f"confidence/{name}.png"] = Image.fromarray(prediction.confidence)
        return {file: self._save(file, image, format="PNG") for file, image in files.items()}

    def save_overlay(self, name: str, prediction: Prediction) -> dict[str, int]:
        """Write the overlay, where one is asked for; returns file -> bytes."""
        if not self.config.overlay:
            return {}
        overlay = prediction.overlay
        if max(overlay.size) > JPEG_SIDE_MAX_PX:
            overlay.thumbnail((JPEG_SIDE_MAX_PX, JPEG_SIDE_MAX_PX))
        file = f"overlays/{name}.jpg"
        return {file: self._save(file, overlay, format="JPEG", quality=90)}

    def _label_image(self, prediction: Prediction) -> Image.Image:
        if self.config.ids == "palette":
            return prediction.label_image
        if self.config.ids == "train":
            return Image.fromarray(prediction.labels)
        return Image.fromarray(raw_table(prediction.space, self.config.ids)[prediction.labels])

    def labels_of(self, name: str, space: LabelSpace) -> np.ndarray | None:
        """The train ids that an earlier attempt wrote under a name; None where they are damaged."""
        try:
            with Image.open(self.out / "labels" / f"{name}.png") as image:
                values = np.asarray(image)
        except (OSError, ValueError, SyntaxError):
            return None
        if self.config.ids in ("train", "palette"):
            return values
        return space.id_map(self.config.ids, wanted_by="--ids").apply(values)

    def _save(self, file: str, image: Image.Image, **options: Any) -> int:
        """Write a picture whole or not at all; its bytes."""
        path = self.out / file
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        image.save(temporary, **options)
        temporary.replace(path)
        return path.stat().st_size

    def finish(self, source: Source, files: Mapping[str, int], facts: Mapping[str, Any]) -> None:
        """Write the record that makes a source whole."""
        path = self.record_path(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {"made_by": self.made_by, "source": source.stamp(), "files": dict(files)}
        write_json(path, {"file": str(source.path), **facts, **made})


def facts_of(prediction: Prediction) -> dict[str, Any]:
    """Size, class shares and mean confidence of a prediction, for its record."""
    height, width = prediction.labels.shape
    return {
        "height": height,
        "width": width,
        "mean_confidence": round(float(prediction.confidence.mean()) / 255, 6),
        "shares": prediction.shares,
    }


def raw_table(space: LabelSpace, name: str) -> np.ndarray:
    """Raw value of every train id by a map of the label space (the first that it lists).

    Raises:
        ValueError: no such map, or a class has no raw value in it.
    """
    if name not in space.maps:
        known = ", ".join(["train", "palette", *sorted(space.maps)])
        raise ValueError(
            f"--ids {name}: label space {space.name!r} has no label map {name!r}; known: {known}. "
            "Name one of these, or a label space that has the map by --labels NAME|FILE.yaml."
        )
    ids = space.maps[name].ids
    raw: dict[int, int] = {}
    for value, train in ids.items():
        raw.setdefault(train, value)
    without = [entry.name for entry in space.classes if entry.id not in raw]
    if without:
        raise ValueError(f"--ids {name}: that map has no raw value for {', '.join(without)}.")
    values = [raw[entry.id] for entry in space.classes]
    return np.array(values, np.uint8 if max(values) < 256 else np.uint16)
