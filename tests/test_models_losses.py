"""Matching and losses against plain slow versions; seeds; unlabelled pixels."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from models.config import LossConfig
from models.decoder import Prediction
from models.losses import SetCriterion, pixel_loss
from models.matching import find_targets, look_at, point_sums
from models.points import draw_points, sample_label_shares, sample_masks, smallest
from models.segmenter import SegmenterOutput

K, SIZE = 4, (24, 32)


def some_labels(batch: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, K + 1, (batch, 3, 4), generator=generator, dtype=torch.uint8)
    coarse[coarse == K] = 255
    return coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)


def some_output(batch: int = 3, aux: int = 2, seed: int = 0) -> SegmenterOutput:
    generator = torch.Generator().manual_seed(seed)
    predictions = [
        Prediction(
            torch.randn(batch, 6, K + 1, generator=generator).requires_grad_(),
            torch.randn(batch, 6, 6, 8, generator=generator).requires_grad_(),
        )
        for _ in range(aux + 1)
    ]
    return SegmenterOutput(
        image_size=SIZE,
        padded_size=SIZE,
        class_logits_BQK1=predictions[0].class_logits_BQK1,
        masks_BQHW=predictions[0].masks_BQHW,
        aux=tuple(predictions[1:]),
    )


def part_of(output: SegmenterOutput, images: slice) -> SegmenterOutput:
    return SegmenterOutput(
        image_size=SIZE,
        padded_size=SIZE,
        class_logits_BQK1=output.class_logits_BQK1[images],
        masks_BQHW=output.masks_BQHW[images],
        aux=tuple(Prediction(c[images], m[images]) for c, m in output.aux),
    )


def binary_masks(labels_BHW: torch.Tensor) -> torch.Tensor:
    return torch.stack([labels_BHW == k for k in [*range(K), 255]], 1).float()


def test_label_shares_equal_sampled_binary_masks():
    labels, points = some_labels(), torch.rand(3, 50, 2, generator=torch.Generator().manual_seed(1))
    shares = sample_label_shares(labels, points, K)
    torch.testing.assert_close(shares, sample_masks(binary_masks(labels), points))


@pytest.mark.parametrize("ties", [False, True])
def test_the_smallest_of_each_row_are_found(ties):
    values = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    if ties:
        values = (values * 6).round()
    found = smallest(values, 9)
    assert found.shape == (5, 9)
    assert all(len(set(row)) == 9 for row in found.tolist())
    expected = values.sort(1).values[:, :9]
    assert torch.equal(values.gather(1, found).sort(1).values, expected)


def slow_costs(config, prediction, labels, points, image):
    """Matching costs of one image from whole binary masks, query by query."""
    classes = [v for v in labels[image].unique().tolist() if v != 255]
    logits = sample_masks(prediction.masks_BQHW[image : image + 1], points[None])[0]
    valid = torch.ones(len(points))
    if config.unlabelled == "ignore":
        labelled = (labels[image] != 255).float()[None, None]
        valid = sample_masks(labelled, points[None])[0, 0]
    costs = torch.zeros(len(logits), len(classes))
    for q, (column, k) in itertools.product(range(len(logits)), enumerate(classes)):
        target = sample_masks((labels[image] == k).float()[None, None], points[None])[0, 0]
        entropy = F.binary_cross_entropy_with_logits(logits[q], target, reduction="none")
        share = logits[q].sigmoid()
        dice = 1 - (2 * (share * target).sum() + 1) / ((share * valid).sum() + target.sum() + 1)
        probability = prediction.class_logits_BQK1[image, q].softmax(0)[k]
        # A point that is half unlabelled counts half: target + other label = valid there.
        other = valid - target
        positive, negative = F.softplus(-logits[q]), F.softplus(logits[q])
        if config.unlabelled == "ignore":
            entropy_mean = (target * positive + other * negative).sum() / valid.sum()
        else:
            entropy_mean = entropy.mean()
        costs[q, column] = (
            -config.class_weight * probability
            + config.mask_weight * entropy_mean
            + config.dice_weight * dice
        )
    return classes, costs


@pytest.mark.parametrize("unlabelled", ["negative", "ignore"])
def test_matches_are_the_cheapest_of_all_assignments(unlabelled):
    config = LossConfig(points=60, unlabelled=unlabelled)
    criterion, labels, output = SetCriterion(config, K), some_labels(), some_output()
    targets = find_targets(labels, K)
    draws = draw_points(
        [1, 2, 3],
        [len(targets.of_image(image)) for image in range(3)],
        points=60,
        candidates=180,
        uncertain=45,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        queries_LT = criterion.match(output.predictions, labels, targets, draws)
        for index, queries_T in enumerate(queries_LT):
            for image in range(3):
                points = draws.matching[image][0]
                classes, costs = slow_costs(
                    config, output.predictions[index], labels, points, image
                )
                cheapest = min(
                    itertools.permutations(range(6), len(classes)),
                    key=lambda queries, costs=costs: sum(
                        costs[q, c].item() for c, q in enumerate(queries)
                    ),
                )
                assert queries_T[targets.of_image(image)].tolist() == list(cheapest)


@pytest.mark.parametrize("ignored", [None, [True, False]])
def test_masks_gathered_point_by_point_cost_what_sampled_ones_do(ignored, monkeypatch):
    # some points at a time, as at true size
    monkeypatch.setattr("models.points.CACHED_VALUES", 70)
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (2, 24, 30), dtype=torch.uint8)
    labels[:, :5] = 255
    masks, points = 3 * torch.randn(2, 7, 9, 11), torch.rand(2, 50, 2)
    columns = torch.tensor([[0, 1, 2, 3], [1, 3, 4, 4]])
    ignore = None if ignored is None else torch.tensor(ignored)
    there = look_at(labels, points, columns, 4, ignore, mask_size=(9, 11))
    gathered = point_sums(masks, points, there)
    sampled = point_sums(masks, points, there._replace(around=None))
    for ours, theirs in zip(gathered, sampled, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_losses_depend_on_seeds_and_on_nothing_else():
    criterion, labels, output = SetCriterion(LossConfig(points=40), K), some_labels(), some_output()
    first = criterion(output, labels, seeds=[1, 2, 3])
    torch.rand(7)
    again = criterion(output, labels, seeds=[1, 2, 3])
    other = criterion(output, labels, seeds=[1, 2, 4])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["loss_mask"], other["loss_mask"])


def test_the_parts_of_a_batch_add_up_to_the_whole():
    criterion, labels, output = SetCriterion(LossConfig(points=40), K), some_labels(), some_output()
    whole = criterion(output, labels, seeds=[1, 2, 3])
    parts = [
        criterion(part_of(output, s), labels[s], seeds=seeds)
        for s, seeds in ((slice(0, 1), [1]), (slice(1, 3), [2, 3]))
    ]
    counts = [len(find_targets(labels[s], K).images_T) for s in (slice(0, 1), slice(1, 3))]
    for name in ("loss_mask", "loss_dice_1"):
        mean = sum(c * p[name] for c, p in zip(counts, parts, strict=True)) / sum(counts)
        torch.testing.assert_close(whole[name], mean)


@pytest.mark.parametrize("unlabelled", ["negative", "ignore"])
def test_mask_losses_equal_those_of_whole_binary_masks(unlabelled):
    # with all points uniform and one draw for all, the same points serve the slow version
    config = LossConfig(points=60, importance=0, unlabelled=unlabelled)
    criterion, labels, output = SetCriterion(config, K), some_labels(), some_output(aux=0)
    targets = find_targets(labels, K)
    draws = draw_points(
        [1, 2, 3],
        [len(targets.of_image(image)) for image in range(3)],
        points=60,
        candidates=180,
        uncertain=0,
        device=torch.device("cpu"),
    )
    losses = criterion(output, labels, draws=draws)
    (queries_T,) = criterion.match(output.predictions, labels, targets, draws)
    entropies, dices = [], []
    points = torch.cat([d[0] for d in draws.uniform])
    for image, query, k, places in zip(
        targets.images_T, queries_T, targets.classes_T, points, strict=True
    ):
        logits = sample_masks(output.masks_BQHW[image, query][None, None], places[None])[0, 0]
        whole = binary_masks(labels[image : image + 1])
        target = sample_masks(whole, places[None])[0, k]
        labelled = sample_masks(whole[:, :K].sum(1, keepdim=True), places[None])[0, 0]
        valid = labelled if unlabelled == "ignore" else torch.ones_like(labelled)
        terms = target * F.softplus(-logits) + (valid - target) * F.softplus(logits)
        entropies.append(terms.sum() / valid.sum())
        share = logits.sigmoid()
        union = (share * valid).sum() + target.sum()
        dices.append(1 - (2 * (share * target).sum() + 1) / (union + 1))
    torch.testing.assert_close(losses["loss_mask"], torch.stack(entropies).mean())
    torch.testing.assert_close(losses["loss_dice"], torch.stack(dices).mean())


@pytest.mark.parametrize("unlabelled", ["negative", "ignore"])
def test_uncertain_points_are_those_with_logits_nearest_zero(unlabelled):
    # one target, one query: the loss must be that of the chosen candidates and uniform points
    config = LossConfig(points=40, unlabelled=unlabelled)
    criterion, labels = SetCriterion(config, K), torch.zeros(1, *SIZE, dtype=torch.uint8)
    labels[0, 5:] = 255
    masks = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(2))
    output = SegmenterOutput(
        image_size=SIZE,
        padded_size=SIZE,
        class_logits_BQK1=torch.zeros(1, 1, K + 1),
        masks_BQHW=masks,
    )
    draws = draw_points(
        [1], [1], points=40, candidates=120, uncertain=30, device=torch.device("cpu")
    )
    candidates, uniform = draws.candidates[0][0, 0], draws.uniform[0][0, 0]
    nearest = sample_masks(masks, candidates[None])[0, 0].abs().argsort()[:30]
    points = torch.cat([candidates[nearest], uniform])[None]
    logits = sample_masks(masks, points)[0, 0]
    target = sample_masks((labels == 0).float()[None], points)[0, 0]
    valid = target if unlabelled == "ignore" else torch.ones_like(target)
    terms = target * F.softplus(-logits) + (valid - target) * F.softplus(logits)
    losses = criterion(output, labels, draws=draws)
    torch.testing.assert_close(losses["loss_mask"], terms.sum() / valid.sum())


def test_classes_without_a_query_cost_nothing():
    output, labels = some_output(aux=0), some_labels()
    few = SegmenterOutput(
        image_size=SIZE,
        padded_size=SIZE,
        class_logits_BQK1=output.class_logits_BQK1[:, :2],
        masks_BQHW=output.masks_BQHW[:, :2],
    )
    criterion = SetCriterion(LossConfig(points=40, importance=0), K)
    targets = find_targets(labels, K)
    draws = draw_points(
        [1, 2, 3],
        [len(targets.of_image(image)) for image in range(3)],
        points=40,
        candidates=120,
        uncertain=0,
        device=torch.device("cpu"),
    )
    (queries_T,) = criterion.match(few.predictions, labels, targets, draws)
    assert [(queries_T[targets.of_image(i)] >= 0).sum().item() for i in range(3)] == [2, 2, 2]
    entropies = []
    points = torch.cat([d[0] for d in draws.uniform])
    for image, query, k, places in zip(
        targets.images_T, queries_T, targets.classes_T, points, strict=True
    ):
        if query >= 0:
            mask = few.masks_BQHW[image, query][None, None]
            logits = sample_masks(mask, places[None])[0, 0]
            target = sample_masks((labels[image] == k).float()[None, None], places[None])[0, 0]
            entropies.append(F.binary_cross_entropy_with_logits(logits, target))
    losses = criterion(few, labels, draws=draws)
    expected = torch.stack(entropies).sum() / len(targets.images_T)
    torch.testing.assert_close(losses["loss_mask"], expected)


def test_ignored_pixels_do_not_matter_and_negative_ones_do():
    labels, output = some_labels(), some_output(aux=0)
    labels[:, 8:, 8:] = 255
    changed = output.masks_BQHW.detach().clone()
    changed[:, :, 3:, 3:] += 7
    other = SegmenterOutput(
        image_size=SIZE,
        padded_size=SIZE,
        class_logits_BQK1=output.class_logits_BQK1,
        masks_BQHW=changed,
    )
    for mode, same in (("ignore", True), ("negative", False)):
        # all points uniform, so that both outputs are compared at the same ones
        config = LossConfig(points=200, importance=0, unlabelled=mode)
        losses = [
            SetCriterion(config, K)(o, labels, seeds=[1, 2, 3])["loss_mask"]
            for o in (output, other)
        ]
        assert torch.allclose(*losses) == same, mode


def test_a_picture_without_labels_still_teaches_its_queries_to_say_nothing():
    criterion, output = SetCriterion(LossConfig(points=40), K), some_output()
    labels = torch.full((3, *SIZE), 255, dtype=torch.uint8)
    losses = criterion(output, labels, seeds=[1, 2, 3])
    assert losses["loss_mask"] == 0
    logits = output.class_logits_BQK1.flatten(0, 1)
    expected = F.cross_entropy(logits, torch.full((18,), K))
    torch.testing.assert_close(losses["loss_ce"], expected)
    losses["total"].backward()
    assert torch.equal(output.masks_BQHW.grad, torch.zeros_like(output.masks_BQHW))


def test_labels_may_be_smaller_than_the_padded_masks():
    criterion, output, labels = SetCriterion(LossConfig(points=40), K), some_output(), some_labels()
    cut = SegmenterOutput(**{**vars(output), "image_size": (20, 30)})
    inside = labels.clone()
    inside[:, 20:], inside[:, :, 30:] = 255, 255
    small = criterion(cut, labels[:, :20, :30], seeds=[1, 2, 3])
    large = criterion(output, inside, seeds=[1, 2, 3])
    torch.testing.assert_close(small["total"], large["total"])


def test_light_decoders_are_judged_pixel_by_pixel():
    labels = some_labels()
    logits = torch.randn(3, K, 6, 8, generator=torch.Generator().manual_seed(0))
    output = SegmenterOutput(image_size=SIZE, padded_size=SIZE, pixel_logits_BKHW=logits)
    losses = SetCriterion(LossConfig(class_weight=3), K)(output, labels)
    resized = F.interpolate(logits, size=SIZE, mode="bilinear")
    expected = F.cross_entropy(resized, labels.long(), ignore_index=255)
    torch.testing.assert_close(losses["loss_ce"], expected)
    torch.testing.assert_close(losses["total"], 3 * expected)
    counted = pixel_loss(logits, labels, count_ignored=True)
    torch.testing.assert_close(counted, expected * (labels != 255).float().mean())


@pytest.mark.parametrize(
    ("labels", "seeds", "message"),
    [
        (torch.zeros(3, 24, 31, dtype=torch.uint8), [1, 2, 3], "at the size of the images"),
        (torch.full((3, *SIZE), 9, dtype=torch.uint8), [1, 2, 3], r"labels hold \[9\]"),
        (torch.zeros(3, *SIZE, dtype=torch.uint8), None, "needs seeds"),
    ],
)
def test_bad_labels_and_missing_seeds_are_named(labels, seeds, message):
    with pytest.raises(ValueError, match=message):
        SetCriterion(LossConfig(points=40), K)(some_output(), labels, seeds=seeds)


def test_a_prediction_that_is_not_finite_gives_losses_that_say_so():
    output = some_output(aux=0)
    with torch.no_grad():
        output.masks_BQHW[0] = float("nan")
    losses = SetCriterion(LossConfig(points=40), K)(output, some_labels(), seeds=[1, 2, 3])
    assert not losses["loss_mask"].isfinite()
    assert losses["loss_ce"].isfinite()
