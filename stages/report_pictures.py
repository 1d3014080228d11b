"""The pictures of a report: painted streets with their labels before and after refinement, and
predictions on the targets beside the truth, each small enough to travel inside one HTML file.

Photographs become WebP, label maps palette PNGs (255 is transparent), all as `data:` URIs.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.labels import IGNORE, LabelClass, LabelSpace, read_labelspace
from stages.report_lineage import Instance, ancestors
from stages.report_scores import Judged
from stages.report_words import plain, words
from stages.shards import Row, read_index, read_jsonl, stays_inside

_UNTOLD = frozenset(
    {"folder", "file", "label", "confidence", "truth_file", "truth", "prompt", "text", "untrained"}
)
"""Fields of index rows that a provenance leaves out: files, counts, and what stands above it."""

_WRONG, _UNJUDGED = 1, 2
_ERROR_PALETTE = ((255, 255, 255), (230, 20, 70), (40, 44, 52))
_ERROR_ALPHA = (0, 215, 190)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of a provenance: what, and what it was."""

    name: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One step on the way to a picture's label."""

    title: str
    instance: Instance
    facts: tuple[Fact, ...]


@dataclass(frozen=True, kw_only=True)
class Painted:
    """One painted (or collected) picture, its labels and where everything came from."""

    id: str
    prompt: str | None
    untrained: bool
    """Painted by a network of seeded random weights: noise."""
    picture: str
    """`data:` URI, as are the next four."""
    raw: str | None
    refined: str | None
    confidence: str | None
    """The teacher's confidence in its labels, white where it is sure."""
    truth: str | None
    """The true labels, of collected pictures that have some."""
    width: int
    height: int
    class_ids: tuple[int, ...]
    """Classes in its labels, most pixels first."""
    changed_share: float | None
    """Share of pixels whose label refinement changed, 0..1."""
    kept: bool | None
    """What `select` decided; None: nothing decided."""
    alt: str
    origins: tuple[Origin, ...]


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """What one model said about one picture of a target."""

    instance: str
    label: str
    prediction: str
    errors: str | None
    wrong_share: float | None
    """Share of the labelled pixels that are wrong, 0..1."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """One picture of a target with what the models said about it."""

    id: str
    dataset: str
    width: int
    height: int
    picture: str | None
    truth: str | None
    views: tuple[ModelView, ...]
    class_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The instances of the round whose pictures are shown."""

    pictures: Instance | None
    prompts: Instance | None
    labels: Instance | None
    selection: Instance | None
    refined: Instance | None


def label_space(instances: Mapping[str, Instance], models: Sequence[Judged]) -> LabelSpace:
    """The label space of the run; without `prepare`, names from the scores and colours by rule."""
    for one in instances.values():
        if one.stage == "prepare" and (one.folder / "labelspace" / "labelspace.json").is_file():
            return read_labelspace(one.folder / "labelspace")
    names = next((one.classes for one in models if one.classes), ())
    classes = tuple(
        LabelClass(id=number, name=name, colour=_rule_colour(number))
        for number, name in enumerate(names)
    )
    return LabelSpace(name="unknown", classes=classes, maps={})


def _rule_colour(number: int) -> tuple[int, int, int]:
    return tuple(40 + (number * step) % 200 for step in (67, 113, 151))


def chain_for(instances: Mapping[str, Instance], headline: str | None) -> Chain:
    """The last round's pictures and labels, on the line that leads to the headline model."""
    line = ancestors(headline, instances) if headline else set()

    def last(stage: str) -> Instance | None:
        some = [one for one in instances.values() if one.stage == stage]
        return max(
            some, key=lambda one: (one.round or 0, one.name in line, one.leg or ""), default=None
        )

    refined = last("refine")
    labels = last("pseudo_label")
    source = refined or labels
    pictures = instances.get((source.made_from("pictures") if source else None) or "")
    if refined and refined.made_from("labels") in instances:
        labels = instances[refined.made_from("labels")]
    pictures = pictures or last("synthesize")
    prompts = instances.get((pictures.made_from("prompts") if pictures else None) or "")
    return Chain(
        pictures=pictures,
        prompts=prompts or last("write_prompts"),
        labels=labels,
        selection=last("select"),
        refined=refined,
    )


