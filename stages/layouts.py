"""On-disk layouts of data sets: which folders to look into, and which files belong together.

Imports neither torch nor Pillow, so that a plan can list a data set's folders cheaply. The rest of
the house sees only (stem, image, label) in sorted order.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.data_config import DatasetConfig

WORLD_PREFIX = "@render_world"

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

USUAL_SPLITS = {
    "sources": "train",
    "targets": "val",
    "validation": "val",
    "unlabelled": "train",
}
"""Split meant where a data set names none and has several, by the data set's role."""


@dataclass(frozen=True, kw_only=True)
class LabelKind:
    """One way in which a layout stores labels."""

    name: str
    """Recorded in the index, for example "labelIds"."""
    folders: tuple[str, ...]
    """Label folders beside the layout's image folders, in the same order; `{split}` stands for
    the split."""
    ending: str
    """What stands after the stem in a label's file name."""
    label_maps: tuple[str, ...]
    """Raw-id maps of a label space that fit, the first one known being used."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set keeps pictures and labels, relative to its root."""

    name: str
    folders: tuple[str, ...]
    """Image folders; `{split}` stands for the split. All those that exist are read."""
    endings: tuple[str, ...] = IMAGE_ENDINGS
    """What stands after the stem in a picture's file name; the stem is the sample's name."""
    kinds: tuple[LabelKind, ...] = ()
    """Ways in which labels come, in the order of preference."""
    has_splits: bool = True
    alternatives: bool = False
    """The image folders are different editions of one data set: only the first that exists is
    read. Otherwise they are parts of it, and all are read."""


_CITYSCAPES_IDS = ("cityscapes", "gta5")
_TRAIN_IDS = ("train_ids",)
_ACDC_CONDITIONS = ("fog", "night", "rain", "snow")
_ACDC_LABELS = tuple(f"gt/{condition}/{{split}}" for condition in _ACDC_CONDITIONS)

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="cityscapes",
            folders=("leftImg8bit/{split}",),
            endings=("_leftImg8bit.png",),
            kinds=(
                LabelKind(
                    name="labelIds",
                    folders=("gtFine/{split}",),
                    ending="_gtFine_labelIds.png",
                    label_maps=_CITYSCAPES_IDS,
                ),
                LabelKind(
                    name="labelTrainIds",
                    folders=("gtFine/{split}",),
                    ending="_gtFine_labelTrainIds.png",
                    label_maps=_TRAIN_IDS,
                ),
            ),
        ),
        Layout(
            name="gta5",
            folders=("images",),
            kinds=(
                LabelKind(
                    name="labels",
                    folders=("labels",),
                    ending=".png",
                    label_maps=("gta5", "cityscapes"),
                ),
            ),
            has_splits=False,
        ),
        Layout(
            name="pairs",
            folders=("images",),
            kinds=(
                LabelKind(name="labels", folders=("labels",), ending=".png", label_maps=_TRAIN_IDS),
            ),
            has_splits=False,
        ),
        Layout(name="folder", folders=(".",), has_splits=False),
        Layout(
            name="synthia",
            folders=("RGB",),
            endings=(".png",),
            kinds=(
                LabelKind(
                    name="GT/LABELS",
                    folders=("GT/LABELS",),
                    ending=".png",
                    label_maps=("synthia",),
                ),
            ),
            has_splits=False,
        ),
        Layout(
            name="bdd100k",
            folders=("images/10k/{split}", "seg/images/{split}"),
            endings=(".jpg",),
            kinds=(
                LabelKind(
                    name="sem_seg/masks",
                    folders=("labels/sem_seg/masks/{split}", "seg/labels/{split}"),
                    ending=".png",
                    label_maps=("bdd100k", "train_ids"),
                ),
                LabelKind(
                    name="train_id",
                    folders=("labels/sem_seg/masks/{split}", "seg/labels/{split}"),
                    ending="_train_id.png",
                    label_maps=("bdd100k", "train_ids"),
                ),
            ),
            alternatives=True,
        ),
        Layout(
            name="mapillary",
            folders=("{split}/images",),
            endings=(".jpg",),
            kinds=(
                LabelKind(
                    name="labels",
                    folders=("{split}/labels",),
                    ending=".png",
                    label_maps=("mapillary_h",),
                ),
                LabelKind(
                    name="v1.2/labels",
                    folders=("{split}/v1.2/labels",),
                    ending=".png",
                    label_maps=("mapillary_h",),
                ),
            ),
        ),
        Layout(
            name="acdc",
            folders=tuple(f"rgb_anon/{condition}/{{split}}" for condition in _ACDC_CONDITIONS),
            endings=("_rgb_anon.png",),
            kinds=(
                LabelKind(
                    name="labelIds",
                    folders=_ACDC_LABELS,
                    ending="_gt_labelIds.png",
                    label_maps=("acdc", *_CITYSCAPES_IDS),
                ),
                LabelKind(
                    name="labelTrainIds",
                    folders=_ACDC_LABELS,
                    ending="_gt_labelTrainIds.png",
                    label_maps=_TRAIN_IDS,
                ),
            ),
        ),
        Layout(
            name="urbansyn",
            folders=("rgb",),
            endings=(".png",),
            kinds=(
                LabelKind(
                    name="ss",
                    folders=("ss",),
                    ending=".png",
                    label_maps=("urbansyn", "train_ids"),
                ),
            ),
            has_splits=False,
        ),
    )
}
"""Every layout by name; `DatasetConfig.layout` lists the same names."""

