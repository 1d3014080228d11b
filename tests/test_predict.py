"""`clouds predict` and its face in Python: held against plain recomputation, and interrupted."""

import json
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flows.cli import main
from models.checkpoints import load_segmenter
from models.inference import predict
from stages import predict as verb
from stages.labels import load_labelspace
from stages.predictor import load
from stages.readers import read_image
from stages.use_config import PredictConfig
from stages.video import FrameWriter, read_frames
from tests.small_models import save_checkpoint
from tests.tiny import CLASSES, SIZE, Told, street, write_labelspace

CITY = load_labelspace("cityscapes19")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("predict") / "model")


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "city"
    return save_checkpoint(folder, names=CITY.names, label_space="cityscapes19")


def pictures(folder, count=5):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(street(number)[0]).save(folder / f"{number}.png")
    return folder


def film(path, count=5):
    with FrameWriter(path, rate=Fraction(10), size=SIZE) as video:
        for number in range(count):
            video.write(street(number)[0])
    return path


def command(*words):
    return main(["predict", *map(str, words), "--device", "cpu"])


def label(path):
    return np.asarray(Image.open(path))


def plain_labels(model, path):
    """The labels of one picture, alone and whole."""
    image = torch.from_numpy(read_image(path)).permute(2, 0, 1)[None]
    return predict(load_segmenter(model), image).argmax(1)[0].numpy()


def test_a_folder_becomes_labels_overlays_shares_and_a_summary(model, tmp_path, capsys):
    inputs = pictures(tmp_path / "in" / "town")
    out = tmp_path / "out"
    assert command(inputs.parent, "--model", model, "--out", out, "--confidence") == 0
    assert "5 pictures" in capsys.readouterr().out
    seen = set()
    for number in range(5):
        labels = label(out / "labels" / "town" / f"{number}.png")
        assert (labels == plain_labels(model, inputs / f"{number}.png")).mean() > 0.999
        record = json.loads((out / "shares" / "town" / f"{number}.json").read_text())
        expected = {name: (labels == k).mean() for k, name in enumerate(CLASSES)}
        assert record["shares"] == pytest.approx(expected, abs=1e-6)
        assert Image.open(out / "overlays" / "town" / f"{number}.jpg").size == SIZE[::-1]
        assert label(out / "confidence" / "town" / f"{number}.png").max() > 64
        seen |= set(np.unique(labels))
    assert len(seen) > 1, "the model of this test must tell classes apart"
    summary = json.loads((out / "summary.json").read_text())
    assert sorted(summary["predicted"]) == [f"town/{number}" for number in range(5)]
    assert sum(summary["shares"].values()) == pytest.approx(1, abs=1e-4)
    assert not list(out.rglob("*.tmp"))


def test_three_lines_of_python_predict_a_picture(model, tmp_path):
    path = pictures(tmp_path / "in", 1) / "0.png"
    result = load(model).predict(str(path))
    result.overlay.save(tmp_path / "overlay.png")
    assert np.array_equal(result.labels, plain_labels(model, path))
    colours = result.space.colours[result.labels].astype(int)
    overlay = np.asarray(Image.open(tmp_path / "overlay.png")).astype(int)
    assert np.abs(overlay - (colours + read_image(path)) / 2).max() <= 1
    same = load(model).predict(Image.open(path))
    assert np.array_equal(same.labels, result.labels)
    with pytest.raises(ValueError, match="uint8 RGB"):
        load(model).predict(np.zeros((4, 4)))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load(model).predict("nowhere.png")


