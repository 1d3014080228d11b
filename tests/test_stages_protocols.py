"""Protocols: what a name fixes, what an override does to it, and that both stand in the results."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flows.recipes import ConfigError, load_recipe, recipe_files, resolve
from models.checkpoints import load_segmenter
from models.inference import predict
from stages import judging, prepare
from stages.config import Recipe
from stages.judging import Sizes, read_item, resize_image
from stages.judging_config import EvaluateConfig
from stages.labels import load_labelspace
from stages.metrics import relative_performance, scores
from stages.protocols import LEFT_OUT, PROTOCOLS, protocol_name
from stages.readers import Sample, load_index, network_size, read_label, resize_label
from tests import small_datasets
from tests.small_judged import evaluated, save_checkpoint
from tests.tiny import Told, stage_config

NAMES = load_labelspace("cityscapes19").names
MAPILLARY = {"name": "m", "root": "m", "layout": "mapillary"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Four prepared targets of four layouts, and a checkpoint with random weights."""
    root = tmp_path_factory.mktemp("protocols")
    small_datasets.cityscapes(root / "city", count=3)
    small_datasets.acdc(root / "acdc")
    small_datasets.bdd100k(root / "bdd")
    small_datasets.mapillary(root / "m")
    targets = [
        {"name": "city", "root": "city"},
        {"name": "acdc", "root": "acdc", "layout": "acdc"},
        {"name": "bdd", "root": "bdd", "layout": "bdd100k"},
        MAPILLARY,
    ]
    recipe = Recipe(data={"root": str(root), "targets": targets}, evaluate={"protocol": "rein"})
    (root / "prepared").mkdir()
    prepare.run(stage_config(recipe, "prepare"), out=root / "prepared", progress=Told())
    save_checkpoint(root / "model", NAMES)
    return root


def named(config: EvaluateConfig, *maps) -> str:
    return protocol_name(config.protocol, config.model_dump(mode="json"), maps)


def test_every_protocol_fixes_every_setting_that_moves_a_number():
    for name, protocol in PROTOCOLS.items():
        fixed = {"short_side", "long_side", "layouts", "resize", "label_resolution"}
        fixed |= {"mode", "absent", "classes", "flip", "scales"}
        if protocol.settings["mode"] == "slide":
            fixed |= {"window", "stride"}
        assert set(protocol.settings) == fixed, name
        assert "mapillary" in protocol.label_maps
        assert set(protocol.label_maps.values()) <= set(load_labelspace("cityscapes19").maps)
        assert named(EvaluateConfig(protocol=name)) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clouds_released", (1024, None, "network", "whole", "detectron2", "mapillary_h")),
        ("rein", (512, 1024, "native", "slide", "mmseg", "mapillary_r")),
        ("vltseg", (512, 1024, "native", "slide", "mmseg", "mapillary_h")),
        ("high_resolution", (1024, 2048, "native", "slide", "mmseg", "mapillary_r")),
        ("native", (None, None, "native", "whole", "cityscapes", "mapillary_h")),
    ],
)
def test_a_protocol_fills_what_is_not_set(name, expected):
    recipe = Recipe(evaluate={"protocol": name}, data={"targets": [MAPILLARY]})
    section = recipe.evaluate
    found = (section.short_side, section.long_side, section.label_resolution, section.mode)
    assert (*found, section.absent, recipe.data.targets[0].label_map) == expected


def test_what_is_set_otherwise_shows_in_the_name():
    changed = EvaluateConfig(protocol="rein", stride=256, short_side=None)
    assert (changed.stride, changed.short_side, changed.long_side) == (256, None, 1024)
    assert named(changed) == "rein, changed: short_side none, stride 256"
    plain = EvaluateConfig(protocol="rein", layouts={})
    assert named(plain) == "rein, changed: layouts (none)"
    assert named(EvaluateConfig(protocol="rein", stride=341)) == "rein"
    by_h = named(EvaluateConfig(protocol="rein"), ("mapillary", "mapillary_h"), ("gta5", "gta5"))
    assert by_h == "rein, changed: mapillary by map mapillary_h"
    assert named(EvaluateConfig(short_side=512)) == "own settings"
    looks = {"flip": True, "scales": (0.5, 1)}
    assert named(EvaluateConfig(**looks)) == "own settings, flip on, scales 0.5 and 1"
    again = named(EvaluateConfig(protocol="rein", **looks))
    assert again == "rein, changed: flip on, scales 0.5 and 1"


