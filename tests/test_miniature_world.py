"""`render_world` writes the layouts of real data sets: the real readers find and read them."""

import json

import numpy as np
import pytest
from PIL import Image

from models.miniature.styles import TARGETS
from stages import render_world
from stages.config import Recipe, StageConfig
from stages.data_config import DatasetConfig
from stages.labels import load_labelspace
from stages.layouts import dataset_root, list_pairs
from stages.readers import read_image, read_label


class Told:
    def __init__(self):
        self.advanced = 0

    def start(self, total, unit, *, done=0):
        self.total, self.done = total, done

    def advance(self, count=1, **metrics):
        self.advanced += count

    def note(self, text):
        pass


def world_config(**changes) -> StageConfig:
    world = {"num_source": 4, "num_target": 2, "num_web": 2, "num_web_val": 2} | changes
    return StageConfig(Recipe(world=world), stage="render_world", sections=("world",))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    told = Told()
    render_world.run(world_config(), out=out, progress=told)
    assert told.advanced == told.total == 4 + 2 * len(TARGETS) + 2 + 2
    return out


PARTS = [
    ("source", "gta5", "sources", 4),
    ("web_val", "cityscapes", "validation", 2),
    ("web", "cityscapes", "unlabelled", 2),
    *((f"targets/{name}", "cityscapes", "targets", 2) for name in TARGETS),
]


@pytest.mark.parametrize(("part", "layout", "role", "count"), PARTS)
def test_labelled_parts_are_read_by_the_real_readers(world, part, layout, role, count):
    dataset = DatasetConfig(name="x", layout=layout, root=f"@render_world/{part}")
    found = list_pairs(dataset, dataset_root(dataset, ".", world), role=role, labelled=True)
    assert len(found.pairs) == count
    space = load_labelspace("miniature")
    id_map = space.maps[next(name for name in found.kind.label_maps if name in space.maps)]
    for pair in found.pairs:
        image, raw = read_image(pair.image), read_label(pair.label)
        assert image.shape == (64, 128, 3)
        assert raw.shape == (64, 128)
        assert id_map.known[np.unique(raw)].all()
        assert len(np.unique(id_map.apply(raw))) > 3


def test_train_ids_beside_label_ids_say_the_same(world):
    id_map = load_labelspace("miniature").maps["cityscapes"]
    paths = sorted((world / "targets").rglob("*_gtFine_labelIds.png"))
    assert paths
    for path in paths:
        train = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
        assert np.array_equal(id_map.apply(read_label(path)), read_label(train))
        instances = np.asarray(Image.open(path.with_name(path.name.replace("label", "instance"))))
        assert instances.dtype == np.uint16


def test_gta_labels_are_palette_images_in_the_classes_colours(world):
    space = load_labelspace("miniature")
    path = sorted((world / "source" / "labels").iterdir())[0]
    label = Image.open(path)
    assert label.mode == "P"
    train = space.maps["gta5"].apply(np.asarray(label))
    shown = np.asarray(label.convert("RGB"))
    assert np.array_equal(shown[train != 255], space.colourise(train)[train != 255])


def test_web_pictures_come_with_captions(world):
    rows = [json.loads(row) for row in (world / "web" / "captions.jsonl").read_text().splitlines()]
    pictures = (world / "web").rglob("*_leftImg8bit.png")
    assert {row["file"] for row in rows} == {str(p.relative_to(world / "web")) for p in pictures}
    assert all("photo of" in row["caption"] for row in rows)


def test_a_restart_renders_only_what_is_missing_and_gets_the_same_bytes(world):
    lost = sorted((world / "source" / "images").iterdir())[1]
    kept = lost.read_bytes()
    lost.unlink()
    told = Told()
    render_world.run(world_config(), out=world, progress=told)
    assert (told.done, told.advanced) == (told.total - 1, 1)
    assert lost.read_bytes() == kept


def test_another_seed_gives_another_world(world, tmp_path):
    small = {"num_source": 1, "num_target": 1, "num_web": 0, "num_web_val": 0, "seed": 1}
    render_world.run(world_config(**small), out=tmp_path, progress=Told())
    assert not (tmp_path / "web").exists()
    name = "source/images/00000.png"
    assert (tmp_path / name).read_bytes() != (world / name).read_bytes()
