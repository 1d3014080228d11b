"""Stage refine: the released rule with a real (tiny, random) Sam."""

import json
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from segment_anything import SamPredictor

from models.config import MINIATURE_DIR
from models.masks import find_components, label_map_of, merge_masks, remove_overlaps
from models.refine_rules import Agreement
from models.refiner import build_refiner
from stages import refine
from stages.config import RefineConfig
from stages.labels import IGNORE, load_labelspace
from stages.refine import count_changes
from stages.refinement import Outcome, Refinement
from stages.shards import item_seed, read_index, shard_folders, write_jsonl
from tests.interruptions import Interrupted, Interrupting, digests
from tests.tiny import (
    Told,
    stage_config,
    street,
    tiny_recipe,
    write_labels,
    write_pictures,
    write_selection,
)

torch.set_num_threads(1)
IDS = [f"p{number}" for number in range(5)]
MIN_AREA = 150


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "pictures": write_pictures(folder / "pictures"),
        "labels": write_labels(folder / "labels"),
        "selection": write_selection(folder / "selection", kept=IDS),
    }


def refined(out, inputs, *, progress=None, seed=0, **section):
    out.mkdir(exist_ok=True)
    how = {"model": "tiny", "rule": "released", "min_area": MIN_AREA}
    how |= {"shard_size": 2, "batch_size": 2} | section
    summary = refine.run(
        stage_config(tiny_recipe(refine=how, seed=seed), "refine", round=1),
        out=out,
        progress=progress or Told(),
        **inputs,
    )
    return list(read_index(out)), json.loads((out / "statistics.json").read_text()), summary


def label_of(row) -> np.ndarray:
    return np.asarray(Image.open(row["folder"] / row["label"]))


def released(predictor: SamPredictor, image, before, *, name: str, seed: int) -> np.ndarray:
    """The released rule written out plainly: per class, full frames, one decoder call each."""
    masks, classes = [], []
    for train_id in np.unique(before[before != IGNORE]):
        numbered, count = ndimage.label(before == train_id)
        for number in range(1, count + 1):
            component = numbered == number
            if component.sum() <= MIN_AREA:
                continue
            rows, columns = np.nonzero(component)
            rng = np.random.default_rng(item_seed(item_seed(seed, "refine"), name, len(masks)))
            drawn = rng.choice(len(rows), size=5, replace=False)
            predictor.set_image(image)
            found, iou, _ = predictor.predict(
                point_coords=np.stack([columns[drawn], rows[drawn]], axis=1),
                point_labels=np.ones(5),
                multimask_output=True,
            )
            masks.append(found[iou.argmax()])
            classes.append(train_id)
    if not masks:
        return before
    claims = np.sum(masks, axis=0)
    after = np.full_like(before, IGNORE)
    for mask, train_id in zip(masks, classes, strict=True):
        after[mask & (claims == 1)] = train_id
    return after


def test_labels_equal_the_released_rule_written_out_plainly(tmp_path, inputs):
    rows, _, _ = refined(tmp_path / "out", inputs, seed=4)
    predictor = SamPredictor(build_refiner("tiny", None, seed=4).sam)
    for number, row in enumerate(rows):
        image, before = street(1000 + number)
        expected = released(predictor, image, before, name=row["id"], seed=4)
        assert np.array_equal(label_of(row), expected)
    assert any((label_of(row) != street(1000 + n)[1]).any() for n, row in enumerate(rows))


def test_without_a_large_component_the_teachers_labels_stay(tmp_path, inputs):
    rows, statistics, _ = refined(tmp_path / "out", inputs, min_area=100_000)
    for number, row in enumerate(rows):
        assert np.array_equal(label_of(row), street(1000 + number)[1])
        assert row["counts"]["fallback"] is True
    assert statistics["num_fallback"] == 5
    assert statistics["components"] == 0


