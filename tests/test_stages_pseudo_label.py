"""Stage pseudo_label: a real (tiny, random) segmenter labels pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from models.build import build_segmenter
from models.checkpoints import load_segmenter, save_segmenter
from models.inference import entropy_of, label_of, predict
from stages import pseudo_label, write_prompts
from stages.labels import IGNORE
from stages.readers import read_image
from stages.shards import read_index, shard_folders
from tests.interruptions import Interrupted, Interrupting, digests
from tests.tiny import (
    CLASSES,
    SEGMENTER,
    Told,
    stage_config,
    tiny_recipe,
    write_labelspace,
    write_pictures,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    segmenter = build_segmenter(SEGMENTER, class_names=list(CLASSES))
    ema = {name: value * 1.5 for name, value in segmenter.trained_state().items()}
    save_segmenter(folder, segmenter, label_space="tiny", step=0, ema=ema)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), num_pictures=5)


def labelled(out, pictures, teacher, *, progress=None, **section):
    out.mkdir(exist_ok=True)
    how = {"batch_size": 2, "shard_size": 2} | section
    summary = pseudo_label.run(
        stage_config(tiny_recipe(pseudo_label=how), "pseudo_label", round=1),
        out=out,
        progress=progress or Told(),
        pictures=pictures,
        teacher=teacher,
    )
    return list(read_index(out)), json.loads((out / "statistics.json").read_text()), summary


def maps_of(row):
    label = np.asarray(Image.open(row["folder"] / row["label"]))
    return label, np.asarray(Image.open(row["folder"] / row["confidence"]))


@pytest.mark.parametrize("which", ["model", "ema"])
def test_labels_and_confidences_are_the_segmenters_own(tmp_path, pictures, teacher, which):
    rows, _, _ = labelled(tmp_path / "out", pictures, teacher, weights=which, batch_size=1)
    segmenter = load_segmenter(teacher, which=which)
    originals = {row["id"]: read_image(row["folder"] / row["file"]) for row in read_index(pictures)}
    for row in rows:
        image = torch.from_numpy(originals[row["id"]].copy()).permute(2, 0, 1)[None]
        scores = predict(segmenter, image)[0].double().numpy()
        label, confidence = maps_of(row)
        assert np.array_equal(label, scores.argmax(0))
        share = scores.max(0) / scores.sum(0)
        assert np.abs(confidence - share * 255).max() <= 0.51


def test_the_next_rounds_prompts_aim_at_what_was_labelled_little_or_unsurely(
    tmp_path, pictures, teacher
):
    rows, _, _ = labelled(tmp_path / "labelled", pictures, teacher)
    sure = dict.fromkeys(CLASSES, 0.0)
    for row in rows:
        label, confidence = maps_of(row)
        for number, name in enumerate(CLASSES):
            sure[name] += (confidence[label == number] / 255).sum()
    seen = sorted(pixels for pixels in sure.values() if pixels)
    median = seen[len(seen) // 2]
    out = tmp_path / "prompts"
    out.mkdir()
    write_prompts.run(
        stage_config(
            tiny_recipe(write_prompts={"num_prompts": 8, "aim": 1.0}), "write_prompts", round=2
        ),
        out=out,
        progress=Told(),
        labelspace=write_labelspace(tmp_path / "labelspace"),
        labelled=tmp_path / "labelled",
    )
    found = json.loads((out / "statistics.json").read_text())["classes"]
    for name, pixels in sure.items():
        expected = min(3.0, max(1.0, (median / max(pixels, 1)) ** 0.5))
        assert found[name]["weight"] == pytest.approx(expected, rel=0.02), name


def test_rows_and_statistics_count_what_the_maps_hold(tmp_path, pictures, teacher):
    rows, statistics, summary = labelled(tmp_path / "out", pictures, teacher)
    total = np.zeros(256, int)
    for row in rows:
        label, confidence = maps_of(row)
        counts = np.bincount(label.ravel(), minlength=256)
        total += counts
        assert row["classes"] == {str(k): int(counts[k]) for k in np.flatnonzero(counts)}
        assert row["mean_confidence"] == pytest.approx(confidence.mean() / 255, abs=1e-6)
        for key, mean in row["class_confidence"].items():
            assert mean == pytest.approx(confidence[label == int(key)].mean() / 255, abs=1e-6)
    assert {key: entry["pixels"] for key, entry in statistics["classes"].items()} == {
        str(k): int(total[k]) for k in np.flatnonzero(total)
    }
    assert statistics["num_pictures"] == 5
    assert summary.numbers["pictures"] == 5
    assert (tmp_path / "out" / "checkpoint.json").read_bytes() == (
        teacher / "checkpoint.json"
    ).read_bytes()


def test_unsure_pixels_get_no_label_under_a_threshold(tmp_path, pictures, teacher):
    plain, _, _ = labelled(tmp_path / "plain", pictures, teacher)
    shares = np.concatenate([maps_of(row)[1].ravel() for row in plain]) / 255
    threshold = float(np.median(shares))
    rows, _, _ = labelled(tmp_path / "out", pictures, teacher, threshold=threshold)
    for before, after in zip(plain, rows, strict=True):
        (label, confidence), (cut, _) = maps_of(before), maps_of(after)
        sure = confidence / 255 > threshold + 1 / 255
        unsure = confidence / 255 < threshold - 1 / 255
        assert np.array_equal(cut[sure], label[sure])
        assert (cut[unsure] == IGNORE).all()
        assert after["unlabelled"] == (cut == IGNORE).sum()
    assert sum(row["unlabelled"] for row in rows) > 0


def test_labels_of_nothing_are_refused_and_the_labelled_share_is_told(tmp_path, pictures, teacher):
    with pytest.raises(ValueError, match=r"no pixel of the 5.*threshold=1,.*lower the thresholds"):
        labelled(tmp_path / "nothing", pictures, teacher, threshold=1.0)
    plain, _, _ = labelled(tmp_path / "plain", pictures, teacher)
    threshold = float(np.median([maps_of(row)[1] for row in plain])) / 255
    rows, _, summary = labelled(tmp_path / "out", pictures, teacher, threshold=threshold)
    unlabelled = sum((maps_of(row)[0] == IGNORE).mean() for row in rows) / len(rows)
    assert 0.1 < unlabelled < 0.9
    assert summary.numbers["labelled_share"] == pytest.approx(1 - unlabelled, abs=1e-4)
    assert f"{1 - unlabelled:.0%} of the pixels have a label" in summary.text


@pytest.mark.parametrize(
    ("scores", "threshold", "label", "confidence"),
    [
        ([0.2, 0.6, 0.2], 0.0, 1, 153),
        ([0.2, 0.6, 0.2], 0.61, IGNORE, 153),
        ([0.4, 1.2, 0.4], 0.59, 1, 153),
        ([0.0, 0.0, 0.0], 0.0, 0, 0),
        ([0.0, 0.0, 3.0], 1.0, 2, 255),
    ],
)
def test_confidence_is_the_best_classs_share_of_all_scores(scores, threshold, label, confidence):
    found = label_of(torch.tensor(scores).view(1, 3, 1, 1), threshold=threshold)
    assert [int(part) for part in found] == [confidence, label]


def test_classes_can_have_thresholds_of_their_own(tmp_path, pictures, teacher):
    plain, _, _ = labelled(tmp_path / "plain", pictures, teacher)
    seen = [key for row in plain for key in row["classes"]]
    frequent = max(set(seen), key=seen.count)
    names = list(CLASSES)
    threshold = float(np.median([maps_of(row)[1] for row in plain])) / 255
    how = {"class_thresholds": {names[int(frequent)]: threshold}}
    rows, _, _ = labelled(tmp_path / "out", pictures, teacher, **how)
    for before, after in zip(plain, rows, strict=True):
        (label, confidence), cut = maps_of(before), maps_of(after)[0]
        unsure = (label == int(frequent)) & (confidence / 255 < threshold)
        clear = np.abs(confidence / 255 - threshold) > 1 / 255  # stored rounded
        assert np.array_equal(cut[clear], np.where(unsure, IGNORE, label)[clear])
    assert sum(row["unlabelled"] for row in rows) > 0
    with pytest.raises(ValueError, match=r"class_thresholds names 'tree'.*road, building"):
        labelled(tmp_path / "bad", pictures, teacher, class_thresholds={"tree": 0.5})


@pytest.mark.parametrize(
    ("shares", "entropy"),
    [([1, 1, 1, 1], 1.0), ([3, 0, 0, 0], 0.0), ([1, 1, 0, 0], 0.5), ([0.0, 0, 0, 0], 0.0)],
)
def test_entropy_is_0_for_one_class_and_1_for_all_alike(shares, entropy):
    scores = torch.tensor(shares, dtype=torch.float32).view(1, 4, 1, 1)
    assert entropy_of(scores).item() == pytest.approx(entropy, abs=1e-6)


def test_pixels_of_much_entropy_get_no_label(tmp_path, pictures, teacher):
    plain, _, _ = labelled(tmp_path / "plain", pictures, teacher, batch_size=1)
    segmenter = load_segmenter(teacher, which="ema")
    source = next(read_index(pictures))
    image = torch.from_numpy(read_image(source["folder"] / source["file"]).copy())
    entropy = entropy_of(predict(segmenter, image.permute(2, 0, 1)[None]))[0].numpy()
    limit = float(np.median(entropy))
    rows, _, _ = labelled(tmp_path / "out", pictures, teacher, batch_size=1, max_entropy=limit)
    before, after = maps_of(plain[0])[0], maps_of(rows[0])[0]
    clear = np.abs(entropy - limit) > 1e-5  # the last bits differ from batch to batch
    assert np.array_equal(after[clear], np.where(entropy > limit, IGNORE, before)[clear])
    assert 0.3 < (after == IGNORE).mean() < 0.7


def test_flipping_averages_with_the_mirrored_picture(tmp_path, pictures, teacher):
    rows, _, _ = labelled(tmp_path / "out", pictures, teacher, flip=True, batch_size=1)
    segmenter = load_segmenter(teacher, which="ema")
    source = next(read_index(pictures))
    image = torch.from_numpy(read_image(source["folder"] / source["file"]).copy())
    image = image.permute(2, 0, 1)[None]
    plain = predict(segmenter, image)
    both = plain + predict(segmenter, image.flip(3)).flip(3)
    _, confidence = maps_of(rows[0])
    share, unflipped = (255 * (s.amax(1) / s.sum(1))[0].numpy() for s in (both, plain))
    assert np.abs(confidence - share).max() <= 0.51
    assert np.abs(confidence - unflipped).max() > 0.51


@pytest.mark.parametrize(
    ("section", "by_hand"),
    [
        ({"scales": (0.5, 1.5)}, {"scales": (0.5, 1.5)}),
        (
            {"mode": "slide", "window": 48, "stride": 32},
            {"mode": "slide", "window": (48, 48), "stride": (32, 32)},
        ),
    ],
)
def test_scales_and_windows_are_those_of_predict(tmp_path, pictures, teacher, section, by_hand):
    rows, _, _ = labelled(tmp_path / "out", pictures, teacher, batch_size=1, **section)
    segmenter = load_segmenter(teacher, which="ema")
    source = next(read_index(pictures))
    image = torch.from_numpy(read_image(source["folder"] / source["file"]).copy())
    image = image.permute(2, 0, 1)[None]
    found, plain = predict(segmenter, image, **by_hand), predict(segmenter, image)
    _, confidence = maps_of(rows[0])
    share, at_once = (255 * (s.amax(1) / s.sum(1))[0].numpy() for s in (found, plain))
    assert np.abs(confidence - share).max() <= 0.51
    assert np.abs(confidence - at_once).max() > 0.51


def test_pictures_of_several_sizes_are_labelled_at_their_own(tmp_path, teacher):
    pictures = write_pictures(tmp_path / "pictures", num_pictures=4)
    shard = pictures / "shard-00000"
    for name, size in (("p1", (40, 70)), ("p3", (33, 65))):
        Image.new("RGB", size[::-1], "gray").save(shard / f"{name}.png")
    rows, _, _ = labelled(tmp_path / "out", pictures, teacher, batch_size=4, shard_size=4)
    sizes = {row["id"]: maps_of(row)[0].shape for row in rows}
    assert (sizes["p1"], sizes["p3"]) == ((40, 70), (33, 65))
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3"]


def test_an_interrupted_run_ends_the_same(tmp_path, pictures, teacher):
    labelled(tmp_path / "undisturbed", pictures, teacher)
    with pytest.raises(Interrupted):
        labelled(tmp_path / "out", pictures, teacher, progress=Interrupting(after=4))
    assert len(shard_folders(tmp_path / "out")) == 1
    told = Told()
    labelled(tmp_path / "out", pictures, teacher, progress=told)
    assert told.started == [(5, "pictures", 2)]
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_a_teacher_without_average_gives_its_own_weights_and_says_so(tmp_path, pictures, teacher):
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("model.safetensors", "checkpoint.json"):
        (plain / name).write_bytes((teacher / name).read_bytes())
    told = Told()
    _, statistics, _ = labelled(tmp_path / "out", pictures, plain, progress=told)
    assert statistics["weights"] == "model"
    assert "no moving average" in told.notes[0]


def test_bad_input_is_refused_with_the_way_out(tmp_path, pictures, teacher):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="--stage synthesize"):
        labelled(tmp_path / "a", empty, teacher)
    with pytest.raises(FileNotFoundError, match="--stage train_source"):
        labelled(tmp_path / "b", pictures, empty)
    broken = write_pictures(tmp_path / "broken", num_pictures=2)
    (broken / "shard-00000" / "p1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"p1\.png"):
        labelled(tmp_path / "c", broken, teacher)


@pytest.mark.parametrize("fits", [1, 0])
def test_a_batch_that_does_not_fit_into_memory_is_halved_and_recorded(
    tmp_path, pictures, teacher, monkeypatch, fits
):
    whole, _, _ = labelled(tmp_path / "whole", pictures, teacher, batch_size=1)
    sizes = []

    def predict_little(segmenter, images, **how):
        sizes.append(len(images))
        if len(images) > fits:
            raise torch.OutOfMemoryError("not enough")
        return predict(segmenter, images, **how)

    monkeypatch.setattr("stages.labelling.predict", predict_little)
    told = Told()
    if not fits:
        with pytest.raises(MemoryError, match="a single picture does not fit"):
            labelled(tmp_path / "out", pictures, teacher, progress=told)
        return
    rows, _, _ = labelled(tmp_path / "out", pictures, teacher, progress=told)
    assert sizes == [2, 1, 1, 2, 1, 1, 1]
    assert [row.get("batch_size") for row in rows] == [1, 1, 1, 1, None]
    assert told.notes[-1] == "out of memory with 2 pictures at once: 1 instead"
    for row, alone in zip(rows, whole, strict=True):
        assert np.array_equal(maps_of(row)[0], maps_of(alone)[0])
