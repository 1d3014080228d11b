"""The t-SNE picture of features: which pixels, whose features, and what is drawn."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from flows.cli import main
from models.checkpoints import load_segmenter
from stages.feature_map import draw_feature_map, features_at, inside, pick_places, silhouette
from stages.labels import read_labelspace
from stages.readers import load_index
from stages.use_config import FeatureMapConfig
from tests.small_models import save_checkpoint
from tests.tiny import CLASSES, Told, write_labelspace, write_sources


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models and two parts with labels."""
    root = tmp_path_factory.mktemp("features")
    write_labelspace(root / "labelspace")
    write_sources(root / "sources", data=root / "data")
    write_sources(root / "targets", data=root / "other")
    index = (root / "targets" / "streets.jsonl").read_text()
    (root / "targets" / "rain.jsonl").write_text(index.replace("streets/", "rain/"))
    (root / "targets" / "streets.json").rename(root / "targets" / "rain.json")
    (root / "targets" / "roots.json").write_text(json.dumps({"rain": str(root / "other")}))
    save_checkpoint(root / "frozen")
    save_checkpoint(root / "tuned")
    return root


def test_points_lie_inside_their_class_and_are_spread_over_the_pictures(world):
    space = read_labelspace(world / "labelspace")
    samples = load_index(world / "sources")
    config = FeatureMapConfig(pictures=4, points=10, level=8)
    places = pick_places(samples, space, config)
    assert len({place.sample.id for place in places}) == 4
    for place in places:
        label = place.sample.read_label()
        window = label[max(0, place.y_px - 4) :][:5, place.x_px]
        assert set(window) == {place.train_id}
    counts = np.bincount([place.train_id for place in places])
    assert counts.max() == 10
    assert places == pick_places(samples, space, config)


def test_inside_removes_what_is_near_another_class():
    label = np.zeros((6, 9), np.uint8)
    label[:, 5:] = 1
    expected = label.copy()
    expected[:, 3:7] = 255
    assert np.array_equal(inside(label, 2), expected)
    assert np.array_equal(inside(label[:1, :1], 8), label[:1, :1])


def test_features_are_the_encoders_at_the_pixel(world):
    segmenter = load_segmenter(world / "frozen")
    space = read_labelspace(world / "labelspace")
    places = pick_places(load_index(world / "sources"), space, FeatureMapConfig(pictures=2))
    found = features_at(segmenter, places, 8, Told())
    place = places[7]
    image = torch.from_numpy(place.sample.read_image()).permute(2, 0, 1)[None]
    normalised = (image - segmenter.encoder.mean) / segmenter.encoder.std
    expected = segmenter.encoder(normalised)[1][0, :, place.y_px // 8, place.x_px // 8]
    expected = expected / expected.norm()
    np.testing.assert_allclose(found[7], expected.detach().numpy(), atol=1e-5)


def test_silhouettes_say_whether_groups_stand_apart():
    rng = np.random.default_rng(0)
    groups = np.arange(40) % 2
    apart = np.stack([np.ones(40), groups * 5.0 - 2], 1) + rng.normal(0, 0.1, (40, 2))
    assert silhouette(apart, groups) > 0.8
    assert abs(silhouette(rng.normal(0, 1, (40, 2)), groups)) < 0.2
    assert silhouette(apart, np.zeros(40)) is None


def test_the_picture_has_a_panel_per_model_and_a_mark_per_point(world, tmp_path):
    told = Told()
    result = draw_feature_map(
        tmp_path / "map",
        models={"frozen <CLIP>": world / "frozen", "tuned": world / "tuned"},
        parts=[world / "sources", world / "targets"],
        labelspace=world / "labelspace",
        progress=told,
        config=FeatureMapConfig(pictures=3, points=6, level=8, perplexity=5),
        device="cpu",
    )
    count = len(result["points"])
    assert told.advanced == told.started[0][0] == 12
    assert result["domains"] == ["streets", "rain"]
    assert json.loads((tmp_path / "map" / "features.json").read_text()) == result
    layouts = [np.array(entry["layout"]) for entry in result["models"].values()]
    assert [layout.shape for layout in layouts] == [(count, 2)] * 2
    assert np.array_equal(*layouts), "models with equal weights must get equal pictures"
    svg = ElementTree.parse(tmp_path / "map" / "features.svg").getroot()
    marks = svg.findall("{http://www.w3.org/2000/svg}polygon")
    assert len(marks) == 2 * count + len(CLASSES) + 2
    words = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"frozen <CLIP>", "tuned", "streets", "rain", *CLASSES} <= set(words)
    with Image.open(tmp_path / "map" / "features.png") as image:
        seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert set(CLASSES.values()) <= seen


def test_the_command_draws_models_of_a_prepared_folder(world, tmp_path, capsys):
    models = [f"{name}={world / name}" for name in ("frozen", "tuned")]
    words = ["features", "--model", models[0], "--model", models[1], "--out", str(tmp_path / "map")]
    small = ["--pictures", "2", "--points", "4", "--level", "8", "--device", "cpu"]
    assert main([*words, *small, "--data", str(world)]) == 0
    assert "frozen: by class" in capsys.readouterr().out
    assert (tmp_path / "map" / "features.svg").is_file()
    assert main([*words, *small]) == 2
    assert "--data" in capsys.readouterr().err
    assert main([*words, "--level", "7", "--data", str(world)]) == 2
    assert "--level" in capsys.readouterr().err


def test_a_model_of_other_classes_is_refused(world, tmp_path):
    save_checkpoint(tmp_path / "other", names=("a", "b"))
    with pytest.raises(ValueError, match="tells apart a, b"):
        draw_feature_map(
            tmp_path / "map",
            models={"other": tmp_path / "other"},
            parts=[world / "sources"],
            labelspace=world / "labelspace",
            progress=Told(),
            device="cpu",
        )
