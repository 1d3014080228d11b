"""How good pseudo-labels are where the truth is known: counted, never trained on."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flows.recipes import ConfigError, load_recipe
from models.build import build_segmenter
from models.checkpoints import save_segmenter
from stages import prepare, pseudo_label, refine, report, select, synthesize
from stages.config import Recipe
from stages.labels import IGNORE
from stages.readers import load_painted
from stages.shards import read_index
from stages.truth import compare, near_boundary, quality
from tests import small_datasets
from tests.report_artifacts import build
from tests.tiny import SEGMENTER, Told, stage_config

CLASSES = 4


def maps(seed: int, size=(14, 19)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = np.array([*range(CLASSES), IGNORE], np.uint8)
    coarse = values[rng.integers(0, len(values), (4, 5))]
    return np.kron(coarse, np.ones((4, 4), np.uint8))[: size[0], : size[1]]


def plain_iou(labels, truth, region, *, labelled_only: bool) -> dict[int, float]:
    """Sets of pixels, class by class."""
    counted = region & (truth != IGNORE)
    if labelled_only:
        counted &= labels != IGNORE
    found = {}
    for k in range(CLASSES):
        given, true = counted & (labels == k), counted & (truth == k)
        if (given | true).any():
            found[k] = (given & true).sum() / (given | true).sum()
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_iou_equals_sets_of_pixels_summed_over_pictures(seed):
    labels, truths = [maps(seed + n) for n in range(2)], [maps(seed + 9 + n) for n in range(2)]
    found = quality([compare(a, b) for a, b in zip(labels, truths, strict=True)])
    label, truth = np.hstack(labels), np.hstack(truths)
    near = np.hstack([near_boundary(each) for each in truths])
    for name, region in (("whole", np.ones_like(near)), ("boundary", near)):
        for key, labelled_only in (("iou", False), ("iou_labelled", True)):
            expected = plain_iou(label, truth, region, labelled_only=labelled_only)
            ours = {
                int(k): entry[key]
                for k, entry in found[name]["classes"].items()
                if entry[key] is not None
            }
            assert ours == pytest.approx(expected, abs=1e-6)
            mean = np.mean(list(expected.values())) if expected else None
            whole = found[name]["miou" if key == "iou" else "miou_labelled"]
            assert whole == (mean if mean is None else pytest.approx(mean, abs=1e-6))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_a_pixel_is_near_a_boundary_when_another_class_is_within_the_radius(seed, radius):
    truth = maps(seed)
    near = near_boundary(truth, radius_px=radius)
    for y, x in np.ndindex(truth.shape):
        window = truth[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        others = set(window.ravel().tolist()) - {IGNORE, int(truth[y, x])}
        assert near[y, x] == (truth[y, x] != IGNORE and bool(others))


@pytest.mark.parametrize("value", [IGNORE, 2])
def test_truth_against_itself_is_perfect_and_nothing_counts_for_nothing(value):
    truth = np.full((6, 8), value, np.uint8)
    found = quality([compare(truth, truth)])
    assert found["whole"]["miou"] == (None if value == IGNORE else 1.0)
    assert found["boundary"]["miou"] is None
    assert quality([compare(np.full_like(truth, IGNORE), truth)])["whole"]["accuracy"] is None


def test_maps_of_different_size_are_refused():
    with pytest.raises(ValueError, match="6x8, its truth 8x6"):
        compare(np.zeros((6, 8), np.uint8), np.zeros((8, 6), np.uint8))


# --- through the stages --------------------------------------------------------------------------

SET = {"name": "web", "root": "web", "split": "train", "truth": True}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A labelled set used as if unlabelled, through prepare, synthesize, ..., refine."""
    folder = tmp_path_factory.mktemp("chain")
    small_datasets.cityscapes(folder / "web", "train", count=5)
    made = {}
    for name, truth in (("known", True), ("unknown", False)):
        recipe = Recipe(
            data={"root": str(folder), "unlabelled": [SET | {"truth": truth}]},
            synthesize={"mode": "collect", "num_images": 4, "shard_size": 3},
            refine={"model": "tiny", "min_area": 30, "shard_size": 2},
            run={"device": "cpu"},
        )
        made[name] = _run(recipe, folder / name)
    return made


def _run(recipe, root):
    teacher = root / "teacher"
    names = [f"c{number}" for number in range(19)]
    save_segmenter(teacher, build_segmenter(SEGMENTER, class_names=names), label_space="x", step=0)
    outs = {"teacher": teacher}

    def stage(verb, name, **inputs):
        outs[name] = root / name
        outs[name].mkdir()
        return verb.run(
            stage_config(recipe, name, round=1), out=outs[name], progress=Told(), **inputs
        )

    stage(prepare, "prepare")
    stage(synthesize, "synthesize", unlabelled=outs["prepare"] / "unlabelled")
    outs["told"] = [
        stage(pseudo_label, "pseudo_label", pictures=outs["synthesize"], teacher=teacher)
    ]
    both = {"pictures": outs["synthesize"], "labels": outs["pseudo_label"]}
    stage(select, "select", **both)
    outs["told"].append(stage(refine, "refine", **both, selection=outs["select"]))
    return outs


