"""Batches and augmentation: pure functions of seed and step, and each view what it says it is."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from stages import augment as augment_module
from stages import batches as batches_module
from stages.augment import (
    PADDING_RGB,
    Window,
    augment,
    crop_image,
    crop_labels,
    jitter_colour,
)
from stages.batches import MixedBatches, RareClassSampler, SourceBatches, UniformSampler
from stages.readers import CorruptFileError, Sample, resize_label
from stages.training_config import AugmentConfig
from tests import small_datasets

CROP = AugmentConfig(crop_height=32, crop_width=32)
PLAIN = AugmentConfig(
    crop_height=32, crop_width=32, scale_min=1, scale_max=1, flip=False, colour=0.0
)


def make_samples(folder, count, *, painted=False, size=(40, 56)):
    found = []
    for number in range(count):
        name = f"{'p' if painted else 's'}{number}"
        label = np.kron(small_datasets.raw_label(number, (0, 1, 2, 255)), np.ones((2, 2), np.uint8))
        label = np.pad(label, ((0, 0), (0, 24)), mode="edge")[: size[0], : size[1]]
        found.append(
            Sample(
                id=f"{'painted' if painted else 'd'}/{number}",
                image=small_datasets.save(
                    folder / f"{name}.png", small_datasets.picture(number, size)
                ),
                label=small_datasets.save(folder / f"{name}.label.png", label),
                height=size[0],
                width=size[1],
                classes={int(c): int((label == c).sum()) for c in np.unique(label) if c != 255},
                painted=painted,
            )
        )
    return found


@pytest.fixture
def samples(tmp_path):
    return make_samples(tmp_path, 7)


def same(one, other):
    return (
        (one.step, one.ids, one.seeds) == (other.step, other.ids, other.seeds)
        and torch.equal(one.images_B3HW, other.images_B3HW)
        and torch.equal(one.labels_BHW, other.labels_BHW)
        and torch.equal(one.painted_B, other.painted_B)
        and torch.equal(one.weights_B, other.weights_B)
    )


def test_a_batch_has_the_shapes_and_types_it_promises(samples):
    batch = SourceBatches(samples, batch_size=4, augment=CROP, seed=0).batch(0)
    assert (batch.images_B3HW.shape, batch.images_B3HW.dtype) == ((4, 3, 32, 32), torch.uint8)
    assert (batch.labels_BHW.shape, batch.labels_BHW.dtype) == ((4, 32, 32), torch.uint8)
    assert batch.images_B3HW.is_contiguous()
    assert not batch.painted_B.any()
    assert len(batch) == len(batch.ids) == len(set(batch.seeds)) == 4


def test_a_batch_depends_on_seed_and_step_alone(samples):
    one = SourceBatches(samples, batch_size=4, augment=CROP, seed=3)
    other = SourceBatches(samples, batch_size=4, augment=CROP, seed=3)
    expected = [one.batch(step) for step in range(6)]
    for step in (5, 0, 3, 3):
        assert same(other.batch(step), expected[step])
    assert not same(
        SourceBatches(samples, batch_size=4, augment=CROP, seed=4).batch(0), expected[0]
    )
    assert not torch.equal(expected[0].images_B3HW, expected[1].images_B3HW)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_gives_the_same_batches_with_any_number_of_processes(samples, workers):
    batches = SourceBatches(samples, batch_size=4, augment=CROP, seed=3)
    expected = [batches.batch(step) for step in range(2, 7)]
    state = torch.get_rng_state()
    streamed = list(batches.stream(2, 7, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(same(one, other) for one, other in zip(streamed, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_stops_the_stream_with_its_name(samples, workers):
    samples[3].image.write_bytes(b"damaged")
    batches = SourceBatches(samples, batch_size=7, augment=CROP, seed=3)
    with pytest.raises(CorruptFileError, match=r"^[^\n]*s3\.png: not a picture[^\n]*$"):
        next(batches.stream(0, 2, workers=workers))


def test_ranks_with_parts_of_a_batch_make_the_whole(samples):
    batches = SourceBatches(samples, batch_size=6, augment=CROP, seed=3)
    whole = batches.batch(1)
    for part in (slice(0, 3), slice(3, 6), slice(1, 2)):
        assert same(batches.batch(1, part), whole.rows(part))


def test_the_cache_changes_nothing_and_keeps_to_its_limit(samples, monkeypatch):
    cached = SourceBatches(samples, batch_size=4, augment=CROP, seed=3)
    monkeypatch.setattr(batches_module, "CACHE_BYTES", 3 * 40 * 56 * 4)
    small = SourceBatches(samples, batch_size=4, augment=CROP, seed=3)
    assert all(same(cached.batch(step), small.batch(step)) for step in range(4))
    assert len(cached._cache) == 7
    assert len(small._cache) == 3


def test_every_epoch_shows_every_sample_once_in_another_order(samples):
    sampler = UniformSampler(samples, seed=1)
    epochs = [[sampler(7 * epoch + place)[0].id for place in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == [f"d/{n}" for n in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    jumped = pickle.loads(pickle.dumps(UniformSampler(samples, seed=1)))
    assert jumped(16)[0].id == epochs[2][2]


def test_one_sample_twice_in_a_batch_gets_two_views(samples):
    batch = SourceBatches(samples[:1], batch_size=2, augment=CROP, seed=0).batch(0)
    assert batch.ids == ("d/0", "d/0")
    assert batch.seeds[0] != batch.seeds[1]
    assert not torch.equal(batch.images_B3HW[0], batch.images_B3HW[1])


@pytest.mark.parametrize(
    ("batch_size", "share", "per_step"),
    [
        (8, 0.25, [2, 2, 2, 2]),
        (4, 0.5, [2, 2, 2, 2]),
        (2, 0.25, [0, 1, 0, 1]),
        (3, 1.0, [3, 3, 3, 3]),
        (3, 0.0, [0, 0, 0, 0]),
    ],
)
def test_mixed_batches_keep_the_share(tmp_path, samples, batch_size, share, per_step):
    painted = make_samples(tmp_path, 5, painted=True)
    batches = MixedBatches(
        samples,
        painted,
        batch_size=batch_size,
        painted_share=share,
        augment=CROP,
        painted_augment=PLAIN,
        seed=0,
    )
    found = [batches.batch(step) for step in range(4)]
    assert [int(batch.painted_B.sum()) for batch in found] == per_step
    assert all(
        flag == name.startswith("painted/")
        for batch in found
        for flag, name in zip(batch.painted_B.tolist(), batch.ids, strict=True)
    )


def test_mixed_batches_run_through_both_kinds_without_gaps(tmp_path, samples):
    painted = make_samples(tmp_path, 5, painted=True)
    batches = MixedBatches(
        samples,
        painted,
        batch_size=4,
        painted_share=0.3,
        augment=CROP,
        painted_augment=PLAIN,
        seed=0,
    )
    drawn = Counter(draw.sample.id for step in range(35) for draw in batches.draws(step))
    shares = Counter(name.partition("/")[0] for name in drawn.elements())
    assert shares == {"d": 98, "painted": 42}
    assert all(drawn[f"d/{n}"] == 14 for n in range(7))
    assert sorted(drawn[f"painted/{n}"] for n in range(5)) == [8, 8, 8, 9, 9]


def test_rare_classes_are_drawn_by_the_published_formula(samples):
    samples = [
        *samples[:1],
        Sample(id="d/rare", image=None, height=10, width=10, classes={0: 90, 5: 10}),
    ]
    samples[0] = Sample(id="d/common", image=None, height=30, width=30, classes={0: 900})
    sampler = RareClassSampler(samples, seed=0, temperature=0.5)
    shares = np.array([990, 10]) / 1000
    expected = np.exp((1 - shares) / 0.5) / np.exp((1 - shares) / 0.5).sum()
    np.testing.assert_allclose(sampler.probabilities, expected)
    drawn = [sampler(position) for position in range(400)]
    share = sum(focus == 5 for _, focus in drawn) / 400
    assert abs(share - expected[1]) < 4 * math.sqrt(expected[1] * (1 - expected[1]) / 400)
    assert all(sample.id == "d/rare" for sample, focus in drawn if focus == 5)
    assert sampler(17)[0].id == drawn[17][0].id


def test_rare_class_sampling_shows_the_class_it_drew(tmp_path):
    folder_samples = make_samples(tmp_path, 4, size=(40, 56))
    label = np.zeros((40, 56), np.uint8)
    label[:8, :8] = 2
    for sample in folder_samples:
        small_datasets.save(sample.label, label)
        sample.classes.clear()
        sample.classes.update({0: 40 * 56 - 64, 2: 64})
    settings = {"batch_size": 8, "augment": CROP, "seed": 0}
    plain = SourceBatches(folder_samples, **settings)
    rare = SourceBatches(folder_samples, **settings, rare_class_sampling=0.01)

    def shown(batches):
        return sum((batches.batch(step).labels_BHW == 2).any((1, 2)).sum() for step in range(10))

    assert shown(rare) > shown(plain) + 10


def test_rare_class_sampling_without_counts_says_why(samples):
    bare = [Sample(id="d/x", image=samples[0].image, height=40, width=56)]
    with pytest.raises(ValueError, match=r"rare_class_sampling needs the class counts"):
        SourceBatches(bare, batch_size=1, augment=CROP, seed=0, rare_class_sampling=0.01)


def test_no_samples_and_two_crop_sizes_are_errors(samples):
    with pytest.raises(ValueError, match="no source samples"):
        SourceBatches([], batch_size=1, augment=CROP, seed=0)
    mixed = {"batch_size": 2, "augment": CROP, "painted_share": 0.5, "seed": 0}
    with pytest.raises(ValueError, match="no painted samples"):
        MixedBatches(samples, [], painted_augment=CROP, **mixed)
    wide = AugmentConfig(crop_height=32, crop_width=64)
    with pytest.raises(ValueError, match=r"\(32, 32\) and painted_augment to \(32, 64\)"):
        MixedBatches(samples, samples, painted_augment=wide, **mixed)


# One view


def view(image, labels, config, seed=0, **options):
    return augment(image, labels, config, np.random.default_rng(seed), **options)


@pytest.mark.parametrize("way", ["whole", "part"])
@pytest.mark.parametrize("scaled", [(20, 28), (40, 56), (53, 75), (80, 112), (31, 60)])
def test_a_cropped_resize_equals_the_resized_whole_then_cropped(scaled, way, monkeypatch):
    monkeypatch.setattr(augment_module, "_WHOLE_UP_TO", math.inf if way == "whole" else 0)
    image = small_datasets.picture(3, (40, 56))
    labels = np.resize(small_datasets.raw_label(3), (40, 56))
    whole = Image.fromarray(image).resize(scaled[::-1], Image.Resampling.BILINEAR)
    for top, left in ((0, 0), (scaled[0] - 16, scaled[1] - 16), (2, 5)):
        window = Window(scaled=scaled, top=top, left=left, height=16, width=16)
        expected = np.asarray(whole)[top : top + 16, left : left + 16].astype(int)
        assert np.abs(crop_image(image, window) - expected).max() <= 1
        expected = resize_label(labels, scaled)[top : top + 16, left : left + 16]
        assert (crop_labels(labels, window) == expected).all()


def test_outside_the_picture_is_padding_without_label():
    image, labels = np.full((8, 10, 3), 200, np.uint8), np.zeros((8, 10), np.uint8)
    window = Window(scaled=(8, 10), top=-3, left=-1, height=16, width=16)
    crop, cropped = crop_image(image, window), crop_labels(labels, window)
    assert (crop[3:11, 1:11] == 200).all()
    assert (cropped[3:11, 1:11] == 0).all()
    outside = np.ones((16, 16), bool)
    outside[3:11, 1:11] = False
    assert (crop[outside] == PADDING_RGB).all()
    assert (cropped[outside] == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (33, 31), (200, 3)])
def test_pictures_of_any_size_give_the_crop(size):
    image, labels = small_datasets.picture(0, size), np.ones(size, np.uint8)
    for seed in range(20):
        crop, cropped = view(image, labels, CROP, seed)
        assert crop.shape == (32, 32, 3)
        assert cropped.shape == (32, 32)
        assert set(np.unique(cropped)) <= {1, 255}


def test_picture_and_label_stay_aligned_through_scale_crop_and_mirror():
    labels = np.zeros((64, 96), np.uint8)
    labels[16:48, 24:80] = 1
    image = np.where(labels[..., None] == 1, 250, 5).astype(np.uint8).repeat(3, axis=2)
    config = AugmentConfig(crop_height=48, crop_width=64, colour=0.0)
    for seed in range(60):
        crop, cropped = view(image, labels, config, seed)
        flat = maximum_filter(cropped, 3) == minimum_filter(cropped, 3)
        judged = flat & (cropped != 255)
        assert ((crop[..., 0] > 127)[judged] == cropped[judged]).all()


def test_half_of_the_views_are_mirrored_only_if_asked():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    labels = np.zeros((32, 32), np.uint8)
    flipping = PLAIN.model_copy(update={"flip": True})
    mirrored = [view(image, labels, flipping, seed)[0][0, 0, 0] == 0 for seed in range(200)]
    assert 70 < sum(mirrored) < 130
    assert all((view(image, labels, PLAIN, seed)[0] == image).all() for seed in range(10))


def test_crops_of_one_class_are_drawn_again():
    labels = np.zeros((64, 256), np.uint8)
    labels[:, :40] = 1
    image = np.zeros((64, 256, 3), np.uint8)
    limited = PLAIN.model_copy(update={"max_class_share": 0.75})

    def pure(config):
        return sum(len(np.unique(view(image, labels, config, seed)[1])) == 1 for seed in range(60))

    assert pure(PLAIN) > 35
    assert pure(limited) < 25


def hsv_reference(image, draws):
    """The distortion step by step in floating point, as published."""
    happens, amounts = draws[:4] < 0.5, 2 * draws[4:8] - 1
    pixels = image.astype(np.float64)

    def contrast(pixels):
        return np.clip(pixels * (1 + 0.5 * amounts[1]), 0, 255)

    if happens[0]:
        pixels = np.clip(pixels + 32 * amounts[0], 0, 255)
    if happens[1] and draws[8] < 0.5:
        pixels = contrast(pixels)
    if happens[2] or happens[3]:
        unit = pixels / 255
        value, low = unit.max(-1), unit.min(-1)
        spread = value - low
        safe = np.where(spread > 0, spread, 1)
        red, green, blue = np.moveaxis(unit, -1, 0)
        hue = np.select(
            [value == red, value == green],
            [(green - blue) / safe % 6, (blue - red) / safe + 2],
            (red - green) / safe + 4,
        )
        saturation = np.where(value > 0, spread / np.where(value > 0, value, 1), 0)
        if happens[2]:
            saturation = np.clip(saturation * (1 + 0.5 * amounts[2]), 0, 1)
        if happens[3]:
            hue = (hue + 18 / 30 * amounts[3]) % 6
        shift = np.array([5, 3, 1])
        k = (shift + hue[..., None]) % 6
        ramp = np.clip(np.minimum(k, 4 - k), 0, 1)
        pixels = 255 * (value[..., None] - (value * saturation)[..., None] * ramp)
    if happens[1] and draws[8] >= 0.5:
        pixels = contrast(pixels)
    return pixels


def test_colour_jitter_by_tables_is_the_published_distortion():
    image = small_datasets.picture(5, (30, 40))
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(40):
        draws = rng.random(9)
        ours = jitter_colour(image, draws, strength=1.0).astype(float)
        error = np.abs(ours - hsv_reference(image, draws))
        assert error.mean() < 2.5
        assert np.percentile(error, 99) < 9
        changed += np.abs(ours - image).mean() > 5
    assert changed > 20


def test_strength_and_share_zero_leave_colours_alone():
    image, labels = small_datasets.picture(1, (32, 32)), np.zeros((32, 32), np.uint8)
    assert (view(image, labels, PLAIN)[0] == image).all()
    blurred = PLAIN.model_copy(update={"blur": 1.0})
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    spread = np.mean([view(noise, labels, blurred, seed)[0].std() for seed in range(9)])
    assert spread < 0.8 * noise.std()
    jittered = PLAIN.model_copy(update={"colour": 1.0})
    assert any((view(image, labels, jittered, seed)[0] != image).any() for seed in range(4))
