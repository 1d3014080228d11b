"""Layouts: what is found below a root, in which order, and what is said when it is not there."""

import shutil
from pathlib import Path
from typing import get_args

import pytest

from stages.data_config import DatasetConfig
from stages.layouts import LAYOUTS, condition_of, dataset_root, list_pairs, strays_told, watched
from tests import small_datasets

ROLE = "targets"


def dataset(**fields) -> DatasetConfig:
    return DatasetConfig(**({"name": "d", "root": "r"} | fields))


def listed(root: Path, *, role: str = ROLE, labelled: bool = True, **fields):
    return list_pairs(dataset(**fields), root, role=role, labelled=labelled)


def test_the_config_names_exactly_the_layouts_that_exist():
    assert set(get_args(DatasetConfig.model_fields["layout"].annotation)) == set(LAYOUTS)


@pytest.mark.parametrize(
    ("write", "layout", "stems", "kind", "label_map"),
    [
        (
            small_datasets.cityscapes,
            "cityscapes",
            ["aachen_000001_000019", "bonn_000000_000019", "bonn_000002_000019"],
            "labelIds",
            "cityscapes",
        ),
        (small_datasets.gta5, "gta5", ["00001", "00002", "00003"], "labels", "gta5"),
        (small_datasets.gta5, "pairs", ["00001", "00002", "00003"], "labels", "train_ids"),
        (small_datasets.synthia, "synthia", ["0000000", "0000001"], "GT/LABELS", "synthia"),
        (
            small_datasets.bdd100k,
            "bdd100k",
            ["7d000000-00000000", "7d000001-00000000"],
            "sem_seg/masks",
            "bdd100k",
        ),
        (small_datasets.mapillary, "mapillary", ["_a0", "_a1"], "labels", "mapillary_h"),
        (
            small_datasets.acdc,
            "acdc",
            [f"GOPR0{n}_frame_000{n}" for n in range(4)],
            "labelTrainIds",
            "train_ids",
        ),
        (small_datasets.urbansyn, "urbansyn", ["rgb_0001", "rgb_0002"], "ss", "urbansyn"),
    ],
)
def test_every_layout_pairs_pictures_with_labels_in_sorted_order(
    tmp_path, write, layout, stems, kind, label_map
):
    found = listed(write(tmp_path), layout=layout)
    assert [pair.stem for pair in found.pairs] == stems
    assert all(pair.image.is_file() and pair.label.is_file() for pair in found.pairs)
    assert found.kind.name == kind
    assert found.kind.label_maps[0] == label_map
    folders = watched(dataset(layout=layout), tmp_path)
    for pair in found.pairs:
        for path in (pair.image, pair.label):
            assert any(path.is_relative_to(folder) for folder in folders), f"{path} not watched"


def test_cityscapes_label_kind_follows_the_label_map_and_what_exists(tmp_path):
    small_datasets.cityscapes(tmp_path, kind="labelTrainIds")
    assert listed(tmp_path).kind.name == "labelTrainIds"
    with pytest.raises(FileNotFoundError, match=r"no labels found .*_gtFine_labelIds\.png"):
        listed(tmp_path, label_map="cityscapes")
    small_datasets.cityscapes(tmp_path, kind="labelIds")
    assert listed(tmp_path).kind.name == "labelIds"
    assert listed(tmp_path, label_map="train_ids").kind.name == "labelTrainIds"


def test_the_usual_split_depends_on_the_role(tmp_path):
    small_datasets.cityscapes(tmp_path, "train")
    assert listed(tmp_path, role="targets").split == "train"  # the only one
    small_datasets.cityscapes(tmp_path, "val")
    assert listed(tmp_path, role="targets").split == "val"
    assert listed(tmp_path, role="sources").split == "train"
    assert listed(tmp_path, role="sources", split="val").split == "val"


def test_splits_that_are_not_usual_must_be_named(tmp_path):
    small_datasets.cityscapes(tmp_path, "one")
    small_datasets.cityscapes(tmp_path, "two")
    with pytest.raises(ValueError, match=r"splits one, two below .*: set `split`"):
        listed(tmp_path)


def test_mapillary_splits_have_their_own_names_and_v2_holds_v12_labels(tmp_path):
    small_datasets.mapillary(tmp_path, "training", v2=True)
    small_datasets.mapillary(tmp_path, "validation", v2=True)
    assert listed(tmp_path, layout="mapillary", role="sources").split == "training"
    found = listed(tmp_path, layout="mapillary")
    assert (found.split, found.kind.name) == ("validation", "v1.2/labels")


def test_one_condition_of_acdc_is_a_split_of_its_own(tmp_path):
    small_datasets.acdc(tmp_path)
    found = listed(tmp_path, layout="acdc", split="night/val")
    assert [pair.stem for pair in found.pairs] == ["GOPR01_frame_0001"]
    assert found.pairs[0].label.is_file()


def test_the_official_acdc_folders_hold_more_than_is_read(tmp_path):
    """Normal-condition twins (`*_ref`), label ids, colours and masks of invalid regions."""
    small_datasets.acdc(tmp_path)
    for condition in ("fog", "night", "rain", "snow"):
        twin = tmp_path / "rgb_anon" / condition / "val_ref" / "GOPR09"
        small_datasets.save(twin / "GOPR09_frame_0009_rgb_ref_anon.png", small_datasets.picture(9))
    for label in list(tmp_path.glob("gt/*/val/*/*_gt_labelTrainIds.png")):
        for kind in ("labelColor", "invIds", "labelIds"):
            name = label.name.replace("labelTrainIds", kind)
            small_datasets.save(label.with_name(name), small_datasets.raw_label(0))
    found = listed(tmp_path, layout="acdc")
    assert (found.split, len(found.pairs), found.kind.name) == ("val", 4, "labelIds")
    by_train_ids = listed(tmp_path, layout="acdc", label_map="train_ids")
    assert by_train_ids.kind.name == "labelTrainIds"
    conditions = [condition_of("acdc", pair.image) for pair in found.pairs]
    assert sorted(conditions) == ["fog", "night", "rain", "snow"]
    assert condition_of("cityscapes", found.pairs[0].image) is None