def test_a_protocol_survives_writing_and_reading():
    recipe = Recipe(evaluate={"protocol": "rein", "window": 640}, data={"targets": [MAPILLARY]})
    read = Recipe.model_validate(recipe.model_dump(mode="json"))
    assert read.evaluate == recipe.evaluate
    assert read.data == recipe.data
    assert named(read.evaluate) == "rein, changed: window 640"


def test_a_leg_may_be_judged_by_another_protocol():
    legs = {"v": {"evaluate.protocol": "vltseg"}, "own": {"evaluate.stride": 100}}
    recipe = Recipe(evaluate={"protocol": "rein"}, legs=legs, data={"targets": [MAPILLARY]})
    other = resolve(recipe, leg="v")
    assert named(other.evaluate) == "vltseg"
    assert other.data.targets[0].label_map == "mapillary_h"
    assert named(resolve(recipe, leg="own").evaluate) == "rein, changed: stride 100"
    assert recipe.data.targets[0].label_map == "mapillary_r"


def test_published_systems_are_judged_by_their_own_protocols():
    kinds = {"clouds": "clouds_released", "rein": "rein", "vltseg": "vltseg", "painted": "rein"}
    for name in recipe_files():
        recipe = load_recipe(name)
        begins = name.partition("_")[0]
        if begins in kinds:
            assert recipe.evaluate.protocol == kinds[begins], name
    by_map = {
        name: {t.label_map for t in load_recipe(name).data.targets if t.layout == "mapillary"}
        for name in ("clouds_rn50_gta5", "rein_dinov2_l_gta5", "vltseg_b16_gta5")
    }
    assert list(by_map.values()) == [{"mapillary_h"}, {"mapillary_r"}, {"mapillary_h"}]


def test_mistakes_name_the_way_out():
    with pytest.raises(ConfigError, match=r"evaluate\.protocol = 'reins'.*'rein'"):
        load_recipe("tiny", ["evaluate.protocol=reins"])
    with pytest.raises(ConfigError, match=r"evaluate\.layouts\.bdd"):
        load_recipe("tiny", ["evaluate.layouts.bdd.short_side=3"])
    with pytest.raises(ConfigError, match=r"training_domain is 'x', which is none of"):
        load_recipe("rein_dinov2_l_gta5", ["evaluate.training_domain=x"])


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((1024, 2048), 512, 1024, (512, 1024)),
        ((720, 1280), 512, 1024, (512, 910)),
        ((1000, 4000), 512, 1024, (256, 1024)),
        ((1080, 1920), 540, 960, (540, 960)),
        ((1000, 4000), None, 1024, (256, 1024)),
        ((300, 400), None, 1024, (300, 400)),
        ((1, 1), None, None, (1, 1)),
    ],
)
def test_the_long_side_bounds_the_networks_size(size, short, long, expected):
    assert network_size(size, short, long) == expected


def test_plain_resizing_is_opencvs_and_antialiased_resizing_is_pillows():
    picture = small_datasets.picture(0, (37, 50))
    size = (16, 23)
    pillow = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR)
    assert (resize_image(picture, size, kind="antialias") == np.asarray(pillow)).all()
    plain = resize_image(picture, size, kind="plain")
    assert np.abs(plain.astype(int) - np.asarray(pillow)).max() > 3
    half = resize_image(picture[:36, :48], (18, 24), kind="plain").astype(int)
    blocks = picture[:36, :48].reshape(18, 2, 24, 2, 3).mean((1, 3))
    assert np.abs(half - blocks).max() <= 0.5
    cv2 = pytest.importorskip("cv2")
    theirs = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.abs(plain.astype(int) - theirs).max() <= 1