def test_statistics_are_the_sums_of_the_rows(tmp_path, inputs):
    rows, statistics, summary = refined(tmp_path / "out", inputs)
    befores = [street(1000 + number)[1] for number in range(5)]
    for train_id, totals in statistics["classes"].items():
        value = int(train_id)
        afters = [label_of(row) for row in rows]
        assert totals["before"] == sum((before == value).sum() for before in befores)
        assert totals["after"] == sum((after == value).sum() for after in afters)
        pairs = list(zip(befores, afters, strict=True))
        assert totals["kept"] == sum(((b == value) & (a == value)).sum() for b, a in pairs)
        assert totals["dropped"] == sum(((b == value) & (a == IGNORE)).sum() for b, a in pairs)
    assert statistics["components"] == sum(row["counts"]["components"] for row in rows)
    assert statistics["untrained"] is True
    assert "untrained SAM" in summary.text
    assert (tmp_path / "out" / "checkpoint.json").is_file()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 40))
def test_counts_add_up_whatever_the_maps_hold(seed, min_area):
    rng = np.random.default_rng(seed)
    values = np.array([0, 1, 2, IGNORE], np.uint8)
    before, after = (values[rng.integers(0, 4, (12, 17))] for _ in range(2))
    prompted = [each.label for each in find_components(before, min_area_px=min_area)]
    outcome = Outcome(label_HW=after, prompted=prompted, iou=[0.5] * len(prompted))
    counts = count_changes(before, outcome)
    for entry in counts["classes"].values():
        assert entry["before"] == entry["kept"] + entry["changed"] + entry["dropped"]
        assert entry["after"] == entry["kept"] + entry["gained"]
    classes = counts["classes"].values()
    assert sum(entry["before"] for entry in classes) == (before != IGNORE).sum()
    assert sum(entry["components"] for entry in classes) == counts["components"]


def with_confidences(labels, *, value: int, names=IDS):
    """A copy of the labels with a confidence map of one value beside each."""
    shard = labels / "shard-00000"
    rows = []
    for name in names:
        Image.new("L", street(0)[1].shape[::-1], value).save(shard / f"{name}.confidence.png")
        rows.append(
            {"id": name, "label": f"{name}.label.png", "confidence": f"{name}.confidence.png"}
        )
    write_jsonl(shard / "index.jsonl", rows)
    return labels


@pytest.mark.parametrize("prompts", [[], ["box"], ["mask"], ["box", "mask"]])
def test_rule_agreement_keeps_the_labels_of_a_sure_teacher_where_sam_is_useless(
    tmp_path, inputs, prompts
):
    shutil.copytree(inputs["labels"], tmp_path / "labels")
    labels = with_confidences(tmp_path / "labels", value=255)
    rows, statistics, _ = refined(
        tmp_path / "out",
        inputs | {"labels": labels},
        rule="agreement",
        prompts=prompts,
        min_iou=1.0,
    )
    for number, row in enumerate(rows):
        assert np.array_equal(label_of(row), street(1000 + number)[1])
    assert statistics["accepted"] == 0
    assert statistics["trusted"] == statistics["components"] > 0


def test_rule_agreement_leaves_out_what_neither_sam_nor_the_teacher_is_sure_of(tmp_path, inputs):
    shutil.copytree(inputs["labels"], tmp_path / "labels")
    labels = with_confidences(tmp_path / "labels", value=20)
    rows, _, _ = refined(
        tmp_path / "out", inputs | {"labels": labels}, rule="agreement", min_iou=1.0
    )
    assert all((label_of(row) == IGNORE).all() for row in rows)


def test_rule_agreement_has_the_same_defaults_as_its_settings():
    assert RefineConfig().rule == "agreement"
    for entry in fields(Agreement):
        assert getattr(RefineConfig(), entry.name) == entry.default, entry.name


AUTOMATIC = {
    "auto_points": 4,
    "auto_min_iou": 0.0,
    "auto_min_stability": 0.0,
    "auto_crop_layers": 0,
}


