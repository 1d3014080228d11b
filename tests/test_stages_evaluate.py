"""`evaluate` and its numbers: held against plain recomputation, torchmetrics, and interruption."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from models.build import build_segmenter
from models.checkpoints import load_segmenter, save_segmenter
from stages import evaluate, prepare
from stages.config import Recipe
from stages.judging_config import EvaluateConfig
from stages.labels import load_labelspace, read_labelspace
from stages.metrics import DatasetScore, mean, scores
from stages.readers import load_index, network_size, resize_label
from tests import small_datasets
from tests.small_judged import evaluated, save_checkpoint
from tests.tiny import SEGMENTER, Told, stage_config, write_labelspace

NAMES = load_labelspace("cityscapes19").names
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two prepared targets and a checkpoint with random weights."""
    root = tmp_path_factory.mktemp("evaluate")
    small_datasets.cityscapes(root / "city", count=5)
    small_datasets.gta5(root / "gta", count=3)
    wide = (24, 40)
    small_datasets.save(root / "gta" / "images" / "00002.png", small_datasets.picture(2, wide))
    label = np.pad(small_datasets.raw_label(2), ((0, 4), (0, 8)), mode="edge")
    small_datasets.save(root / "gta" / "labels" / "00002.png", label, palette=True)
    targets = [
        {"name": "city", "root": "city"},
        {"name": "gta", "root": "gta", "layout": "gta5"},
    ]
    recipe = Recipe(data={"root": str(root), "targets": targets})
    (root / "prepared").mkdir()
    prepare.run(stage_config(recipe, "prepare"), out=root / "prepared", progress=Told())
    save_checkpoint(root / "model", NAMES)
    return root