def test_halved_sets_are_scored_at_half_size(tmp_path):
    picture, label = small_datasets.picture(3), small_datasets.raw_label(3)
    sample = Sample(
        id="m/x",
        image=small_datasets.save(tmp_path / "x.png", picture),
        label=small_datasets.save(tmp_path / "l.png", label),
        height=20,
        width=32,
    )
    sizes = Sizes(short_side=5, halve=True, resize="plain")
    item = read_item(sample, EvaluateConfig(), sizes)
    assert (item.image_HW3.shape, item.size) == ((5, 8, 3), (10, 16))
    assert (item.label_HW == resize_label(label, (10, 16))).all()
    item = read_item(sample, EvaluateConfig(label_resolution="network"), Sizes())
    assert item.size == item.label_HW.shape == (20, 32)


def test_a_published_protocol_is_run_and_stored(inputs, tmp_path):
    told = Told()
    summary, results = evaluated(inputs, tmp_path / "out", told=told, protocol="rein", batch_size=2)
    protocol = results["protocol"]
    assert protocol["name"] == "rein"
    assert protocol["layouts"] == (
        "acdc short side 540, long side 960; bdd100k own size; "
        "mapillary short side 512, long side 1024, halved first"
    )
    assert "protocol: rein" in told.notes
    assert summary.text.startswith("mIoU by rein: acdc ")
    assert results["sets"]["m"]["label_map"] == "mapillary_r"
    halved = [
        resize_label(sample.read_label(), (10, 16))
        for sample in load_index(inputs / "prepared" / "targets")
        if sample.dataset == "m"
    ]
    counted = sum(np.count_nonzero(label != 255) for label in halved)
    assert np.sum(results["sets"]["m"]["confusion"]) == counted
    _, other = evaluated(inputs, tmp_path / "v", protocol="vltseg", short_side=32, long_side=None)
    assert other["protocol"]["name"] == (
        "vltseg, changed: long_side none, short_side 32, mapillary by map mapillary_r"
    )


def test_means_over_16_and_13_classes_stand_beside_all_19(inputs, tmp_path):
    _, results = evaluated(inputs, tmp_path / "all", batch_size=1)
    for entry in results["sets"].values():
        by_classes = entry["miou_by_classes"]
        assert set(by_classes) == {"19", "16", "13"}
        assert by_classes["19"] == pytest.approx(entry["miou"])
        for count, dropped in LEFT_OUT.items():
            kept = [v for i, v in enumerate(entry["iou"]) if i not in dropped and v is not None]
            assert by_classes[str(count)] == pytest.approx(np.mean(kept))
    assert [NAMES[i] for i in LEFT_OUT[16]] == ["terrain", "truck", "train"]
    assert {NAMES[i] for i in LEFT_OUT[13]} - {NAMES[i] for i in LEFT_OUT[16]} == {
        "wall",
        "fence",
        "pole",
    }
    _, sixteen = evaluated(inputs, tmp_path / "16", batch_size=1, classes=16)
    for name, entry in sixteen["sets"].items():
        assert entry["miou"] == results["sets"][name]["miou_by_classes"]["16"]
        assert entry["confusion"] == results["sets"][name]["confusion"]


def test_acdc_is_scored_per_condition_and_together(inputs, tmp_path):
    _, results = evaluated(inputs, tmp_path / "out", batch_size=1)
    assert "conditions" not in results["sets"]["city"]
    entry = results["sets"]["acdc"]
    conditions = entry["conditions"]
    assert list(conditions) == ["fog", "night", "rain", "snow"]
    total = np.sum([part["confusion"] for part in conditions.values()], axis=0)
    assert entry["confusion"] == total.tolist()
    assert entry["miou"] == scores(total.tolist(), "cityscapes")["miou"]
    alone = [scores(part["confusion"], "cityscapes")["miou"] for part in conditions.values()]
    assert entry["miou_mean_of_conditions"] == pytest.approx(np.mean(alone))
    labels = small_datasets.raw_label(1, (0, 2, 10, 255))
    assert np.sum(conditions["night"]["confusion"]) == np.count_nonzero(labels != 255)
    assert [part["num_images"] for part in conditions.values()] == [1, 1, 1, 1]
    assert entry["num_images"] == 4