@pytest.mark.parametrize(
    ("rule", "labelspace"),
    [("majority", "cityscapes19"), ("guided", "miniature"), ("stuff_things", "miniature")],
)
def test_rules_on_automatic_masks_run_with_a_real_sam_and_end_the_same(
    tmp_path, inputs, rule, labelspace
):
    shutil.copytree(inputs["labels"], tmp_path / "labels")
    labels = with_confidences(tmp_path / "labels", value=200)
    names = list(load_labelspace(labelspace).names)
    (labels / "checkpoint.json").write_text(json.dumps({"format": 1, "class_names": names}))
    how = AUTOMATIC | {"rule": rule}
    rows, statistics, _ = refined(tmp_path / "one", inputs | {"labels": labels}, **how)
    for number, row in enumerate(rows):
        assert set(np.unique(label_of(row))) <= {*np.unique(street(1000 + number)[1]), IGNORE}
    assert statistics["automatic"] > 0
    with pytest.raises(Interrupted):
        refined(
            tmp_path / "two", inputs | {"labels": labels}, progress=Interrupting(after=4), **how
        )
    refined(tmp_path / "two", inputs | {"labels": labels}, **how)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("rule", ["guided", "stuff_things"])
def test_rules_by_class_refuse_classes_they_do_not_know(tmp_path, inputs, rule):
    labels = write_labels(tmp_path / "labels", classes=["road", "car", "lane marking"])
    message = rf"refine\.rule={rule}: .*'lane marking'.* Use released, agreement or majority"
    with pytest.raises(ValueError, match=message):
        refined(tmp_path / "out", inputs | {"labels": labels}, rule=rule)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 5), st.floats(0, 1))
def test_merging_in_one_pass_equals_removing_overlaps_first(seed, num_masks, share):
    rng = np.random.default_rng(seed)
    stack = torch.from_numpy(rng.random((num_masks, 6, 9)) < share)
    labels = rng.integers(0, 19, num_masks).tolist()
    merged = merge_masks(stack, labels, void=IGNORE)
    assert merged.dtype == torch.uint8
    if num_masks:
        assert torch.equal(merged, label_map_of(remove_overlaps(stack), labels, void=IGNORE))
    else:
        assert (merged == IGNORE).all()


def test_only_kept_pictures_are_refined(tmp_path, inputs):
    selection = write_selection(tmp_path / "selection", kept=["p1", "p4"])
    rows, _, _ = refined(tmp_path / "out", inputs | {"selection": selection})
    assert [row["id"] for row in rows] == ["p1", "p4"]


def test_a_pictures_labels_do_not_depend_on_which_others_are_kept(tmp_path, inputs):
    everything, _, _ = refined(tmp_path / "all", inputs, batch_size=1)
    selection = write_selection(tmp_path / "selection", kept=["p3"])
    (alone,), _, _ = refined(tmp_path / "one", inputs | {"selection": selection}, batch_size=1)
    assert np.array_equal(label_of(alone), label_of(everything[3]))


def test_an_interrupted_run_ends_the_same(tmp_path, inputs):
    refined(tmp_path / "undisturbed", inputs)
    with pytest.raises(Interrupted):
        refined(tmp_path / "out", inputs, progress=Interrupting(after=4))
    assert len(shard_folders(tmp_path / "out")) == 1
    told = Told()
    refined(tmp_path / "out", inputs, progress=told)
    assert told.started == [(5, "pictures", 2)]
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


@pytest.mark.parametrize("rule", ["released", "agreement", "majority", "guided", "stuff_things"])
@pytest.mark.parametrize("value", [IGNORE, 2, 13])
def test_maps_of_nothing_or_of_one_class_are_refined_sensibly(tmp_path, inputs, rule, value):
    shutil.copytree(inputs["labels"], tmp_path / "labels")
    labels = with_confidences(tmp_path / "labels", value=200)
    names = list(load_labelspace("cityscapes19").names)
    (labels / "checkpoint.json").write_text(json.dumps({"format": 1, "class_names": names}))
    uniform = np.full(street(0)[1].shape, value, np.uint8)
    for name in IDS:
        Image.fromarray(uniform).save(labels / "shard-00000" / f"{name}.label.png")
    how = AUTOMATIC | {"rule": rule}
    rows, statistics, summary = refined(tmp_path / "out", inputs | {"labels": labels}, **how)
    for row in rows:
        assert set(np.unique(label_of(row))) <= {value, IGNORE}
    assert statistics["classes"].keys() <= {str(value)}
    assert summary.numbers["pictures"] == 5
    assert ("no pixel had a label" in summary.text) == (value == IGNORE)
    if value == IGNORE:
        assert (summary.numbers["kept_share"], summary.numbers["lost_share"]) == (0, 0)


