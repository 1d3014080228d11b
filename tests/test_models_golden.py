"""The golden sets beside the checkout, and that a wrong number is noticed."""

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import golden

FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
needs_sets = pytest.mark.skipif(not FOLDER.is_dir(), reason="no golden sets beside the checkout")


@needs_sets
@pytest.mark.parametrize("name", golden.CHECKS)
def test_the_code_gives_the_golden_numbers(name):
    verdict = golden.check(FOLDER / f"{name}.safetensors")
    assert verdict.passed, str(verdict)


@needs_sets
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rein", "out/lora/queries"),
        ("evaluation", "out/void/detectron2/miou"),
        ("sam_refine", "out/refined_0_map"),
        ("inference", "out/slide_logits"),
        ("clouds_losses", "out/grad_aux_1_masks"),
    ],
)
def test_one_wrong_number_fails_a_set(tmp_path, name, key):
    source = FOLDER / f"{name}.safetensors"
    tensors = load_file(source)
    flat = tensors[key].view(-1)
    flat[0] = flat[0] + (1 if not flat.is_floating_point() else 0.001 * flat.abs().max() + 1e-6)
    with safe_open(source, "pt") as file:
        save_file(tensors, tmp_path / source.name, metadata=file.metadata())
    assert not golden.check(tmp_path / source.name).passed
    assert golden.main([str(tmp_path)]) == 1


def test_unknown_and_missing_sets_fail(tmp_path, capsys):
    assert golden.main([str(tmp_path)]) == 1
    assert "no *.safetensors" in capsys.readouterr().err
    (tmp_path / "novelty.safetensors").write_bytes(b"")
    assert golden.main([str(tmp_path)]) == 1
    assert "unknown set" in capsys.readouterr().out


@needs_sets
def test_a_folder_with_one_known_set_passes(tmp_path, capsys):
    shutil.copy(FOLDER / "denseclip_score.safetensors", tmp_path)
    assert golden.main([str(tmp_path)]) == 0
    assert "1 of 1 sets pass" in capsys.readouterr().out