def test_what_is_whole_is_not_made_again_and_what_is_damaged_is(model, tmp_path, capsys):
    inputs, out = pictures(tmp_path / "in"), tmp_path / "out"
    words = (inputs, "--model", model, "--out", out)
    assert command(*words) == 0
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    wanted = (out / "labels" / "1.png").read_bytes()
    (out / "labels" / "1.png").write_bytes(wanted[:20])
    Image.fromarray(street(9)[0]).save(inputs / "3.png")
    capsys.readouterr()
    assert command(*words) == 0
    assert "3 done before" in capsys.readouterr().out
    changed = {p.name for p, time in times.items() if p.stat().st_mtime_ns != time}
    assert changed == {"1.png", "3.png"}
    assert (out / "labels" / "1.png").read_bytes() == wanted
    assert command(*words, "--flip") == 0
    assert "done before" not in capsys.readouterr().out


def test_an_interrupted_run_goes_on_to_the_same_files(model, tmp_path):
    class Interrupted(Told):
        def advance(self, count=1, **metrics):
            super().advance(count, **metrics)
            if self.advanced == 4:
                raise KeyboardInterrupt

    film(pictures(tmp_path / "in", 3) / "drive.mp4")
    options = {"inputs": [tmp_path / "in"], "model": model}
    config = PredictConfig(batch=2, device="cpu", confidence=True)
    verb.run(config, out=tmp_path / "whole", progress=Told(), **options)
    with pytest.raises(KeyboardInterrupt):
        verb.run(config, out=tmp_path / "out", progress=Interrupted(), **options)
    assert not (tmp_path / "out" / "overlays" / "drive.mp4").exists()
    first = tmp_path / "out" / "labels" / "drive" / "000000.png"
    time = first.stat().st_mtime_ns
    told = Told()
    verb.run(config, out=tmp_path / "out", progress=told, **options)
    assert told.started == [(8, "pictures and frames", 3)]
    assert first.stat().st_mtime_ns == time, "a frame that was predicted is predicted again"
    names = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*")}
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*")} == names
    for name in names:
        left, right = (tmp_path / folder / name for folder in ("whole", "out"))
        if name.suffix in {".png", ".jpg"}:
            assert left.read_bytes() == right.read_bytes(), name
        elif name.parts[0] == "shares":
            records = [json.loads(path.read_text()) for path in (left, right)]
            for record in records:  # an MP4's size differs from run to run
                record["files"].pop("overlays/drive.mp4", None)
            assert records[0] == records[1]


def test_a_video_becomes_frames_shares_and_an_overlay_video(model, tmp_path):
    path = film(tmp_path / "drive.mp4")
    out = tmp_path / "out"
    assert command(path, "--model", model, "--out", out) == 0
    frames = list(read_frames(path))
    assert len(frames) == 5
    predictor = load(model)
    for number, frame in enumerate(frames):
        labels = label(out / "labels" / "drive" / f"{number:06d}.png")
        assert (labels == predictor.predict(frame).labels).mean() > 0.999
    record = json.loads((out / "shares" / "drive.json").read_text())
    assert [frame["time_s"] for frame in record["frames"]] == [0, 0.1, 0.2, 0.3, 0.4]
    overlays = list(read_frames(out / "overlays" / "drive.mp4"))
    assert len(overlays) == 5
    expected = np.asarray(predictor.predict(frames[2]).overlay).astype(int)
    assert np.abs(overlays[2] - expected).mean() < 12, "MP4 loses some, but not the picture"


