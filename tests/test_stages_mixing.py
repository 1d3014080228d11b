"""Class mixing, and how far painted labels are trusted: weights of pictures, doubtful pixels."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages import self_train, train_source
from stages.augment import mix_classes
from stages.batches import MixedBatches
from stages.labels import IGNORE
from stages.readers import load_painted
from stages.shards import read_index, read_jsonl, write_jsonl
from stages.trust import DoubtedSample, belief, floors_of, sure_share, trusted
from tests.test_stages_batches import CROP, PLAIN, make_samples, same
from tests.tiny import (
    Told,
    stage_config,
    street,
    tiny_recipe,
    write_labels,
    write_labelspace,
    write_pictures,
    write_selection,
    write_sources,
)

SIZE = (9, 13)


def view(seed: int, values=(0, 1, 2, 3, IGNORE)):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return image, rng.choice(np.array(values, np.uint8), SIZE)


# --- mixing --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31))
def test_half_of_the_donors_classes_take_the_place_of_what_was_there(seed):
    onto, donor = view(seed), view(seed + 1, values=(0, 2, 5, IGNORE))
    kept = [each.copy() for each in (*onto, *donor)]
    image, labels, share = mix_classes(onto, donor, np.random.default_rng(seed))
    present = set(donor[1].ravel().tolist()) - {IGNORE}
    drawn = {
        k
        for k in present
        if (labels[donor[1] == k] == k).all() and (image == donor[0])[donor[1] == k].all()
    }
    pasted = np.isin(donor[1], list(drawn))
    assert len(drawn) == (len(present) + 1) // 2
    assert share == pytest.approx(pasted.mean())
    assert np.array_equal(image[~pasted], onto[0][~pasted])
    assert np.array_equal(labels[~pasted], onto[1][~pasted])
    for before, now in zip(kept, (*onto, *donor), strict=True):
        assert np.array_equal(before, now)  # the cache's arrays are not written to


@pytest.mark.parametrize("value", [IGNORE, 4])
def test_a_donor_of_nothing_gives_nothing_and_one_of_one_class_gives_all(value):
    onto, donor = view(0), (view(1)[0], np.full(SIZE, value, np.uint8))
    image, labels, share = mix_classes(onto, donor, np.random.default_rng(0))
    expected = onto if value == IGNORE else donor
    assert np.array_equal(image, expected[0])
    assert np.array_equal(labels, expected[1])
    assert share == (value != IGNORE)


@pytest.fixture
def kinds(tmp_path):
    return make_samples(tmp_path, 7), make_samples(tmp_path, 5, painted=True)


def mixed_batches(kinds, **options):
    settings_ = {"augment": PLAIN, "painted_augment": PLAIN, "seed": 0} | options
    return MixedBatches(*kinds, batch_size=4, painted_share=0.5, **settings_)


def test_only_painted_rows_are_mixed_and_the_draws_stay_the_same(kinds):
    plain, mixed = (mixed_batches(kinds, mixing=mixing) for mixing in (False, True))
    differing = 0
    for step in range(4):
        one, two = plain.batch(step), mixed.batch(step)
        assert (one.ids, one.seeds) == (two.ids, two.seeds)
        assert torch.equal(one.images_B3HW[:2], two.images_B3HW[:2])
        differing += int((one.images_B3HW[2:] != two.images_B3HW[2:]).any())
        assert two.weights_B.tolist() == [1.0] * 4
    assert differing == 4


def test_mixed_batches_depend_on_seed_and_step_alone(kinds):
    batches = mixed_batches(kinds, mixing=True, augment=CROP, painted_augment=CROP)
    whole = batches.batch(3)
    batches.batch(0)
    assert same(batches.batch(3), whole)
    for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
        assert same(batches.batch(3, part), whole.rows(part))
    (read,) = mixed_batches(kinds, mixing=True, augment=CROP, painted_augment=CROP).stream(
        3, 4, workers=1
    )
    assert same(read, whole)
    assert not same(mixed_batches(kinds, mixing=True, seed=1).batch(3), whole)


def test_a_mixed_view_weighs_as_its_pixels_do(kinds):
    sources, painted = kinds
    light = [sample.__class__(**{**vars(sample), "weight": 0.25}) for sample in painted]
    plain = mixed_batches((sources, painted)).batch(0)
    mixed = mixed_batches((sources, light), mixing=True).batch(0)
    assert mixed.weights_B[:2].tolist() == [1.0, 1.0]
    for row in (2, 3):
        moved = (mixed.images_B3HW[row] != plain.images_B3HW[row]).any(0).float().mean()
        assert mixed.weights_B[row] == pytest.approx(0.25 + 0.75 * moved.item(), abs=0.02)
    assert mixed_batches((sources, light)).batch(0).weights_B.tolist() == [1, 1, 0.25, 0.25]


def test_mixing_needs_source_samples(kinds):
    with pytest.raises(ValueError, match="no source samples"):
        MixedBatches(
            [],
            kinds[1],
            batch_size=2,
            painted_share=1.0,
            augment=PLAIN,
            painted_augment=PLAIN,
            seed=0,
            mixing=True,
        )


# --- trust ---------------------------------------------------------------------------------------


def test_a_pictures_weight_is_its_share_of_sure_pixels():
    confidence = np.array([[255, 247], [246, 0]], np.uint8)
    assert sure_share(confidence, 0.968) == 0.5  # 247 / 255 = 0.9686, 246 / 255 = 0.9647


def test_belief_in_a_changed_label_is_what_the_teacher_leaves():
    label, teacher = np.array([[1, 2]], np.uint8), np.array([[1, 1]], np.uint8)
    confidence = np.array([[200, 200]], np.uint8)
    assert belief(label, teacher, confidence).tolist() == [[200, 55]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.5, 3))
def test_floors_leave_out_pixels_whose_loss_exceeds_a_multiple_of_their_classs_mean(seed, factor):
    rng = np.random.default_rng(seed)
    labels, beliefs = rng.integers(0, 3, 60), rng.integers(0, 256, 60)
    histogram = np.zeros((256, 256), np.int64)
    np.add.at(histogram, (labels, beliefs), 1)
    floors = np.array(floors_of(histogram, factor=factor))
    losses = -np.log(np.maximum(beliefs / 255, 0.5 / 255))
    for k in range(3):
        own = labels == k
        if own.any():
            expected = losses[own] > factor * losses[own].mean() + 1e-9
            assert np.array_equal(beliefs[own] < floors[k], expected)
    assert floors[3:].max() == 0  # classes that no pixel has


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Painted samples with refined labels, and the teacher's maps."""
    folder = tmp_path_factory.mktemp("painted")
    evidence = write_labels(folder / "evidence")
    shard = evidence / "shard-00000"
    rows = []
    for number in range(5):
        labels = street(1000 + number)[1]
        confidence = np.where(labels == 3, 100, 250).astype(np.uint8)
        confidence[: 8 * number] = 10
        Image.fromarray(confidence).save(shard / f"p{number}.confidence.png")
        rows.append(
            {
                "id": f"p{number}",
                "label": f"p{number}.label.png",
                "confidence": f"p{number}.confidence.png",
            }
        )
    write_jsonl(shard / "index.jsonl", rows)
    made = {"pictures": write_pictures(folder / "pictures"), "labels": write_labels(folder / "own")}
    return made | {"evidence": evidence}


