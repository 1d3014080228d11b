"""Weights made elsewhere cannot run code: every loader meets a checkpoint with a trap in it.

The trap is a pickled object that, unpickled without care, makes a file.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from models.build import build_encoder
from models.config import EncoderConfig, TuningConfig
from models.imports import read_state
from models.likeness import load_scorer
from models.painter import load_painter, save_random_painter
from models.refiner import build_refiner
from models.tensors import read_tensors
from models.writer import load_writer, save_random_writer
from stages.shards import file_digest, write_json
from stages.training import Checkpoints

torch.set_num_threads(1)
VISION = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 16}


class Trap:
    """Unpickled, it makes the file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return (os.mkdir, (str(self.sprung),))


@pytest.fixture
def sprung(tmp_path) -> Path:
    return tmp_path / "sprung"


@pytest.fixture
def trapped(tmp_path, sprung):
    """Writes a checkpoint with a trap (over one of tensors), and gives it back."""

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {"weight": torch.ones(1)}, "trap": Trap(sprung)}, path)
        return path

    return write


def encoder(family, name, weights, **architecture):
    config = EncoderConfig(
        family=family, name=name, weights=str(weights), architecture=architecture or None
    )
    return build_encoder(config, TuningConfig())


def open_clip_file(trapped, folder):
    return encoder("open_clip", "tiny", trapped(folder / "tower.bin"), **VISION)


def open_clip_folder(trapped, folder):
    trapped(folder / "open_clip_pytorch_model.bin")
    return encoder("open_clip", "tiny", folder, **VISION)


def timm_file(trapped, folder):
    return encoder("timm", "resnet18", trapped(folder / "resnet.pth"))


def sam_encoder(trapped, folder):
    small = {"embed_dim": 32, "depth": 4, "num_heads": 2, "global_attn_indexes": (0,)}
    return encoder("sam", "vit_b", trapped(folder / "sam.pth"), **small)


def segformer(trapped, folder):
    from transformers import SegformerConfig

    SegformerConfig().save_pretrained(folder)
    trapped(folder / "pytorch_model.bin")
    return encoder("transformers", "mit-b0", folder)


def refiner(trapped, folder):
    return build_refiner("tiny", str(trapped(folder / "sam.pth")))


def likeness(trapped, folder):
    text = {"context_length": 77, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
    about = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
    trapped(folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": about, "preprocess_cfg": {"size": 32}})
    )
    return load_scorer(str(folder))


def without_safetensors(folder, name):
    (file,) = (folder / name).glob("*.safetensors")
    file.unlink()
    return file.parent


def painter(trapped, folder):
    save_random_painter(folder, seed=0)
    trapped(without_safetensors(folder, "unet") / "diffusion_pytorch_model.bin")
    return load_painter(str(folder), device="cpu", dtype=torch.float32, seed=0)


def writer(trapped, folder):
    save_random_writer(folder, seed=0)
    trapped(without_safetensors(folder, ".") / "pytorch_model.bin")
    return load_writer(str(folder), device="cpu", dtype=torch.float32, seed=0)


@pytest.mark.parametrize(
    "load",
    [
        *(open_clip_file, open_clip_folder, timm_file, sam_encoder, segformer),
        *(refiner, likeness, painter, writer),
    ],
)
def test_a_checkpoint_that_would_run_code_is_refused_by_name(load, trapped, sprung, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of plain") as refused:
        load(trapped, folder)
    assert not sprung.exists(), "code of the file was run"
    assert str(folder) in str(refused.value)


def test_the_trap_would_spring(trapped, sprung, tmp_path):
    torch.load(trapped(tmp_path / "trap.pth"), weights_only=False)
    assert sprung.exists()


def test_an_import_runs_nothing(trapped, sprung, tmp_path):
    with pytest.raises(ValueError, match=r"theirs\.pth cannot be read.*GLOBAL posix\.mkdir"):
        read_state(trapped(tmp_path / "theirs.pth"))
    assert not sprung.exists()


def test_a_training_state_with_a_trap_is_passed_over(trapped, sprung, tmp_path):
    states, said = Checkpoints(tmp_path / "state"), []
    states.save(1, {"weight": torch.ones(1)})
    path = trapped(states.folder / "step-00000002.pt")
    write_json(path.with_suffix(".json"), {"step": 2, "digest": file_digest(path)})
    step, _ = states.newest(said.append)
    assert (step, sprung.exists()) == (1, False)
    assert "step-00000002.pt is truncated or altered" in said[0]


@pytest.mark.parametrize("name", ["noise.safetensors", "noise.pth"])
def test_noise_is_no_checkpoint(name, tmp_path):
    (tmp_path / name).write_bytes(b"noise" * 9)
    with pytest.raises(ValueError, match=rf"refine\.weights: .*{name} cannot be read"):
        read_tensors(tmp_path / name, option="refine.weights")
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        read_state(tmp_path / name)
