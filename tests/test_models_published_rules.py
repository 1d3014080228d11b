"""Published rules that label automatic masks, on maps small enough to check by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.published_rules import (
    VOID,
    guided_rule,
    label_entropy,
    majority_rule,
    smallest_rectangle,
    stuff_labels,
    thing_prompts,
)
from models.rule_classes import RuleClasses
from stages.labels import load_labelspace

cv2 = pytest.importorskip("cv2", reason="OpenCV is the oracle of rotated rectangles")
SIZE = (20, 30)
FULL = np.ones(SIZE, bool)
CLASSES = RuleClasses.of(load_labelspace("cityscapes19").names)
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY = range(11)
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(11, 19)


def canvas(**areas) -> np.ndarray:
    """A map of void with rectangles: label = (rows, columns)."""
    labels = np.full(SIZE, VOID, np.uint8)
    for label, (rows, columns) in areas.items():
        labels[rows, columns] = globals()[label]
    return labels


def part(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[rows, columns] = True
    return mask


def guided(labels, masks, *, confidence=1.0, **how):
    sure = np.full(SIZE, confidence, np.float32)
    return guided_rule(labels, sure, np.asarray(masks), **{"classes": CLASSES} | how)


ALL = slice(None)


def test_a_mask_gets_the_commonest_class_inside_and_void_does_not_count():
    labels = canvas(ROAD=(slice(0, 3), ALL), CAR=(slice(3, 5), ALL))
    assert (majority_rule(labels, FULL[None]) == ROAD).all()
    top = part(slice(0, 5), ALL)
    plain = majority_rule(labels, top[None], fill=False)
    assert (plain[top] == ROAD).all()
    assert (plain[~top] == VOID).all()


def test_small_masks_are_painted_over_large_ones_and_gaps_are_filled_by_the_teacher():
    labels = canvas(ROAD=(slice(0, 10), ALL), SKY=(slice(10, 20), ALL))
    labels[2:5, 2:5] = CAR
    masks = np.stack([part(slice(0, 10), ALL), part(slice(2, 5), slice(2, 5))])
    assert np.array_equal(majority_rule(labels, masks), labels)
    filled = majority_rule(labels, masks, fill=False)
    assert (filled[10:] == VOID).all()


def test_a_mask_without_any_label_and_no_masks_at_all_change_nothing():
    labels = canvas(ROAD=(slice(0, 5), ALL))
    empty = part(slice(10, 15), ALL)
    for masks in (empty[None], np.zeros((0, *SIZE), bool)):
        assert np.array_equal(majority_rule(labels, masks), labels)
        assert np.array_equal(guided(labels, masks, fusion=1), labels)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_no_rule_gives_a_class_the_labels_do_not_hold(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 1, 5, 8, 13, 18, VOID], np.uint8), SIZE)
    masks = rng.random((4, *SIZE)) < 0.3
    confidence = rng.random(SIZE).astype(np.float32)
    known = {*np.unique(labels).tolist(), VOID}
    outcomes = [majority_rule(labels, masks), stuff_labels(labels, masks, stuff=CLASSES.stuff)]
    outcomes += [guided(labels, masks, confidence=confidence, fusion=f) for f in (1, 2, 3)]
    for outcome in outcomes:
        assert set(np.unique(outcome).tolist()) <= known


@pytest.mark.parametrize(("columns_of_pole", "expected"), [(4, BUILDING), (5, POLE), (9, POLE)])
def test_a_small_class_with_a_fifth_of_a_large_ones_pixels_wins(columns_of_pole, expected):
    labels = np.full(SIZE, BUILDING, np.uint8)
    labels[:, :columns_of_pole] = POLE
    assert (guided(labels, [FULL], fusion=1) == expected).all()


def test_a_second_class_that_is_not_small_does_not_win():
    labels = np.full(SIZE, BUILDING, np.uint8)
    labels[:, :14] = SKY
    assert (guided(labels, [FULL], fusion=1) == BUILDING).all()


def test_a_sidewalk_mask_becomes_road_where_the_road_is_expected():
    labels = canvas(SIDEWALK=(slice(15, 19), slice(12, 22)), ROAD=(slice(15, 16), slice(12, 22)))
    ahead = part(slice(15, 19), slice(12, 22))
    whole = FULL.copy()
    assert (guided(labels, [whole, ahead], fusion=1)[ahead] == ROAD).all()
    away = canvas(SIDEWALK=(slice(15, 19), slice(0, 6)), ROAD=(slice(15, 16), slice(0, 6)))
    left = part(slice(15, 19), slice(0, 6))
    other = part(slice(0, 4), ALL)
    assert (guided(away, [other, left], fusion=1)[left] == SIDEWALK).all()
    assert (guided(away, [left], fusion=1)[left] == ROAD).all()  # it is the largest mask


def test_the_second_fusion_lets_masks_of_detail_overwrite_the_teacher_only():
    labels = canvas(BUILDING=(ALL, ALL))
    labels[:10, 10] = POLE
    labels[:10, 11:13] = BUILDING
    wide = part(slice(0, 10), slice(10, 12))
    fused = guided(labels, [wide], fusion=2)
    assert (fused[wide] == POLE).all()
    sky = canvas(SKY=(slice(0, 8), ALL), BUILDING=(slice(8, 20), ALL))
    assert np.array_equal(guided(sky, [part(slice(0, 12), ALL)], fusion=2), sky)


@pytest.mark.parametrize(
    ("teacher", "mask_class", "confidence", "restored"),
    [
        (POLE, BUILDING, 0.0, True),
        (SIGN, VEGETATION, 0.0, True),
        (CAR, VEGETATION, 0.0, True),
        (FENCE, BUILDING, 0.0, True),
        (BICYCLE, ROAD, 0.0, True),
        (SIDEWALK, TERRAIN, 0.995, True),
        (SIDEWALK, TERRAIN, 0.98, False),
        (PERSON, BUILDING, 0.995, True),
        (PERSON, BUILDING, 0.5, False),
        (SKY, BUILDING, 1.0, False),
        (BUILDING, SKY, 1.0, True),
    ],
)
def test_the_third_fusion_brings_the_teacher_back_for_certain_pairs(
    teacher, mask_class, confidence, restored
):
    labels = np.full(SIZE, mask_class, np.uint8)
    labels[0, :3] = teacher
    fused = guided(labels, [FULL], confidence=confidence, fusion=3)
    assert (fused[0, :3] == (teacher if restored else mask_class)).all()
    assert (fused[1:] == mask_class).all()


@pytest.mark.parametrize(("columns_of_sky", "expected"), [(6, VOID), (7, SKY)])
def test_a_stuff_class_needs_more_than_a_fifth_of_the_labelled_pixels(columns_of_sky, expected):
    labels = np.full(SIZE, CAR, np.uint8)
    labels[:, :columns_of_sky] = SKY
    assert (stuff_labels(labels, FULL[None], stuff=CLASSES.stuff) == expected).all()
    labels[:, 20:] = VOID
    labels[:, :6] = SKY
    assert (stuff_labels(labels, FULL[None], stuff=CLASSES.stuff) == SKY).all()


def test_stuff_and_things_are_all_classes():
    assert {*CLASSES.stuff, *CLASSES.things} == set(range(19))
    assert not CLASSES.stuff & set(CLASSES.things)


def test_in_cityscapes_the_classes_are_the_papers_train_ids():
    """As SAM4UDASS's and SeCo's code number them."""
    detail = {5, 6, 7, *range(11, 19)}
    assert (
        RuleClasses(
            road={0},
            sidewalk={1},
            large={0, 1, 2, 8, 10, 13},
            small={3, 4, 5, 6, 7, 12, 14, 17, 18},
            detail=detail,
            restored_if_sure={0: {1}, 1: {0, 9}, 2: {10, 4}, 3: {8}, 8: {9, 2}, 11: {2}},
            restored={
                4: {2, 8},
                5: {2, 6, 7},
                6: {2, 5, 8},
                7: {2, 8, 6},
                13: {8},
                18: set(range(19)),
            },
            stuff={0, 1, 2, 3, 4, 8, 9, 10},
            things=tuple(sorted(detail)),
        )
        == CLASSES
    )


MINIATURE = load_labelspace("miniature").names


def test_classes_that_a_label_space_lacks_are_left_out():
    found = RuleClasses.of(MINIATURE)
    named = {name: number for number, name in enumerate(MINIATURE)}
    assert found.small == {named[n] for n in ("fence", "pole", "traffic sign", "truck", "bicycle")}
    assert {*found.stuff, *found.things} == set(range(13))
    assert found.restored[named["pole"]] == {named["building"], named["traffic sign"]}
    assert found.restored[named["bicycle"]] == set(range(13))
    assert found.restored_if_sure[named["building"]] == {named["sky"], named["fence"]}
    roadless = RuleClasses.of(["sky", "car"])
    assert roadless.road == roadless.sidewalk == set()
    assert roadless.restored == {1: set()}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_in_another_label_space_the_rules_do_as_in_cityscapes(seed, confidence):
    rng = np.random.default_rng(seed)
    whole = load_labelspace("cityscapes19").names
    picked = {0, 1, 13, *rng.choice(19, rng.integers(1, 12)).tolist()}
    there = np.array([*sorted(picked), *[VOID] * (256 - len(picked))], np.uint8)
    own = RuleClasses.of([whole[number] for number in sorted(picked)])
    blocks = rng.choice([*range(len(picked)), VOID], (5, 6)).astype(np.uint8)
    labels = np.kron(blocks, np.ones((4, 5), np.uint8))
    masks = np.kron(rng.random((4, 10, 15)) < 0.4, np.ones((2, 2), bool))
    for fusion in (1, 2, 3):
        how = {"confidence": confidence, "fusion": fusion}
        here = guided(labels, masks, classes=own, **how)
        assert np.array_equal(there[here], guided(there[labels], masks, **how))
    here = stuff_labels(labels, masks, stuff=own.stuff)
    assert np.array_equal(there[here], stuff_labels(there[labels], masks, stuff=CLASSES.stuff))
    asked, oracle = (
        thing_prompts(labels, things=own.things),
        thing_prompts(there[labels], things=CLASSES.things),
    )
    assert tuple(there[list(asked.labels)]) == oracle.labels
    assert np.array_equal(asked.boxes_P4, oracle.boxes_P4)
    np.testing.assert_allclose(asked.points_P22, oracle.points_P22)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["road", "car", "lane marking"], "these labels have 'lane marking', which Cityscapes"),
        (["road", "Car"], "these labels have 'Car', which"),
        (["road", "sky"], "none of the classes that the rule knows as things: bicycle, bus"),
        (["person", "car"], r"\(person, car\) have none of .* as stuff: building"),
    ],
)
def test_classes_that_the_rules_do_not_know_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        RuleClasses.of(names)


def test_every_thing_component_of_ten_pixels_gets_a_box_and_two_points():
    labels = canvas(ROAD=(ALL, ALL))
    labels[4:10, 5:15] = CAR
    labels[0:3, 0:3] = CAR  # nine pixels
    labels[12:14, 20:25] = PERSON
    labels[14:16, 25] = PERSON  # touches by a corner: 8-connected
    found = thing_prompts(labels, things=CLASSES.things)
    assert found.labels == (PERSON, CAR)
    assert found.boxes_P4[0, 2] > 25
    width, height = 9, 5  # between the centres of the outer pixels
    grown = width * height * 1.25 / (2 * (width + height))
    expected = (5 - grown, 4 - grown, 14 + grown, 9 + grown)
    np.testing.assert_allclose(found.boxes_P4[1], expected, rtol=1e-5)
    for label, points in zip(found.labels, found.points_P22, strict=True):
        assert all(labels[int(y), int(x)] == label for x, y in points)
    upper, lower = found.points_P22[1]
    assert upper[1] <= 6 <= 7 <= lower[1]


def test_boxes_stay_inside_the_picture():
    labels = canvas(CAR=(ALL, slice(0, 12)))
    left, top, _right, bottom = thing_prompts(labels, things=CLASSES.things).boxes_P4[0]
    assert (left, top, bottom) == (0, 0, SIZE[0] - 1)


def test_points_lie_where_the_neighbourhood_is_least_mixed():
    labels = canvas(ROAD=(ALL, slice(0, 15)), CAR=(ALL, slice(15, 30)))
    points = thing_prompts(labels, things=CLASSES.things, radius_px=2).points_P22[0]
    assert (points[:, 0] >= 17).all()


def test_no_thing_no_prompts():
    found = thing_prompts(canvas(ROAD=(ALL, ALL)), things=CLASSES.things)
    assert found.labels == ()
    assert found.boxes_P4.shape == (0, 4)
    assert found.points_P22.shape == (0, 2, 2)


def test_entropy_is_that_of_the_window_written_out():
    labels = np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8)
    entropy = label_entropy(labels, radius_px=2)
    window = labels[5:10, 7:12]
    shares = np.bincount(window.ravel(), minlength=3) / 25
    expected = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    assert entropy[7, 9] == pytest.approx(expected, abs=1e-5)
    assert label_entropy(np.zeros(SIZE, np.uint8), radius_px=2).max() == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 20))
def test_the_smallest_rectangle_is_as_small_as_opencvs(seed, count):
    points = np.random.default_rng(seed).integers(0, 40, (count, 2)).astype(np.float64)
    corners = smallest_rectangle(points)
    sides = np.linalg.norm(corners - np.roll(corners, -1, axis=0), axis=1)
    (_, (width, height), _) = cv2.minAreaRect(points.astype(np.float32))
    assert sides[0] * sides[1] == pytest.approx(width * height, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("points", [[[3, 4]] * 4, [[0, 0], [2, 2], [4, 4]], [[1, 0], [1, 9]]])
def test_points_on_a_line_have_a_flat_rectangle(points):
    corners = smallest_rectangle(np.array(points, float))
    assert corners.min(0) == pytest.approx(np.min(points, axis=0), abs=1e-9)
    assert corners.max(0) == pytest.approx(np.max(points, axis=0), abs=1e-9)
