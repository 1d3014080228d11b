"""Readers: every kind of picture and label file becomes uint8 arrays, or an error that names it."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from stages.labels import IdMap
from stages.readers import (
    CorruptFileError,
    Sample,
    image_size,
    load_index,
    load_painted,
    read_image,
    read_label,
    resize_label,
)
from stages.shards import write_json, write_jsonl
from tests import small_datasets

RGB = small_datasets.picture(0, (6, 10))
GRAY = RGB[..., 0]


def saved(tmp_path, image: Image.Image, name="x.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def gray16(tmp_path):
    return saved(tmp_path, Image.fromarray(GRAY.astype(np.uint16) * 256 + 7))


def transparent(tmp_path):
    alpha = np.where(np.arange(10) < 5, 255, 0).astype(np.uint8) * np.ones((6, 1), np.uint8)
    return saved(tmp_path, Image.fromarray(np.dstack([RGB, alpha])))


def rotated(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees counter-clockwise to see it upright
    turned = np.rot90(RGB)  # so this is how the camera stored it
    return saved(tmp_path, Image.fromarray(np.ascontiguousarray(turned)), exif=exif)


CASES = [
    ("rgb", lambda folder: saved(folder, Image.fromarray(RGB)), RGB),
    ("gray", lambda folder: saved(folder, Image.fromarray(GRAY)), np.dstack([GRAY] * 3)),
    ("16 bit", gray16, np.dstack([GRAY] * 3)),
    ("alpha", transparent, np.where(np.arange(10)[:, None] < 5, RGB, 0)),
    ("exif", rotated, RGB),
    (
        "palette",
        lambda folder: saved(
            folder, Image.fromarray(RGB // 64 * 64).convert("P", palette=Image.Palette.ADAPTIVE)
        ),
        RGB // 64 * 64,
    ),
    ("one pixel", lambda folder: saved(folder, Image.fromarray(RGB[:1, :1])), RGB[:1, :1]),
]


@pytest.mark.parametrize(
    ("make", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_pictures_of_every_mode_become_rgb(tmp_path, make, expected):
    path = make(tmp_path)
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= (0 if "palette" not in path.name else 8)
    assert image_size(path) == expected.shape[:2]


def test_cmyk_jpeg_comes_out_in_about_its_colours(tmp_path):
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    path = saved(tmp_path, Image.fromarray(flat).convert("CMYK"), "x.jpg", quality=95)
    assert np.abs(read_image(path).astype(int) - flat).max() < 12


def test_a_picture_of_100_megapixels_is_read_without_a_warning(tmp_path, recwarn):
    path = saved(tmp_path, Image.new("L", (12_500, 8_000), 7), compress_level=1)
    assert read_image(path).shape == (8_000, 12_500, 3)
    assert not [w for w in recwarn if "Decompression" in w.category.__name__]


@pytest.mark.parametrize("read", [read_image, read_label])
def test_damaged_files_are_named(tmp_path, read):
    path = saved(tmp_path, Image.fromarray(small_datasets.picture(1, (64, 64))))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:20], b"", b"GIF89a?", b"hello " * 50):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"x\.png"):
            read(path)


def test_a_file_that_is_gone_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="clouds --stage prepare"):
        read_image(tmp_path / "gone.png")


def test_label_files_give_their_raw_values(tmp_path):
    raw = small_datasets.raw_label(0)
    plain = small_datasets.save(tmp_path / "plain.png", raw)
    palette = small_datasets.save(tmp_path / "palette.png", raw, palette=True)
    gray_colours = small_datasets.save(tmp_path / "equal.png", np.dstack([raw] * 3))
    for path in (plain, palette, gray_colours):
        assert read_label(path).dtype == np.uint8
        assert (read_label(path) == raw).all(), path.name
    wide = raw.astype(np.uint16) * 1000
    path = saved(tmp_path, Image.fromarray(wide))
    assert read_label(path).dtype == np.uint16
    assert (read_label(path) == wide).all()


def test_16_bit_colour_labels_give_their_red_channel_whole(tmp_path):
    label = np.zeros((5, 7, 3), np.uint16)
    label[..., 0] = np.arange(35).reshape(5, 7) * 1000
    label[..., 1] = 77
    path = small_datasets.save(tmp_path / "synthia.png", label)
    assert (read_label(path) == label[..., 0]).all()
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CorruptFileError, match=r"synthia\.png"):
        read_label(path)


def test_coloured_labels_are_refused_with_a_way_out(tmp_path):
    path = saved(tmp_path, Image.fromarray(RGB))
    with pytest.raises(ValueError, match=r"x\.png: a label must hold one class value.*palette"):
        read_label(path)


def test_labels_are_resized_at_pixel_centres():
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (resize_label(label, (3, 4)) == label).all()
    assert (resize_label(label, (6, 8)) == np.kron(label, np.ones((2, 2), np.uint8))).all()
    assert resize_label(label, (1, 2)).tolist() == [[5, 7]]


def test_a_sample_maps_its_label_and_fits_it_to_its_picture(tmp_path):
    raw = np.kron(np.array([[7, 8], [26, 0]], np.uint8), np.ones((4, 4), np.uint8))
    sample = Sample(
        id="d/sub/x",
        image=small_datasets.save(tmp_path / "i.png", RGB),
        label=small_datasets.save(tmp_path / "l.png", raw),
        height=4,
        width=4,
        label_map=IdMap(name="m", ids={7: 0, 8: 1, 26: 13}, ignored=frozenset({0})),
    )
    assert (sample.dataset, sample.stem) == ("d", "sub/x")
    assert sample.read_label()[::2, ::2].tolist() == [[0, 1], [13, 255]]
    with pytest.raises(ValueError, match="d/sub/x has no label"):
        dataclasses.replace(sample, label=None).read_label()


def test_an_index_without_roots_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"roots\.json is missing: run .*prepare"):
        load_index(tmp_path)


def painted_artifacts(tmp_path, *, kept=("a", "c"), labelled=("a", "b", "c")):
    for number, name in enumerate("abc"):
        folder = tmp_path / "pictures" / "shard-00000"
        small_datasets.save(folder / f"{name}.png", small_datasets.picture(number))
        folder = tmp_path / "labels" / "shard-00000"
        if name in labelled:
            small_datasets.save(folder / f"{name}.label.png", small_datasets.raw_label(number))
    for stage, rows in (
        ("pictures", [{"id": name, "file": f"{name}.png"} for name in "abc"]),
        ("labels", [{"id": name, "label": f"{name}.label.png"} for name in labelled]),
    ):
        write_jsonl(tmp_path / stage / "shard-00000" / "index.jsonl", rows)
        write_json(tmp_path / stage / "shard-00000" / "shard.json", {"files": {}})
    (tmp_path / "selection").mkdir()
    rows = [{"id": name, "kept": name in kept, "scores": {}, "reasons": []} for name in "abc"]
    write_jsonl(tmp_path / "selection" / "selection.jsonl", rows)
    return tmp_path / "pictures", tmp_path / "labels", tmp_path / "selection"


def test_painted_pictures_are_paired_with_labels_and_selected(tmp_path):
    pictures, labels, selection = painted_artifacts(tmp_path)
    every = load_painted(pictures, labels)
    assert [sample.id for sample in every] == ["painted/a", "painted/b", "painted/c"]
    chosen = load_painted(pictures, labels, selection)
    assert [sample.id for sample in chosen] == ["painted/a", "painted/c"]
    assert all(sample.painted for sample in chosen)
    assert (chosen[1].read_label() == small_datasets.raw_label(2)).all()
    assert (chosen[1].height, chosen[1].width) == small_datasets.SIZE


def test_painted_pictures_without_labels_or_selection_are_errors(tmp_path):
    pictures, labels, _ = painted_artifacts(tmp_path / "one", labelled=("a", "c"))
    with pytest.raises(ValueError, match=r"1 of 3 pictures .* no label .*the first: b"):
        load_painted(pictures, labels)
    pictures, labels, selection = painted_artifacts(tmp_path / "two", kept=())
    with pytest.raises(ValueError, match="the selection keeps none"):
        load_painted(pictures, labels, selection)


def test_index_lines_join_their_roots_and_maps(tmp_path):
    row = {"id": "d/x", "image": "i/x.png", "label": "l/x.png", "height": 2, "width": 3}
    write_jsonl(tmp_path / "d.jsonl", [row | {"classes": {"0": 4, "13": 2}}])
    id_map = IdMap(name="m", ids={7: 0})
    write_json(tmp_path / "d.json", {"label_map": id_map.to_json()})
    write_jsonl(tmp_path / "a.jsonl", [row | {"id": "a/x", "label": None}])
    write_json(tmp_path / "a.json", {"label_map": None})
    (tmp_path / "roots.json").write_text(json.dumps({"d": "/data/d", "a": "/data/a"}))
    plain, labelled = load_index(tmp_path)
    assert (plain.id, plain.label, plain.classes) == ("a/x", None, None)
    assert str(labelled.image) == "/data/d/i/x.png"
    assert labelled.classes == {0: 4, 13: 2}
    assert labelled.label_map.apply(np.array([[7, 0]], np.uint8)).tolist() == [[0, 255]]