def test_rpd_relates_unseen_domains_to_the_one_trained_on(inputs, tmp_path):
    assert 100 * relative_performance([0.660, 0.772, 0.733], 0.85) == pytest.approx(84.9, abs=0.05)
    assert relative_performance([None], 0.5) is None
    assert relative_performance([0.5], 0) is None
    summary, results = evaluated(inputs, tmp_path / "out", batch_size=1, training_domain="city")
    sets = results["sets"]
    unseen = np.mean([sets[name]["miou"] for name in ("acdc", "bdd", "m")])
    assert results["miou_mean"] == pytest.approx(unseen)
    assert results["rpd"] == pytest.approx(unseen / sets["city"]["miou"])
    assert results["training_domain"] == "city"
    assert summary.numbers["rpd"] == round(100 * results["rpd"], 2)
    assert "rPD" in summary.text
    with pytest.raises(ValueError, match=r"training_domain is 'gone'.*acdc, bdd, city, m"):
        evaluated(inputs, tmp_path / "bad", training_domain="gone")


def test_fewer_classes_are_refused_where_the_19_are_not_told_apart(inputs, tmp_path):
    space = json.loads((inputs / "prepared" / "labelspace" / "labelspace.json").read_text())
    part = tmp_path / "prepared"
    (part / "labelspace").mkdir(parents=True)
    space["classes"] = space["classes"][:3]
    (part / "labelspace" / "labelspace.json").write_text(json.dumps(space))
    (part / "targets").symlink_to(inputs / "prepared" / "targets")
    save_checkpoint(tmp_path / "model", NAMES[:3])
    with pytest.raises(ValueError, match=r"evaluate\.classes is 16.*set evaluate\.classes=all"):
        evaluated(tmp_path, tmp_path / "out", classes=16)


def test_an_average_that_does_not_exist_is_missed_before_anything_is_loaded(inputs, tmp_path):
    told = Told()
    with pytest.raises(FileNotFoundError, match=r"evaluate\.weights=model.*ema\.decay"):
        evaluated(inputs, tmp_path / "out", told=told, weights="ema")
    assert not told.started


def test_mapillary_raw_ids_differ_in_eleven_places_between_the_two_maps(inputs):
    space = load_labelspace("cityscapes19")
    h, r = (space.id_map(f"mapillary_{key}", wanted_by="test") for key in "hr")
    differing = [raw for raw in range(66) if h.table[raw] != r.table[raw]]
    assert differing == [7, 8, 9, 10, 11, 14, 23, 41, 44, 46, 49]
    (sample, *_) = [s for s in load_index(inputs / "prepared" / "targets") if s.dataset == "m"]
    raw = read_label(sample.label)
    assert (sample.read_label() == r.table[raw]).all()
    assert (sample.read_label() != h.table[raw]).any()


def test_pictures_of_every_mode_and_size_are_judged_together(tmp_path):
    """Gray, 16 bit, CMYK, turned by EXIF, with a palette, one pixel: the truth fits the eye."""
    rgb, raw = small_datasets.picture(0), small_datasets.raw_label(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.ascontiguousarray(np.rot90(rgb))
    pictures = {
        "gray.png": (Image.fromarray(rgb[..., 0]), {}),
        "deep.png": (Image.fromarray(rgb[..., 0].astype(np.uint16) * 256), {}),
        "cmyk.jpg": (Image.fromarray(rgb).convert("CMYK"), {}),
        "turned.jpg": (Image.fromarray(turned), {"exif": exif}),
        "palette.png": (Image.fromarray(rgb).quantize(16), {}),
        "dot.png": (Image.fromarray(rgb[:1, :1]), {}),
    }
    for name, (picture, options) in pictures.items():
        (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "data" / "images" / name, **options)
        label = raw[:1, :1] if name == "dot.png" else raw
        stem = name.partition(".")[0]
        small_datasets.save(tmp_path / "data" / "labels" / f"{stem}.png", label, palette=True)
    targets = [{"name": "odd", "root": str(tmp_path / "data"), "layout": "gta5"}]
    (tmp_path / "prepared").mkdir()
    recipe = Recipe(data={"targets": targets})
    prepare.run(stage_config(recipe, "prepare"), out=tmp_path / "prepared", progress=Told())
    save_checkpoint(tmp_path / "model", NAMES)
    _, results = evaluated(tmp_path, tmp_path / "out", batch_size=2)
    counted = 5 * np.count_nonzero(raw) + int(raw[0, 0] != 0)
    assert np.sum(results["sets"]["odd"]["confusion"]) == counted
    assert results["sets"]["odd"]["num_images"] == 6


def test_targets_with_other_classes_are_refused_by_value(tmp_path):
    small_datasets.gta5(tmp_path / "data", count=1)
    small_datasets.save(tmp_path / "data" / "labels" / "00001.png", np.full((20, 32), 77, np.uint8))
    targets = [{"name": "odd", "root": str(tmp_path / "data"), "layout": "gta5"}]
    recipe = Recipe(data={"targets": targets})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"00001\.png: values 77 are not in label map 'gta5'"):
        prepare.run(stage_config(recipe, "prepare"), out=tmp_path / "out", progress=Told())


