"""Simple measures of pictures, and a real (tiny, random) CLIP."""

import itertools
import json
import logging

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from models.likeness import HASH_BITS, NearCopies, contrast, difference_hash, load_scorer
from tests.tiny import street

torch.set_num_threads(1)
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**CLIP)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    about = {"model_cfg": CLIP, "preprocess_cfg": {"size": 32}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (np.full((8, 8, 3), 77, np.uint8), 0.0),
        (np.repeat(np.array([[[0] * 3], [[255] * 3]], np.uint8), 4, axis=1), 0.5),
        (np.broadcast_to(np.array([255, 0, 0], np.uint8), (4, 4, 3)), 0.0),
    ],
)
def test_contrast_is_the_spread_of_luminance(picture, expected):
    assert contrast(picture) == pytest.approx(expected, abs=1e-6)


def test_near_copies_have_near_hashes_and_other_pictures_far_ones():
    picture = street(3)[0]
    height, width = picture.shape[:2]
    image = Image.fromarray(picture)
    copies = [
        np.asarray(image.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)),
        np.clip(picture.astype(int) + 8, 0, 255).astype(np.uint8),
        np.clip(picture * 0.9, 0, 255).astype(np.uint8),
    ]
    value = difference_hash(picture)
    for copy in copies:
        assert (difference_hash(copy) ^ value).bit_count() <= 6
    mirrored = difference_hash(np.ascontiguousarray(picture[:, ::-1]))
    assert (mirrored ^ value).bit_count() > 20


def test_a_hash_is_the_comparison_of_neighbouring_cells():
    cells = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    picture = np.repeat(np.repeat(cells, 4, axis=0), 4, axis=1)[..., None].repeat(3, axis=2)
    expected = "".join("1" if a > b else "0" for row in cells for a, b in itertools.pairwise(row))
    assert f"{difference_hash(picture):0{HASH_BITS}b}" == expected


HASHES = st.integers(0, 2**HASH_BITS - 1)


@settings(max_examples=60, deadline=None)
@given(
    HASHES,
    st.lists(st.integers(0, HASH_BITS - 1), max_size=30),
    st.integers(0, HASH_BITS),
    st.lists(HASHES, max_size=3),
)
def test_the_near_copy_is_the_first_hash_of_the_fewest_differing_bits(value, turned, bits, others):
    """Hashes that walk away from the one asked for, a bit at a time, and strangers."""
    walk = itertools.accumulate(turned, lambda near, bit: near ^ (1 << bit), initial=value)
    hashes = [*others, *list(walk)[:0:-1]]
    copies = NearCopies(bits=bits)
    for known in hashes:
        copies.add(known)
    distances = [(value ^ known).bit_count() for known in hashes]
    near = min(distances, default=HASH_BITS + 1)
    assert copies.nearest(value) == (distances.index(near) if near <= bits else None)


def test_similarities_are_cosines_of_open_clips_own_features(clip_folder):
    scorer = load_scorer(f"local-dir:{clip_folder}")
    images, texts = [street(n)[0] for n in range(3)], ["a road", "a long wall", "fog"]
    found = scorer.score(images, texts)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(texts)
    with torch.inference_mode():
        for image, token, value in zip(images, tokens, found, strict=True):
            seen = model.encode_image(transform(Image.fromarray(image))[None])
            read = model.encode_text(token[None])
            assert value == pytest.approx(torch.cosine_similarity(seen, read).item(), abs=1e-5)
    assert len(set(found)) == 3


def test_a_clip_that_is_not_to_be_had_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json is missing"):
        load_scorer(str(tmp_path))
    with pytest.raises(ValueError, match=r"open_clip has no 'ViT-B-33'; nearest: .*ViT-B-32"):
        load_scorer("ViT-B-33")
    with pytest.raises(ValueError, match=r"needs select\.clip_weights.*laion2b_s34b_b79k"):
        load_scorer("ViT-B-32")


def test_loading_a_clip_tells_the_log_no_paths(clip_folder, caplog):
    caplog.set_level(logging.INFO)
    load_scorer(f"local-dir:{clip_folder}")
    assert str(clip_folder) not in caplog.text
    logging.info("afterwards")
    assert "afterwards" in caplog.text