def test_what_is_lost_is_told_and_a_refinement_that_leaves_no_label_is_noted(tmp_path, inputs):
    labels = with_confidences(shutil.copytree(inputs["labels"], tmp_path / "labels"), value=100)
    told, how = Told(), {"rule": "agreement", "min_agreement": 1.0}
    _, statistics, summary = refined(
        tmp_path / "out", inputs | {"labels": labels}, progress=told, **how
    )
    assert sum(counts["after"] for counts in statistics["classes"].values()) == 0
    assert "100% lost their label" in summary.text
    assert any("no pixel of any picture has a label" in note for note in told.notes)
    told = Told()
    _, _, summary = refined(tmp_path / "kept", inputs, progress=told, min_area=100_000)
    assert summary.numbers["lost_share"] == 0
    assert not any("no pixel" in note for note in told.notes)


def test_train_ids_beyond_the_labels_own_classes_are_refused(tmp_path, inputs):
    labels = tmp_path / "labels"
    shutil.copytree(inputs["labels"], labels)
    Image.fromarray(np.full(street(0)[1].shape, 17, np.uint8)).save(
        labels / "shard-00000" / "p1.label.png"
    )
    with pytest.raises(ValueError, match=r"p1\.label\.png of picture p1 holds train id 17.*4 clas"):
        refined(tmp_path / "out", inputs | {"labels": labels})


@pytest.mark.skipif(
    not (MINIATURE_DIR / "sam" / "sam.safetensors").is_file(),
    reason="models/miniature/sam is not shipped yet",
)
def test_the_miniatures_sam_is_loaded_by_its_name(tmp_path, inputs):
    rows, statistics, _ = refined(
        tmp_path / "out", inputs, model="config", weights="builtin:sam", min_area=50
    )
    assert statistics["untrained"] is False
    assert len(rows) == 5


def test_labels_of_another_size_than_the_picture_are_refused(tmp_path, inputs):
    labels = tmp_path / "labels"
    shutil.copytree(inputs["labels"], labels)
    Image.new("L", (10, 12)).save(labels / "shard-00000" / "p2.label.png")
    with pytest.raises(ValueError, match=r"picture p2 is .* its p2.label.png 12x10"):
        refined(tmp_path / "out", inputs | {"labels": labels})


def test_artifacts_that_do_not_belong_together_are_refused(tmp_path, inputs):
    stray = write_selection(tmp_path / "stray", kept=["p9"], num_pictures=10)
    with pytest.raises(ValueError, match=r"first: p9.*do not belong together"):
        refined(tmp_path / "a", inputs | {"selection": stray})
    fewer = write_labels(tmp_path / "fewer", num_pictures=3)
    with pytest.raises(ValueError, match=r"first: p3.*do not belong together"):
        refined(tmp_path / "b", inputs | {"labels": fewer})
    none = write_selection(tmp_path / "none", kept=[])
    with pytest.raises(ValueError, match="keeps none"):
        refined(tmp_path / "c", inputs | {"selection": none})


def test_missing_weights_stop_the_stage_before_any_work(tmp_path, inputs):
    told = Told()
    with pytest.raises(FileNotFoundError, match=r"refine\.weights"):
        refined(tmp_path / "out", inputs, model="vit_b", weights="none.pth", progress=told)
    assert told.started == []


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_recorded(
    tmp_path, inputs, monkeypatch
):
    whole, _, _ = refined(tmp_path / "whole", inputs, batch_size=1)
    refine, sizes = Refinement.refine, []

    def refine_little(self, subjects):
        sizes.append(len(subjects))
        if len(subjects) > 1:
            raise torch.OutOfMemoryError("not enough")
        return refine(self, subjects)

    monkeypatch.setattr(Refinement, "refine", refine_little)
    rows, _, _ = refined(tmp_path / "out", inputs, batch_size=3, shard_size=3)
    assert sizes == [3, 2, 1, 1, 1, 2, 1, 1]
    assert [row["batch_size"] for row in rows] == [1] * 5
    for row, alone in zip(rows, whole, strict=True):
        assert np.array_equal(label_of(row), label_of(alone))
