"""Windows, flips and scales."""

import pytest
import torch

from models.build import build_segmenter
from models.config import SegmenterConfig
from models.inference import predict, resize_in_bands, slide, slide_in_bands, windows
from models.segmenter import resize


@pytest.fixture(scope="module")
def segmenter():
    config = SegmenterConfig.model_validate(
        {
            "encoder": {
                "architecture": {
                    "layers": [1, 1, 1, 1],
                    "width": 8,
                    "image_size": 64,
                    "embed_dim": 16,
                }
            },
            "decoder": {
                "width": 32,
                "queries": 6,
                "layers": 2,
                "heads": 4,
                "ffn": 32,
                "pixel_layers": 1,
                "pixel_ffn": 32,
                "group_norm": 8,
            },
        }
    )
    return build_segmenter(config, class_names=["a", "b", "c"]).eval()


def some_images(*size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def test_sliding_window_equals_whole_image_when_one_window_covers_it(segmenter):
    images = some_images(2, 3, 50, 90)
    whole = predict(segmenter, images)
    slid = predict(segmenter, images, mode="slide", window=(64, 96), stride=(40, 40))
    torch.testing.assert_close(slid, whole)


def test_windows_are_averaged_where_they_overlap():
    images = torch.rand(2, 3, 10, 17, generator=torch.Generator().manual_seed(0))
    slid = slide(lambda x: x * 2, images, window=(4, 6), stride=(3, 4), batch=3)
    torch.testing.assert_close(slid, images * 2)
    # a score that differs from window to window: the window's own mean
    places = windows((10, 17), (4, 6), (3, 4))
    total, count = torch.zeros(2, 3, 10, 17), torch.zeros(10, 17)
    for y1, x1, y2, x2 in places:
        part = images[..., y1:y2, x1:x2]
        total[..., y1:y2, x1:x2] += part.mean((2, 3), keepdim=True)
        count[y1:y2, x1:x2] += 1

    def means(x):
        return x.mean((2, 3), keepdim=True).expand_as(x)

    slid = slide(means, images, window=(4, 6), stride=(3, 4), batch=4)
    torch.testing.assert_close(slid, total / count)


@pytest.mark.parametrize(
    ("size", "window", "stride", "expected"),
    [
        ((4, 4), (4, 4), (2, 2), [(0, 0, 4, 4)]),
        ((3, 5), (4, 4), (2, 2), [(0, 0, 3, 4), (0, 1, 3, 5)]),
        ((6, 4), (4, 4), (3, 3), [(0, 0, 4, 4), (2, 0, 6, 4)]),
    ],
)
def test_the_last_window_is_shifted_inward(size, window, stride, expected):
    assert windows(size, window, stride) == expected


def test_windows_that_leave_gaps_are_refused():
    with pytest.raises(ValueError, match="windows of 6 pixels every 7"):
        windows((20, 20), (8, 6), (8, 7))


def test_every_pixel_is_in_a_window():
    for height in range(1, 40, 3):
        covered = torch.zeros(height, 23)
        for y1, x1, y2, x2 in windows((height, 23), (8, 9), (5, 7)):
            covered[y1:y2, x1:x2] += 1
        assert covered.min() >= 1


def test_a_flipped_image_has_flipped_scores_when_flips_are_averaged(segmenter):
    images = some_images(1, 3, 64, 96)
    straight = predict(segmenter, images, flip=True)
    mirrored = predict(segmenter, images.flip(3), flip=True)
    torch.testing.assert_close(straight, mirrored.flip(3))
    assert not torch.allclose(straight, predict(segmenter, images))


def test_scales_are_averaged_at_the_size_asked_for(segmenter):
    images = some_images(1, 3, 64, 96)
    both = predict(segmenter, images, scales=(1.0, 0.5), size=(32, 48))
    one = predict(segmenter, images, size=(32, 48))
    half = predict(segmenter, images, scales=(0.5,), size=(32, 48))
    assert both.shape == (1, 3, 32, 48)
    torch.testing.assert_close(both, (one + half) / 2)


def test_bf16_is_near_float32(segmenter):
    images = some_images(1, 3, 64, 96)
    exact, rounded = predict(segmenter, images), predict(segmenter, images, bf16=True)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().mean() < 0.05 * exact.abs().mean()


def test_training_mode_is_refused(segmenter):
    segmenter.train()
    try:
        with pytest.raises(ValueError, match=r"segmenter\.eval"):
            predict(segmenter, some_images(1, 3, 64, 64))
    finally:
        segmenter.eval()


def place_dependent(images):
    """Scores that differ from window to window."""
    return images.float() + images.float().mean((2, 3), keepdim=True)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(30, 17), (4, 17), (3, 5), (31, 6)])
def test_bands_from_top_to_bottom_are_what_all_windows_give_at_once(size, flip):
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    options = {"window": (8, 6), "stride": (3, 4), "batch": 3}
    bands = list(slide_in_bands(place_dependent, images, flip=flip, **options))
    whole = slide(place_dependent, images, **options)
    if flip:
        whole = (whole + slide(place_dependent, images.flip(3), **options).flip(3)) / 2
    assert len(bands) == len({y for y, *_ in windows(size, (8, 6), (3, 4))})
    torch.testing.assert_close(torch.cat(bands, 2), whole)


@pytest.mark.parametrize(
    ("of", "to"), [((7, 9), (30, 20)), ((30, 20), (7, 9)), ((1, 1), (5, 3)), ((6, 6), (13, 6))]
)
def test_resizing_in_bands_equals_resizing_at_once(of, to):
    scores = torch.rand(2, 3, *of, generator=torch.Generator().manual_seed(0))
    bands = torch.cat(list(resize_in_bands(scores, to, rows=4)), 2)
    torch.testing.assert_close(bands, resize(scores, to))
