"""Training on the labelled sources, end to end, small."""

import json

import pytest
import torch
from safetensors.torch import load_file

from models.checkpoints import describe_checkpoint, load_segmenter
from models.inference import predict
from stages import train_source
from stages.training_config import EmaConfig
from tests.tiny import (
    CLASSES,
    Told,
    stage_config,
    street,
    tiny_recipe,
    write_labelspace,
    write_sources,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_sources(folder / "sources", data=folder / "data")
    write_labelspace(folder / "labelspace")
    return {"sources": folder / "sources", "labelspace": folder / "labelspace"}


def train(world, out, *, seed: int = 0, precision: str = "fp32", **section):
    recipe = tiny_recipe(train_source=section, seed=seed, precision=precision)
    told = Told()
    config = stage_config(recipe, "train_source")
    return train_source.run(config, out=out, progress=told, **world), told


def files(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and not {"logs", "state"} & set(path.parts)
    }


def test_leaves_a_checkpoint_that_rebuilds_itself(world, tmp_path):
    summary, told = train(world, tmp_path, steps=5)
    assert sorted(files(tmp_path)) == ["checkpoint.json", "ema.safetensors", "model.safetensors"]
    card = describe_checkpoint(tmp_path)
    assert (card["class_names"], card["label_space"], card["step"]) == (list(CLASSES), "tiny", 5)
    for which in ("model", "ema"):
        assert load_segmenter(tmp_path, which=which).num_classes == 4
    model, ema = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "ema"))
    assert any(not torch.equal(model[name], ema[name]) for name in model)
    assert summary.numbers["steps"] == told.advanced == 5
    assert summary.numbers["samples"] == 6
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert {"loss", "lr", "grad_norm", "loss_ce", "loss_dice", "samples_per_s"} <= rows[0].keys()
    assert rows[-1]["loss"] == summary.numbers["loss"]


def test_learns_the_streets(world, tmp_path):
    train(world, tmp_path, steps=150, batch_size=4, ema=None, log_every=1)
    rows = [json.loads(line)["loss"] for line in (tmp_path / "logs" / "metrics.jsonl").open()]
    assert sum(rows[-10:]) < 0.8 * sum(rows[:10])
    image, labels = street(3)
    segmenter = load_segmenter(tmp_path)
    scores = predict(segmenter, torch.from_numpy(image).permute(2, 0, 1)[None])
    labelled = torch.from_numpy(labels) != 255
    right = (scores.argmax(1)[0] == torch.from_numpy(labels))[labelled].float().mean()
    assert right > 0.6, f"{right:.2f} of the pixels are right"


@pytest.mark.parametrize(
    "same",
    [{}, {"checkpoint_every": 1, "log_every": 3}, {"data_workers": 1}],
    ids=["again", "checkpoints", "workers"],
)
def test_result_does_not_depend_on(world, tmp_path, same):
    train(world, tmp_path / "one")
    train(world, tmp_path / "two", **same)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"precision": "bf16"}, {"batch_size": 3}], ids=["seed", "bf16", "batch"]
)
def test_result_depends_on(world, tmp_path, other):
    train(world, tmp_path / "one")
    train(world, tmp_path / "two", **other)
    one, two = (files(tmp_path / name)["model.safetensors"] for name in ("one", "two"))
    assert one != two


def test_without_an_average_there_is_no_ema_file(world, tmp_path):
    train(world, tmp_path, ema=None)
    assert sorted(files(tmp_path)) == ["checkpoint.json", "model.safetensors"]


def test_average_that_never_moves_holds_the_first_weights(world, tmp_path):
    train(world, tmp_path / "short", steps=1, ema=EmaConfig(decay=0.9, every=100))
    train(world, tmp_path / "long", steps=4, ema=EmaConfig(decay=0.9, every=100))
    short, long = (files(tmp_path / name)["ema.safetensors"] for name in ("short", "long"))
    assert short == long


def test_rare_classes_can_be_sampled(world, tmp_path):
    summary, _ = train(world, tmp_path, rare_class_sampling=0.1)
    assert summary.numbers["loss"] > 0


def test_recipes_seed_seeds_the_decoder():
    config = tiny_recipe().segmenter
    seeded = train_source.seeded(config, 5)
    assert (seeded.decoder.seed, seeded.encoder.seed) == (5, 5)
    assert (
        seeded.model_copy(update={"decoder": config.decoder, "encoder": config.encoder}) == config
    )