def read(path):
    return np.asarray(Image.open(path))


def test_labels_are_compared_with_the_truth_before_and_after(chain):
    known = chain["known"]
    pictures = list(read_index(known["synthesize"]))
    truths = {row["id"]: read(row["folder"] / row["truth_file"]) for row in pictures}
    assert len(truths) == 4
    statistics = {
        name: json.loads((known[name] / "statistics.json").read_text())["truth"]
        for name in ("pseudo_label", "refine")
    }
    made = {
        name: quality(
            [
                compare(read(row["folder"] / row["label"]), truths[row["id"]])
                for row in read_index(known[name])
            ]
        )
        for name in statistics
    }
    assert statistics["pseudo_label"] == statistics["refine"]["before"] == made["pseudo_label"]
    assert statistics["refine"]["after"] == made["refine"]
    labelled, refined = known["told"]
    assert labelled.numbers["truth_miou"] == made["pseudo_label"]["whole"]["miou"]
    assert "against the truth of all" in labelled.text
    assert refined.numbers["truth_miou_after"] == made["refine"]["whole"]["miou"]
    assert "mIoU against the truth" in refined.text


def test_the_truth_changes_no_label_and_is_not_trained_on(chain):
    known, unknown = chain["known"], chain["unknown"]
    for name in ("pseudo_label", "refine"):
        pairs = zip(read_index(known[name]), read_index(unknown[name]), strict=True)
        for one, two in pairs:
            assert (read(one["folder"] / one["label"]) == read(two["folder"] / two["label"])).all()
            assert "truth" not in two
    samples = load_painted(known["synthesize"], known["refine"], known["select"])
    assert all(".truth." not in str(sample.label) for sample in samples)
    assert not list(unknown["synthesize"].rglob("*.truth.png"))


@pytest.mark.parametrize("role", ["sources", "targets", "validation"])
def test_truth_belongs_to_unlabelled_sets(tmp_path, role):
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{{role}: [{{name: a, root: a, truth: true}}]}}")
    with pytest.raises(ConfigError, match=r"sets truth, which belongs under data\.unlabelled"):
        load_recipe(str(path))


def test_a_set_without_labels_has_no_truth(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png")
    data = {"name": "a", "root": "a", "layout": "folder", "truth": True}
    recipe = Recipe(data={"root": str(tmp_path), "unlabelled": [data]})
    with pytest.raises(ValueError, match="without `truth`"):
        prepare.run(stage_config(recipe, "prepare"), out=tmp_path / "out", progress=Told())


# --- in the report -------------------------------------------------------------------------------


def reported(artifacts, out):
    out.mkdir()
    report.run(stage_config(Recipe(), "report"), out=out, progress=Told(), artifacts=artifacts)
    page = (out / "report.html").read_text(encoding="utf-8")
    return page, json.loads((out / "results.json").read_text())["label_quality"]


def test_the_report_shows_what_refinement_did_per_class(tmp_path, chain):
    artifacts = build(tmp_path / "a", pictures=2)
    page, none = reported(artifacts, tmp_path / "plain")
    assert none is None
    assert "How good the labels are" not in page
    truth = json.loads((chain["known"]["refine"] / "statistics.json").read_text())["truth"]
    truth["after"]["whole"]["miou"] = 0.4321
    (artifacts["refine@1"] / "statistics.json").write_text(json.dumps({"truth": truth}))
    page, table = reported(artifacts, tmp_path / "known")
    assert "How good the labels are" in page
    assert "43.2" in page
    mean = table["rows"][0]
    assert mean["whole"] == {"before": truth["before"]["whole"]["miou"], "after": 0.4321}
    assert 'value="truth"' not in page  # no truth beside the pictures themselves
    assert mean["boundary"]["after"] == truth["after"]["boundary"]["miou"]
    assert len(table["rows"]) == 1 + len(
        truth["before"]["whole"]["classes"].keys() | truth["after"]["whole"]["classes"].keys()
    )


def test_the_report_lays_the_truth_over_the_pictures(tmp_path, chain):
    known = chain["known"]
    names = {"pseudo_label": "pseudo_label@1", "refine": "refine@1", "synthesize": "synthesize"}
    artifacts = build(tmp_path / "a", pictures=2)
    for name, instance in names.items():
        for old in artifacts[instance].glob("shard-*"):
            shutil.rmtree(old)
        shutil.copytree(known[name], artifacts[instance], dirs_exist_ok=True)
    page, _ = reported(artifacts, tmp_path / "out")
    assert page.count('class="layer truth"') == 4
    assert 'name="over" value="truth"' in page


def test_the_report_shows_raw_labels_alone(tmp_path, chain):
    artifacts = build(tmp_path / "a", pictures=2, legs=("raw",))
    path = chain["known"]["pseudo_label"] / "statistics.json"
    (artifacts["pseudo_label@1"] / "statistics.json").write_text(path.read_text())
    _, table = reported(artifacts, tmp_path / "out")
    assert table["refined"] is False
    assert table["rows"][0]["whole"]["after"] is None
