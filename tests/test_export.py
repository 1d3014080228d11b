"""`clouds export`: the ONNX file, run by onnxruntime, predicts what the segmenter predicts."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from flows.cli import main
from models.checkpoints import load_segmenter
from models.onnx_export import some_images
from tests.small_models import save_checkpoint
from tests.small_segmenters import small_config
from tests.tiny import CLASSES

LIGHT = {"decoder": small_config().decoder.model_dump() | {"kind": "light"}}
TOLERANCE = {"scores": 1e-5}
"""Largest difference of float32 scores between onnxruntime and torch."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def export(model, out, *words):
    return main(["export", "--to", "onnx", "--model", str(model), "--out", str(out), *words])


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["scores"], {"images": images.numpy()})[0]


@pytest.mark.parametrize(
    ("encoder", "decoder", "batch"),
    [
        ("CLIP ResNet", {}, "any"),
        ("CLIP ConvNeXt", LIGHT, "1"),
        pytest.param("CLIP ConvNeXt", {}, "2", marks=pytest.mark.slow),
        pytest.param("CLIP ResNet", LIGHT, "any", marks=pytest.mark.slow),
    ],
)
def test_the_exported_graph_predicts_what_the_segmenter_predicts(
    tmp_path, capsys, encoder, decoder, batch
):
    model = save_checkpoint(tmp_path / "model", config=small_config(encoder, **decoder))
    out = tmp_path / "new" / "street.onnx"
    assert export(model, out, "--size", "40x72", "--batch", batch) == 0
    assert "largest difference" in capsys.readouterr().out
    images = some_images(3 if batch == "any" else int(batch), (40, 72), seed=5)
    found = run_onnx(out, images)
    segmenter = load_segmenter(model)
    with torch.no_grad():
        expected = segmenter.semantic(segmenter(images)).numpy()
    assert expected.std((2, 3)).max() > 0.01, "scores alike everywhere would prove little"
    np.testing.assert_allclose(found, expected, atol=TOLERANCE["scores"], rtol=0)
    assert np.array_equal(found.argmax(1), expected.argmax(1))
    usual = expected.mean((0, 2, 3), keepdims=True)  # untrained, one class may win everywhere
    centred = [(scores - usual).argmax(1) for scores in (found, expected)]
    assert len(np.unique(centred[1])) > 1
    assert (centred[0] == centred[1]).mean() > 0.999
    card = json.loads((tmp_path / "new" / "street.onnx.json").read_text())
    assert [entry["name"] for entry in card["classes"]] == list(CLASSES)
    assert card["mean"] == pytest.approx(segmenter.encoder.mean.flatten().tolist())
    assert card["agreement"]["difference"] <= TOLERANCE["scores"]
    metadata = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(metadata["classes"]) == card["classes"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["street.onnx", "street.onnx.json"]


def test_a_graph_that_disagrees_is_not_left_behind(tmp_path, capsys, monkeypatch):
    model = save_checkpoint(tmp_path / "model")
    out = tmp_path / "street.onnx"
    out.write_bytes(b"an earlier one")

    def write_other_scores(segmenter, path, **options):
        scores = np.zeros((1, len(CLASSES), 32, 64), np.float32)
        node = onnx.helper.make_node(
            "Constant", [], ["scores"], value=onnx.numpy_helper.from_array(scores)
        )
        images = onnx.helper.make_tensor_value_info(
            "images", onnx.TensorProto.UINT8, [1, 3, 32, 64]
        )
        given = onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, scores.shape)
        graph = onnx.helper.make_graph([node], "zeros", [images], [given])
        opset = [onnx.helper.make_opsetid("", 20)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)

    monkeypatch.setattr("stages.export.write_onnx", write_other_scores)
    assert export(model, out, "--size", "32x64") == 2
    assert "nothing was written" in capsys.readouterr().err
    assert out.read_bytes() == b"an earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "street.onnx"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "512"], "write 512x1024"),
        (["--batch", "0"], "neither a number"),
        (["--opset", "9"], "--opset"),
        (["--weights", "ema"], "ema.safetensors"),
    ],
)
def test_mistakes_of_an_export_are_explained(tmp_path, capsys, words, said):
    model = save_checkpoint(tmp_path / "model")
    try:
        code = export(model, tmp_path / "street.onnx", *words)
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "street.onnx").exists()


def test_a_folder_in_place_of_the_file_is_told_before_the_work(tmp_path, capsys):
    assert export(save_checkpoint(tmp_path / "model"), tmp_path) == 2
    assert f"{tmp_path} is a folder: name the file" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stages.export.NEEDED", ("onnx", "no_such_package"))
    model = save_checkpoint(tmp_path / "model")
    assert export(model, tmp_path / "street.onnx") == 2
    assert "pip install no_such_package" in capsys.readouterr().err