def section_of(**changes):
    return tiny_recipe(self_train=changes).self_train


def test_pictures_the_teacher_is_sure_of_weigh_more(painted):
    samples = load_painted(painted["pictures"], painted["labels"])
    section = section_of(weighting="confidence", sure_above=0.9)
    found = trusted(samples, painted["evidence"], section)
    for sample, row in zip(found, read_index(painted["evidence"]), strict=True):
        confidence = np.asarray(Image.open(row["folder"] / row["confidence"]))
        assert sample.weight == (confidence > 0.9 * 255).mean()
    weights = [sample.weight for sample in found]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > weights[4]


def test_noisy_pixels_lose_their_labels(painted):
    samples = load_painted(painted["pictures"], painted["labels"])
    found = trusted(samples, painted["evidence"], section_of(drop_noise=1.25))
    assert all(isinstance(sample, DoubtedSample) and sample.weight == 1 for sample in found)
    for number, (before, after) in enumerate(zip(samples, found, strict=True)):
        dropped = (before.read_label() != IGNORE) & (after.read_label() == IGNORE)
        unsure = np.zeros_like(dropped)
        unsure[: 8 * number] = before.read_label()[: 8 * number] != IGNORE
        if number == 4:
            assert dropped.any()
        assert not dropped[~unsure].any()


def test_without_a_selection_spare_and_flagged_pictures_are_left_out(painted, tmp_path):
    pictures = shutil.copytree(painted["pictures"], tmp_path / "pictures")
    index = pictures / "shard-00000" / "index.jsonl"
    marks = {"p1": {"spare": True}, "p3": {"flagged": True}}
    write_jsonl(index, [row | marks.get(row["id"], {}) for row in read_jsonl(index)])
    samples = load_painted(pictures, None)
    assert [sample.id for sample in samples] == ["painted/p0", "painted/p2", "painted/p4"]


def test_labels_of_other_pictures_are_no_evidence(painted, tmp_path):
    samples = load_painted(painted["pictures"], painted["labels"])
    fewer = write_labels(tmp_path / "fewer", num_pictures=3)
    with pytest.raises(ValueError, match=r"painted/p3\): the two do not belong together"):
        trusted(samples, fewer, section_of(weighting="confidence"))


@pytest.mark.parametrize(
    "change",
    [{"mixing": "classmix"}, {"weighting": "confidence", "sure_above": 0.9}, {"drop_noise": 1.0}],
    ids=lambda change: next(iter(change)),
)
def test_an_option_changes_the_student(painted, tmp_path, change):
    torch.set_num_threads(1)
    roles = {
        "sources": write_sources(tmp_path / "sources", data=tmp_path / "data"),
        "labelspace": write_labelspace(tmp_path / "labelspace"),
    }
    teacher = tmp_path / "teacher"
    config = stage_config(tiny_recipe(train_source={"steps": 1}), "train_source")
    train_source.run(config, out=teacher, progress=Told(), **roles)
    ids = [f"p{number}" for number in range(5)]
    roles |= {
        "teacher": teacher,
        "pictures": painted["pictures"],
        "labels": painted["labels"],
        "selection": write_selection(tmp_path / "selection", kept=ids),
    }
    students = []
    for name, own in (("plain", {}), ("changed", change)):
        recipe = tiny_recipe(self_train={"steps": 2} | own)
        evidence = {} if name == "plain" or "mixing" in own else {"evidence": painted["evidence"]}
        out = tmp_path / name
        self_train.run(
            stage_config(recipe, "self_train", round=1),
            out=out,
            progress=Told(),
            **roles,
            **evidence,
        )
        students.append((out / "model.safetensors").read_bytes())
    assert students[0] != students[1]
