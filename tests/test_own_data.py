"""Data, classes and label values of one's own, from files to predictions, by the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from flows.cli import main
from tests.small_datasets import picture, save

LABELS = """
name: three
classes:
  - {id: 0, name: road, colour: [128, 64, 128]}
  - {id: 1, name: vehicle, colour: [0, 0, 142], thing: true, synonyms: [car, truck, bus]}
  - {id: 2, name: everything else, colour: [70, 70, 70]}
maps:
  my_ids:
    ids: {10: 0, 20: 1, 30: 2}
    ignored: [0]
"""
RECIPE = """
extends: camvid
data:
  root: data
  labels: three.yaml
  sources: [{name: renders, layout: pairs, root: renders, label_map: my_ids}]
  targets: [{name: my_city, layout: pairs, root: my_city, label_map: my_ids}]
  unlabelled: [{name: pictures, layout: folder, root: pictures}]
segmenter:
  encoder: {architecture: {embed_dim: 32, layers: [1, 1, 1, 1], width: 8, image_size: 64}}
  decoder: {width: 16, heads: 2, queries: 8, layers: 1, ffn: 32, pixel_layers: 1, pixel_ffn: 32}
  losses: {points: 64}
train_source: {steps: 2, batch_size: 2, augment: {crop_height: 32, crop_width: 64}}
synthesize: {mode: collect, num_images: 2}
self_train:
  steps: 1
  batch_size: 2
  painted_share: 0.5
  augment: {crop_height: 32, crop_width: 64}
  painted_augment: {crop_height: 32, crop_width: 64}
evaluate: {short_side: null}
report: {title: My streets}
run: {device: cpu}
"""
SIZE = (64, 96)


def labelled(folder: Path, numbers: range) -> None:
    """Pictures in `images`, raw values 0, 10, 20, 30 in `labels`."""
    for number in numbers:
        label = np.full(SIZE, 30, np.uint8)
        label[40:] = 10
        label[36:50, 20:40] = 20
        label[:, :2] = 0
        save(folder / "images" / f"{number}.png", picture(number, SIZE))
        save(folder / "labels" / f"{number}.png", label)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder a new user stands in: data, a label space and a recipe."""
    labelled(tmp_path / "data" / "renders", range(3))
    labelled(tmp_path / "data" / "my_city", range(3, 5))
    for number in range(2):
        save(tmp_path / "data" / "pictures" / f"{number}.png", picture(9 + number, SIZE))
    (tmp_path / "three.yaml").write_text(LABELS)
    (tmp_path / "my_streets.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def clouds(command: str, *more: str) -> int:
    return main([command, "--recipe", "my_streets.yaml", *more])


def test_three_classes_of_ones_own_go_from_files_to_scores_and_predictions(place, capsys):
    assert clouds("check") == 0
    assert "map my_ids" in capsys.readouterr().out
    assert clouds("plan") == 3
    assert clouds("run") == 0
    (scores,) = place.glob("artifacts/evaluate@1#refined/*/results.json")
    assert "vehicle" in scores.read_text()
    assert (place / "artifacts" / "latest" / "report.html").is_file()
    capsys.readouterr()
    assert main(["predict", "data/pictures", "--model", "latest", "--out", "predicted"]) == 0
    assert "everything else" in capsys.readouterr().out
    summary = json.loads((place / "predicted" / "summary.json").read_text())
    assert [entry["colour"] for entry in summary["classes"]] == [
        entry["colour"] for entry in yaml.safe_load(LABELS)["classes"]
    ]
    labels = np.asarray(Image.open(place / "predicted" / "labels" / "0.png"))
    assert labels.shape == SIZE
    assert set(np.unique(labels)) <= {0, 1, 2}
    # the model of these classes does not fit others of the same number
    (place / "others.yaml").write_text(LABELS.replace("vehicle", "animal"))
    adopt = ["adopt", "train_source", "artifacts/latest/model", "--recipe", "my_streets.yaml"]
    assert main([*adopt, "--set", "data.labels=others.yaml"]) == 2
    said = capsys.readouterr().err
    assert "classes are 3 (road, vehicle, everything else)" in said
    assert "are 3 (road, animal, everything else)" in said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.targets.0.label_map=null", "'train_ids', which label space 'three'"),
        ("data.targets.0.layout=cityscapes", "Folders in data/my_city: images, labels"),
        ("data.targets.0.layout=folder", "can only stand under `data.unlabelled`"),
        ("data.sources.0.root=rendres", "the folder data/rendres does not exist"),
    ],
)
def test_check_tells_a_mistake_about_ones_own_data_once(place, capsys, setting, said):
    assert clouds("check", "--set", setting) == 1
    assert capsys.readouterr().out.count(said) == 1


def test_values_outside_of_the_map_are_named_with_the_file_to_change(place, capsys):
    (place / "three.yaml").write_text(LABELS.replace(", 30: 2", ""))
    assert clouds("check") == 1
    out = capsys.readouterr().out
    assert "values 30 are not in label map 'my_ids'" in out
    assert "label space file" in out