def painted_pictures(
    chain: Chain,
    instances: Mapping[str, Instance],
    space: LabelSpace,
    *,
    count: int,
    side_px: int,
) -> list[Painted]:
    """`count` pictures, evenly spaced over all of them.

    Args:
        chain: whose pictures and labels.
        instances: all, for provenance.
        space: names and colours.
        count: at most so many.
        side_px: longest side in the page.
    """
    if not chain.pictures:
        return []
    rows = [row for row in read_index(chain.pictures.folder) if _path(row, "file")]
    shown = evenly(rows, count)
    wanted = {str(row.get("id")) for row in shown}
    prompts = _by_id(_rows(chain.prompts, "prompts.jsonl"))
    labels = _by_id(_index(chain.labels), wanted)
    selection = _by_id(_rows(chain.selection, "selection.jsonl"), wanted)
    refined = _by_id(_index(chain.refined), wanted)
    painted = []
    for row in shown:
        name = str(row.get("id"))
        rows_of_it = {
            "picture": row,
            "prompt": prompts.get(str(row.get("prompt_id"))),
            "label": labels.get(name),
            "selection": selection.get(name),
            "refined": refined.get(name),
        }
        painted.append(_painted(rows_of_it, chain, instances, space, side_px))
    return painted


def _painted(
    rows: Mapping[str, Row | None],
    chain: Chain,
    instances: Mapping[str, Instance],
    space: LabelSpace,
    side_px: int,
) -> Painted:
    row = rows["picture"] or {}
    picture = open_picture(_path(row, "file"))
    width, height = fitted(picture.size, side_px)
    raw = _label(rows["label"], (width, height))
    truth = _label(row, (width, height), field="truth_file")
    refined = _label(rows["refined"], (width, height))
    known = refined if refined is not None else raw
    class_ids = classes_in([known] if known is not None else [])
    selection = rows["selection"] or {}
    prompt = row.get("prompt") or (rows["prompt"] or {}).get("text")
    untrained = bool(row.get("untrained"))
    both = raw is not None and refined is not None
    return Painted(
        id=str(row.get("id")),
        prompt=str(prompt) if prompt else None,
        untrained=untrained,
        picture=photo_uri(picture, (width, height)),
        raw=label_uri(raw, space) if raw is not None else None,
        refined=label_uri(refined, space) if refined is not None else None,
        confidence=_confidence(rows["label"], (width, height)),
        truth=label_uri(truth, space) if truth is not None else None,
        width=width,
        height=height,
        class_ids=class_ids,
        changed_share=float((raw != refined).mean()) if both else None,
        kept=bool(selection["kept"]) if "kept" in selection else None,
        alt=_alt(prompt, untrained, class_ids, space),
        origins=_origins(rows, chain, instances, space),
    )


def _alt(prompt: Any, untrained: bool, class_ids: Sequence[int], space: LabelSpace) -> str:
    what = "Noise from an untrained painter" if untrained else "Picture"
    told = f"{what} for the prompt: {prompt}" if prompt else what
    names = ", ".join(class_name(space, one) for one in class_ids[:5])
    return f"{told.rstrip('.')}. Labels: {names or 'none'}."


def _origins(
    rows: Mapping[str, Row | None],
    chain: Chain,
    instances: Mapping[str, Instance],
    space: LabelSpace,
) -> tuple[Origin, ...]:
    row = rows["picture"] or {}
    steps = [
        ("Prompt", chain.prompts if row.get("prompt_id") is not None else None, rows["prompt"]),
        ("Picture", chain.pictures, row),
        ("Teacher", _teacher(chain, instances), {}),
        ("Label", chain.labels, rows["label"]),
        ("Selection", chain.selection, rows["selection"]),
        ("Refinement", chain.refined, rows["refined"]),
    ]
    weights = {"Refinement": ("refine", "model", "weights"), "Picture": ("synthesize", "guidance")}
    origins = []
    for title, instance, found in steps:
        if not instance or (found is None and title != "Teacher"):
            continue
        facts = [
            Fact(name=words(name), value=_plain(name, value, space))
            for name, value in sorted((found or {}).items())
            if name not in _UNTOLD and value not in (None, "") and value != row.get("id")
        ]
        section, *fields = weights.get(title, ("",))
        facts += [
            Fact(name=words(name), value=plain(instance.section(section)[name]))
            for name in fields
            if name in instance.section(section) and name not in (found or {})
        ]
        origins.append(Origin(title=title, instance=instance, facts=tuple(facts)))
    return tuple(origins)