_STEM_PREFIXES = {"urbansyn": ("rgb_", "ss_")}
"""Layouts whose picture and label names begin differently (picture's, label's)."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture and its label on disk."""

    stem: str
    """Name of the sample, unique in its data set; safe as a file name."""
    image: Path
    label: Path | None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a layout found below a root."""

    pairs: tuple[Pair, ...]
    """Sorted by stem."""
    split: str | None
    """The split that was read, after choosing the usual one."""
    kind: LabelKind | None
    """How labels are stored; None where none are read."""
    strays: tuple[Path, ...] = ()
    """Label files of that kind which belong to no picture, in order (`limit` has no part in it)."""


def dataset_root(dataset: DatasetConfig, data_root: str, world: Path | None = None) -> Path:
    """The folder of a data set.

    Args:
        dataset: its section.
        data_root: `data.root`, which relative roots are below.
        world: the `render_world` artifact, for roots `@render_world/PART`.

    Raises:
        ValueError: the root names the rendered world and there is none.
    """
    if dataset.root.startswith(WORLD_PREFIX):
        if world is None:
            raise ValueError(
                f"data set {dataset.name!r}: root {dataset.root!r} lies in the rendered world, "
                "which was not given to this stage: run `clouds --stage render_world` first."
            )
        return world / dataset.root.removeprefix(WORLD_PREFIX).lstrip("/")
    root = Path(dataset.root).expanduser()
    return root if root.is_absolute() else Path(data_root).expanduser() / root


def watched(dataset: DatasetConfig, root: Path) -> list[Path]:
    """Folders whose listing decides what a data set holds (they need not exist)."""
    layout = LAYOUTS[dataset.layout]
    patterns = [*layout.folders, *(folder for kind in layout.kinds for folder in kind.folders)]
    if not layout.has_splits or dataset.split is not None:
        places = [_place(pattern, dataset.split) for pattern in patterns]
    elif any(pattern.startswith("{split}") for pattern in patterns):
        places = [path.name for path in _subfolders(root)]
    else:
        places = [pattern.partition("/{split}")[0] for pattern in patterns]
    return [root / place for place in dict.fromkeys(places)]


def list_pairs(dataset: DatasetConfig, root: Path, *, role: str, labelled: bool) -> Listing:
    """Pictures and labels of a data set, sorted, cut to `dataset.limit`.

    Args:
        dataset: its section.
        root: its folder.
        role: "sources", "targets", "validation" or "unlabelled": which split is usual.
        labelled: every picture must have a label; otherwise labels are not looked for.

    Raises:
        FileNotFoundError: a folder is missing or empty, or labels are missing; names what was
            expected where.
        ValueError: the layout has no splits or no labels, or two files have one name.
    """
    layout = LAYOUTS[dataset.layout]
    who = f"data set {dataset.name!r} (data.{role}, layout {layout.name})"
    if not root.is_dir():
        raise FileNotFoundError(
            f"{who}: the folder {root} does not exist. Set its `root`, or `data.root` if that is "
            "relative."
        )
    split = _choose_split(dataset, layout, root, role=role, who=who)
    if labelled and not layout.kinds:
        raise ValueError(
            f"{who} has no labels, so it can only stand under `data.unlabelled`, without `truth`. "
            "Labelled layouts: "
            f"{', '.join(name for name, known in LAYOUTS.items() if known.kinds)}."
        )
    folders = _image_folders(layout, root, split)
    pictures = sorted(_pictures(layout, [root / folder for _, folder in folders]))
    if not pictures:
        raise FileNotFoundError(_nothing_found(layout, root, split, who=who))
    _refuse_same_stems(pictures, who=who)
    taken = _evenly(pictures, dataset.limit)
    if not labelled:
        pairs = tuple(Pair(stem=stem, image=path, label=None) for stem, path, _ in taken)
        return Listing(pairs=pairs, split=split, kind=None)
    kind = _choose_kind(dataset, layout, root, split, folders, taken, who=who)
    return Listing(
        pairs=tuple(_with_labels(layout, kind, root, split, folders, taken, who=who)),
        split=split,
        kind=kind,
        strays=tuple(_strays(layout, kind, root, split, folders, pictures)),
    )


def strays_told(listing: Listing, root: Path) -> str | None:
    """How many label files belong to no picture, and one of them; None if all do."""
    if not listing.strays:
        return None
    first = listing.strays[0].relative_to(root)
    return (
        f"{len(listing.strays)} label files have no picture and are not used (the first: {first})"
    )


def condition_of(layout: str, image: Path) -> str | None:
    """Under which condition a picture was taken ("night"), where the layout's folders tell."""
    if layout != "acdc":
        return None
    return next((part for part in reversed(image.parts[:-1]) if part in _ACDC_CONDITIONS), None)