@pytest.mark.parametrize(
    "section",
    [{"flip": True}, {"scales": (0.75, 1.5)}, {"flip": True, "scales": (2.0,), "short_side": 24}],
)
def test_mirrored_and_scaled_pictures_are_judged_as_predict_averages_them(
    inputs, tmp_path, section
):
    _, plain = evaluated(inputs, tmp_path / "plain", batch_size=1)
    summary, results = evaluated(inputs, tmp_path / "out", batch_size=1, **section)
    config = EvaluateConfig(**section)
    segmenter = load_segmenter(inputs / "model")
    by_hand = {"flip": config.flip, "scales": config.scales}
    expected = np.zeros((len(NAMES), len(NAMES)), int)
    for sample in load_index(inputs / "prepared" / "targets"):
        if sample.dataset == "city":
            item = read_item(sample, config, Sizes(config.short_side))
            image = torch.from_numpy(item.image_HW3).permute(2, 0, 1)[None]
            found = predict(segmenter, image, size=item.size, **by_hand).argmax(1)[0].numpy()
            known = item.label_HW != 255
            np.add.at(expected, (item.label_HW[known], found[known]), 1)
    confusion, before = (np.array(r["sets"]["city"]["confusion"]) for r in (results, plain))
    assert (confusion == expected).all()
    assert (confusion != before).any()
    protocol = results["protocol"]
    assert protocol.get("flip", False) == config.flip
    assert protocol.get("scales", [1.0]) == list(config.scales)
    assert not plain["protocol"].keys() & {"flip", "scales"}
    assert summary.text.startswith(f"mIoU by {named(config)}: acdc ")


@pytest.mark.parametrize(
    ("section", "share"),
    [
        ({"short_side": 16}, 0.002),
        ({"mode": "slide", "window": 16}, 0.002),
        ({"mode": "slide", "window": 16, "flip": True}, 0.002),
        # averaged at the network's size first, then resized: not the last pixel of every edge
        ({"short_side": 16, "flip": True, "scales": (0.5, 1.5)}, 0.03),
    ],
)
def test_large_pictures_are_judged_in_bands_with_the_same_labels(
    inputs, tmp_path, monkeypatch, section, share
):
    section = section | {"stride": 12, "batch_size": 2}
    _, at_once = evaluated(inputs, tmp_path / "once", **section)
    monkeypatch.setattr(judging, "LARGE_PX", 600)
    _, in_bands = evaluated(inputs, tmp_path / "bands", **section)
    for name, entry in at_once["sets"].items():
        first, second = (np.array(r["sets"][name]["confusion"]) for r in (at_once, in_bands))
        assert first.sum() == second.sum()
        assert np.abs(first - second).sum() <= share * first.sum(), entry["layout"]
    with pytest.raises(ValueError, match=r"picture of 20x32 .*evaluate\.short_side=1024"):
        evaluated(inputs, tmp_path / "whole")
    scaled = {"mode": "slide", "window": 16, "stride": 12, "scales": (0.5, 1.5)}
    with pytest.raises(ValueError, match=r"20x32 .*evaluate\.scales=\[0\.5, 1\.5\] cannot: set"):
        evaluated(inputs, tmp_path / "scaled", **scaled)
