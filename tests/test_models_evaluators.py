"""Confusion matrices and IoU rules against torchmetrics and plain loops."""

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from models.evaluators import (
    boundary_differences,
    category_iou,
    confusion_matrix,
    iou_scores,
)


def some_maps(classes=5, void=True):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, classes, (2, 9, 11), generator=generator, dtype=torch.uint8)
    guess = torch.randint(0, classes, (2, 9, 11), generator=generator, dtype=torch.uint8)
    if void:
        truth[0, :3], guess[1, :2] = 255, classes
    return guess, truth


def test_pairs_are_counted_one_by_one():
    guess, truth = some_maps()
    slow = torch.zeros(6, 6, dtype=torch.int64)
    for g, t in zip(guess.flatten().tolist(), truth.flatten().tolist(), strict=True):
        slow[min(t, 5), min(g, 5)] += 1
    assert torch.equal(confusion_matrix(guess, truth, 5), slow)


@pytest.mark.parametrize("region", [1, 3, 16])
def test_runs_of_pixels_are_counted_as_single_pixels_are(region):
    generator = torch.Generator().manual_seed(region)
    coarse = torch.randint(0, 7, (2, 4, 5), generator=generator, dtype=torch.uint8)
    coarse[coarse == 6] = 255
    guess, truth = coarse.repeat_interleave(region, 1).repeat_interleave(region, 2)
    guess = guess.roll(region // 2, 1)
    slow = torch.zeros(6, 6, dtype=torch.int64)
    for g, t in zip(guess.flatten().tolist(), truth.flatten().tolist(), strict=True):
        slow[min(t, 5), min(g, 5)] += 1
    found = confusion_matrix(guess, truth, 5)
    assert found.dtype == torch.int64
    assert torch.equal(found, slow)
    wide = confusion_matrix(guess.long(), truth.long(), 5)
    assert torch.equal(wide, slow)
    empty = confusion_matrix(guess[:0], truth[:0], 5)
    assert empty.shape == (6, 6)
    assert not empty.any()


def test_matrices_of_parts_add_up():
    guess, truth = some_maps()
    parts = [confusion_matrix(g, t, 5) for g, t in zip(guess, truth, strict=True)]
    assert torch.equal(sum(parts), confusion_matrix(guess, truth, 5))


@pytest.mark.parametrize("rule", ["mmseg", "cityscapes", "detectron2", "clouds"])
def test_all_rules_agree_with_torchmetrics_where_nothing_is_void(rule):
    guess, truth = some_maps(void=False)
    scores = iou_scores(confusion_matrix(guess, truth, 5), rule)
    expected = multiclass_jaccard_index(guess, truth.long(), num_classes=5, average=None)
    torch.testing.assert_close(scores.class_iou_K.float(), expected)
    assert scores.miou == pytest.approx(expected.mean().item())
    assert scores.pixel_accuracy == pytest.approx((guess == truth).float().mean().item())


def test_the_rules_differ_where_they_are_known_to():
    truth = torch.tensor([0, 0, 1, 1, 255], dtype=torch.uint8)
    guess = torch.tensor([0, 2, 1, 3, 2], dtype=torch.uint8)  # 3 is void, 2 is not in the truth
    confusion = confusion_matrix(guess, truth, 3)
    strict = iou_scores(confusion, "mmseg").class_iou_K
    assert strict.tolist() == [0.5, 0.5, 0.0]
    lenient = iou_scores(confusion, "detectron2").class_iou_K
    assert lenient[:2].tolist() == [0.5, 1.0]
    assert math.isnan(lenient[2])


def test_a_class_that_is_nowhere_does_not_count():
    truth = torch.tensor([0, 0, 1], dtype=torch.uint8)
    scores = iou_scores(confusion_matrix(truth, truth, 4))
    assert scores.miou == 1
    assert scores.class_iou_K.isnan().tolist() == [False, False, True, True]


def test_confusion_inside_a_category_is_right():
    truth = torch.tensor([0, 1, 2, 2], dtype=torch.uint8)
    guess = torch.tensor([1, 0, 2, 0], dtype=torch.uint8)
    found = category_iou(confusion_matrix(guess, truth, 3), {"flat": (0, 1), "other": (2,)})
    assert found == {"flat": pytest.approx(2 / 3), "other": pytest.approx(1 / 2)}


def test_the_boundary_of_a_rectangle_is_its_rim():
    mask = torch.zeros(12, 14, dtype=torch.uint8)
    mask[3:9, 4:11] = 1
    rim = mask.clone()
    rim[4:8, 5:10] = 0
    assert torch.equal(boundary_differences(mask), rim)
    mask[:] = 1
    rim = mask.clone()
    rim[1:-1, 1:-1] = 0
    assert torch.equal(boundary_differences(mask), rim)


def test_bad_input_is_named():
    guess, truth = some_maps()
    with pytest.raises(ValueError, match="resize the predictions"):
        confusion_matrix(guess[:, 1:], truth, 5)
    with pytest.raises(ValueError, match="known are mmseg"):
        iou_scores(torch.eye(3), "pascal")