_Picture = tuple[str, Path, Path]
"""Stem, file, and the image folder it was found below."""


def _place(pattern: str, split: str | None) -> str:
    """A folder pattern with its split. A split "night/val" also names what stands before it."""
    if split is not None and "/" in split and "/{split}" in pattern:
        return f"{pattern.split('/')[0]}/{split}"
    return pattern.replace("{split}", split or "")


def _image_folders(layout: Layout, root: Path, split: str | None) -> list[tuple[int, str]]:
    """(number in the layout, folder) of the image folders that exist."""
    places: dict[str, int] = {}
    for number, pattern in enumerate(layout.folders):
        places.setdefault(_place(pattern, split), number)
    found = [(number, place) for place, number in places.items() if (root / place).is_dir()]
    return found[:1] if layout.alternatives else found


def _pictures(layout: Layout, folders: Sequence[Path]) -> Iterator[_Picture]:
    flat = layout.name != "folder"
    for folder in folders:
        for path in _files(folder):
            ending = next((e for e in layout.endings if path.name.lower().endswith(e.lower())), "")
            if ending:
                name = path.name if flat else "__".join(path.relative_to(folder).parts)
                yield name[: -len(ending)], path, folder


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, links to folders followed once, hidden ones left out."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _splits(layout: Layout, root: Path) -> list[str]:
    """Splits present below the root."""
    found = set()
    for pattern in layout.folders:
        before, _, after = pattern.partition("{split}")
        for folder in _subfolders(root / before):
            if (folder / after.lstrip("/")).is_dir():
                found.add(folder.name)
    return sorted(found)


def _choose_split(
    dataset: DatasetConfig, layout: Layout, root: Path, *, role: str, who: str
) -> str | None:
    if not layout.has_splits:
        if dataset.split is not None:
            raise ValueError(
                f"{who}: this layout has no splits, but split is {dataset.split!r}: leave `split` "
                "out, or give another `root`."
            )
        return None
    if dataset.split is not None:
        return dataset.split
    known = _splits(layout, root)
    usual = next(
        (name for name in known if name.startswith(USUAL_SPLITS[role])), USUAL_SPLITS[role]
    )
    if usual in known or not known:
        return usual
    if len(known) == 1:
        return known[0]
    raise ValueError(f"{who}: splits {', '.join(known)} below {root}: set `split` to one of them.")