def _teacher(chain: Chain, instances: Mapping[str, Instance]) -> Instance | None:
    return instances.get((chain.labels.made_from("teacher") if chain.labels else None) or "")


def _plain(name: str, value: Any, space: LabelSpace) -> str:
    """A value of an index row; what is told per train id gets the classes' names."""
    if name in ("classes", "class_confidence") and isinstance(value, Mapping):
        known = {int(key): _weight(one) for key, one in value.items() if str(key).isdigit()}
        largest = sorted(known.items(), key=lambda pair: -pair[1])
        scale = 100 / (sum(known.values()) or 1) if name == "classes" else 100
        shown = [f"{class_name(space, one)} {scale * part:.0f} %" for one, part in largest[:5]]
        return ", ".join(shown) + (f" and {len(largest) - 5} more" if len(largest) > 5 else "")
    if name == "counts" and isinstance(value, Mapping):
        return plain({key: one for key, one in value.items() if key != "classes"})
    return plain(value)


def _weight(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def predictions(
    models: Sequence[Judged],
    instances: Mapping[str, Instance],
    space: LabelSpace,
    *,
    per_target: int,
    side_px: int,
) -> list[Predicted]:
    """What the models said about the first pictures of every target.

    Args:
        models: in the order of the page.
        instances: for their folders.
        space: names and colours.
        per_target: pictures per data set.
        side_px: longest side in the page.

    Raises:
        ValueError: a truth and a prediction have different sizes.
    """
    found: dict[tuple[str, str], dict[str, tuple[Judged, Path, Row]]] = {}
    for model in models:
        folder = instances[model.instance].folder
        index = folder / "predictions" / "index.jsonl"
        for row in read_jsonl(index) if index.is_file() else []:
            place = (str(row.get("dataset")), str(row.get("id")))
            found.setdefault(place, {})[model.instance] = (model, folder, row)
    shown = []
    for dataset in sorted({dataset for dataset, _ in found}):
        of_it = sorted(place for place in found if place[0] == dataset)
        for place in evenly(of_it, per_target):
            one = _predicted(place, list(found[place].values()), space, side_px)
            shown += [one] if one else []
    return shown


def _predicted(
    place: tuple[str, str],
    said: Sequence[tuple[Judged, Path, Row]],
    space: LabelSpace,
    side_px: int,
) -> Predicted | None:
    image = next((path for _, f, r in said if (path := _inside(f, r, "image_file"))), None)
    truth_file = next((path for _, f, r in said if (path := _inside(f, r, "truth_file"))), None)
    truth = open_label(truth_file) if truth_file else None
    views, size, maps = [], None, [] if truth is None else [truth]
    for model, folder, row in said:
        file = _inside(folder, row, "file")
        if not file:
            continue
        label = open_label(file)
        if truth is not None and truth.shape != label.shape:
            raise ValueError(
                f"{file} is {label.shape[1]}x{label.shape[0]} and its truth {truth_file} "
                f"{truth.shape[1]}x{truth.shape[0]}; run evaluate again with --force."
            )
        size = size or fitted((label.shape[1], label.shape[0]), side_px)
        judged = None if truth is None else truth != IGNORE
        wrong = None if judged is None else (label != truth) & judged
        some = judged is not None and bool(judged.any())
        views.append(
            ModelView(
                instance=model.instance,
                label=model.label,
                prediction=label_uri(resized(label, size), space),
                errors=None if wrong is None else error_uri(wrong, judged, size),
                wrong_share=float(wrong.sum() / judged.sum()) if some else None,
            )
        )
        maps.append(label)
    if not views or size is None:
        return None
    return Predicted(
        id=place[1],
        dataset=place[0],
        width=size[0],
        height=size[1],
        picture=photo_uri(open_picture(image), size) if image else None,
        truth=None if truth is None else label_uri(resized(truth, size), space),
        views=tuple(views),
        class_ids=classes_in([truth] if truth is not None else maps),
    )


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spaced, in order; all where there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


def class_name(space: LabelSpace, class_id: int) -> str:
    """The class's name; its id where the label space does not know it."""
    return space.names[class_id] if class_id < space.num_classes else f"class {class_id}"


def classes_in(maps: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Train ids in the label maps, most pixels first, without 255."""
    counts = sum((np.bincount(one.ravel(), minlength=256) for one in maps), np.zeros(256, int))
    order = np.argsort(-counts, kind="stable")
    return tuple(int(one) for one in order if counts[one] and one != IGNORE)


def open_picture(path: Path) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        ValueError: it cannot be read; names the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path}: not a readable picture ({error}).") from error


def open_label(path: Path) -> np.ndarray:
    """Read a label map as uint8 train ids [H, W].

    Raises:
        ValueError: it cannot be read or is no single-channel 8-bit image; names the file.
    """
    try:
        with Image.open(path) as image:
            label = np.asarray(image)
    except OSError as error:
        raise ValueError(f"{path}: not a readable label map ({error}).") from error
    if label.ndim != 2 or label.dtype != np.uint8:
        raise ValueError(
            f"{path}: expected 8-bit train ids [H, W], got {label.dtype} {list(label.shape)}."
        )
    return label


def fitted(size: tuple[int, int], side_px: int) -> tuple[int, int]:
    """Width and height with the longest side at most `side_px`."""
    scale = min(1.0, side_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resized(label_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map at (width, height), nearest neighbour."""
    return np.asarray(Image.fromarray(label_HW).resize(size, Image.Resampling.NEAREST))


def photo_uri(picture: Image.Image, size: tuple[int, int]) -> str:
    """A photograph at (width, height) as a WebP `data:` URI."""
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return _uri(picture, "webp", quality=82, method=4)


def _confidence(row: Row | None, size: tuple[int, int]) -> str | None:
    path = _path(row, "confidence") if row else None
    if not path:
        return None
    return _uri(Image.fromarray(resized(open_label(path), size)), "webp", quality=60, method=4)


def label_uri(label_HW: np.ndarray, space: LabelSpace) -> str:
    """A label map in its classes' colours as a PNG `data:` URI; 255 is transparent."""
    image = Image.fromarray(label_HW, mode="P")
    image.putpalette(_colours(space).tobytes())
    return _uri(image, "png", optimize=True, transparency=IGNORE)


def _colours(space: LabelSpace) -> np.ndarray:
    colours = space.colours.copy()
    for number in range(space.num_classes, IGNORE):
        colours[number] = _rule_colour(number)
    return colours


def error_uri(wrong_HW: np.ndarray, judged_HW: np.ndarray, size: tuple[int, int]) -> str:
    """Wrong pixels red, pixels without truth dark, the rest transparent, as a PNG `data:` URI."""
    codes = np.where(wrong_HW, _WRONG, np.where(judged_HW, 0, _UNJUDGED)).astype(np.uint8)
    image = Image.fromarray(resized(codes, size), mode="P")
    image.putpalette([value for colour in _ERROR_PALETTE for value in colour])
    return _uri(image, "png", optimize=True, transparency=bytes(_ERROR_ALPHA))


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _label(row: Row | None, size: tuple[int, int], *, field: str = "label") -> np.ndarray | None:
    path = _path(row, field) if row else None
    return resized(open_label(path), size) if path else None


def _path(row: Row, name: str) -> Path | None:
    """A file that an index row of a shard names, if it is there."""
    return _inside(row["folder"], row, name)


def _inside(folder: Path, row: Row, name: str) -> Path | None:
    path = folder / row[name] if stays_inside(row.get(name)) else None
    return path if path and path.is_file() else None


def _index(instance: Instance | None) -> list[Row]:
    return list(read_index(instance.folder)) if instance else []


def _rows(instance: Instance | None, name: str) -> list[Row]:
    path = instance.folder / name if instance else None
    return read_jsonl(path) if path and path.is_file() else []


def _by_id(rows: Sequence[Row], wanted: set[str] | None = None) -> dict[str, Row]:
    return {str(row.get("id")): row for row in rows if wanted is None or str(row["id"]) in wanted}