def odd_pictures(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    gray = Image.fromarray(rng.integers(0, 255, (40, 60), dtype=np.uint8))
    gray.save(folder / "gray.png")
    sixteen = (np.asarray(gray).astype(np.uint16) << 8) + 7
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    colour = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    colour.convert("CMYK").save(folder / "cmyk.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / "turned.png", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.new("RGB", (1, 1), "red").save(folder / "one.jpg")
    return folder


def test_gray_16_bit_cmyk_turned_and_1_pixel_pictures_are_predicted(model, tmp_path):
    out = tmp_path / "out"
    assert command(odd_pictures(tmp_path / "in"), "--model", model, "--out", out) == 0
    shapes = {path.name: label(path).shape for path in (out / "labels").iterdir()}
    assert shapes == {
        **dict.fromkeys(("gray.png", "sixteen.png", "cmyk.png"), (40, 60)),
        "turned.png": (60, 40),
        "one.png.png": (1, 1),
        "one.jpg.png": (1, 1),
    }
    assert np.array_equal(label(out / "labels" / "gray.png"), label(out / "labels" / "sixteen.png"))


def test_unreadable_files_are_named_and_the_rest_is_done(model, tmp_path, capsys):
    inputs = pictures(tmp_path / "in", 3)
    (inputs / "1.png").write_bytes((inputs / "1.png").read_bytes()[:900])
    (inputs / "text.jpg").write_text("no picture")
    (inputs / "empty.mp4").touch()
    (inputs / "text.mkv").write_text("no video")
    film(inputs / "cut.mp4")
    (inputs / "cut.mp4").write_bytes((inputs / "cut.mp4").read_bytes()[:1500])
    out = tmp_path / "out"
    assert command(inputs, "--model", model, "--out", out) == 1
    said = capsys.readouterr().out
    names = ["1.png", "text.jpg", "empty.mp4", "text.mkv", "cut.mp4"]
    for name in names:
        assert str(inputs / name) in said
    assert "2 pictures" in said
    failed = json.loads((out / "summary.json").read_text())["failed"]
    assert sorted(failed) == sorted(str(inputs / name) for name in names)
    assert {path.name for path in (out / "labels").rglob("*.png")} == {"0.png", "2.png"}


def test_no_folder_is_made_for_pictures_that_cannot_be_read(model, tmp_path, capsys):
    path = tmp_path / "text.jpg"
    path.write_text("no picture")
    assert command(path, "--model", model, "--out", tmp_path / "out") == 1
    assert "nothing; 1 left out\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_told_before_the_work(model, tmp_path, capsys):
    path = tmp_path / "out"
    path.touch()
    assert command(pictures(tmp_path / "in", 1), "--model", model, "--out", path) == 2
    assert "out is a file: predictions need a folder" in capsys.readouterr().err


def test_a_video_without_frames_is_refused_by_name(model, tmp_path, capsys):
    path = tmp_path / "none.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = SIZE
        container.start_encoding()
    assert command(path, "--model", model, "--out", tmp_path / "out") == 1
    assert "none.mp4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere"),
        (["."], "nothing to predict"),
        ([".", "--stride", "600"], "leave gaps"),
        ([".", "--batch", "0"], "--batch"),
        ([".", "--scales", "1,0"], "--scales [1.0, 0.0] must hold at least one scale"),
        ([".", "--weights", "ema"], "ema.safetensors"),
        ([".", "--labels", "cityscapes19"], "tells apart"),
        ([".", "--ids", "cityscapes"], "no label map 'cityscapes'; known: train, palette"),
        ([".", "--device", "tpu"], "--device"),
        ([".", "--model", "self_train"], "Models here"),
        ([".", "--model", "."], "holds no checkpoint"),
        ([".", "--model", "latest"], "train one"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(
    model, tmp_path, capsys, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    if said != "nothing to predict":
        pictures(tmp_path, 1)
    before = [] if "--model" in words else ["--model", model]
    assert main(["predict", *map(str, before), *words, "--out", "out"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "labels").exists()


def test_its_own_output_below_the_input_is_no_input(model, tmp_path):
    inputs = pictures(tmp_path, 2)
    out = inputs / "predicted"
    for _ in range(2):
        assert command(inputs, "--model", model, "--out", out) == 0
    assert sorted(json.loads((out / "summary.json").read_text())["predicted"]) == ["0", "1"]


def test_labels_can_be_raw_ids_or_carry_the_palette(city, tmp_path):
    inputs = pictures(tmp_path / "in", 2)
    for ids in ("train", "palette", "cityscapes"):
        words = ("--model", city, "--out", tmp_path / ids, "--ids", ids)
        assert command(inputs, *words) == 0
    plain = label(tmp_path / "train" / "labels" / "0.png")
    raw = label(tmp_path / "cityscapes" / "labels" / "0.png")
    assert len(np.unique(plain)) > 1
    assert not np.array_equal(raw, plain)
    assert np.array_equal(CITY.maps["cityscapes"].apply(raw), plain)
    with Image.open(tmp_path / "palette" / "labels" / "0.png") as palette:
        assert np.array_equal(np.asarray(palette), plain)
        assert np.array_equal(np.asarray(palette.convert("RGB")), CITY.colourise(plain))


def test_colours_come_from_the_label_space_that_is_named(model, tmp_path):
    assert load(model).space.origin == "made-up colours"
    space = load(model, labels=write_labelspace(tmp_path / "space")).space
    assert {entry.name: entry.colour for entry in space.classes} == CLASSES


def test_a_picture_too_large_for_its_scores_is_predicted_in_bands(model):
    image = np.concatenate([street(number)[0] for number in range(3)])
    windows = {"window": 32, "stride": 24, "device": "cpu"}
    for flip in (False, True):
        at_once = load(model, config=PredictConfig(mode="slide", flip=flip, **windows))
        banded = load(model, config=PredictConfig(whole_px=900, flip=flip, **windows))
        left, right = at_once.predict(image), banded.predict(image)
        assert (left.labels == right.labels).mean() > (0.999 if not flip else 0.9)
        shrunk = {"short_side": 24, "device": "cpu", "flip": flip}
        left = load(model, config=PredictConfig(**shrunk)).predict(image)
        right = load(model, config=PredictConfig(whole_px=4000, **shrunk)).predict(image)
        assert left.labels.shape == image.shape[:2]
        assert (left.labels == right.labels).mean() > 0.999


def test_scales_are_averaged_and_refused_where_they_cannot_be(model, tmp_path, capsys):
    path = pictures(tmp_path / "in", 1) / "0.png"
    words = (path, "--model", model, "--out", tmp_path / "out", "--scales", "0.5,1,1.75")
    assert command(*words) == 0
    image = torch.from_numpy(read_image(path)).permute(2, 0, 1)[None]
    scores = predict(load_segmenter(model), image, scales=(0.5, 1, 1.75))
    labels = label(tmp_path / "out" / "labels" / "0.png")
    assert np.array_equal(labels, scores.argmax(1)[0].numpy())
    assert not np.array_equal(labels, plain_labels(model, path))
    shown = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    assert shown["scales"] == [0.5, 1, 1.75]
    assert "scales" not in PredictConfig().deciding(), "predictions made before are found again"
    banded = load(model, config=PredictConfig(whole_px=900, scales=(0.5,), device="cpu"))
    with pytest.raises(ValueError, match="leave --scales out, or shrink it"):
        banded.predict(path)
    with pytest.raises(SystemExit):
        command(*words[:-1], "half")
    assert "'half' are no scales; write 0.75,1,1.25" in capsys.readouterr().err


def test_a_batch_that_exceeds_the_memory_is_split(model, monkeypatch):
    predictor = load(model)
    images = [street(number)[0] for number in range(3)]
    expected = [predictor.predict(image).labels for image in images]
    batch = type(predictor)._predict_batch

    def with_little_memory(self, pictures):
        if len(pictures) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch(self, pictures)

    monkeypatch.setattr(type(predictor), "_predict_batch", with_little_memory)
    most = 1
    found = [prediction.labels for prediction in predictor.predict_many(images)]
    assert all(map(np.array_equal, found, expected))
    most = 0
    with pytest.raises(ValueError, match="--short-side"):
        predictor.predict_many(images)


def test_a_video_without_pyav_names_what_to_install(model, tmp_path, capsys, monkeypatch):
    path = film(tmp_path / "drive.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert command(path, "--model", model, "--out", tmp_path / "out") == 1
    assert "pip install av" in capsys.readouterr().out
