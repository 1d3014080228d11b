"""Our refinement rule: masks count where SAM and the teacher agree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.masks import find_components
from models.refine_rules import Agreement, agreement_rule, prompted_components

VOID = 255
SIZE = (24, 32)


def blocks() -> np.ndarray:
    """Class 1 left, class 2 right, a pole of class 3 in front of both, void below."""
    labels = np.full(SIZE, 1, np.uint8)
    labels[:, 16:] = 2
    labels[2:18, 8:11] = 3
    labels[20:] = VOID
    return labels


def ruled(labels, masks, iou, *, confidence=1.0, components=None, stability=None, **settings_):
    components = find_components(labels, min_area_px=0) if components is None else components
    confidences = np.full(labels.shape, confidence, np.float32)
    return agreement_rule(
        labels,
        np.asarray(confidences if np.isscalar(confidence) else confidence, np.float32),
        components,
        torch.from_numpy(np.asarray(masks, bool)),
        torch.as_tensor(iou, dtype=torch.float32),
        stability_PC=None if stability is None else torch.as_tensor(stability),
        settings=Agreement(**settings_),
    )


def own_shapes(labels, components) -> np.ndarray:
    """Perfect masks: each component's own shape, as three equal candidates."""
    masks = np.zeros((len(components), 3, *labels.shape), bool)
    for number, component in enumerate(components):
        component.paint(masks[number, 0], True)
        masks[number, 1:] = masks[number, 0]
    return masks


