"""Refinement steps against scipy and against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from models import masks

label_maps = arrays(
    np.uint8,
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    elements=st.sampled_from([0, 1, 7, 255]),
)


def slow_components(label_map, min_area_px):
    """Class after class with scipy, as the released code does it."""
    found = []
    for label in np.unique(label_map):
        if label == 255:
            continue
        numbers, count = ndimage.label(label_map == label)
        for number in range(1, count + 1):
            whole = numbers == number
            if whole.sum() > min_area_px:
                found.append((int(label), np.flatnonzero(whole)[0], whole))
    return [(label, whole) for label, _, whole in sorted(found, key=lambda f: f[:2])]


@settings(max_examples=60, deadline=None)
@given(label_maps, st.integers(0, 6))
def test_components_are_those_of_scipy_in_the_same_order(label_map, min_area_px):
    ours = masks.find_components(label_map, min_area_px=min_area_px)
    slow = slow_components(label_map, min_area_px)
    assert [c.label for c in ours] == [label for label, _ in slow]
    for component, (_, whole) in zip(ours, slow, strict=True):
        canvas = np.zeros(label_map.shape, dtype=bool)
        component.paint(canvas, True)
        assert np.array_equal(canvas, whole)
        assert component.area_px == whole.sum()
        expected = np.argwhere(whole)[:, ::-1]
        assert np.array_equal(component.pixels(), expected)


def test_points_lie_in_their_component_are_distinct_and_follow_the_seed():
    label_map = np.full((20, 30), 255, dtype=np.uint8)
    label_map[3:9, 4:20] = 5
    label_map[6, 6:18] = 255
    (component,) = masks.find_components(label_map, min_area_px=0)
    indices = masks.draw_indices(component, 7, seed=3)
    points = masks.pick_points(component, indices)
    assert len(np.unique(points, axis=0)) == 7
    assert all(label_map[int(y), int(x)] == 5 for x, y in points)
    assert np.array_equal(indices, masks.draw_indices(component, 7, seed=3))
    assert not np.array_equal(indices, masks.draw_indices(component, 7, seed=4))
    assert len(masks.draw_indices(component, 10_000, seed=0)) == component.area_px


def test_points_are_scaled_with_the_rounded_size():
    # 100 x 333 becomes 308 x 1024: 307.5 is rounded before the ratio is taken
    scaled = masks.scale_points(np.array([[333.0, 100.0]]), (100, 333))
    assert scaled.tolist() == [[1024.0, 308.0]]


def test_the_best_of_three_masks_is_taken_and_overlaps_are_cleared_in_all():
    candidates = torch.zeros(2, 3, 2, 4, dtype=torch.bool)
    candidates[0, 1, :, :3] = True
    candidates[1, 2, :, 2:] = True
    best, index = masks.best_masks(candidates, torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.2, 0.8]]))
    assert index.tolist() == [1, 2]
    apart = masks.remove_overlaps(best)
    label_map = masks.label_map_of(apart, [7, 9])
    assert label_map.tolist() == [[7, 7, 255, 9]] * 2


@settings(max_examples=30, deadline=None)
@given(arrays(bool, (4, 5, 6)))
def test_no_pixel_keeps_two_masks_and_single_claims_stay(stack):
    apart = masks.remove_overlaps(torch.from_numpy(stack)).numpy()
    claims = stack.sum(0)
    assert np.array_equal(apart.sum(0), claims == 1)
    assert not (apart & ~stack).any()


def test_a_map_without_components_stays_as_it_is():
    label_map = np.array([[0, 255], [7, 0]], dtype=np.uint8)
    refined = masks.refined_label_map(label_map, [], torch.empty(0))
    assert np.array_equal(refined, label_map)
    assert refined is not label_map


@pytest.mark.parametrize("value", [255, 19])
def test_what_no_mask_covers_becomes_void(value):
    label_map = np.zeros((4, 4), dtype=np.uint8)
    found = masks.find_components(label_map, min_area_px=3)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2] = True
    refined = masks.refined_label_map(label_map, found, mask, void=value)
    assert refined.tolist() == [[0] * 4] * 2 + [[value] * 4] * 2
