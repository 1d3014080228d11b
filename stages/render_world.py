"""Render the miniature's streets into the layouts of real data sets, so that the real readers run.

    clouds --stage render_world --recipe miniature

`source/` is laid out as GTA5, all else as Cityscapes: `targets/<name>/` and `web_val/` with split
val, `web/` with split train and `captions.jsonl`; its labels are there to tell how good
pseudo-labels are. Label files hold Cityscapes label ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from models.miniature.materials import train_id_table
from models.miniature.renderer import Picture, render
from models.miniature.styles import TARGETS
from stages.config import StageConfig
from stages.contracts import Progress, Summary
from stages.data_config import WorldConfig
from stages.labels import load_labelspace
from stages.shards import item_seed, write_jsonl

SPLITS = {"web": "train"}
"""Split of a part; the judged ones have "val", as in Cityscapes."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One picture to render."""

    part: str
    """Folder below the artifact."""
    style: str
    stem: str
    seed: int


def run(config: StageConfig, *, out: Path, progress: Progress) -> Summary:
    """Render every part of the world; pictures of an interrupted attempt are kept.

    Args:
        config: section `world`.
        out: the artifact.
        progress: told every picture.
    """
    world = config.world
    items = list(_items(world))
    palette = load_labelspace("miniature").colours[train_id_table()].tobytes()
    missing = [item for item in items if not _image_path(out, item).exists()]
    progress.start(len(items), "pictures", done=len(items) - len(missing))
    for item in missing:
        picture = _render(item, world)
        _write(picture, out, item, palette)
        progress.advance()
    web = [item for item in items if item.part == "web"]
    if web:
        write_jsonl(out / "web" / "captions.jsonl", [_caption_row(item, world) for item in web])
    return Summary(
        text=f"{len(items)} pictures of {world.height}x{world.width}, "
        f"{2 + len(TARGETS) + bool(web)} data sets",
        numbers={"pictures": len(items)},
    )


def _items(world: WorldConfig) -> Iterator[_Item]:
    parts = [("source", "source", world.num_source)]
    parts += [(f"targets/{name}", name, world.num_target) for name in TARGETS]
    parts += [("web_val", "web", world.num_web_val), ("web", "web", world.num_web)]
    for part, style, count in parts:
        for index in range(count):
            yield _Item(
                part=part,
                style=style,
                stem=f"{index:05d}",
                seed=item_seed(world.seed, "world", part, index),
            )


def _render(item: _Item, world: WorldConfig) -> Picture:
    return render(item.style, seed=item.seed, height_px=world.height, width_px=world.width)


def _caption_row(item: _Item, world: WorldConfig) -> dict[str, str]:
    picture = _image_path(Path(), item).relative_to(item.part)
    return {"file": picture.as_posix(), "caption": _render(item, world).caption}


def _image_path(out: Path, item: _Item) -> Path:
    root = out / item.part
    if item.part == "source":
        return root / "images" / f"{item.stem}.png"
    city = item.part.rpartition("/")[2].replace("_", "")
    split = SPLITS.get(item.part, "val")
    return root / "leftImg8bit" / split / city / f"{city}_{item.stem}_leftImg8bit.png"


def _write(picture: Picture, out: Path, item: _Item, palette: bytes) -> None:
    """Labels first, the picture last: where the picture stands, the sample is whole.

    GTA5's labels are palette images; `palette` gives each label id its class' colour.
    """
    image = _image_path(out, item)
    labels = {}
    if item.part == "source":
        labels[out / item.part / "labels" / image.name] = picture.label_ids_HW
    else:
        folder = (
            out
            / item.part
            / "gtFine"
            / image.relative_to(out / item.part).parent.relative_to("leftImg8bit")
        )
        stem = image.name.removesuffix("_leftImg8bit.png")
        labels = {
            folder / f"{stem}_gtFine_labelIds.png": picture.label_ids_HW,
            folder / f"{stem}_gtFine_labelTrainIds.png": picture.labels_HW,
            folder / f"{stem}_gtFine_instanceIds.png": picture.instances_HW,
        }
    for path, values in labels.items():
        label = Image.fromarray(values)
        if item.part == "source":
            label.putpalette(palette)
        _save(label, path)
    _save(Image.fromarray(picture.image_HW3), image)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, format="PNG")
    temporary.replace(path)