class Interrupted(Told):
    """Progress that stops a stage after so many units."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, count: int = 1, **metrics: float) -> None:
        super().advance(count, **metrics)
        if self.advanced >= self.after:
            raise KeyboardInterrupt


def files(out):
    return {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def plain_confusion(inputs, name):
    """One picture at a time, counted pixel by pixel in Python."""
    segmenter = load_segmenter(inputs / "model")
    confusion = np.zeros((19, 19), int)
    for sample in load_index(inputs / "prepared" / "targets"):
        if sample.dataset != name:
            continue
        image = torch.from_numpy(sample.read_image().copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            predicted = segmenter.semantic(segmenter(image))[0].argmax(0).numpy()
        truth = sample.read_label()
        for row, column in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if row != 255:
                confusion[row, column] += 1
    return confusion


def test_results_equal_a_plain_recomputation(inputs, tmp_path):
    told = Told()
    summary, results = evaluated(inputs, tmp_path / "out", told=told, batch_size=1)
    assert told.started == [(8, "pictures", 0)]
    assert told.advanced == 8
    assert list(results["sets"]) == ["city", "gta"]
    for name, entry in results["sets"].items():
        confusion = plain_confusion(inputs, name)
        assert len(np.unique(confusion.nonzero()[1])) > 4, "too few classes to prove much"
        assert entry["confusion"] == confusion.tolist()
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        iou = [
            None if u == 0 else pytest.approx(right / u)
            for right, u in zip(confusion.diagonal(), union, strict=True)
        ]
        assert entry["iou"] == iou
        assert entry["miou"] == pytest.approx(np.mean([i.expected for i in iou if i is not None]))
        assert summary.numbers[f"miou_{name}"] == round(100 * entry["miou"], 2)
    assert results["miou_mean"] == mean([entry["miou"] for entry in results["sets"].values()])
    assert results["classes"] == list(NAMES)
    assert not (tmp_path / "out" / "state").exists()


def test_the_protocol_stands_beside_the_numbers(inputs, tmp_path):
    section = {"mode": "slide", "window": 32, "stride": 21, "absent": "mmseg"}
    _, results = evaluated(inputs, tmp_path / "out", precision="bf16", **section)
    expected = {
        "label_space": "cityscapes19",
        "weights": "model",
        "step": 7,
        "precision": "bf16",
        "short_side": None,
        "label_resolution": "native",
        **section,
    }
    assert expected.items() <= results["protocol"].items()
    assert results["sets"]["gta"]["label_map"] == "gta5"
    assert results["sets"]["gta"]["num_images"] == 3


def test_batches_of_several_pictures_count_every_picture_once(inputs, tmp_path):
    _, one = evaluated(inputs, tmp_path / "one", batch_size=1)
    _, four = evaluated(inputs, tmp_path / "four", batch_size=4)
    for name in ("city", "gta"):
        first, second = (np.array(r["sets"][name]["confusion"]) for r in (one, four))
        assert first.sum() == second.sum()
        assert np.abs(first - second).sum() <= 0.002 * first.sum()


def test_an_interrupted_run_continues_and_ends_the_same(inputs, tmp_path):
    evaluated(inputs, tmp_path / "whole", batch_size=2)
    for after in (2, 5, 7):
        out = tmp_path / f"cut{after}"
        with pytest.raises(KeyboardInterrupt):
            evaluated(inputs, out, told=Interrupted(after), batch_size=2)
        told = Told()
        evaluated(inputs, out, told=told, batch_size=2)
        kept = 0 if after < 6 else 5
        assert told.started == [(8, "pictures", kept)]
        assert told.advanced == 8 - kept
        assert files(out) == files(tmp_path / "whole")


def test_a_few_predictions_lie_beside_picture_and_truth(inputs, tmp_path):
    evaluated(inputs, tmp_path / "out", num_predictions=2, batch_size=1)
    lines = (tmp_path / "out" / "predictions" / "index.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["dataset"] for row in rows] == ["city", "city", "gta", "gta"]
    samples = {s.id: s for s in load_index(inputs / "prepared" / "targets")}
    space = read_labelspace(inputs / "prepared" / "labelspace")
    for row in rows:
        sample = samples[row["id"]]
        prediction = Image.open(tmp_path / "out" / row["file"])
        assert np.asarray(prediction).shape == (sample.height, sample.width)
        assert np.asarray(prediction).max() < 19
        painted = np.asarray(prediction.convert("RGB"))
        assert (painted == space.colourise(np.asarray(prediction))).all()
        truth = np.asarray(Image.open(tmp_path / "out" / row["truth_file"]))
        assert (truth == sample.read_label()).all()
        shown = np.asarray(Image.open(tmp_path / "out" / row["image_file"])).astype(int)
        assert np.abs(shown - sample.read_image()).mean() < 12
    evaluated(inputs, tmp_path / "none", num_predictions=0, batch_size=1)
    assert (tmp_path / "none" / "predictions" / "index.jsonl").read_text() == ""


def test_labels_are_scored_at_their_own_or_at_the_networks_size(inputs, tmp_path):
    _, native = evaluated(inputs, tmp_path / "native", short_side=32)
    _, network = evaluated(inputs, tmp_path / "network", short_side=32, label_resolution="network")
    samples = [s for s in load_index(inputs / "prepared" / "targets") if s.dataset == "city"]
    expected = sum(np.count_nonzero(s.read_label() != 255) for s in samples)
    assert np.sum(native["sets"]["city"]["confusion"]) == expected
    resized = [resize_label(s.read_label(), (32, 51)) for s in samples]
    expected = sum(np.count_nonzero(label != 255) for label in resized)
    assert np.sum(network["sets"]["city"]["confusion"]) == expected


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((360, 480), None, (360, 480)),
        ((360, 480), 180, (180, 240)),
        ((1052, 1914), 1024, (1024, 1863)),
        ((1914, 1052), 1024, (1863, 1024)),
        ((1, 1), 32, (32, 32)),
    ],
)
def test_the_networks_size_keeps_the_aspect(size, short_side, expected):
    assert network_size(size, short_side) == expected


def test_ema_weights_are_judged_when_asked_and_missed_by_name(inputs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ema\.safetensors"):
        evaluated(inputs, tmp_path / "out", weights="ema")
    segmenter = load_segmenter(inputs / "model")
    shifted = {n: v + 0.3 for n, v in segmenter.trained_state().items() if v.is_floating_point()}
    save_segmenter(tmp_path / "ema", segmenter, label_space="x", step=1, ema=shifted)
    _, plain = evaluated(inputs, tmp_path / "a", model=tmp_path / "ema")
    _, average = evaluated(inputs, tmp_path / "b", model=tmp_path / "ema", weights="ema")
    assert plain["sets"]["city"]["confusion"] != average["sets"]["city"]["confusion"]


def test_a_checkpoint_of_other_classes_is_refused(inputs, tmp_path):
    save_checkpoint(tmp_path / "other", [*NAMES[:-1], "scooter"])
    message = "only in the checkpoint: scooter; only in the label space: bicycle"
    with pytest.raises(ValueError, match=message):
        evaluated(inputs, tmp_path / "out", model=tmp_path / "other")
    save_checkpoint(tmp_path / "turned", NAMES[::-1])
    with pytest.raises(ValueError, match="the order differs"):
        evaluated(inputs, tmp_path / "out", model=tmp_path / "turned")


def test_missing_checkpoint_and_missing_targets_are_named(inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        evaluated(inputs, tmp_path / "out", model=tmp_path / "empty")
    (tmp_path / "empty" / "roots.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.targets"):
        evaluate.run(
            stage_config(Recipe(run={"device": "cpu"}), "evaluate"),
            out=tmp_path,
            progress=Told(),
            model=inputs / "model",
            targets=tmp_path / "empty",
            labelspace=inputs / "prepared" / "labelspace",
        )


def random_maps(seed, num_classes=7):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, num_classes, (6, 13, 17), dtype=np.uint8))
    predictions = labels.clone()
    noise = torch.from_numpy(rng.random(labels.shape) < 0.4)
    other = torch.from_numpy(rng.integers(0, num_classes, labels.shape, dtype=np.uint8))
    predictions[noise] = other[noise]
    labels[torch.from_numpy(rng.random(labels.shape) < 0.1)] = 255
    return predictions, labels


def test_scores_equal_torchmetrics_over_the_whole_set():
    classification = pytest.importorskip("torchmetrics.classification")
    oracle = classification.MulticlassJaccardIndex(7, average="none", ignore_index=255)
    total = DatasetScore(7, CPU)
    for seed in range(3):
        predictions, labels = random_maps(seed)
        total.add(predictions, labels)
        oracle.update(predictions.long(), labels.long())
    found = total.to_json()
    assert found["num_images"] == 18
    ours = scores(found["confusion"], "mmseg")
    np.testing.assert_allclose(ours["iou"], oracle.compute().numpy(), rtol=1e-6)
    assert ours["miou"] == pytest.approx(np.mean(ours["iou"]))


def test_classes_that_do_not_occur_count_as_the_rule_says():
    confusion = np.zeros((4, 4), int)
    confusion[0] = (6, 2, 0, 2)  # class 3 is predicted but not in the truth, 2 is neither
    confusion[1] = (1, 9, 0, 0)
    confusion = confusion.tolist()
    assert scores(confusion, "mmseg")["iou"] == pytest.approx([6 / 11, 9 / 12, None, 0.0])
    assert scores(confusion, "cityscapes")["miou"] == pytest.approx((6 / 11 + 9 / 12) / 3)
    assert scores(confusion, "detectron2")["iou"] == pytest.approx([6 / 11, 9 / 12, None, None])
    assert scores(confusion, "detectron2")["miou"] == pytest.approx((6 / 11 + 9 / 12) / 2)
    empty = scores(np.zeros((4, 4), int).tolist(), "mmseg")
    assert empty["miou"] is None
    assert json.loads(json.dumps(empty)) == empty


def test_means_leave_out_what_does_not_exist():
    assert mean([0.5, None, 1.0]) == 0.75
    assert mean([None]) is None


def test_the_tiny_label_space_of_training_is_judged_too(tmp_path):
    """A prepared set whose labels are train ids already (no map)."""
    space = read_labelspace(write_labelspace(tmp_path / "space"))
    small_datasets.gta5(tmp_path / "data", count=2)
    names = space.names
    segmenter = build_segmenter(SEGMENTER, class_names=names)
    save_segmenter(tmp_path / "model", segmenter, label_space="tiny", step=0)
    part = tmp_path / "targets"
    part.mkdir()
    rows = []
    for number in (1, 2):
        label = small_datasets.raw_label(number, (0, 1, 2, 3, 255))
        small_datasets.save(tmp_path / "data" / "labels" / f"{number:05d}.png", label)
        row = {"id": f"t/{number}", "image": f"images/{number:05d}.png"}
        row |= {"label": f"labels/{number:05d}.png", "height": 20, "width": 32}
        rows.append(json.dumps(row))
    (part / "t.jsonl").write_text("\n".join(rows))
    card = {"layout": "gta5", "label_map": None, "split": None, "also_in_sources": []}
    (part / "t.json").write_text(json.dumps(card))
    (part / "roots.json").write_text(json.dumps({"t": str(tmp_path / "data")}))
    recipe = Recipe(evaluate=EvaluateConfig(), run={"device": "cpu"})
    (tmp_path / "out").mkdir()
    evaluate.run(
        stage_config(recipe, "evaluate"),
        out=tmp_path / "out",
        progress=Told(),
        model=tmp_path / "model",
        targets=part,
        labelspace=tmp_path / "space",
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sets"]["t"]["label_map"] is None
    assert results["sets"]["t"]["num_images"] == 2
