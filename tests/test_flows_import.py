"""`clouds import`: published checkpoints as the output of train_source, through the command line.

The files are written in the names of the released checkpoints, as in test_models_imports.py.
"""

import json

import pytest
import torch

from flows.cli import main
from flows.store import Store
from models.build import build_segmenter
from models.checkpoints import load_segmenter
from models.config import SegmenterConfig
from models.inference import predict
from stages.labels import load_labelspace
from tests.test_models_imports import CONFIGS, DECODER, foreign_state, some_images


@pytest.fixture
def release(tmp_path, request):
    """A recipe, a file in the authors' names, and the segmenter in it."""
    origin = getattr(request, "param", "clouds")
    tree = {"decoder": DECODER} | CONFIGS[origin]
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(json.dumps({"segmenter": tree, "data": {"labels": "cityscapes19"}}))
    names = load_labelspace("cityscapes19").names
    segmenter = build_segmenter(SegmenterConfig.model_validate(tree), class_names=names)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in segmenter.state_dict().values():
            if value.is_floating_point():
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
    state = foreign_state(segmenter, origin)
    file = tmp_path / "theirs.pth"
    torch.save({"model" if origin == "clouds" else "state_dict": state}, file)
    arguments = ["--recipe", str(recipe), "--artifacts", str(tmp_path / "artifacts")]
    return file, arguments, segmenter.eval(), state


def pinned(tmp_path, name="train_source"):
    store = Store(tmp_path / "artifacts")
    return store.folder(name, store.pins()[name])


@pytest.mark.parametrize("release", CONFIGS, indirect=True)
def test_a_published_checkpoint_becomes_the_source_model(release, capsys, tmp_path):
    file, arguments, segmenter, _ = release
    assert main(["import", str(file), *arguments]) == 0
    said = capsys.readouterr().out
    assert "matched" in said
    assert "missing     0" in said
    folder = pinned(tmp_path)
    ours = load_segmenter(folder)
    assert torch.equal(predict(ours, some_images()), predict(segmenter, some_images()))
    account = json.loads((folder / "import.json").read_text())
    assert account["file"] == "theirs.pth"
    assert len(account["matched"]) > 60
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["origin"] == str(file)
    main(["plan", *arguments])
    plan = capsys.readouterr().out
    assert f"adopted from {file}" in plan
    assert main(["adopt", "train_source", "--undo", *arguments]) == 0
    assert Store(tmp_path / "artifacts").pins() == {}


def test_a_checkpoint_can_become_the_student_of_a_round(release, capsys, tmp_path):
    file, arguments, _, _ = release
    assert main(["import", str(file), *arguments, "--stage", "self_train", "--round", "1"]) == 0
    folder = pinned(tmp_path, "self_train@1")
    assert json.loads((folder / "checkpoint.json").read_text())["step"] == 80_000
    undone = capsys.readouterr().out.partition("Undo with: python flows/clouds.py ")[2].split()
    assert undone[:5] == ["adopt", "self_train", "--round", "1", "--undo"]
    assert main(undone) == 0
    assert Store(tmp_path / "artifacts").pins() == {}


@pytest.mark.parametrize("damage", ["drop", "add", "reshape"])
def test_a_partial_match_is_refused_with_every_name(release, capsys, tmp_path, damage):
    file, arguments, _, state = release
    names = [name for name in state if "predictor.transformer" in name][:12]
    for name in names:
        if damage == "add":
            state[name.replace("predictor.transformer", "predictor.tranceformer")] = state[name]
        else:
            value = state.pop(name)
            if damage == "reshape":
                state[name] = torch.cat([value, value])
    torch.save({"model": state}, file)
    assert main(["import", str(file), *arguments]) == 2
    said = capsys.readouterr()
    kind = {"drop": "missing", "add": "unknown", "reshape": "misshapen"}[damage]
    assert f"{kind:<11} 12" in said.out
    listed = [line for line in said.out.splitlines() if line.startswith("    ")]
    assert len(listed) == 12, "all names, not the first few"
    assert "cannot import" in said.err
    assert Store(tmp_path / "artifacts").pins() == {}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--stage", "refine"], "leaves no checkpoint"),
        (["--stage", "trainsource"], "did you mean 'train_source'"),
        (["--set", "segmenter.decoder.width=64"], "misshapen"),
        (["--set", "data.labels=miniature"], "misshapen"),
    ],
)
def test_mistakes_of_an_import_are_named(release, capsys, tmp_path, more, said):
    file, arguments, _, _ = release
    assert main(["import", str(file), *arguments, *more]) == 2
    assert said in capsys.readouterr().err
    assert Store(tmp_path / "artifacts").pins() == {}


def test_another_networks_recipe_is_refused_before_weights_are_fetched(
    release, capsys, monkeypatch
):
    file, arguments, _, _ = release
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    released = ["--recipe", "clouds_convnext_l_gta5_released", *arguments[2:]]
    assert main(["import", str(file), *released]) == 2
    said = capsys.readouterr()
    assert "does not fit the segmenter" in said.err
    assert "misshapen" in said.out


def test_a_file_that_is_not_there_or_no_checkpoint_is_named(release, capsys, tmp_path):
    file, arguments, _, _ = release
    assert main(["import", str(tmp_path / "nothing.pth"), *arguments]) == 2
    assert "nothing.pth" in capsys.readouterr().err
    file.write_bytes(b"noise")
    assert main(["import", str(file), *arguments]) == 2
    assert "plain tensors" in capsys.readouterr().err