def _nothing_found(layout: Layout, root: Path, split: str | None, *, who: str) -> str:
    places = ", ".join(f"{root / _place(pattern, split)}" for pattern in layout.folders)
    endings = ", ".join(f"*{ending}" for ending in layout.endings)
    state = "holds no picture" if _image_folders(layout, root, split) else "does not exist"
    found = [path.name for path in _subfolders(root)][:8]
    message = f"{who}: {places} {state}. Expected there: files {endings}, also in subfolders."
    if layout.has_splits:
        message += f" Splits present: {', '.join(_splits(layout, root)) or 'none'}."
    return f"{message} Folders in {root}: {', '.join(found) or 'none'}."


def _refuse_same_stems(pictures: Sequence[_Picture], *, who: str) -> None:
    for (stem, first, _), (other, second, _) in itertools.pairwise(pictures):
        if stem == other:
            raise ValueError(
                f"{who}: {first} and {second} would both be the sample {stem!r}: rename one."
            )


def _evenly(pictures: list[_Picture], limit: int | None) -> list[_Picture]:
    if limit is None or limit >= len(pictures):
        return pictures
    return [pictures[number * len(pictures) // limit] for number in range(limit)]


def _label_path(
    layout: Layout,
    kind: LabelKind,
    root: Path,
    split: str | None,
    folders: Sequence[tuple[int, str]],
    picture: _Picture,
) -> Path:
    stem, path, folder = picture
    number = next(number for number, place in folders if root / place == folder)
    if split is not None and "/" in split:
        number = 0
    before = _place(kind.folders[number], split)
    ours, theirs = _STEM_PREFIXES.get(layout.name, ("", ""))
    name = theirs + stem.removeprefix(ours) + kind.ending
    return root / before / path.parent.relative_to(folder) / name


def _choose_kind(
    dataset: DatasetConfig,
    layout: Layout,
    root: Path,
    split: str | None,
    folders: Sequence[tuple[int, str]],
    pictures: Sequence[_Picture],
    *,
    who: str,
) -> LabelKind:
    """The kind of labels to read: the one that `label_map` is for, else the first that exists."""
    wanted = [kind for kind in layout.kinds if dataset.label_map in kind.label_maps]
    kinds = wanted or list(layout.kinds)
    for kind in kinds:
        if any(_label_path(layout, kind, root, split, folders, p).is_file() for p in pictures):
            return kind
    expected = " or ".join(
        str(_label_path(layout, kind, root, split, folders, pictures[0])) for kind in kinds
    )
    raise FileNotFoundError(
        f"{who}: no labels found for {len(pictures)} pictures; expected for the first: {expected}."
    )


def _with_labels(
    layout: Layout,
    kind: LabelKind,
    root: Path,
    split: str | None,
    folders: Sequence[tuple[int, str]],
    pictures: Sequence[_Picture],
    *,
    who: str,
) -> Iterator[Pair]:
    missing = []
    for picture in pictures:
        label = _label_path(layout, kind, root, split, folders, picture)
        if not label.is_file():
            missing.append(label)
        yield Pair(stem=picture[0], image=picture[1], label=label)
    if missing:
        raise FileNotFoundError(
            f"{who}: {len(missing)} of {len(pictures)} pictures have no label of kind {kind.name}; "
            f"the first: {missing[0]}."
        )


def _strays(
    layout: Layout,
    kind: LabelKind,
    root: Path,
    split: str | None,
    folders: Sequence[tuple[int, str]],
    pictures: Sequence[_Picture],
) -> Iterator[Path]:
    """Files that look like labels of this kind, without those of the pictures."""
    expected = {_label_path(layout, kind, root, split, folders, picture) for picture in pictures}
    others = tuple(own.ending for own in layout.kinds if len(own.ending) > len(kind.ending))
    places = [kind.folders[number] for number, _ in folders]
    if split is not None and "/" in split:
        places = [kind.folders[0]]
    for place in dict.fromkeys(_place(pattern, split) for pattern in places):
        for path in _files(root / place):
            ours = path.name.endswith(kind.ending) and not path.name.endswith(others)
            if ours and path not in expected:
                yield path
