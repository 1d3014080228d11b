"""What holds for every refinement rule, whatever the maps and masks are.

No pixel gets a class the inputs do not hold; order does not matter where a rule promises no order;
perfect labels with perfect masks are unchanged; empty in, empty out.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from models.masks import find_components, refined_label_map
from models.published_rules import (
    guided_rule,
    majority_rule,
    stuff_labels,
    stuff_things_rule,
    thing_prompts,
)
from models.refine_rules import Agreement, agreement_rule
from models.rule_classes import RuleClasses
from stages.labels import load_labelspace

VOID = 255
SIZE = (16, 24)
EVERYTHING = tuple(range(19))
"""Cityscapes' classes, so that all rules apply."""
CLASSES = RuleClasses.of(load_labelspace("cityscapes19").names)

Rule = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From labels, confidences (0..1) and one mask per component to the refined labels."""


def released(labels, _confidence, masks):
    return refined_label_map(
        labels, find_components(labels, min_area_px=0), torch.from_numpy(masks)
    )


def agreement(labels, confidence, masks):
    components = find_components(labels, min_area_px=0)
    candidates = torch.from_numpy(np.repeat(masks[:, None], 3, axis=1))
    iou = torch.full((len(components), 3), 0.9)
    ruling = agreement_rule(labels, confidence, components, candidates, iou, settings=Agreement())
    return ruling.label_HW


def majority(labels, _confidence, masks):
    return majority_rule(labels, from_large_to_small(masks))


def guided(labels, confidence, masks):
    return guided_rule(labels, confidence, from_large_to_small(masks), classes=CLASSES)


def stuff(labels, _confidence, masks):
    """SeCo's automatic half, over the classes it is for: all of them here."""
    return stuff_labels(labels, from_large_to_small(masks), stuff=frozenset(EVERYTHING))


def stuff_things(labels, _confidence, masks):
    """SeCo's rule whole: asked about a thing, SAM answers with all masks that touch it."""
    asked = thing_prompts(labels, things=CLASSES.things)
    things = np.zeros((len(asked.labels), *labels.shape), bool)
    firsts = asked.points_P22[:, 0].astype(int)
    for answer, label, (x, y) in zip(things, asked.labels, firsts, strict=True):
        parts, _ = ndimage.label(labels == label, np.ones((3, 3)))
        touching = masks[:, parts == parts[y, x]].any(1)
        answer |= masks[touching].any(0)
    automatic = from_large_to_small(masks)
    return stuff_things_rule(labels, automatic, asked.labels, things, stuff=CLASSES.stuff)


RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (released, agreement, majority, guided, stuff, stuff_things)
}
rules = pytest.mark.parametrize("name", RULES)


def from_large_to_small(masks: np.ndarray) -> np.ndarray:
    """As `Refiner.everything` sorts automatic masks."""
    return masks[np.argsort(-masks.sum((1, 2)), kind="stable")]


def maps(seed: int) -> np.ndarray:
    """Rectangles of a few classes and of nothing."""
    rng = np.random.default_rng(seed)
    values = np.array([*rng.choice(19, 3, replace=False), VOID], np.uint8)
    return np.kron(values[rng.integers(0, 4, (4, 6))], np.ones((4, 4), np.uint8))


def perfect(labels: np.ndarray) -> np.ndarray:
    """Each component's own shape, bool [P, H, W]."""
    components = find_components(labels, min_area_px=0)
    masks = np.zeros((len(components), *labels.shape), bool)
    for mask, component in zip(masks, components, strict=True):
        component.paint(mask, True)
    return masks


def random_masks(labels: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    count = len(find_components(labels, min_area_px=0))
    coarse = rng.random((count, 4, 6)) < rng.random((count, 1, 1))
    return np.kron(coarse, np.ones((4, 4), bool)).astype(bool)


@rules
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_no_pixel_gets_a_class_the_inputs_do_not_hold(name, seed):
    labels = maps(seed)
    confidence = np.random.default_rng(seed).random(SIZE).astype(np.float32)
    found = RULES[name](labels, confidence, random_masks(labels, seed))
    assert found.dtype == np.uint8
    assert found.shape == SIZE
    assert set(np.unique(found)) <= {*np.unique(labels), VOID}


@rules
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_perfect_labels_with_perfect_masks_are_unchanged(name, seed, confidence):
    labels = maps(seed)
    sure = np.full(SIZE, confidence, np.float32)
    found = RULES[name](labels, sure, perfect(labels))
    assert np.array_equal(found, labels)


@rules
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_the_inputs_are_left_alone(name, seed):
    labels, confidence = maps(seed), np.full(SIZE, 0.7, np.float32)
    masks = random_masks(labels, seed)
    kept = [each.copy() for each in (labels, confidence, masks)]
    RULES[name](labels, confidence, masks)
    for before, now in zip(kept, (labels, confidence, masks), strict=True):
        assert np.array_equal(before, now)


@rules
def test_empty_in_empty_out(name):
    labels, sure = np.full(SIZE, VOID, np.uint8), np.ones(SIZE, np.float32)
    found = RULES[name](labels, sure, np.zeros((0, *SIZE), bool))
    assert (found == VOID).all()


@rules
@pytest.mark.parametrize("value", [0, 5, 13, 18])
def test_one_class_stays_one_class(name, value):
    labels, sure = np.full(SIZE, value, np.uint8), np.ones(SIZE, np.float32)
    assert (RULES[name](labels, sure, perfect(labels)) == value).all()
    half = perfect(labels)
    half[:, :, 12:] = False
    assert set(np.unique(RULES[name](labels, sure, half))) <= {value, VOID}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_the_order_of_components_does_not_matter_to_the_released_rule(seed):
    labels = maps(seed)
    components = find_components(labels, min_area_px=0)
    masks = torch.from_numpy(random_masks(labels, seed))
    order = np.random.default_rng(seed).permutation(len(components)).tolist()
    plain = refined_label_map(labels, components, masks)
    other = refined_label_map(labels, [components[n] for n in order], masks[order])
    assert np.array_equal(plain, other)


@pytest.mark.parametrize("name", ["majority", "guided", "stuff"])
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_the_order_of_masks_that_do_not_overlap_does_not_matter(name, seed):
    labels, sure = maps(seed), np.ones(SIZE, np.float32)
    rng = np.random.default_rng(seed)
    owner = np.kron(rng.integers(0, 5, (4, 6)), np.ones((4, 4), int))
    masks = np.stack([owner == number for number in range(4)])
    masks = masks[masks.any((1, 2))]

    def ruled(ordered):
        match name:
            case "majority":
                return majority_rule(labels, ordered)
            case "stuff":
                return stuff_labels(labels, ordered, stuff=CLASSES.stuff)
            case _:
                return guided_rule(labels, sure, ordered, classes=CLASSES)

    if name == "guided":  # its largest mask, the first, has a rule of its own
        order = [0, *(1 + rng.permutation(len(masks) - 1))] if len(masks) else []
    else:
        order = rng.permutation(len(masks))
    assert np.array_equal(ruled(masks), ruled(masks[order]))
