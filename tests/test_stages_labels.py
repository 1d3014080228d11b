"""Label spaces: the shipped one, maps by the tables of the literature, and refusals."""

import numpy as np
import pytest
import yaml

from stages.contracts import labelspace_file
from stages.labels import IdMap, labelspace_path, load_labelspace, read_labelspace

MINIMAL = {
    "name": "three",
    "classes": [
        {"id": 0, "name": "ground", "colour": [10, 20, 30], "synonyms": ["road"]},
        {"id": 1, "name": "sky", "colour": [1, 2, 3]},
        {"id": 2, "name": "car", "colour": [0, 0, 142], "thing": True},
    ],
    "maps": {"mine": {"ids": {7: 0, 300: 2}, "ignored": ["0-3", 9]}},
}


def written(tmp_path, **changes):
    path = tmp_path / "three.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return str(path)


def test_cityscapes19_has_the_classes_in_the_order_of_train_ids():
    space = load_labelspace("cityscapes19")
    assert space.names[:4] == ("road", "sidewalk", "building", "wall")
    assert space.names[13:] == ("car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert next(c.name for c in space.classes if c.thing) == "person"
    assert len(set(map(tuple, space.colours[:19]))) == 19


@pytest.mark.parametrize(
    ("name", "raw", "train"),
    [
        ("cityscapes", [7, 8, 11, 33, 26, 0, 9, 34], [0, 1, 2, 18, 13, 255, 255, 255]),
        ("gta5", [7, 19, 31, 5], [0, 6, 16, 255]),
        ("train_ids", [0, 18, 255], [0, 18, 255]),
        ("synthia", [3, 21, 1, 17, 0, 22], [0, 3, 10, 12, 255, 255]),
        ("urbansyn", [0, 18, 19], [0, 18, 255]),
        ("mapillary_h", [7, 13, 41, 44, 46, 55], [255, 0, 0, 255, 255, 13]),
        ("mapillary_r", [7, 13, 41, 44, 46, 55], [0, 0, 255, 5, 7, 13]),
    ],
)
def test_maps_give_the_train_ids_of_the_literature(name, raw, train):
    id_map = load_labelspace("cityscapes19").maps[name]
    for dtype in (np.uint8, np.uint16):
        mapped = id_map.apply(np.array([raw], dtype))
        assert mapped.dtype == np.uint8
        assert mapped.tolist() == [train]


def test_the_two_mapillary_maps_know_all_66_ids_and_differ_in_11():
    maps = load_labelspace("cityscapes19").maps
    h, r = maps["mapillary_h"], maps["mapillary_r"]
    assert np.flatnonzero(h.known).tolist() == np.flatnonzero(r.known).tolist() == [*range(66)]
    assert np.flatnonzero(h.table != r.table).tolist() == [7, 8, 9, 10, 11, 14, 23, 41, 44, 46, 49]


def test_a_map_travels_through_json_unchanged():
    id_map = load_labelspace("cityscapes19").maps["mapillary_r"]
    again = IdMap.from_json(id_map.to_json())
    assert (again.table == id_map.table).all()
    assert (again.known == id_map.known).all()


def test_a_label_space_of_ones_own_is_read_by_path_and_saved(tmp_path):
    space = load_labelspace(written(tmp_path))
    assert space.names == ("ground", "sky", "car")
    assert space.classes[2].thing
    assert space.maps["mine"].apply(np.array([[7, 300, 9]], np.uint16)).tolist() == [[0, 2, 255]]
    assert space.maps["mine"].known[[0, 3, 4, 9]].tolist() == [True, True, False, True]
    space.save(tmp_path)
    assert read_labelspace(tmp_path).classes == space.classes


def test_colours_are_the_classes_and_black_elsewhere(tmp_path):
    space = load_labelspace(written(tmp_path))
    painted = space.colourise(np.array([[0, 2, 255, 3]], np.uint8))
    assert painted.tolist() == [[[10, 20, 30], [0, 0, 142], [0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "none"}, "expected `name`, `classes`"),
        ({"classes": []}, "0 classes"),
        ({"colours": 1}, "unknown keys"),
        ({"ignore_id": 0}, "ignore_id is 0"),
        ({"classes": MINIMAL["classes"][::-1]}, r"classes\[0\]: id is 2"),
        ({"classes": [MINIMAL["classes"][0] | {"colour": [1, 2]}]}, "colour is"),
        ({"classes": [MINIMAL["classes"][0] | {"color": 1}]}, "unknown keys"),
        (
            {"classes": [MINIMAL["classes"][0], MINIMAL["classes"][1] | {"name": "ground"}]},
            "used twice: ground",
        ),
        ({"maps": {"m": [1]}}, r"maps\.m: expected `ids"),
        ({"maps": {"m": {"ids": {1: 3}}}}, r"maps\.m: 1 -> 3; train ids are 0\.\.2"),
        ({"maps": {"m": {"ids": {-1: 0}}}}, "raw value -1"),
        ({"maps": {"m": {"ids": {1: 0}, "ignored": ["0-3"]}}}, r"\[1\] stand under both"),
        ({"maps": {"m": {"ids": {}, "ignored": ["a-b"]}}}, "ignored holds 'a-b'"),
    ],
)
def test_a_wrong_file_is_refused_with_place_and_value(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_labelspace(written(tmp_path, **changes))
    assert "three.yaml" in str(caught.value)


def test_broken_yaml_names_the_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("classes: [")
    with pytest.raises(ValueError, match=r"broken\.yaml: not valid YAML"):
        load_labelspace(str(path))


def test_an_unknown_name_tells_the_known_and_the_nearest():
    with pytest.raises(FileNotFoundError, match="nearest: cityscapes19"):
        load_labelspace("cityscape19")


def test_an_unknown_map_tells_who_wants_it_and_the_known_ones(tmp_path):
    space = load_labelspace(written(tmp_path))
    with pytest.raises(ValueError, match=r"data set 'x' needs the label map 'min'.*nearest: mine"):
        space.id_map("min", wanted_by="data set 'x'")


def test_a_label_space_in_ones_home_is_found_by_plan_and_by_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("classes: []")
    assert labelspace_path("~/own.yaml") == labelspace_file("~/own.yaml") == tmp_path / "own.yaml"
