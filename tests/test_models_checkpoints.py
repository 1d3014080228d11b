"""Segmenters and moving averages on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.build import build_segmenter
from models.checkpoints import describe_checkpoint, load_segmenter, save_segmenter
from models.config import SegmenterConfig
from models.ema import Ema
from models.inference import predict

NAMES = ["road", "sky", "car"]
TOWER = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "embed_dim": 16}
DECODER = {
    "width": 32,
    "queries": 4,
    "layers": 1,
    "heads": 4,
    "ffn": 32,
    "pixel_layers": 1,
    "pixel_ffn": 32,
    "group_norm": 8,
}


def small_segmenter(kind="frozen", weights=None, **tuning):
    config = SegmenterConfig.model_validate(
        {
            "encoder": {"architecture": TOWER, "weights": weights},
            "decoder": DECODER,
            "tuning": {"kind": kind, **tuning},
        }
    )
    return build_segmenter(config, class_names=NAMES)


def tower_file(path, seed=5):
    """A file of tower weights, as open_clip stores them."""
    generator = torch.Generator().manual_seed(seed)
    state = small_segmenter().encoder.trunk.state_dict()
    changed = {
        f"visual.{k}": v * (1 + 0.1 * torch.rand(v.shape, generator=generator))
        if v.is_floating_point()
        else v
        for k, v in state.items()
    }
    save_file(changed, path)
    return str(path)


def train_a_little(segmenter, steps=3, ema=None):
    optimizer = torch.optim.AdamW(segmenter.parameter_groups(1e-2, 0.05))
    images = some_images()
    for step in range(1, steps + 1):
        output = segmenter(images)
        terms = [x for p in output.predictions for x in p]
        sum(t.square().mean() for t in terms).backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(segmenter, step)


def some_images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["frozen", "full", "rein"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_loaded_segmenter_predicts_the_same(tmp_path, kind, pretrained):
    weights = tower_file(tmp_path / "tower.safetensors") if pretrained else None
    segmenter = small_segmenter(kind, weights)
    train_a_little(segmenter)
    save_segmenter(tmp_path / "c", segmenter, label_space="three", step=3)
    loaded = load_segmenter(tmp_path / "c")
    assert not loaded.training
    assert loaded.class_names == tuple(NAMES)
    assert torch.equal(predict(loaded, some_images()), predict(segmenter.eval(), some_images()))


def test_only_what_is_trained_is_saved_beside_pre_trained_weights(tmp_path):
    weights = tower_file(tmp_path / "tower.safetensors")
    save_segmenter(tmp_path / "c", small_segmenter("rein", weights), label_space="x", step=0)
    saved = load_file(tmp_path / "c" / "model.safetensors")
    assert {n.partition(".")[0] for n in saved} == {"decoder", "tokens"}
    # random frozen weights are nowhere else
    save_segmenter(tmp_path / "r", small_segmenter("rein"), label_space="x", step=0)
    saved = load_file(tmp_path / "r" / "model.safetensors")
    assert {n.partition(".")[0] for n in saved} == {"decoder", "tokens", "encoder"}


def test_other_frozen_weights_are_refused(tmp_path):
    weights = tower_file(tmp_path / "tower.safetensors")
    save_segmenter(tmp_path / "c", small_segmenter("frozen", weights), label_space="x", step=0)
    tower_file(tmp_path / "tower.safetensors", seed=6)
    with pytest.raises(ValueError, match="not the one it was trained with"):
        load_segmenter(tmp_path / "c")


def test_the_same_segmenter_is_saved_in_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_segmenter(tmp_path / name, small_segmenter(), label_space="x", step=1)
    for file in ("model.safetensors", "checkpoint.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_checkpoint_says_what_it_is(tmp_path):
    segmenter = small_segmenter()
    save_segmenter(tmp_path, segmenter, label_space="three", step=7, extra={"round": 2})
    description = describe_checkpoint(tmp_path)
    assert description["class_names"] == NAMES
    assert description["label_space"] == "three"
    assert description["step"] == 7
    assert description["extra"] == {"round": 2}
    assert SegmenterConfig.model_validate(description["segmenter"]) == segmenter.config


@pytest.mark.parametrize("damage", ["drop", "add", "reshape"])
def test_a_partial_match_is_refused_with_the_names(tmp_path, damage):
    save_segmenter(tmp_path, small_segmenter(), label_space="x", step=0)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    name = "decoder.query_decoder.norm.weight"
    if damage == "drop":
        del state[name]
    elif damage == "add":
        name = "decoder.more.weight"
        state[name] = torch.zeros(1)
    else:
        state[name] = torch.zeros(5)
    save_file(state, path)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_segmenter(tmp_path)


def test_missing_parts_of_a_checkpoint_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_source"):
        load_segmenter(tmp_path)
    save_segmenter(tmp_path, small_segmenter(), label_space="x", step=0)
    with pytest.raises(FileNotFoundError, match=r"ema\.safetensors is missing"):
        load_segmenter(tmp_path, which="ema")
    path = tmp_path / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_segmenter(tmp_path)
    with pytest.raises(ValueError, match="class names"):
        save_segmenter(
            tmp_path, small_segmenter(), label_space="x", step=0, class_names=["a", "b", "c"]
        )


def test_the_average_follows_at_its_pace_and_covers_running_statistics():
    segmenter = small_segmenter("full")
    start = {n: v.clone() for n, v in segmenter.trained_state().items()}
    assert "encoder.trunk.bn1.running_mean" in start
    ema = Ema(segmenter, decay=0.75, every=2)
    train_a_little(segmenter, steps=1, ema=ema)
    assert all(torch.equal(ema.shadow[n], start[n]) for n in start)
    ema.update(segmenter, 2)
    now = segmenter.trained_state()
    name = "encoder.trunk.bn1.running_mean"
    torch.testing.assert_close(ema.shadow[name], 0.75 * start[name] + 0.25 * now[name])
    assert not torch.equal(now[name], start[name])
    assert torch.equal(ema.shadow["encoder.trunk.bn1.num_batches_tracked"], torch.tensor(1))


def test_an_average_is_saved_loaded_and_applied(tmp_path):
    segmenter = small_segmenter()
    ema = Ema(segmenter, decay=0.5)
    train_a_little(segmenter, ema=ema)
    save_segmenter(tmp_path, segmenter, label_space="x", step=3, ema=ema.state_dict())
    loaded = load_segmenter(tmp_path, which="ema")
    other = small_segmenter()
    again = Ema(other)
    again.load_state_dict(ema.state_dict())
    again.apply_to(other)
    for name, value in ema.shadow.items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(other.state_dict()[name], value)
    with pytest.raises(ValueError, match="differing names"):
        again.load_state_dict({"decoder.strange": torch.zeros(1)})


def test_a_built_in_encoder_is_found_wherever_the_package_lies(tmp_path, monkeypatch):
    encoder = {"name": "builtin:clip", "weights": "builtin:clip"}
    config = SegmenterConfig(
        encoder=encoder, decoder={"width": 32, "heads": 4, "group_norm": 8, "layers": 1}
    )
    monkeypatch.chdir(tmp_path)
    segmenter = build_segmenter(config, class_names=["road", "sky"]).eval()
    save_segmenter(
        tmp_path / "saved", segmenter, class_names=["road", "sky"], label_space="x", step=1
    )
    assert "builtin:clip" in (tmp_path / "saved" / "checkpoint.json").read_text()
    again = load_segmenter(tmp_path / "saved", device="cpu")
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert torch.equal(segmenter(images).masks_BQHW, again(images).masks_BQHW)
