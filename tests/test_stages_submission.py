"""Submission folders against the servers' own rules, and our numbers against cityscapesScripts."""

import glob
import json
import math
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from flows.cli import main
from models.evaluators import (
    CITYSCAPES_CATEGORIES,
    CITYSCAPES_IDS,
    category_iou,
    confusion_matrix,
    iou_scores,
)
from stages import prepare, submission
from stages.config import Recipe
from stages.labels import load_labelspace
from tests import small_datasets
from tests.small_judged import evaluated, save_checkpoint
from tests.tiny import Told, stage_config

NAMES = load_labelspace("cityscapes19").names


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def scripts():
    """The official evaluation, quiet, in pure Python, without instances."""
    module = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="needs cityscapesScripts (the dev extra)",
    )
    before = dict(vars(module.args))
    module.args.evalInstLevelScore = module.args.JSONOutput = False
    module.args.quiet, module.args.predictionPath = True, None
    module.args.predictionWalk = None
    yield module
    vars(module.args).clear()
    vars(module.args).update(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Cityscapes and ACDC, and a checkpoint with random weights."""
    root = tmp_path_factory.mktemp("submission")
    small_datasets.cityscapes(root / "city", count=3)
    small_datasets.acdc(root / "acdc", "test")
    shutil.rmtree(root / "acdc" / "gt")
    data = {"root": str(root), "targets": [{"name": "city", "root": "city"}]}
    (root / "prepared").mkdir()
    recipe = Recipe(data=data)
    prepare.run(stage_config(recipe, "prepare"), out=root / "prepared", progress=Told())
    save_checkpoint(root / "model", NAMES)
    return root


def submitted(inputs, out, server, *, told=None, split="test", **section):
    recipe = Recipe(evaluate={"batch_size": 1, **section}, run={"device": "cpu"})
    return submission.run(
        stage_config(recipe, "evaluate"),
        out=out,
        progress=told or Told(),
        model=inputs / "model",
        root=inputs / {"cityscapes": "city", "acdc": "acdc"}[server],
        server=server,
        split=split,
    )


def test_the_official_script_finds_and_scores_a_cityscapes_submission_as_we_do(
    inputs, tmp_path, scripts
):
    submitted(inputs, tmp_path / "out", "cityscapes", split="val")
    truths = sorted(glob.glob(str(inputs / "city/gtFine/val/*/*_gtFine_labelIds.png")))
    scripts.args.predictionPath = str(tmp_path / "out")
    predictions = [scripts.getPrediction(scripts.args, truth) for truth in truths]
    theirs = scripts.evaluateImgLists(predictions, truths, scripts.args)
    _, results = evaluated(inputs, tmp_path / "judged", batch_size=1, protocol="native")
    ours = results["sets"]["city"]
    assert ours["miou"] == pytest.approx(theirs["averageScoreClasses"], abs=1e-12)
    for name, value in zip(NAMES, ours["iou"], strict=True):
        expected = theirs["classScores"][name]
        assert (value is None) == math.isnan(expected), name
        assert value is None or value == pytest.approx(expected, abs=1e-12), name
    counted = np.array(theirs["confMatrix"], int)[np.ix_(CITYSCAPES_IDS, CITYSCAPES_IDS)]
    assert ours["confusion"] == counted.tolist()


@pytest.mark.parametrize("case", ["plain", "absent class predicted", "void predicted", "all void"])
def test_our_matrix_and_scores_are_cityscapesscripts(tmp_path, scripts, case):
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 19, (24, 40)).astype(np.uint8)
    guess = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 19, truth.shape))
    truth[rng.random(truth.shape) < 0.15] = 255
    if case == "absent class predicted":
        truth[truth == 16] = 13
        guess[:2, :5] = 16
    if case == "void predicted":
        guess[3:5] = 19
    if case == "all void":
        truth[:] = 255
    ids = np.array([*CITYSCAPES_IDS, 0], np.uint8)
    for name, labels in (("guess", guess), ("truth", truth)):
        Image.fromarray(ids[np.minimum(labels, 19)]).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("guess", "truth")]
    theirs = scripts.evaluateImgLists(files[:1], files[1:], scripts.args)
    predicted = torch.from_numpy(guess.astype(np.uint8))
    ours = confusion_matrix(predicted, torch.from_numpy(truth), 19)
    scores = iou_scores(ours, "cityscapes")
    expected = [theirs["classScores"][name] for name in NAMES]
    np.testing.assert_allclose(scores.class_iou_K.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(scores.miou, theirs["averageScoreClasses"], atol=1e-12)
    categories = category_iou(ours)
    expected = [theirs["categoryScores"][name] for name in CITYSCAPES_CATEGORIES]
    np.testing.assert_allclose(list(categories.values()), expected, atol=1e-12)


def test_acdc_gets_train_ids_in_its_folder_named_as_the_pictures(inputs, tmp_path):
    summary = submitted(inputs, tmp_path / "out", "acdc")
    names = [f"GOPR0{n}_frame_000{n}_rgb_anon.png" for n in range(4)]
    with zipfile.ZipFile(tmp_path / "out" / "acdc_test.zip") as packed:
        assert packed.namelist() == [f"labelTrainIds/{name}" for name in names]
        assert packed.testzip() is None
    for name in names:
        prediction = Image.open(tmp_path / "out" / "labelTrainIds" / name)
        assert (prediction.mode, prediction.size) == ("L", small_datasets.SIZE[::-1])
        assert np.asarray(prediction).max() < 19
    assert summary.numbers == {"pictures": 4}


def test_cityscapes_gets_label_ids_at_the_pictures_size(inputs, tmp_path):
    submitted(inputs, tmp_path / "out", "cityscapes", split="val", protocol="clouds_released")
    files = sorted((tmp_path / "out" / "results").iterdir())
    assert len(files) == 3
    for file in files:
        prediction = np.asarray(Image.open(file))
        assert prediction.shape == small_datasets.SIZE
        assert set(np.unique(prediction)) <= set(CITYSCAPES_IDS)


def test_a_stopped_submission_goes_on_and_ends_the_same(inputs, tmp_path):
    submitted(inputs, tmp_path / "whole", "acdc")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "acdc_test.zip").unlink()
    gone = sorted((tmp_path / "cut" / "labelTrainIds").iterdir())[1:3]
    for path in gone:
        path.unlink()
    told = Told()
    submitted(inputs, tmp_path / "cut", "acdc", told=told)
    assert (told.started, told.advanced) == ([(4, "pictures", 2)], 2)
    for path in gone:
        assert path.read_bytes() == (tmp_path / "whole" / "labelTrainIds" / path.name).read_bytes()
    assert (tmp_path / "cut" / "acdc_test.zip").is_file()


def test_two_kinds_of_predictions_never_share_a_folder(inputs, tmp_path):
    submitted(inputs, tmp_path / "out", "acdc")
    with pytest.raises(ValueError, match=r"predictions with another evaluate: give another folder"):
        submitted(inputs, tmp_path / "out", "acdc", short_side=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no submission"):
        submitted(inputs, tmp_path / "mine", "acdc")


def test_the_command_explains_mistakes(inputs, tmp_path, capsys):
    save_checkpoint(tmp_path / "three", NAMES[:3])
    options = ["--recipe", "tiny", "--out", str(tmp_path / "out"), "--set", "run.device=cpu"]
    acdc = ["submit", "acdc", "--root", str(inputs / "acdc"), *options]
    assert main([*acdc, "--model", str(tmp_path / "three")]) == 2
    assert "data.labels=cityscapes19" in capsys.readouterr().err
    assert main([*acdc, "--split", "val", "--model", str(inputs / "model")]) == 2
    assert "Splits present" in capsys.readouterr().err
    assert main([*acdc, "--model", "gone", "--artifacts", str(tmp_path)]) == 2
    assert "'gone' is neither a folder nor an artifact" in capsys.readouterr().err
    assert main([*acdc, "--model", str(inputs / "model")]) == 0
    assert "4 predictions as train ids, acdc_test.zip" in capsys.readouterr().out
    header = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert (header["server"], header["protocol"]) == ("acdc", "own settings")