def test_a_folder_tree_of_images_needs_no_labels(tmp_path):
    for name in ("t.png", "sub/a.JPG", "sub/deep/c.webp", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = listed(tmp_path, layout="folder", role="unlabelled", labelled=False)
    assert [pair.stem for pair in found.pairs] == ["sub__a", "sub__deep__c", "t"]
    assert all(pair.label is None for pair in found.pairs)
    with pytest.raises(ValueError, match=r"can only stand under `data\.unlabelled`"):
        listed(tmp_path, layout="folder")


def test_a_link_to_a_parent_folder_does_not_loop(tmp_path):
    small_datasets.save(tmp_path / "a" / "x.png", small_datasets.picture(0))
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    found = listed(tmp_path, layout="folder", role="unlabelled", labelled=False)
    assert len(found.pairs) == 1


def test_a_limit_takes_samples_evenly(tmp_path):
    small_datasets.gta5(tmp_path, count=7)
    found = listed(tmp_path, layout="gta5", limit=3)
    assert [pair.stem for pair in found.pairs] == ["00001", "00003", "00005"]
    assert len(listed(tmp_path, layout="gta5", limit=50).pairs) == 7


def test_roots_are_absolute_relative_or_in_the_rendered_world(tmp_path):
    assert dataset_root(dataset(root="/x/y"), "/data") == Path("/x/y")
    assert dataset_root(dataset(root="city"), "/data") == Path("/data/city")
    world = dataset(root="@render_world/targets/night")
    assert dataset_root(world, "/data", tmp_path) == tmp_path / "targets" / "night"
    with pytest.raises(ValueError, match="clouds --stage render_world"):
        dataset_root(world, "/data")


@pytest.mark.parametrize(
    ("folders", "fields", "error", "message"),
    [
        ([], {}, FileNotFoundError, "the folder .* does not exist"),
        (["other"], {}, FileNotFoundError, r"leftImg8bit/val does not exist.*Folders in .*: other"),
        (
            ["leftImg8bit/val/bonn"],
            {},
            FileNotFoundError,
            r"holds no picture.*\*_leftImg8bit\.png.*Splits present: val",
        ),
        (["images"], {"layout": "gta5"}, FileNotFoundError, "images holds no picture"),
        (["images"], {"layout": "gta5", "split": "val"}, ValueError, "no splits, but split is"),
    ],
)
def test_what_is_missing_is_named(tmp_path, folders, fields, error, message):
    root = tmp_path / "root"
    for folder in folders:
        (root / folder).mkdir(parents=True)
    with pytest.raises(error, match=message) as caught:
        listed(root, **fields)
    assert "data set 'd'" in str(caught.value)


def test_pictures_without_labels_are_counted_and_the_first_named(tmp_path):
    small_datasets.gta5(tmp_path)
    (tmp_path / "labels" / "00002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 pictures .*labels/00002\.png"):
        listed(tmp_path, layout="gta5")


def test_two_files_of_one_name_are_refused(tmp_path):
    small_datasets.gta5(tmp_path)
    small_datasets.save(tmp_path / "images" / "00002.jpg", small_datasets.picture(2))
    with pytest.raises(ValueError, match=r"00002\.(jpg|png) and .* both be the sample '00002'"):
        listed(tmp_path, layout="gta5")


def test_labels_without_a_picture_are_told_with_the_first_of_them(tmp_path):
    small_datasets.gta5(tmp_path, count=4)
    labelled = {"layout": "pairs", "limit": 2}
    assert listed(tmp_path, **labelled).strays == ()
    for name in ("00002", "00004"):
        (tmp_path / "images" / f"{name}.png").unlink()
    found = listed(tmp_path, **labelled)
    assert [pair.stem for pair in found.pairs] == ["00001", "00003"]
    assert found.strays == tuple(tmp_path / "labels" / f"{n}.png" for n in ("00002", "00004"))
    assert strays_told(found, tmp_path).startswith("2 label files have no picture")
    assert strays_told(found, tmp_path).endswith("the first: labels/00002.png)")


@pytest.mark.parametrize(
    ("write", "layout"),
    [
        (small_datasets.cityscapes, "cityscapes"),
        (small_datasets.gta5, "gta5"),
        (small_datasets.synthia, "synthia"),
        (small_datasets.bdd100k, "bdd100k"),
        (small_datasets.mapillary, "mapillary"),
        (small_datasets.acdc, "acdc"),
        (small_datasets.urbansyn, "urbansyn"),
    ],
)
def test_every_label_of_a_whole_data_set_belongs_to_a_picture(tmp_path, write, layout):
    write(tmp_path)
    (tmp_path / "readme.png").touch()
    assert listed(tmp_path, layout=layout).strays == ()


def test_labels_of_another_kind_are_no_strays(tmp_path):
    small_datasets.bdd100k(tmp_path)
    folder = next(tmp_path.glob("**/sem_seg/masks/val"))
    for path in list(folder.glob("*.png")):
        shutil.copyfile(path, path.with_name(f"{path.stem}_train_id.png"))
    assert listed(tmp_path, layout="bdd100k").strays == ()