def maps(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.choice(np.array([0, 1, 2, VOID], np.uint8), (6, 8))
    return np.kron(small, np.ones((4, 4), np.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_perfect_labels_with_perfect_masks_are_unchanged(seed, confidence):
    labels = maps(seed)
    components = find_components(labels, min_area_px=0)
    masks = own_shapes(labels, components)
    ruling = ruled(labels, masks, np.ones((len(components), 3)), confidence=confidence)
    assert np.array_equal(ruling.label_HW, labels)
    assert ruling.num_accepted == len(components)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_no_pixel_gets_a_class_the_label_map_does_not_hold_and_order_does_not_matter(
    seed, min_score, trust
):
    rng = np.random.default_rng(seed)
    labels = maps(seed)
    components = prompted_components(labels, min_area_px=40, floor_px=8, class_share=0.5)
    masks = rng.random((len(components), 3, *labels.shape)) < 0.5
    masks |= own_shapes(labels, components)
    iou = rng.random((len(components), 3))
    confidence = rng.random(labels.shape)
    how = {"confidence": confidence, "min_score": min_score, "trust": trust, "sure": 0.8}
    ruling = ruled(labels, masks, iou, components=components, **how)
    assert set(np.unique(ruling.label_HW)) <= {*np.unique(labels), VOID}
    order = rng.permutation(len(components))
    other = ruled(
        labels, masks[order], iou[order], components=[components[n] for n in order], **how
    )
    assert np.array_equal(ruling.label_HW, other.label_HW)


@pytest.mark.parametrize("value", [VOID, 2])
def test_nothing_in_nothing_out(value):
    labels = np.full(SIZE, value, np.uint8)
    empty = np.zeros((0, 3, *SIZE), bool)
    ruling = ruled(labels, empty, np.zeros((0, 3)), components=[], confidence=0.1)
    assert (ruling.label_HW == VOID).all()
    sure = ruled(labels, empty, np.zeros((0, 3)), components=[], confidence=1.0)
    assert (sure.label_HW == value).all()


def test_a_mask_moves_a_boundary_the_teacher_drew_wrongly():
    labels = blocks()
    truth = labels.copy()
    truth[:20, 14:] = np.where(truth[:20, 14:] == 1, 2, truth[:20, 14:])
    components = find_components(labels, min_area_px=0)
    right = [np.zeros(SIZE, bool) for _ in components]
    for component, mask in zip(components, right, strict=True):
        mask |= truth == component.label
    masks = np.repeat(np.stack(right)[:, None], 3, axis=1)
    ruling = ruled(labels, masks, np.full((3, 3), 0.9), confidence=0.6)
    assert np.array_equal(ruling.label_HW, truth)


def test_of_three_candidates_the_one_that_both_like_best_is_used():
    labels = blocks()
    components = [c for c in find_components(labels, min_area_px=0) if c.label == 2]
    part = np.zeros((3, *SIZE), bool)
    part[0] = True  # the whole picture: SAM is sure, the teacher disagrees
    part[1, :20, 17:] = True
    part[2, :5, 16:] = True
    ruling = ruled(labels, part[None], [[0.99, 0.9, 0.95]], components=components, confidence=0.0)
    assert ruling.num_accepted == 1
    assert np.array_equal(ruling.label_HW == 2, part[1])


@pytest.mark.parametrize(
    ("settings_", "accepted", "trusted"),
    [
        ({}, 1, 0),
        ({"min_score": 0.84 / 0.6**2}, 1, 0),
        ({"min_score": 0.85 / 0.6**2}, 0, 1),
        ({"min_iou": 0.91}, 0, 1),
        ({"min_agreement": 0.99}, 0, 1),
        ({"min_iou": 0.91, "trust": 0.7}, 0, 0),
    ],
)
def test_a_mask_below_a_threshold_is_not_used(settings_, accepted, trusted):
    labels = blocks()
    components = [c for c in find_components(labels, min_area_px=0) if c.label == 2]
    mask = np.zeros((1, 3, *SIZE), bool)
    mask[..., :20, 17:] = True
    how = {"trust": 0.5} | settings_
    ruling = ruled(labels, mask, [[0.9] * 3], components=components, confidence=0.6, **how)
    assert (ruling.num_accepted, ruling.num_trusted) == (accepted, trusted)
    assert (ruling.label_HW == 2).sum() == (15 * 20 if accepted else 16 * 20 if trusted else 0)


def test_what_is_small_stays_in_front_of_what_is_large():
    labels = blocks()
    components = find_components(labels, min_area_px=0)
    masks = own_shapes(labels, components)
    behind = components[0]
    assert behind.label == 1
    masks[0, :, 2:18, 8:11] = True  # the wall's mask covers the pole before it
    ruling = ruled(labels, masks, np.ones((3, 3)), confidence=0.1, overlaps="front")
    assert np.array_equal(ruling.label_HW, labels)


def test_pixels_that_shapes_of_several_classes_claim_may_be_nobodys():
    labels = blocks()
    components = find_components(labels, min_area_px=0)
    masks = own_shapes(labels, components)
    assert components[0].label == 1
    masks[0, :, 2:18, 8:11] = True
    how = {"overlaps": "nobody", "sure": 0.9}
    ruling = ruled(labels, masks, np.ones((3, 3)), confidence=0.1, **how)
    assert (ruling.label_HW[labels == 3] == VOID).all()
    assert np.array_equal(ruling.label_HW[labels != 3], labels[labels != 3])
    sure = ruled(labels, masks, np.ones((3, 3)), confidence=0.95, **how)
    assert np.array_equal(sure.label_HW, labels)


@pytest.mark.parametrize(("of_pole", "winner"), [(0.95, 3), (0.85, 1)])
def test_pixels_that_shapes_claim_may_go_to_the_highest_score(of_pole, winner):
    labels = blocks()
    components = find_components(labels, min_area_px=0)
    assert [component.label for component in components] == [1, 2, 3]
    masks = own_shapes(labels, components)
    agreement = (labels == 1).sum() / (labels[:, :16] != VOID).sum()
    masks[0, :, :20, :16] = True  # the wall's mask covers the pole before it
    iou = np.array([[0.9 / agreement] * 3, [1.0] * 3, [of_pole] * 3])
    ruling = ruled(labels, masks, iou, confidence=0.1, overlaps="score")
    assert (ruling.label_HW[labels == 3] == winner).all()
    assert np.array_equal(ruling.label_HW[labels != 3], labels[labels != 3])


def test_the_teachers_own_shapes_yield_to_masks_by_score():
    labels = blocks()
    components = find_components(labels, min_area_px=0)
    masks = own_shapes(labels, components)
    masks[0, :, :20, :16] = True
    masks[2] = False  # no mask for the pole, of which the teacher is sure
    masks[2, :, 0, 0] = True
    confidence = np.where(labels == 3, 1.0, 0.3)
    how = {"min_score": 0.9, "trust": 0.9, "confidence": confidence}
    by_score = ruled(labels, masks, np.ones((3, 3)), overlaps="score", sure=1.1, **how)
    in_front = ruled(labels, masks, np.ones((3, 3)), overlaps="front", sure=1.1, **how)
    assert (by_score.num_accepted, by_score.num_trusted) == (2, 1)
    assert (by_score.label_HW[labels == 3] == 1).all()
    assert (in_front.label_HW[labels == 3] == 3).all()


@pytest.mark.parametrize(("min_stability", "accepted"), [(0.0, 3), (0.8, 2), (0.95, 0)])
def test_masks_that_shift_with_the_cut_are_not_used(min_stability, accepted):
    labels = blocks()
    components = find_components(labels, min_area_px=0)
    stability = np.array([[0.9] * 3, [0.8] * 3, [0.7] * 3])
    ruling = ruled(
        labels,
        own_shapes(labels, components),
        np.ones((3, 3)),
        confidence=0.1,
        stability=stability,
        min_stability=min_stability,
    )
    assert ruling.num_accepted == accepted


def test_classes_of_which_the_teacher_is_seldom_sure_need_less_agreement():
    labels = blocks()
    confidence = np.where(labels == 3, 0.4, 0.9)
    components = [c for c in find_components(labels, min_area_px=0) if c.label in (2, 3)]
    masks = own_shapes(labels, components)
    iou = np.full((2, 3), 0.2)
    ruling = ruled(labels, masks, iou, components=components, confidence=confidence, sure=1.0)
    assert (ruling.label_HW[labels == 3] == 3).all()
    assert not (ruling.label_HW == 2).any()
    assert ruling.num_accepted == 1


def test_pixels_that_no_shape_covers_keep_their_label_only_where_the_teacher_is_sure():
    labels = blocks()
    components = [c for c in find_components(labels, min_area_px=0) if c.label == 2]
    mask = np.zeros((1, 3, *SIZE), bool)
    mask[..., :20, 20:] = True
    confidence = np.full(SIZE, 0.5)
    confidence[:10] = 0.95
    how = {"confidence": confidence, "sure": 0.9}
    ruling = ruled(labels, mask, [[0.9] * 3], components=components, **how)
    shed = ruling.label_HW[:, 16:20]
    assert (shed[:10] == 2).all()
    assert (shed[10:] == VOID).all()


def test_the_smallest_component_worth_a_prompt_depends_on_its_class():
    labels = np.zeros((40, 40), np.uint8)
    labels[:20] = 1  # 800 pixels
    labels[22:32, 2:5] = 2  # a pole of 30
    labels[22:30, 8:11] = 2  # a pole of 24
    labels[35:37, 8:12] = 2  # a speck of 8
    labels[30:35, 20:26] = 1  # a speck of 30 of the large class
    found = prompted_components(labels, min_area_px=500, floor_px=10, class_share=0.5)
    assert [(c.label, c.area_px) for c in found] == [(0, 708), (1, 800), (2, 30), (2, 24)]
    everything = prompted_components(labels, min_area_px=7, floor_px=10, class_share=1.0)
    assert len(everything) == 6
